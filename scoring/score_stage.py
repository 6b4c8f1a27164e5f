"""Scoring one stage: raw scores of its validation fold and test set, calibration, report, probabilities, submission."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetWriter, read_metadata

from common.battle import VERDICTS
from common.console import duration
from common.errors import ArenaError
from common.files import atomic_file, only_run, read_json, write_json
from common.progress import Show
from common.stages import STAGES, UNTRAINED
from data_prep.export_reader import (
    Split,
    read_audit,
    read_battles,
    read_rows,
    readable,
    require_intact,
    test_lines,
    truth_of,
)
from factory.stage_context import StageContext
from factory.state import archive
from factory.trainer_log import loss_curve
from scoring.calibration import Calibration
from scoring.checks.merge_check import check_merge
from scoring.checks.provenance import provenance
from scoring.checks.run_checks import require_sound, run_checks, stopping
from scoring.executor import Executor, InProcess, RayActors, Workers, default_workers
from scoring.judge import MANIFEST, make_base_judge
from scoring.model_card import write_cards
from scoring.predictions import REPORT, Answers, read_probabilities, write_probabilities
from scoring.probe import PROBE
from scoring.report.build import build_report
from scoring.report.page import shown_battles, write_page
from scoring.runner import ONE_ORDER, Job, Pace, open_job, parse_duration
from scoring.scorer import Scorer, ScorerSpec, own_precision

_FLAG = ("level", "text")
_LABELS = {"valid": "scoring the validation fold", "test": "scoring the test set"}


@dataclass(frozen=True)
class ScoreOptions:
    """How to score: engine, precision (None: the experiment's), workers, the address of a Ray cluster ("local": here).

    `time_limit` is in seconds from `started` (time.monotonic); `fresh` uses nothing that was scored before, and puts an
    earlier report aside.
    """

    engine: str = "torch"
    precision: str | None = None
    workers: int | None = None
    ray: str | None = None
    time_limit: float | None = None
    fresh: bool = False
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, *, time_limit: str | None = None, **options: Any) -> ScoreOptions:
        """Return the options of a command line, where a time limit is text such as 1h30m; raises UsageError."""
        return cls(time_limit=parse_duration(time_limit) if time_limit else None, **options)

    def spec(self, context: StageContext) -> ScorerSpec:
        """Return which scorer is asked."""
        precision = self.precision or own_precision(context.experiment, context.name)
        return ScorerSpec(context, self.engine, precision)

    def open(self, spec: ScorerSpec, scorer: Scorer, show: Show) -> Executor:
        """Load the model as often as asked: into `scorer` where one is enough."""
        show.note(f"{spec.context.label}: loading the model")
        if self.ray is not None:
            return RayActors(spec, show.note, address=self.ray, actors=self.workers)
        count = self.workers or default_workers(spec.engine)
        # llama.cpp ends its process where a file's numbers make no sense.
        apart = count > 1 or spec.engine == "llama.cpp"
        return Workers(spec, show.note, count) if apart else InProcess(scorer, show.note)


def score_stage(context: StageContext, *, show: Show, options: ScoreOptions | None = None) -> dict[str, Any]:
    """Score the validation fold and the test set of one stage and write its report; return the report.

    Label logits of the validation fold are taken in both orders, for the position bias; those of the test set only
    with `swap_tta` or, as far as it goes, a time limit. Raises ArenaError if the model, the export or the scores are
    not what they should be.
    """
    options, folder, stage = options or ScoreOptions(), context.folder, context.label
    if context.name == "base":
        make_base_judge(context)
    spec = options.spec(context)
    scorer = spec.scorer()
    names = [Path(path).name for path in context.scoring_inputs["data"]]
    require_intact(context.experiment.data_folder, names, context.manifest["files"])
    context.require_current_settings()
    context.require_current_training()
    scorer.require_own_export()
    compared = check_merge(context, show=show)
    asked = {"engine": spec.engine, "precision": spec.precision}
    inputs = {"model": scorer.inputs(), **context.scoring_inputs, **asked}
    with only_run(folder):
        standing = context.state.standing("score", inputs)
        if standing.is_finished and not options.fresh and _answered(context):
            if standing.only_prior_changed and not standing.record.damaged:
                show.note(f"{stage}: target_prior changed: a new report of the scores of {standing.record.finished_at}")
                report = _report_again(context, inputs, standing.record.seconds, compared)
                require_sound(report.get("checks", []), folder / REPORT)
                return report
            standing.require_same_inputs("score", folder, context.score_again)
            show.note(f"{stage}: scores kept, finished {standing.record.finished_at}")
            if not context.scores("valid"):
                return {}
            report = read_report(context, remedy=context.score_again)
            require_sound(report.get("checks", []), folder / REPORT)
            return report
        started = time.monotonic()
        with closing(options.open(spec, scorer, show)) as executor:
            # Only now: a model that cannot be loaded leaves the earlier result as it is.
            for old in archive(folder / REPORT) if options.fresh else ():
                show.note(f"{stage}: the earlier report is now {old}")
            context.state.begin("score", inputs)
            jobs, scoring = _score_splits(context, scorer, executor, inputs["model"], options, show)
        scoring["seconds"] = seconds = round(time.monotonic() - started, 2)
        report, outputs = (
            _write(context, jobs, scoring, compared) if context.scores("valid") else _answers(context, jobs)
        )
        context.state.finish("score", outputs, time.monotonic() - started)
        for job in jobs.values():
            job.remove()
    require_sound(report.get("checks", []), folder / REPORT)
    rows = f"{jobs['valid'].rows} validation and {jobs['test'].rows} test battles"
    show.note(f"{stage}: scored {rows} in {duration(seconds)}")
    return report


def _answered(context: StageContext) -> bool:
    """Tell whether the test set was scored, where it is asked for: another fold_answer asks other judges."""
    path = context.folder / "scores_test.parquet"
    if context.fold is None or not context.scores("test") or not path.is_file():
        return True
    with readable(path):
        return read_metadata(path).num_rows == read_audit(context.experiment.data_folder)["exported"]["test"]


def read_report(context: StageContext, *, remedy: str | None = None) -> dict[str, Any]:
    """Return a stage's report.json; raises ArenaError if the stage was not scored or the file is damaged."""
    path = context.reported.folder / REPORT
    try:
        report = read_json(path)
        flags, others = report.get("flags", []), report.get("calibrations") or {}
        if not isinstance(report["calibration"], dict) or not all(isinstance(f[k], str) for f in flags for k in _FLAG):
            raise TypeError
        counts = report.get("train_class_counts") or dict.fromkeys(VERDICTS, 0)
        if not isinstance(others, dict) or not all(0 <= counts[name] < math.inf for name in VERDICTS):
            raise ValueError
        Calibration.from_json(report)
        return report
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        what, again = "there is no readable report of this stage", remedy or context.command
        raise ArenaError(what, where=str(path), remedy=again) from None


def texts(data: Path, split: Split) -> pd.DataFrame:
    """Return the frame that the baselines learn from (see scoring.baselines), with each row's prompt group: rows of the
    first source (and the test set) alone, so that they stay what they are when a source is added.

    The answers are as they were fitted to the judge prompt, lengths and turns as in the vote.
    """
    rows = [
        (battle.id, battle.verdict, "\n".join(battle.responses_a), "\n".join(battle.responses_b))
        for battle, _ in read_battles(data, split)
    ]
    fitted = pd.DataFrame(rows, columns=["id", "verdict", "text_a", "text_b"])
    with readable(data / "rows.parquet"):
        facts = read_rows(data, split)
        fitted = fitted.join(facts[["split", "group", "chars_prompt", "chars_a", "chars_b", "turns"]])
        return fitted[facts["source"].isin(["train", "test"]).to_numpy()].reset_index(drop=True)


def audit_for(data: Path, stage: str) -> dict[str, Any]:
    """Return the export's audit with the truncation of what this stage reads, the judge prompt or the pair."""
    audit = read_audit(data)
    if STAGES[stage].data != "dpo_reward":
        return audit
    with readable(data / "audit.json"):
        return {**audit, "truncation": audit["pairs"]["reward"]["truncation"]}


def _score_splits(
    context: StageContext,
    scorer: Scorer,
    executor: Executor,
    model: dict[str, Any],
    options: ScoreOptions,
    show: Show,
) -> tuple[dict[str, Job], dict[str, Any]]:
    """Score both splits; return their jobs, and what the report says of how they were scored."""
    jobs = {
        split: open_job(
            context.folder / "scoring",
            split,
            scorer,
            executor,
            inputs={"data": context.scoring_inputs["data"], "model": model},
            rows=lambda split=split: scorer.exported(split) if context.scores(split) else iter(()),
            label=f"{context.label}: {label}",
            show=show,
            fresh=options.fresh,
        )
        for split, label in _LABELS.items()
    }
    valid, test = jobs.values()
    pace = Pace(valid.tokens + test.tokens, options.time_limit, started=options.started)
    for job in jobs.values():
        job.score(executor, pace)
    both, test_too = {"valid": 0, "test": 0}, context.experiment.swap_tta or options.time_limit is not None
    # Rewards have no order; the test set's other one has no calibration without the fold's.
    for split in ("valid", *(("test",) if test_too else ())) if scorer.label_ids else ():
        if not pace.allows(jobs[split].tokens):
            show.note(f"{context.label}: {ONE_ORDER}")
            break
        jobs[split].score(executor, pace, swapped=True)
        both[split] = jobs[split].rows
    scoring = {"engine": executor.engine, "precision": executor.precision, "device": executor.device}
    limit = {} if options.time_limit is None else {"time_limit_seconds": options.time_limit}
    return jobs, {**scoring, "rows_in_both_orders": both, **limit}


def _report_again(
    context: StageContext, inputs: dict[str, Any], seconds: float, compared: dict[str, Any] | None
) -> dict[str, Any]:
    """Write another report of the scores that are there, which took `seconds`; return it."""
    report, outputs = {}, [context.folder / "scores_test.parquet"]
    earlier = read_report(context, remedy=context.score_again) if context.scores("valid") else None
    context.state.begin("score", inputs)
    if earlier:
        with readable(outputs[0], context.score_again):
            test = scored_rows(pd.read_parquet(outputs[0]))
        scoring = {**earlier["scoring"], "seconds": earlier["provenance"]["scoring_seconds"]}
        report, outputs = _conclude(context, test, scoring, compared)
    context.state.finish("score", outputs, seconds)
    return report


def scored_rows(table: pd.DataFrame) -> SimpleNamespace:
    """Return a table of raw scores as what a finished `Job` is to its readers."""
    return SimpleNamespace(rows=len(table), ids=lambda: table["id"], tables=lambda: [table])


def _write(
    context: StageContext, jobs: dict[str, Job], scoring: dict[str, Any], compared: dict[str, Any] | None
) -> tuple[dict[str, Any], list[Path]]:
    """Write the raw scores, then what is made of them; return the report and the files."""
    for split, job in jobs.items():
        _write_scores(context.folder / f"scores_{split}.parquet", job)
    return _conclude(context, jobs["test"], scoring, compared)


def _conclude(
    context: StageContext, test: Any, scoring: dict[str, Any], compared: dict[str, Any] | None
) -> tuple[dict[str, Any], list[Path]]:
    """Write everything that a person or a program reads, report.json the last; return the report and all files."""
    folder = context.folder
    with readable(folder / "scores_valid.parquet", "score the stage again"):
        valid = pd.read_parquet(folder / "scores_valid.parquet")
    report, probabilities, calibration = _report(context, valid, test, scoring, compared)
    outputs = write_result(context, report, valid["id"], probabilities, calibration, test)
    return report, [*(folder / f"scores_{split}.parquet" for split in _LABELS), *outputs]


def _answers(context: StageContext, jobs: dict[str, Job]) -> tuple[dict[str, Any], list[Path]]:
    """Write what a judge that trained on every vote says of the test set: its folds' calibration judges it."""
    path = context.folder / "scores_test.parquet"
    _write_scores(path, jobs["test"])
    return {}, [path]


def write_result(
    context: StageContext, report: dict[str, Any], ids: Any, probabilities: Any, calibration: Calibration, test: Any
) -> list[Path]:
    """Write the tables of probabilities, the page and, last, report.json; return them. `test`: a Job, or what is one.

    `ids` and `probabilities` [rows, 3] are of the rows that were judged.
    """
    folder, names = context.folder, []
    write_probabilities(folder / "probabilities_valid.csv", ids, probabilities)
    (folder / "submission.csv").unlink(missing_ok=True)
    tables = ["probabilities_test.csv", *([] if stopping(report["checks"]) else ["submission.csv"])]
    is_wsdm, unread = test_lines(context.experiment.data_folder)
    answers = Answers.of(test, calibration, unread, report)
    for name in tables if test.rows else ():
        answers.write(folder / name, winner=is_wsdm and name == "submission.csv")
        names.append(name)
    battles = shown_battles(context.experiment.data_folder, context.parts("valid"), report, context.name)
    write_page(report, folder / "report.html", battles)
    write_cards(context, report)
    write_json(folder / REPORT, report)
    return [folder / name for name in (*names, "probabilities_valid.csv", "report.html", REPORT)]


def _report(
    context: StageContext, valid: pd.DataFrame, test: Any, scoring: dict[str, Any], compared: dict[str, Any] | None
) -> tuple[dict[str, Any], Any, Calibration]:
    """Return the report, the validation rows' probabilities and the calibration."""
    curve, seconds = loss_curve(context.adapter / "trainer_log.jsonl"), scoring.pop("seconds")
    checks = run_checks(context, scores=valid, test_ids=list(test.ids()), loss_curve=curve, compared=compared)
    about = {
        "merge_gate": compared and compared["merge_gate"],
        "checks": [asdict(check) for check in checks],
        "loss_curve": curve,
        "checkpoint": context.choice or None,
        "provenance": {**_provenance(context), "scoring_seconds": seconds},
        "scoring": scoring,
    }
    return report_on(context, about, valid, both=bool(scoring["rows_in_both_orders"]["valid"]), test_rows=test.rows)


def report_on(
    context: StageContext, about: Mapping[str, Any], scores: pd.DataFrame, *, both: bool, test_rows: int
) -> tuple[dict[str, Any], Any, Calibration]:
    """Return what `build_report` does of a stage's scores; `both`: all were scored in both orders."""
    experiment, data = context.experiment, context.experiment.data_folder
    valid = texts(data, context.parts("valid"))
    return build_report(
        about={"experiment": experiment.name, "stage": context.name, **about},
        scores=scores,
        train_rows=valid if context.of_folds else texts(data, context.parts("train")),
        valid_texts=valid,
        truth=truth_of(data),
        truncation=audit_for(data, context.name)["truncation"],
        swap_tta=experiment.swap_tta and both,
        seed=experiment.seed,
        target_prior=context.scoring_inputs["target_prior"],
        test_rows=test_rows,
        untrained=untrained(context, scores["id"].tolist()),
    )


def untrained(context: StageContext, ids: list[str]) -> dict[str, np.ndarray]:
    """Return what the stages without training say of these rows, [rows, 3], where they were scored on this export."""
    others = [context.other(name) for name in UNTRAINED if name != context.name and context.fold is None]
    scored = [each for each in others if (each.folder / REPORT).is_file()]
    current = [each for each in scored if not (each.earlier_scores() or each.outdated_files())]
    return {each.name: read_probabilities(each.folder / "probabilities_valid.csv", ids) for each in current}


def write_frame(path: Path, scores: pd.DataFrame) -> None:
    """Write raw scores as parquet, whole or not at all."""
    with atomic_file(path, "wb") as file:
        scores.to_parquet(file, compression="zstd", index=False)


def _write_scores(path: Path, job: Job) -> None:
    """Write a job's raw scores as parquet, piece by piece, whole or not at all."""
    schema = job.schema()
    with atomic_file(path, "wb") as file, ParquetWriter(file, schema, compression="zstd") as writer:
        for table in job.tables():
            writer.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False))


def _provenance(context: StageContext) -> dict[str, Any]:
    data, step = context.experiment.data_folder, context.step
    files = [
        context.experiment.folder / "experiment.yaml",
        context.recipe_path,
        context.merge_recipe_path,
        *(data / name for name in ("rows.parquet", "battles.parquet", "truth.csv", "judge_prompt.j2")),
        *(data / f"{step.data}_{part}.jsonl" for part in context.experiment.labelled_parts),
        *((data / "pairs.parquet",) if step.data == "dpo_reward" else ()),
        context.folder / PROBE,
        context.merged / MANIFEST,
        *sorted(context.weights.glob("*.safetensors")),
        *sorted(context.merged.glob("*.safetensors")),
    ]
    return provenance(seed=context.experiment.seed, files=files)


def provenance_of(context: StageContext, folds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the provenance of a result that was made from those of its folds."""
    own = provenance(seed=context.experiment.seed, files=[each.folder / REPORT for each in context.judging])
    sums = {name: digest for each in folds for name, digest in each["sha256"].items()}
    seconds = round(sum(each["scoring_seconds"] for each in folds), 2)
    return {**own, "sha256": {**sums, **own["sha256"]}, "scoring_seconds": seconds}
