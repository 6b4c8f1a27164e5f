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
from typing import TYPE_CHECKING

from common.battle import PROBABILITY_COLUMNS
from common.files import read_json, write_json
from common.stages import STEPS, TRAININGS
from data_prep.export_reader import truth_of
from data_prep.ground_truth import probabilities_of
from factory.state import outdated_files, require_scored
from scoring.baselines import baseline_ladder
from scoring.pipeline import REPORT, texts
from scoring.report.page import write_compare_page

if TYPE_CHECKING:
    import pandas as pd

    from common.experiment import Experiment

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
    return fit_conditional_logit(design, truth, np.zeros(design.shape[2]))[0]


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


def compare_stages(experiment: Experiment) -> dict[str, Any]:
    """Compare every scored stage on identical validation rows; write compare.json and compare.html, return the numbers.

    Raises ArenaError if nothing was scored, or a stage was scored on other rows than those that are exported now.
    """
    frames = {
        stage: _frame(experiment, stage) for stage in TRAININGS if (experiment.output_folder(stage) / REPORT).is_file()
    }
    if not frames:
        raise ArenaError(
            "no stage of this experiment was scored yet",
            where=str(experiment.output_folder("compare").parent),
            remedy=f"python run.py sft -e {experiment.name}, then dpo and rm",
        )
    for stage in frames:
        require_scored(experiment, stage)
    rows = texts(experiment.data_folder, "valid")
    for stage, frame in frames.items():
        _require_own_rows(experiment, stage, frame, rows)
    ladder = baseline_ladder(texts(experiment.data_folder, "train"), rows, experiment.seed)
    truth = truth_of(experiment.data_folder)
    bayes = None
    if truth is not None:
        bayes = probabilities_of(truth, rows["id"].tolist(), str(experiment.data_folder / "truth.csv"))
    result = {"experiment": experiment.name, **compare(frames, experiment.seed, baselines=ladder, bayes=bayes)}
    result["flags"] = {stage: _red_flags(experiment, stage) for stage in frames}
    folder = experiment.output_folder("compare")
    write_compare_page(result, folder / "compare.html")
    write_json(folder / "compare.json", result)
    return result


def _require_own_rows(experiment: Experiment, stage: str, scored: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Raise ArenaError where a stage's figures are not of the exported rows: baselines would be those of others."""
    changed = outdated_files(experiment, stage)
    if changed or scored["id"].tolist() != rows["id"].tolist():
        raise ArenaError(
            f"{stage} was trained or scored on another export than {experiment.data_folder} holds now",
            where=str(experiment.output_folder(stage)),
            remedy=f"prepare the earlier votes again; or python run.py {STEPS[stage].command} -e {experiment.name} "
            "--fresh; a stage whose folder is moved out of outputs/ is left out",
        )


def _red_flags(experiment: Experiment, stage: str) -> list[str]:
    """Return what the stage's report says in red, so that no comparison hides it."""
    path = experiment.output_folder(stage) / REPORT
    try:
        return [str(flag["text"]) for flag in read_json(path).get("flags", []) if flag["level"] == "red"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        again = f"python run.py score -e {experiment.name} --stage {stage} --fresh"
        raise ArenaError(f"its flags cannot be read: {error!r}", where=str(path), remedy=again) from None


def _frame(experiment: Experiment, stage: str) -> pd.DataFrame:
    import pandas as pd

    folder = experiment.output_folder(stage)
    again = f"move {folder / REPORT} away and score again: run.py score -e {experiment.name} --stage {stage}"
    try:
        scores = pd.read_parquet(folder / "scores_valid.parquet", columns=["id", "verdict", "group"])
        chances = pd.read_csv(folder / "probabilities_valid.csv", dtype={"id": str})
        chances = chances[["id", *PROBABILITY_COLUMNS]].astype(dict.fromkeys(PROBABILITY_COLUMNS, float))
    except (OSError, ValueError, KeyError) as error:  # pandas' and pyarrow's own errors are among them
        reason = str(error).splitlines()[0][:200]
        raise ArenaError(f"its scores cannot be read: {reason}", where=str(folder), remedy=again) from None
    if scores["id"].tolist() != chances["id"].tolist():
        raise ArenaError(
            "scores_valid.parquet and probabilities_valid.csv hold different rows",
            where=str(folder),
            remedy=again,
        )
    for name, column in zip(CHANCES, PROBABILITY_COLUMNS, strict=True):
        scores[name] = chances[column].to_numpy()
    return scores
