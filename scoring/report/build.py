"""The report of one stage as numbers: what it reached, beside its baselines, and where it is weak.

report, probabilities, calibration = build_report(experiment="demo", stage="sft", scores=…, …)
write_json(folder / "report.json", report)
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from common.battle import VERDICTS
from scoring.report.formatting import final_flips

if TYPE_CHECKING:
    import pandas as pd
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from common.console import name_of
from common.errors import ArenaError
from data_prep.ground_truth import probabilities_of
from scoring import metrics
from scoring.baselines import baseline_ladder, ladder_notes
from scoring.calibration import (
    AB_COLUMNS,
    BA_COLUMNS,
    Calibration,
    FittedLink,
    calibrate,
    has_both_orders,
    kind_of,
    raw_scores,
)
from scoring.links import correct_prior, smoothed_prior, softmax

if TYPE_CHECKING:
    import pandas as pd

# From here on a figure is worth a warning.
FEW_ROWS, FLIP_RATE, CUT_SHARE, ECE, PRIOR_SHIFT = 200, 0.15, 0.1, 0.03, 0.1


def flags_of(report: Mapping[str, Any], calibration: FittedLink, train_prior: np.ndarray) -> list[dict[str, str]]:
    """Return what a reader must not overlook, gravest first."""
    flags: list[tuple[str, str, str]] = []
    if not report["beats_prior"]:
        flags.append(("red", "not_better_than_prior", _prior_words(report)))
    if calibration.kind == "rewards" and not calibration.kept:
        flags.append(("red", "no_link", calibration.reason))
    if report["merge_gate"] and report["merge_gate"].get("passed") is False:
        flags.append(("red", "merge_gate", "The merged model does not say what the trained adapter says."))
    for check in report["checks"]:
        if check["passed"] is False and check["name"] != "merge check":
            level = "red" if check["stops"] else "amber"
            flags.append((level, "check", f"The check “{check['name']}” failed: {check['detail']}."))
    if (report["target_prior"] or {}).get("log_loss") is not None:
        found = report["target_prior"]
        if found["log_loss"] >= found["prior"]:
            figures = f"it reaches {found['log_loss']:.3f}, the prior alone {found['prior']:.3f}"
            text = f"Under the declared target prior {figures}."
            flags.append(("red", "target_prior_not_beaten", text))
    flags += _cautions(report, calibration)
    shift = float(np.abs(_shares(report["class_counts"]) - train_prior).sum() / 2)
    if shift > PRIOR_SHIFT and not calibration.target_prior:
        text = f"The class shares of the training rows differ from these rows' by {shift:.0%}: declare a target prior."
        flags.append(("amber", "prior_shift", text))
    if not (calibration.kind == "rewards" and not calibration.kept):
        uncalibrated = calibration.log_loss_cross_fitted is None
        flags.append(("amber" if uncalibrated else "info", "calibration", calibration.reason))
    return [{"level": level, "code": code, "text": text} for level, code, text in flags]


def _cautions(report: Mapping[str, Any], calibration: FittedLink) -> list[tuple[str, str, str]]:
    """Return the amber flags."""
    found, loss = [], report["log_loss"]
    ahead = [
        f"{name} ({report['baselines'][name]:.3f})" for name in ("length", "tfidf") if report["baselines"][name] < loss
    ]
    if ahead:
        found.append(("baseline_ahead", f"A simple baseline is better ({loss:.3f} here): {', '.join(ahead)}."))
    if calibration.link is not None and calibration.link.learned is False:
        found.append(
            ("scores_say_nothing", "The link hardly uses the model's scores (within two standard errors of 0).")
        )
    missing = [name for name, count in report["class_counts"].items() if not count]
    if missing:
        found.append(("class_missing", f"No judged row of class {', '.join(missing)}."))
    if report["rows"] < FEW_ROWS:
        found.append(("few_rows", f"Only {report['rows']} rows: the figures are rough."))
    bias = report["position_bias"]
    if bias and bias["flip_rate"] > FLIP_RATE:
        final = final_flips(bias, averaged=calibration.swap_tta, decimals=0)
        changed = f"{bias['flip_rate']:.0%} of its first choices change with the order of the answers"
        found.append(("position_bias", f"{changed}{final}."))
    cut = report["truncation"].get("judged", {}).get("rows_cut_share", 0)
    if cut > CUT_SHARE:
        found.append(("truncation", f"{cut:.0%} of the rows were shortened to fit: a larger cutoff_len may help."))
    if report["ece"] > max(ECE, report["ece_by_chance"]):
        found.append(
            ("ece", f"First choices are off by {report['ece']:.1%} on average: the probabilities are not honest.")
        )
    return [("amber", code, text) for code, text in found]


def _prior_words(report: Mapping[str, Any]) -> str:
    prior, loss, ends = report["baselines"]["prior"], report["log_loss"], report["gain_over_prior_ci95"]
    if loss >= prior:
        return f"Log loss {loss:.4f} does not beat the class prior ({prior:.4f}): this judge is useless as it is."
    if loss >= report["baselines"]["uniform"]:
        return f"Log loss {loss:.4f} is worse than a third for each class (1.0986): the prior is wrong for these rows."
    if ends is None:
        return f"Log loss {loss:.4f} against {prior:.4f} of the class prior, on one prompt only: nothing is shown."
    return (
        f"Log loss {loss:.4f} is below the class prior's {prior:.4f}, but the 95% interval of the gain "
        f"({ends[0]:.4f} to {ends[1]:.4f}) holds 0: nothing is shown."
    )


def _shares(counts: Mapping[str, int]) -> np.ndarray:
    values = np.array([counts[name] for name in VERDICTS], dtype=np.float64)
    return values / values.sum()


# Languages beyond these are one slice.
LANGUAGES = 8


def row_slices(table: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Return masks [rows] by family (length, turns, language) and name; every row is in one slice of a family.

    Empty slices are left out, and languages where no row states one.
    """
    return {"length": _by_length(table), "turns": _by_turns(table), "language": _by_language(table)}


def _by_length(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by quarters of the characters of prompt, A and B together; equal lengths stay together."""
    total = table[["chars_prompt", "chars_a", "chars_b"]].sum(axis=1).to_numpy()
    edges = np.unique(np.quantile(total, [0.25, 0.5, 0.75])).astype(int)
    place = np.searchsorted(edges, total, side="left")
    names = [f"up to {edges[0]:,} characters"]
    names += [f"{low + 1:,} to {high:,} characters" for low, high in pairwise(edges)]
    names.append(f"over {edges[-1]:,} characters")
    return _present({name: place == index for index, name in enumerate(names)})


def _by_turns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    turns = table["turns"].to_numpy()
    return _present({"1 turn": turns <= 1, "2 turns": turns == 2, "3 or more turns": turns >= 3})


def _by_language(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by the stated language, the most frequent ones first; empty where no row states one."""
    stated = table["language"].dropna().astype(str) if "language" in table else None
    if stated is None or stated.empty:
        return {}
    names = table["language"].astype("string").fillna("").to_numpy(dtype=object)
    common = stated.value_counts().index[:LANGUAGES].tolist()
    slices = {name: names == name for name in common}
    slices["other languages"] = ~np.isin(names, [*common, ""])
    slices["not stated"] = names == ""
    return _present(slices)


def _present(slices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: mask for name, mask in slices.items() if mask.any()}


# How many rows the lists of worst and most biased rows hold.
LISTED = 20


@dataclass(frozen=True)
class _Judged:
    """The rows with a verdict: their table, class codes [n], groups [n], probabilities [n, 3] and what they beat."""

    table: pd.DataFrame
    truth: np.ndarray
    groups: np.ndarray
    model: np.ndarray
    baselines: Mapping[str, np.ndarray]
    bayes: np.ndarray | None
    orders: tuple[np.ndarray, np.ndarray] | None

    def losses(self, probabilities: np.ndarray) -> np.ndarray:
        return metrics.row_losses(probabilities, self.truth)


def build_report(
    *,
    experiment: str,
    stage: str,
    scores: pd.DataFrame,
    train_rows: pd.DataFrame,
    valid_texts: pd.DataFrame,
    truth: pd.DataFrame | None,
    audit: Mapping[str, Any],
    loss_curve: list[dict],
    provenance: Mapping[str, Any],
    swap_tta: bool,
    seed: int,
    target_prior: Mapping[str, float] | None = None,
    merge_gate: Mapping[str, Any] | None = None,
    checks: Sequence[Mapping[str, Any]] = (),
    calibration: Calibration | None = None,
    set_name: str = "valid",
) -> tuple[dict[str, Any], np.ndarray, Calibration]:
    """Judge one stage's scores and return (report.json's content, probabilities [rows, 3], calibration).

    `scores` one row a battle; `train_rows` and `valid_texts` as `baselines` describes, `valid_texts` with every id
    of `scores`; `truth` (synthetic arena): id and the true probabilities, in `PROBABILITY_COLUMNS`.
    Without `calibration` one is fitted here and the rows are judged by its cross-fitted probabilities, before any
    `target_prior`, because these rows have their own prior; what the correction would reach is estimated by
    weighting. With `calibration`, fitted on other rows, the rows are judged by what it gives them, target prior
    included, and the baselines get the same correction. `beats_prior` is true where the paired 95% interval of
    the gain over the class prior lies above 0 and the log loss is below that of a third for each class.
    Raises ArenaError for broken scores (naming ids), rows without text, or no row with a verdict.
    """
    _check(scores, valid_texts)
    train_truth = metrics.verdict_codes(train_rows["verdict"])
    train_prior = smoothed_prior(train_truth)
    fitted_here = calibration is None
    if fitted_here:
        calibration = calibrate(
            scores,
            seed=seed,
            swap_tta=swap_tta,
            train_prior=_named(train_prior),
            target_prior=target_prior,
        )
    fitted = calibration.used
    probabilities = fitted.probabilities if fitted_here else fitted.apply(scores)
    corrected = None if fitted_here else fitted.target_prior
    judged = _judged(scores, probabilities, train_rows, valid_texts, truth, corrected, seed)
    report = {
        "experiment": experiment,
        "stage": stage,
        "set": set_name,
        **_figures(judged, fitted, seed),
        **calibration.to_json(),
        "target_prior": _weighted_to_target(judged, fitted, seed) if fitted_here else None,
        "merge_gate": merge_gate,
        "checks": list(checks),
        "truncation": _truncation(judged, audit),
        "train_class_counts": _counts(train_truth),
        "baseline_notes": ladder_notes(int((train_truth >= 0).sum())),
        "loss_curve": loss_curve,
        "provenance": {**provenance, "report": {"seed": seed, "bootstrap_draws": metrics.DRAWS}},
    }
    report["flags"] = flags_of(report, fitted, train_prior)
    return _plain(report), probabilities, calibration


def _figures(judged: _Judged, calibration: FittedLink, seed: int) -> dict[str, Any]:
    """Return every figure that comes from probabilities and verdicts; `calibration` tells what of the order remains."""
    truth, model = judged.truth, judged.model
    intervals, shares = _intervals(judged, seed)
    losses = {name: float(judged.losses(p).mean()) for name, p in judged.baselines.items()}
    loss = metrics.log_loss(model, truth)
    against = intervals["gain_over_prior"]
    bayes = None if judged.bayes is None else metrics.log_loss(judged.bayes, truth)
    share, share_ends = shares
    return {
        "rows": len(truth),
        "class_counts": _counts(truth),
        "log_loss": loss,
        "log_loss_ci95": intervals["model"],
        "accuracy": metrics.accuracy(model, truth),
        "ece": metrics.ece(model, truth),
        "ece_by_chance": metrics.ece_by_chance(model, seed=seed),
        "per_class_log_loss": metrics.per_class_log_loss(model, truth),
        "baselines": losses,
        "baselines_ci95": {name: intervals[name] for name in losses} | _if(intervals, "bayes"),
        # Both rungs know nothing of the texts: ahead of a prior that is itself worse than a third each is no success.
        "beats_prior": against is not None and against[0] > 0 and loss < losses["uniform"],
        "gain_over_prior": losses["prior"] - loss,
        "gain_over_prior_ci95": against,
        "bayes": bayes,
        "bayes_expected": None if judged.bayes is None else _entropy(judged.bayes),
        "learned_share": share,
        "learned_share_ci95": share_ends,
        **_position(judged, calibration, intervals),
        "reliability": metrics.reliability(model, truth),
        "confusion": metrics.confusion(model, truth),
        "slices": _slices(judged, seed),
        "worst": _worst(judged),
        "most_biased": _most_biased(judged),
    }


def _intervals(judged: _Judged, seed: int) -> tuple[dict[str, list | None], tuple]:
    """Return the 95% interval of each column of losses, all from the same draws, and (learned share, interval)."""
    columns = {name: judged.losses(p) for name, p in judged.baselines.items()}
    columns["model"] = judged.losses(judged.model)
    columns["gain_over_prior"] = columns["prior"] - columns["model"]
    if judged.bayes is not None:
        columns["bayes"] = judged.losses(judged.bayes)
    if judged.orders:
        ab, ba = judged.orders
        columns["tta_gain"] = judged.losses(ab) - judged.losses((ab + ba) / 2)
    values = np.column_stack(list(columns.values()))
    samples = metrics.GroupBootstrap(judged.groups, seed).samples(values)
    by_name = dict(zip(columns, samples.T, strict=True))
    ends = {name: metrics.percentile_interval(found, judged.groups) for name, found in by_name.items()}
    if judged.bayes is None:
        return ends, (None, None)
    means = {name: float(column.mean()) for name, column in columns.items()}
    learnable = means["prior"] - means["bayes"]
    if learnable <= 0:
        return ends, (None, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = by_name["gain_over_prior"] / (by_name["prior"] - by_name["bayes"])
    ratios = ratios[np.isfinite(ratios)]
    return ends, (means["gain_over_prior"] / learnable, metrics.percentile_interval(ratios, judged.groups))


def _position(judged: _Judged, calibration: FittedLink, intervals: Mapping[str, list | None]) -> dict[str, Any]:
    """Return position bias of the uncalibrated softmax in both orders, or null with the reason.

    `final_flip_rate` is the share of rows whose first choice by the final probabilities changes with the order.
    """
    if judged.orders is None:
        if kind_of(judged.table) == "rewards":
            reason = "each answer is rewarded alone, so the order cannot matter"
        else:
            reason = "the swapped order was not scored (swap_tta: false)"
        return {"position_bias": None, "position_bias_reason": reason}
    ab, ba = judged.orders
    single, both = metrics.log_loss(ab, judged.truth), metrics.log_loss((ab + ba) / 2, judged.truth)
    bias = {
        **metrics.position_bias(ab, ba),
        "final_flip_rate": _final_flip_rate(judged.table, calibration),
        "log_loss_ab": single,
        "log_loss_ba": metrics.log_loss(ba, judged.truth),
        "log_loss_averaged": both,
        "tta_gain": single - both,
        "tta_gain_ci95": intervals["tta_gain"],
    }
    return {"position_bias": bias, "position_bias_reason": None}


def _final_flip_rate(table: pd.DataFrame, calibration: FittedLink) -> float:
    """Return how often the final first choice is another one when the battle is given with A and B exchanged.

    Of averaged orders it may change, too: a link's class bias for A stays with the place, not with the answer.
    """
    exchanged = [VERDICTS.index(name) for name in ("b", "a", "tie")]
    other = table.copy()
    for here, there in ((AB_COLUMNS, BA_COLUMNS), (BA_COLUMNS, AB_COLUMNS)):
        other[list(here)] = table[[there[i] for i in exchanged]].to_numpy()
    final, swapped = calibration.apply(table), calibration.apply(other)[:, exchanged]
    return float((final.argmax(axis=1) != swapped.argmax(axis=1)).mean())


def _slices(judged: _Judged, seed: int) -> dict[str, list[dict]]:
    """Return each family's slices with rows, log loss, its interval, and the prior's log loss on the same rows."""
    families = row_slices(judged.table)
    masks = [mask for family in families.values() for mask in family.values()]
    losses, prior = judged.losses(judged.model), judged.losses(judged.baselines["prior"])
    if not masks:
        return {name: [] for name in families}
    weights = np.column_stack(masks).astype(np.float64)
    bootstrap = metrics.GroupBootstrap(judged.groups, seed)
    samples = iter(bootstrap.samples(np.tile(losses[:, None], len(masks)), weights).T)
    return {
        name: [
            {
                "name": label,
                "rows": int(mask.sum()),
                "log_loss": float(losses[mask].mean()),
                "log_loss_ci95": metrics.percentile_interval(next(samples), judged.groups, mask),
                "prior": float(prior[mask].mean()),
            }
            for label, mask in family.items()
        ]
        for name, family in families.items()
    }


def _worst(judged: _Judged) -> list[dict]:
    """Return the rows that cost most, highest loss first."""
    losses = judged.losses(judged.model)
    ids, verdicts = _ids(judged.table), judged.table["verdict"].tolist()
    return [
        {
            "id": ids[row],
            "verdict": verdicts[row],
            "probabilities": dict(zip(VERDICTS, judged.model[row], strict=True)),
            "log_loss": losses[row],
        }
        for row in np.argsort(-losses, kind="stable")[:LISTED]
    ]


def _most_biased(judged: _Judged) -> list[dict]:
    """Return the rows whose probability of A moved most when the answers changed places."""
    if judged.orders is None:
        return []
    ab, ba = judged.orders
    moved, ids = np.abs(ab[:, 0] - ba[:, 0]), _ids(judged.table)
    return [
        {"id": ids[row], "change": moved[row], "a_first": ab[row], "b_first": ba[row]}
        for row in np.argsort(-moved, kind="stable")[:LISTED]
    ]


def _truncation(judged: _Judged, audit: Mapping[str, Any]) -> dict[str, Any]:
    """Return the audit's truncation, and how many of the judged rows were cut and what they cost."""
    found = dict(audit.get("truncation") or {})
    if "cut" not in judged.table:
        return found
    cut = judged.table["cut"].fillna(False).to_numpy(dtype=bool)
    losses = judged.losses(judged.model)
    found["judged"] = {
        "rows_cut": int(cut.sum()),
        "rows_cut_share": float(cut.mean()),
        "log_loss_cut": float(losses[cut].mean()) if cut.any() else None,
        "log_loss_whole": float(losses[~cut].mean()) if not cut.all() else None,
    }
    return found


def _weighted_to_target(judged: _Judged, calibration: FittedLink, seed: int) -> dict[str, Any] | None:
    """Estimate the corrected log loss under the declared prior.

    Each row counts (declared share / observed share) of its class.
    """
    if calibration.target_prior is None:
        return None
    target = np.array([calibration.target_prior[name] for name in VERDICTS])
    observed = np.bincount(judged.truth, minlength=3) / len(judged.truth)
    unseen = [name for code, name in enumerate(VERDICTS) if observed[code] == 0 and target[code] > 0]
    found = {"declared": _named(target), "source": dict(calibration.source_prior)}
    if unseen:
        reason = f"no judged row of class {', '.join(unseen)}: the corrected log loss cannot be estimated here"
        return {**found, "log_loss": None, "log_loss_ci95": None, "prior": None, "reason": reason}
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(observed > 0, target / observed, 0.0)[judged.truth]
    model = judged.losses(correct_prior(judged.model, found["source"], found["declared"]))
    prior = -np.log(np.clip(target, metrics.EPS, 1))[judged.truth]
    return {
        **found,
        "log_loss": float(np.average(model, weights=weights)),
        "log_loss_ci95": metrics.GroupBootstrap(judged.groups, seed).interval(model, weights),
        "log_loss_uncorrected": float(np.average(judged.losses(judged.model), weights=weights)),
        "prior": float(np.average(prior, weights=weights)),
        "reason": "estimated on these rows, weighted to the declared class shares",
    }


def _judged(
    scores: pd.DataFrame,
    probabilities: np.ndarray,
    train_rows: pd.DataFrame,
    texts: pd.DataFrame,
    truth: pd.DataFrame | None,
    corrected: Mapping[str, float] | None,
    seed: int,
) -> _Judged:
    """Put the rows with a verdict beside the baselines' and the true probabilities."""
    codes = metrics.verdict_codes(scores["verdict"])
    known = codes >= 0
    if not known.any():
        raise ArenaError(
            "no row has a verdict to judge by",
            where="scores",
            remedy="report on rows with votes, such as the validation fold",
        )
    table = scores[known].reset_index(drop=True)
    rows = texts.set_index(texts["id"].astype(str)).loc[_ids(table)]
    baselines = baseline_ladder(train_rows, rows, seed)
    if corrected is not None:
        source = _named(smoothed_prior(metrics.verdict_codes(train_rows["verdict"])))
        for name in set(baselines) - {"uniform"}:
            baselines[name] = correct_prior(baselines[name], source, corrected)
    orders = None
    if kind_of(table) == "logits" and has_both_orders(table):
        raw_scores(table, orders=2)  # names the rows that lack one of the orders
        orders = tuple(softmax(table[list(names)].to_numpy(np.float64)) for names in (AB_COLUMNS, BA_COLUMNS))
    return _Judged(
        table,
        codes[known],
        metrics.as_groups(table["group"]),
        probabilities[known],
        baselines,
        None if truth is None else probabilities_of(truth, _ids(table)),
        orders,
    )


def _check(scores: pd.DataFrame, texts: pd.DataFrame) -> None:
    """Raise ArenaError where ids repeat or a scored row has no text."""
    ids = scores["id"].astype(str)
    if ids.duplicated().any():
        raise ArenaError(
            f"id {name_of(ids[ids.duplicated()].iloc[0])} occurs twice", where="scores", remedy="score the stage again"
        )
    have = texts["id"].astype(str)
    absent = ids[~ids.isin(have)]
    if len(absent) or have.duplicated().any():
        what = f"no text for id {name_of(absent.iloc[0])}" if len(absent) else "an id occurs twice"
        raise ArenaError(what, where="battles", remedy="prepare the data again, then score again")


def _ids(table: pd.DataFrame) -> list[str]:
    return table["id"].astype(str).tolist()


def _counts(truth: np.ndarray) -> dict[str, int]:
    return {name: int((truth == code).sum()) for code, name in enumerate(VERDICTS)}


def _named(shares: np.ndarray) -> dict[str, float]:
    return dict(zip(VERDICTS, map(float, shares), strict=True))


def _if(values: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {key: values[key]} if key in values else {}


def _entropy(probabilities: np.ndarray) -> float:
    """Return the mean entropy in nats: the expected log loss of the true probabilities."""
    return float(-(probabilities * np.log(np.clip(probabilities, metrics.EPS, 1))).sum(axis=1).mean())


def _plain(value: Any) -> Any:
    """Return the same as plain JSON values; what is not a finite number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
