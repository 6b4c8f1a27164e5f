"""The comparison: every stage that was scored, on identical rows, with paired differences and a blend.

compare(rows, {"sft": probabilities, "dpo_judge": probabilities}, seed=42)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from common.errors import ArenaError
from common.experiment import Experiment
from common.files import write_json
from common.stages import STAGES
from data_prep.export_reader import truth_of
from data_prep.ground_truth import probabilities_of
from factory.stage_context import StageContext
from scoring import metrics
from scoring.baselines import baseline_probabilities
from scoring.calibration import grouped_parts, too_few_to_fit
from scoring.links import fit_conditional_logit, softmax
from scoring.predictions import REPORT, read_probabilities
from scoring.report.page import write_compare_page
from scoring.score_stage import read_report, texts

BLEND = "blend"
# The smallest probability whose logarithm enters the blend: one certain mistake must not rule the weights.
_FLOOR = 1e-6
# Probabilities [rows, 3], None where there are none, and `weights` with the `reason`.
Blend = tuple[np.ndarray | None, dict[str, Any]]


def compare_stages(experiment: Experiment) -> dict[str, Any]:
    """Compare every scored stage on identical validation rows; write compare.json and compare.html, return the numbers.

    Raises ArenaError if nothing was scored, or a stage was scored on other rows than those that are exported now; an
    earlier comparison is removed first, so that none is left that no longer holds.
    """
    folder, data = experiment.output_folder("compare"), experiment.data_folder
    for name in ("compare.json", "compare.html"):
        (folder / name).unlink(missing_ok=True)
    contexts = [StageContext(experiment, stage) for stage in STAGES]
    contexts = [context for context in contexts if (context.folder / REPORT).is_file()]
    if not contexts:
        raise ArenaError(
            "no stage of this experiment was scored yet",
            where=str(folder.parent),
            remedy=f"python run.py sft -e {experiment.name}, then dpo and rm",
        )
    rows = texts(data, experiment.parts("valid"))
    ids = rows["id"].tolist()
    models = {context.name: stage_probabilities(context, ids) for context in contexts}
    baselines = baseline_probabilities(texts(data, experiment.parts("train")), rows, experiment.seed)
    truth = truth_of(data)
    bayes = None if truth is None else probabilities_of(truth, ids, str(data / "truth.csv"))
    compared = compare(rows, models, experiment.seed, baselines=baselines, bayes=bayes)
    result = {"experiment": experiment.name, **compared}
    result["flags"] = {context.name: red_flags(context) for context in contexts}  # no comparison hides them
    write_compare_page(result, folder / "compare.html")
    write_json(folder / "compare.json", result)
    return result


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


def blend(
    models: Mapping[str, np.ndarray],
    truth: np.ndarray,
    groups: np.ndarray,
    seed: int,
    given: np.ndarray | None = None,
) -> Blend:
    """Return cross-fitted probabilities [rows, 3] of the weighted mean of log probabilities, and its description.

    p(c) ∝ Π p_m(c)^w_m with w_m ≥ 0: a logarithmic opinion pool (Genest & Zidek, Statistical Science 1986). The
    weights need not sum to 1, so that the blend may be sharper than its parts. `given` weights are not fitted.
    """
    if given is not None:
        return pool(models.values(), given), {
            "weights": dict(zip(models, given.tolist(), strict=True)),
            "reason": "given",
        }
    if reason := "a blend needs at least two stages" if len(models) < 2 else too_few_to_fit(truth, groups):
        return None, {"weights": {}, "reason": f"no blend: {reason}"}
    design = _design(models.values())
    mixed, lower = np.empty((len(truth), 3)), np.zeros(len(models))
    try:
        for fit, judge in grouped_parts(groups, seed):
            mixed[judge] = softmax(design[judge] @ fit_conditional_logit(design[fit], truth[fit], lower)[0])
        weights = dict(zip(models, fit_conditional_logit(design, truth, lower)[0].tolist(), strict=True))
    except ArenaError as error:  # the table itself needs no blend
        return None, {"weights": {}, "reason": f"no blend: {error.what}"}
    return mixed, {"weights": weights, "reason": "cross-fitted; the weights shown are those of all rows"}


def pool(members: Iterable[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Return the blend [rows, 3] of members' probabilities with these weights."""
    return softmax(_design(members) @ weights)


def _design(members: Iterable[np.ndarray]) -> np.ndarray:
    return np.stack([np.log(np.clip(p, _FLOOR, 1)) for p in members], axis=2)


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
