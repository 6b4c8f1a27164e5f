"""The comparison: every stage that ran, on identical rows, with paired differences and a blend.

compare({"sft": frame, "dpo_judge": frame}, seed=42)   # frames: id, verdict, group, p_a, p_b, p_tie
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any

import numpy as np

from common.battle import VERDICTS
from common.errors import ArenaError
from scoring import metrics
from scoring.calibration import FEWEST_ROWS, grouped_parts
from scoring.links import fit_conditional_logit, softmax

if TYPE_CHECKING:
    import pandas as pd

CHANCES = tuple(f"p_{name}" for name in VERDICTS)
BLEND = "blend"
# The smallest probability whose logarithm enters the blend: one certain mistake must not rule the weights.
_FLOOR = 1e-6


def compare(
    named: Mapping[str, pd.DataFrame],
    seed: int,
    *,
    baselines: Mapping[str, np.ndarray] | None = None,
    bayes: np.ndarray | None = None,
) -> dict[str, Any]:
    """Return rows, `table` (a row each, blend last), `differences` of all pairs, `blend`, `baselines` and `bayes`.

    Frames have the columns id, verdict, group, p_a, p_b, p_tie; `baselines` and `bayes` are [rows, 3] in the first
    frame's order. All intervals are 95%, by prompt group, from the same draws.
    Raises ArenaError where the frames do not hold the same rows, a verdict is missing or a probability is none.
    """
    if not named:
        raise ArenaError("there is nothing to compare", where="compare", remedy="run a stage first: run.py sft -e …")
    if BLEND in named:
        raise ArenaError(f"{BLEND!r} is the blend's own name", where="compare", remedy="rename that stage")
    frames = _aligned(named)
    first = next(iter(frames.values()))
    truth, groups = metrics.verdict_codes(first["verdict"]), metrics.as_groups(first["group"])
    models = {name: frame[list(CHANCES)].to_numpy(np.float64) for name, frame in frames.items()}
    mixed, blend = _blend(models, truth, groups, seed)
    if mixed is not None:
        models[BLEND] = mixed
    bootstrap = metrics.GroupBootstrap(groups, seed)
    others = {name: np.asarray(p, np.float64) for name, p in (baselines or {}).items()}
    ends = _intervals(others, truth, bootstrap)
    return {
        "rows": len(truth),
        "table": _table(models, truth, bootstrap),
        "differences": _differences(models, truth, bootstrap),
        "blend": blend,
        "baselines": {name: metrics.log_loss(p, truth) for name, p in others.items()},
        "baselines_ci95": ends,
        "bayes": None if bayes is None else metrics.log_loss(bayes, truth),
    }


def _table(models: Mapping[str, np.ndarray], truth: np.ndarray, bootstrap: metrics.GroupBootstrap) -> list[dict]:
    ends = _intervals(models, truth, bootstrap)
    return [
        {
            "name": name,
            "rows": len(truth),
            "log_loss": metrics.log_loss(p, truth),
            "log_loss_ci95": ends[name],
            "accuracy": metrics.accuracy(p, truth),
            "ece": metrics.ece(p, truth),
            "per_class_log_loss": metrics.per_class_log_loss(p, truth),
        }
        for name, p in models.items()
    ]


def _differences(models: Mapping[str, np.ndarray], truth: np.ndarray, bootstrap: metrics.GroupBootstrap) -> list[dict]:
    """Return log loss of first minus second for every pair; `better` names one only where the interval excludes 0."""
    pairs = list(combinations(models, 2))
    if not pairs:
        return []
    losses = {name: metrics.row_losses(p, truth) for name, p in models.items()}
    gaps = np.column_stack([losses[first] - losses[second] for first, second in pairs])
    found = []
    for (first, second), gap, samples in zip(pairs, gaps.T, bootstrap.samples(gaps).T, strict=True):
        ends = metrics.percentile_interval(samples, bootstrap.groups)
        decided = ends is not None and (ends[0] > 0 or ends[1] < 0)
        better = (second if gap.mean() > 0 else first) if decided else None
        pair = {"first": first, "second": second, "difference": float(gap.mean()), "ci95": ends}
        found.append({**pair, "better": better})
    return found


def _intervals(
    models: Mapping[str, np.ndarray], truth: np.ndarray, bootstrap: metrics.GroupBootstrap
) -> dict[str, list | None]:
    if not models:
        return {}
    losses = np.column_stack([metrics.row_losses(p, truth) for p in models.values()])
    samples = bootstrap.samples(losses).T
    ends = [metrics.percentile_interval(column, bootstrap.groups) for column in samples]
    return dict(zip(models, ends, strict=True))


def _blend(
    models: Mapping[str, np.ndarray], truth: np.ndarray, groups: np.ndarray, seed: int
) -> tuple[np.ndarray | None, dict[str, Any]]:
    """Return cross-fitted probabilities [rows, 3] of the weighted mean of log probabilities, and its description.

    p(c) ∝ Π p_m(c)^w_m with w_m ≥ 0: a logarithmic opinion pool (Genest & Zidek, Statistical Science 1986). The
    weights need not sum to 1, so that the blend may be sharper than its parts.
    """
    missing = [name for code, name in enumerate(VERDICTS) if not (truth == code).any()]
    if len(models) < 2:
        reason = "a blend needs at least two stages"
    elif len(truth) < FEWEST_ROWS:
        reason = f"fewer than {FEWEST_ROWS} rows fit no weights"
    elif missing:
        reason = f"no row of class {', '.join(missing)}"
    elif len(set(groups.tolist())) < 2:
        reason = "all rows share one prompt, so nothing can be cross-fitted"
    else:
        design = np.stack([np.log(np.clip(p, _FLOOR, 1)) for p in models.values()], axis=2)
        mixed = np.empty((len(truth), 3))
        for fit, judge in grouped_parts(groups, seed):
            mixed[judge] = softmax(design[judge] @ _weights(design[fit], truth[fit]))
        weights = dict(zip(models, map(float, _weights(design, truth)), strict=True))
        return mixed, {"weights": weights, "reason": "cross-fitted; the weights shown are those of all rows"}
    return None, {"weights": {}, "reason": f"no blend: {reason}"}


def _weights(design: np.ndarray, truth: np.ndarray) -> np.ndarray:
    return fit_conditional_logit(design, truth, np.zeros(design.shape[2])).parameters


def _aligned(named: Mapping[str, pd.DataFrame]) -> dict[str, pd.DataFrame]:
    """Return the frames in the first one's row order; raises ArenaError that lists every disagreement."""
    frames = {name: frame.set_index(frame["id"].astype(str)) for name, frame in named.items()}
    reference_name, reference = next(iter(frames.items()))
    faults = []
    for name, frame in frames.items():
        faults += [f"{name}: {fault}" for fault in _frame_faults(frame)]
        extra, lacking = frame.index.difference(reference.index), reference.index.difference(frame.index)
        if len(extra) or len(lacking):
            example = (lacking if len(lacking) else extra)[0]
            faults.append(
                f"{name} and {reference_name} hold different rows: {len(lacking)} missing, {len(extra)} more "
                f"(for example id {example})"
            )
    if not faults:
        frames = {name: frame.loc[reference.index] for name, frame in frames.items()}
        for name, frame in frames.items():
            faults += [
                f"{name} and {reference_name} state another {column} for {count} row(s)"
                for column in ("verdict", "group")
                if (count := int((frame[column].to_numpy() != reference[column].to_numpy()).sum()))
            ]
    if faults:
        raise ArenaError(
            "\n".join(["the stages cannot be compared:", *(f"  - {fault}" for fault in faults)]),
            where="compare",
            remedy="score every stage again on the same prepared data",
        )
    return frames


def _frame_faults(frame: pd.DataFrame) -> list[str]:
    values = frame[list(CHANCES)].to_numpy(np.float64)
    faults = []
    if not len(frame):
        faults.append("there are no rows")
    if frame.index.has_duplicates:
        faults.append("ids occur twice")
    if (metrics.verdict_codes(frame["verdict"]) < 0).any():
        faults.append("rows without a verdict")
    with np.errstate(invalid="ignore"):
        broken = ~(np.abs(values.sum(axis=1) - 1) < 1e-3) | (values < 0).any(axis=1)
    if broken.any():
        faults.append(f"{broken.sum()} row(s) hold no probabilities, the first id is {frame.index[broken][0]}")
    return faults
