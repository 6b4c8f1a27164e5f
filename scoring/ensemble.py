"""An ensemble: scored stages of any experiments, and simple baselines, blended on the battles that all of them judged.

ensemble(["demo:sft", "demo:rm", "demo:tfidf"], "both")   ->   outputs/both/ensemble/{report.json, submission.csv, …}

The blend is that of `compare`, with the same numbers; its weights are fitted on the members' probabilities of held-out
battles (out-of-fold where there are folds), each cross-fitted by prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.errors import ArenaError, UsageError
from common.experiment import Experiment, check_name, load_experiment
from common.files import only_run, write_json
from common.stages import STAGES
from data_prep.export_reader import readable, test_lines
from factory.stage_context import StageContext
from factory.state import StageState
from scoring.baselines import baseline_probabilities
from scoring.calibration import Calibration, blend, pool
from scoring.checks.provenance import provenance
from scoring.compare import (
    BLEND,
    common_rows,
    compare,
    judged_rows,
    red_flags,
    references,
    stage_probabilities,
)
from scoring.links import correct_prior
from scoring.metrics import as_groups, verdict_codes
from scoring.predictions import REPORT, Answers, check_submission, write_probabilities
from scoring.report.page import write_compare_page
from scoring.score_stage import read_report, texts

_BASELINES = ("length", "tfidf")
_COLUMNS = ["a", "b", "tie"]


@dataclass(frozen=True)
class Member:
    """What one member says: probabilities by id, of held-out battles and of the test set; `files` it was read from."""

    name: str
    experiment: Experiment
    held_out: pd.DataFrame
    test: pd.DataFrame
    files: list[Path]
    flags: list[str]


def ensemble(names: Sequence[str], name: str, weights: str = "fitted") -> dict[str, Any]:
    """Blend members, each EXPERIMENT:STAGE, write outputs/NAME/ensemble and return its report.

    `weights`: fitted; mean; or one for each member, which sum to 1. Raises ArenaError where members judged no battle in
    common or contradict each other, UsageError for malformed names and weights.
    """
    check_name(name)
    given = _weights(weights, names)
    members = [_member(each) for each in names]
    _require_alike(members)
    rows, left_out = common_rows({each.name: judged_rows(each.experiment) for each in members})
    first, ids = members[0].experiment, rows["id"].tolist()
    held_out = {each.name: each.held_out.loc[ids].to_numpy() for each in members}
    codes, groups = verdict_codes(rows["verdict"]), as_groups(rows["group"])
    judged, about = blend(held_out, codes, groups, first.seed, given)
    if judged is None:
        raise ArenaError(about["reason"], where=name, remedy="--weights mean needs no fit")
    compared = compare(
        rows,
        held_out,
        first.seed,
        **references(first, ids),
        blended=(judged, about),
    )
    own = next(row for row in compared["table"] if row["name"] == BLEND)
    files = list(dict.fromkeys(path for each in members for path in each.files))
    report = {
        **compared,
        **{key: value for key, value in own.items() if key != "name"},
        "experiment": name,
        "stage": "ensemble",
        "left_out": left_out,
        "flags": {each.name: each.flags for each in members},
        "checks": [],
        "provenance": provenance(seed=first.seed, files=files),
    }
    _write(members, report, ids, judged)
    return report


def _write(members: list[Member], report: dict[str, Any], ids: list[str], judged: np.ndarray) -> None:
    folder, started = Path("outputs") / report["experiment"] / "ensemble", time.monotonic()
    weights, test = report["blend"]["weights"], members[0].test.index.tolist()
    answers = pool([each.test.loc[test].to_numpy() for each in members], np.array([*weights.values()]))
    shares, first = dict(zip(_COLUMNS, judged.mean(axis=0), strict=True)), members[0].experiment
    if prior := first.target_prior:
        answers, shares = correct_prior(answers, shares, prior.model_dump()), prior.model_dump()
    is_wsdm, unread = test_lines(first.data_folder)
    submission = Answers(lambda: [(list(test), answers, 0)], unread, np.array([shares[name] for name in _COLUMNS]))
    with only_run(folder):
        state = StageState(folder)
        state.begin("score", {"members": weights, "files": report["provenance"]["sha256"]})
        tables = ["probabilities_valid.csv", *(["probabilities_test.csv", "submission.csv"] if test else [])]
        write_probabilities(folder / tables[0], ids, judged)
        check_submission(folder / tables[0], ids)
        for name in tables[1:]:
            submission.write(folder / name, winner=is_wsdm and name == "submission.csv")
        write_compare_page(report, folder / "report.html")
        write_json(folder / REPORT, report)
        outputs = [folder / name for name in (*tables, "report.html", REPORT)]
        state.finish("score", outputs, time.monotonic() - started)


def _member(name: str) -> Member:
    """Read one member; raises UsageError for a malformed name, ArenaError where its stage is not scored."""
    of, _, stage = name.partition(":")
    if stage not in (*STAGES, *_BASELINES):
        what = f"{name!r} is no member"
        remedy = f"write EXPERIMENT:STAGE, the stage one of {', '.join((*STAGES, *_BASELINES))}"
        raise UsageError(what, where="-e", remedy=remedy)
    experiment = load_experiment(of)
    data = experiment.data_folder
    if stage in _BASELINES:
        train = texts(data, experiment.parts("train"))
        frames = [texts(data, experiment.parts(split)) for split in ("valid", "test")]
        found = [baseline_probabilities(train, each, experiment.seed)[stage] for each in frames]
        tables = [_frame(each["id"], p) for each, p in zip(frames, found, strict=True)]
        return Member(name, experiment, *tables, [data / "rows.parquet", data / "battles.parquet"], [])
    context = StageContext(experiment, stage)
    report = read_report(context)  # first: of a stage that is not scored it names the command
    ids = judged_rows(experiment)["id"]
    held_out = _frame(ids, stage_probabilities(context, ids.tolist()))
    path = context.folder / "scores_test.parquet"
    with readable(path, "score the stage again"):
        scores = pd.read_parquet(path)
    calibration = Calibration.from_json(report)
    # Without the correction for a target prior, which is made once, behind the blend.
    plain = {number: replace(link, target_prior=None) for number, link in calibration.links.items()}
    test = _frame(scores["id"], replace(calibration, links=plain).apply(scores))
    files = [context.folder / each for each in (REPORT, "probabilities_valid.csv", path.name)]
    return Member(name, experiment, held_out, test, files, red_flags(context))


def _frame(ids: pd.Series, probabilities: np.ndarray) -> pd.DataFrame:
    return pd.DataFrame(probabilities, columns=_COLUMNS, index=ids.astype(str))


def _require_alike(members: list[Member]) -> None:
    """Raise ArenaError where members answer different test sets, or for different shares of the verdicts."""
    first, *others = members
    for other in others:
        if other.experiment.target_prior != first.experiment.target_prior:
            what, remedy = f"{other.name} and {first.name} declare other target priors", "declare the same in both"
            raise ArenaError(what, where="target_prior", remedy=remedy)
        if set(other.test.index) != set(first.test.index):
            what = f"{other.name} answers {len(other.test)} test battles, {first.name} {len(first.test)}: not the same"
            raise ArenaError(what, where="-e", remedy="prepare both with the same --test, and score them again")


def _weights(text: str, names: Sequence[str]) -> np.ndarray | None:
    """Return the weights that a text gives, None for those to be fitted; raises UsageError for a malformed text."""
    if len(names) < 2 or len(set(names)) < len(names):
        raise UsageError(
            "an ensemble is of two different members or more", where="-e", remedy="give -e EXP:STAGE twice"
        )
    if text in ("fitted", "mean"):
        return None if text == "fitted" else np.full(len(names), 1 / len(names))
    try:
        values = np.array([float(each) for each in text.split(",")])
    except ValueError:
        values = np.array([math.nan])
    if len(values) != len(names) or not (values >= 0).all() or abs(values.sum() - 1) > 1e-6:
        what = f"{text!r} is not {len(names)} weights of at least 0 that sum to 1"
        raise UsageError(what, where="--weights", remedy="write fitted, mean, or a number for each -e: 0.5,0.3,0.2")
    return values
