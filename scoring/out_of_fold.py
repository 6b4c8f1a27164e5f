"""The result of a stage with folds: its report on every battle that was voted on, and one answer to the test set.

Each training battle has the scores of the one judge that did not see its prompt; one calibration is fitted on all of
them. The test set is answered by `full`, or by the mean of the folds' scores. Their mean is taken before the link: a
link is linear in the scores, so that this is the renormalised geometric mean of the folds' calibrated probabilities, as
sure of itself as one judge is. The arithmetic mean of calibrated probabilities is less sure than it should be (Ranjan
and Gneiting, JRSS B 2010), and the calibration was fitted on scores of single judges.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pandas as pd

from common.errors import ArenaError
from common.files import only_run
from common.progress import Show
from data_prep.export_reader import read_rows, readable
from factory.stage_context import StageContext
from scoring.calibration import AB_COLUMNS, BA_COLUMNS, REWARD_COLUMNS
from scoring.checks.run_checks import require_sound, submission_ids
from scoring.predictions import REPORT
from scoring.score_stage import provenance_of, read_report, report_on, scored_rows, write_frame, write_result

_AGAIN = "score the folds again with --fresh"


def out_of_fold_report(context: StageContext, *, show: Show) -> dict[str, Any] | None:
    """Write the result of all folds of a stage and return its report; None, with a note, while a fold is not scored.

    A result of the same scores is kept. Raises ArenaError where a fold was made from other rows or settings.
    """
    members = context.scored_one_by_one
    if missing := [each for each in members if not each.glance("score").is_finished]:
        show.note(f"{context.name}: the report of all folds waits for {missing[0].label}: {missing[0].command}")
        return None
    for each in members:
        each.glance("score").require_same_inputs("score", each.folder, f"train it again: {each.command} --fresh")
        each.require_current_training()
    with only_run(context.folder):
        inputs = context.scoring_inputs
        standing = context.state.standing("score", inputs)
        if standing.is_finished and not standing.changes and not standing.record.damaged:
            show.note(f"{context.name}: the report of all folds is kept, finished {standing.record.finished_at}")
            report = read_report(context)
        else:
            started = time.monotonic()
            context.state.begin("score", inputs)
            report, outputs = _write(context)
            context.state.finish("score", outputs, time.monotonic() - started)
    require_sound(report["checks"], context.folder / REPORT)
    return report


def mean_scores(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the tables of several judges' scores of the same rows as one; NaN where one of them has no score."""
    first = tables[0]
    if any(list(table["id"]) != list(first["id"]) for table in tables):
        raise ArenaError("the folds' scores are of different rows", where="scores", remedy=_AGAIN)
    names = [name for name in (*AB_COLUMNS, *BA_COLUMNS, *REWARD_COLUMNS) if name in first]
    found = first.copy()
    found[names] = np.mean([table[names].to_numpy(float) for table in tables], axis=0)
    return found


class MeanOfJobs:
    """Several judges' jobs on the same rows, read as one."""

    def __init__(self, jobs: Sequence[Any]):
        self._jobs, self.ids, self.rows = jobs, jobs[0].ids, jobs[0].rows
        self.inputs, self.unread = jobs[0].inputs, jobs[0].unread

    def tables(self) -> Iterator[pd.DataFrame]:
        """Yield the mean scores of some thousand rows at a time."""
        for tables in zip(*(job.tables() for job in self._jobs), strict=True):
            yield mean_scores(tables)


def _write(context: StageContext) -> tuple[dict[str, Any], list]:
    folder, data = context.folder, context.experiment.data_folder
    with readable(data / "rows.parquet"):
        ids = read_rows(data, context.parts("valid"))["id"]
    scores = pd.concat([_scores(each, "valid") for each in context.judging]).set_index("id")
    if sorted(scores.index) != sorted(ids):
        raise ArenaError("the folds' scores are not of the exported rows", where=str(folder), remedy=_AGAIN)
    scores = scores.loc[ids].reset_index()
    test = mean_scores([_scores(each, "test") for each in context.answering])
    reports = [read_report(each) for each in context.judging]
    both = [report["scoring"]["rows_in_both_orders"]["valid"] for report in reports]
    checks = [*_merged_checks(reports), asdict(submission_ids(data, list(test["id"])))]
    gates = [report["merge_gate"] for report in reports if report["merge_gate"]]
    about = {
        "set": "out-of-fold",
        "folds": [{key: report[key] for key in ("rows", "log_loss", "log_loss_ci95")} for report in reports],
        "checkpoint": _chosen(context.judging),
        "merge_gate": max(gates, key=lambda gate: gate["max_abs_diff"], default=None),
        "checks": checks,
        "loss_curve": [],  # each fold's report has its own
        "provenance": provenance_of(context, [report["provenance"] for report in reports]),
        "scoring": {
            **reports[0]["scoring"],
            "rows_in_both_orders": {"valid": sum(both), "test": 0},
            "answer": f"fold_answer: {context.experiment.fold_answer}",
        },
    }
    # How many of the test rows were scored in both orders is each judge's own matter.
    report, probabilities, calibration = report_on(context, about, scores, both=all(both), test_rows=0)
    for name, frame in {"valid": scores, "test": test}.items():
        write_frame(folder / f"scores_{name}.parquet", frame)
    outputs = write_result(context, report, scores["id"], probabilities, calibration, scored_rows(test))
    return report, [*(folder / f"scores_{name}.parquet" for name in ("valid", "test")), *outputs]


def _chosen(judging: Iterable[StageContext]) -> dict[str, Any] | None:
    """Return what choosing checkpoints by log loss did to all folds in which one was; None where none was."""
    chosen = {each.label.split()[-1]: each.choice for each in judging if "curve" in each.choice}
    if not chosen:
        return None
    rows = [its["rows"] for its in chosen.values()]
    losses = {
        key: float(np.average([its[key] for its in chosen.values()], weights=rows))
        for key in ("log_loss", "cross_fitted")
    }
    names = ", ".join(f"{fold} {its['chosen'] or 'the last'}" for fold, its in chosen.items())
    return {"chosen": names, "rows": sum(rows), **losses, "curve": []}  # each fold's report has its own


def _scores(context: StageContext, split: str) -> pd.DataFrame:
    path = context.folder / f"scores_{split}.parquet"
    with readable(path, _AGAIN):
        return pd.read_parquet(path)


def _merged_checks(reports: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each check of the folds once: failed where it failed in any, with what the first such fold says."""
    found: dict[str, dict[str, Any]] = {}
    for number, report in enumerate(reports):
        for check in report["checks"]:
            known = found.get(check["name"])
            if known is None or (check["passed"] is False and known["passed"] is not False):
                found[check["name"]] = {**check, "detail": f"fold {number}: {check['detail']}"}
    return [check for name, check in found.items() if name != "submission ids = test ids"]
