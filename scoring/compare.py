"""Every stage that was scored, on identical rows: compared with paired differences, and blended into one submission.

compare(rows, {"sft": probabilities, "dpo_judge": probabilities}, seed=42)
ensemble(["demo:sft", "demo:rm", "demo:tfidf"], "both")   ->   outputs/both/ensemble/{report.json, submission.csv, …}

An ensemble's members are stages of any experiments, and simple baselines. The blend is that of `compare`, with the same
numbers; its weights are fitted on the members' probabilities of held-out battles (out-of-fold where there are folds),
each cross-fitted by prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.console import name_of
from common.errors import ArenaError, UsageError
from common.experiment import Experiment, check_name, load_experiment
from common.files import only_run, write_json
from common.stages import STAGES, TRAININGS
from data_prep.export_reader import read_rows, readable, test_lines, truth_of
from data_prep.verdict_shares import probabilities_of
from factory.recipes import shared_values
from factory.stage_context import StageContext
from factory.state import StageState
from scoring import metrics
from scoring.baselines import baseline_probabilities
from scoring.calibration import Blend, Calibration, blend, pool
from scoring.checks.provenance import provenance
from scoring.links import correct_prior
from scoring.predictions import REPORT, Answers, check_submission, read_probabilities, write_probabilities
from scoring.report.page import write_compare_page
from scoring.score_stage import read_report, texts

BLEND = "blend"
_SAME = "prepare the experiments with the same votes and the same folds, or with folds, which judge every battle"
_BASELINES = ("length", "tfidf")
_COLUMNS = ["a", "b", "tie"]


def compare_stages(*experiments: Experiment) -> dict[str, Any]:
    """Compare every scored stage on identical validation rows; write compare.json and compare.html, return the numbers.

    Stages of several experiments are named EXPERIMENT:STAGE, and `differs` has the keys in which their settings differ.
    Raises ArenaError if nothing was scored, or a stage was scored on other rows than those that are exported now; an
    earlier comparison is removed first, so that none is left that no longer holds.
    """
    experiment, *others = experiments
    folder = compare_folder(experiments)
    for name in ("compare.json", "compare.html"):
        (folder / name).unlink(missing_ok=True)
    contexts = {}
    for each in experiments:
        scored = [c for c in (StageContext(each, stage) for stage in STAGES) if (c.folder / REPORT).is_file()]
        if not scored:
            what, remedy = "no stage of this experiment was scored yet", f"python run.py sft -e {each.name}"
            raise ArenaError(what, where=f"outputs/{each.name}", remedy=f"{remedy}, then dpo and rm")
        contexts |= {f"{each.name}:{c.name}" if others else c.name: c for c in scored}
    tables = {each.name: judged_rows(each) for each in experiments}
    known, left_out = common_rows(tables)
    ids = known["id"].tolist()
    models = {}
    for name, context in contexts.items():
        own = tables[context.experiment.name]["id"].tolist()
        models[name] = pd.DataFrame(stage_probabilities(context, own), index=own).loc[ids].to_numpy()
    compared = compare(known, models, experiment.seed, **references(experiment, ids))
    result = {"experiment": " and ".join(each.name for each in experiments), **compared}
    result["flags"] = {name: red_flags(context) for name, context in contexts.items()}  # no comparison hides them
    stages = {context.name for context in contexts.values()}
    result |= {"left_out": left_out, "differs": differing_settings(experiments, stages) if others else {}}
    write_compare_page(result, folder / "compare.html")
    write_json(folder / "compare.json", result)
    return result


def compare_folder(experiments: Sequence[Experiment]) -> Path:
    """Return outputs/A/compare, or outputs/A/compare_B for several."""
    first, *others = experiments
    return first.output_folder("_".join(["compare", *(each.name for each in others)]))


def references(experiment: Experiment, ids: list[str]) -> dict[str, Any]:
    """Return `baselines` and, on a synthetic arena, `bayes`: what `compare` shows with the models."""
    data = experiment.data_folder
    rows = texts(data, experiment.parts("valid")).set_index("id").loc[ids].reset_index()
    truth = truth_of(data)
    return {
        "baselines": baseline_probabilities(texts(data, experiment.parts("train")), rows, experiment.seed),
        "bayes": None if truth is None else probabilities_of(truth, ids, str(data / "truth.csv")),
    }


def judged_rows(experiment: Experiment) -> pd.DataFrame:
    """Return id, verdict and group of the battles that an experiment's stages are judged on."""
    with readable(experiment.data_folder / "rows.parquet"):
        return read_rows(experiment.data_folder, experiment.parts("valid"))[["id", "verdict", "group"]]


def common_rows(tables: Mapping[str, pd.DataFrame]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the rows of `judged_rows` that stand in all tables, and how many of each are left out.

    Raises ArenaError where there are none, or a battle has two verdicts.
    """
    (first, rows), *others = tables.items()
    for other, table in others:
        theirs = table.set_index("id")["verdict"]
        rows = rows[rows["id"].isin(theirs.index)]
        if len(wrong := rows[rows["verdict"].to_numpy() != theirs.loc[rows["id"]].to_numpy()]):
            what = f"{len(wrong)} battles have another verdict in {other} than in {first}"
            raise ArenaError(f"{what}, the first is {name_of(wrong['id'].iloc[0])}", where="-e", remedy=_SAME)
    if rows.empty:
        what = f"{' and '.join(tables)} were scored on other battles: they have none in common"
        raise ArenaError(what, where="-e", remedy=_SAME)
    return rows.reset_index(drop=True), {name: len(table) - len(rows) for name, table in tables.items()}


def differing_settings(experiments: Sequence[Experiment], stages: Collection[str]) -> dict[str, dict[str, Any]]:
    """Return {"sft: learning_rate": {A: 1e-4, B: 2e-4}}: keys of experiment.yaml and of the stages' recipes."""
    settings: dict[str, dict[str, Any]] = {}
    for each in experiments:
        content = each.model_dump(mode="json", exclude={"name", "description", "recipes"})
        pages = {"experiment.yaml": content}
        for step in TRAININGS:
            if step in stages and each.recipe(step).is_file():
                shared = shared_values(each, step, each.written_fold)
                pages[step] = {k: v for k, v in StageContext(each, step).written.items() if k not in shared}
        for page, values in pages.items():
            for key, value in values.items():
                settings.setdefault(f"{page}: {key}", {})[each.name] = value
    names = [each.name for each in experiments]
    found = {key: {name: values.get(name) for name in names} for key, values in settings.items()}
    return {key: values for key, values in found.items() if len({str(value) for value in values.values()}) > 1}


def compare(
    rows: pd.DataFrame,
    stages: Mapping[str, np.ndarray],
    seed: int,
    *,
    baselines: Mapping[str, np.ndarray] | None = None,
    bayes: np.ndarray | None = None,
    blended: Blend | None = None,
) -> dict[str, Any]:
    """Return rows, `table` (a row each, blend last), `differences` of all pairs, `blend`, `baselines` and `bayes`.

    `rows` have the columns verdict and group; `stages`, `baselines` and `bayes` are probabilities [rows, 3] of these
    rows. `blended` is what `blend` returned, else it is made here. All intervals are 95%, by prompt group, from the
    same draws. Raises ArenaError where a verdict is missing.
    """
    models, baselines = dict(stages), dict(baselines or {})
    truth, groups = metrics.verdict_codes(rows["verdict"]), metrics.as_groups(rows["group"])
    if not len(truth) or (truth < 0).any():
        what, remedy = "there are no rows to compare on, or rows without a verdict", "prepare, then score every stage"
        raise ArenaError(what, where="the validation fold", remedy=remedy)
    mixed, about = blended or blend(models, truth, groups, seed)
    if mixed is not None:
        models[BLEND] = mixed
    bootstrap = metrics.GroupBootstrap(groups, seed)
    losses = {name: metrics.row_losses(p, truth) for name, p in (baselines | models).items()}
    samples = bootstrap.samples(np.column_stack(list(losses.values()))).T
    intervals = {name: metrics.percentile_interval(draws, groups) for name, draws in zip(losses, samples, strict=True)}
    table = [
        {
            "name": name,
            "rows": len(truth),
            "log_loss": float(losses[name].mean()),
            "log_loss_ci95": intervals[name],
            "accuracy": metrics.accuracy(p, truth),
            "ece": metrics.ece(p, truth),
            "per_class_log_loss": metrics.per_class_log_loss(p, truth),
        }
        for name, p in models.items()
    ]
    return {
        "rows": len(truth),
        "table": table,
        "differences": _differences({name: losses[name] for name in models}, bootstrap),
        "blend": about,
        "baselines": {name: float(losses[name].mean()) for name in baselines},
        "baselines_ci95": {name: intervals[name] for name in baselines},
        "bayes": None if bayes is None else metrics.log_loss(bayes, truth),
    }


def _differences(losses: Mapping[str, np.ndarray], bootstrap: metrics.GroupBootstrap) -> list[dict[str, Any]]:
    """Return log loss of first minus second for every pair; `better` names one only where the interval excludes 0."""
    pairs = list(combinations(losses, 2))
    if not pairs:
        return []
    gaps = np.column_stack([losses[first] - losses[second] for first, second in pairs])
    found = []
    for (first, second), gap, draws in zip(pairs, gaps.T, bootstrap.samples(gaps).T, strict=True):
        ends = metrics.percentile_interval(draws, bootstrap.groups)
        decided = ends is not None and (ends[0] > 0 or ends[1] < 0)
        better = (second if gap.mean() > 0 else first) if decided else None
        pair = {"first": first, "second": second, "difference": float(gap.mean()), "ci95": ends}
        found.append({**pair, "better": better})
    return found


def stage_probabilities(context: StageContext, ids: list[str]) -> np.ndarray:
    """Return a stage's final probabilities [rows, 3]; raises ArenaError where they are not of `ids`."""
    context.require_scored()
    if context.outdated_files():
        raise ArenaError(
            f"{context.name} was trained or scored on another export than {context.experiment.data_folder} holds now",
            where=str(context.folder),
            remedy=f"prepare the earlier votes again; or {context.command} --fresh; a stage whose folder is moved out "
            "of outputs/ is left out",
        )
    return read_probabilities(context.folder / "probabilities_valid.csv", ids)


def red_flags(context: StageContext) -> list[str]:
    """Return the texts of a stage's red flags."""
    return [flag["text"] for flag in read_report(context).get("flags", []) if flag["level"] == "red"]


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
    codes, groups = metrics.verdict_codes(rows["verdict"]), metrics.as_groups(rows["group"])
    judged, about = blend(held_out, codes, groups, first.seed, given)
    if judged is None:
        raise ArenaError(about["reason"], where=name, remedy="--weights mean needs no fit")
    compared = compare(rows, held_out, first.seed, **references(first, ids), blended=(judged, about))
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
