"""The report of one stage as numbers: what it reached, beside its baselines, and where it is weak.

report, probabilities, calibration = build_report(about={"stage": "sft", …}, scores=…, …)
write_json(folder / "report.json", report)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from common.battle import VERDICTS
from common.console import name_of
from common.errors import ArenaError
from data_prep.verdict_shares import probabilities_of
from scoring import metrics
from scoring.agreement import agreement_curve
from scoring.baselines import baseline_notes, baseline_probabilities
from scoring.calibration import (
    AB_COLUMNS,
    BA_COLUMNS,
    Calibration,
    FittedLink,
    blend,
    calibrate,
    has_both_orders,
    kind_of,
    raw_scores,
)
from scoring.links import correct_prior, smoothed_prior, softmax
from scoring.metrics import slice_losses
from scoring.report.findings import flags_of

# How many rows the lists of worst and most biased rows hold.
LISTED = 20


def build_report(
    *,
    about: Mapping[str, Any],
    scores: pd.DataFrame,
    train_rows: pd.DataFrame,
    valid_texts: pd.DataFrame,
    truth: pd.DataFrame | None,
    truncation: Mapping[str, Any],
    swap_tta: bool,
    seed: int,
    target_prior: Mapping[str, float] | None = None,
    test_rows: int = 0,
    untrained: Mapping[str, np.ndarray] | None = None,
) -> tuple[dict[str, Any], np.ndarray, Calibration]:
    """Judge one stage's scores and return (report.json's content, probabilities [rows, 3], calibration).

    `about` goes into the report as it is: experiment, stage, merge_gate, checks, loss_curve, provenance, and scoring:
    how the rows were scored. `scores` one row a battle; `train_rows` and `valid_texts` as `baselines` describes,
    `valid_texts` with every id of `scores`; `truth` (synthetic arena): id and the true probabilities, in
    `PROBABILITY_COLUMNS`; `truncation` the audit's, `test_rows` the size of the test set.
    The rows are judged by the calibration's cross-fitted probabilities, before any `target_prior`, because these
    rows have their own prior; what the correction would reach is estimated by weighting. `untrained`: what other
    stages say of the rows [rows, 3], which joins the baselines. `beats_prior` is true where the paired 95% interval of
    the gain over the class prior lies above 0 and the log loss is below that of a third for each class.
    Raises ArenaError for broken scores (naming ids), rows without text, or no row with a verdict.
    """
    _require_texts(scores, valid_texts)
    train_truth = metrics.verdict_codes(train_rows["verdict"])
    train_prior = _by_class(smoothed_prior(train_truth))
    calibration = calibrate(scores, seed=seed, swap_tta=swap_tta, train_prior=train_prior, target_prior=target_prior)
    fitted = calibration.used
    judged = _judged(scores, fitted.probabilities, train_rows, valid_texts, truth, seed, untrained or {})
    report = {
        "set": "valid",
        "folds": [],
        "checkpoint": None,
        **about,
        **_quality(judged, fitted),
        "ece_by_chance": metrics.ece_by_chance(judged.model, seed=seed),
        **calibration.to_json(),
        "target_prior": _weighted_to_target(judged, fitted),
        "agreement": agreement_curve(judged.model, judged.truth, judged.bootstrap.groups, seed),
        "truncation": _truncation(judged, truncation),
        "train_class_counts": _counts(train_truth),
        "baseline_notes": {
            k: v for k, v in baseline_notes(int((train_truth >= 0).sum())).items() if k in judged.baselines
        },
        "provenance": {**about["provenance"], "report": {"seed": seed, "bootstrap_draws": metrics.DRAWS}},
    }
    report["flags"] = flags_of(report, test_rows)
    return _jsonable(report), fitted.probabilities, calibration


@dataclass(frozen=True)
class _Judged:
    """The rows with a verdict: their table, class codes [n], and the probabilities [n, 3] of all that is compared.

    `orders`: the uncalibrated softmax of both orders; `bootstrap` draws the same rows for every interval.
    """

    table: pd.DataFrame
    truth: np.ndarray
    model: np.ndarray
    baselines: dict[str, np.ndarray]
    bayes: np.ndarray | None
    orders: tuple[np.ndarray, np.ndarray] | None
    bootstrap: metrics.GroupBootstrap

    def losses(self, probabilities: np.ndarray) -> np.ndarray:
        return metrics.row_losses(probabilities, self.truth)

    def interval(self, samples: np.ndarray, weights: np.ndarray | None = None) -> list[float] | None:
        return metrics.percentile_interval(samples, self.bootstrap.groups, weights)


def _judged(
    scores: pd.DataFrame,
    probabilities: np.ndarray,
    train_rows: pd.DataFrame,
    texts: pd.DataFrame,
    truth: pd.DataFrame | None,
    seed: int,
    untrained: Mapping[str, np.ndarray],
) -> _Judged:
    """Return the rows with a verdict beside the baselines' and the true probabilities."""
    codes = metrics.verdict_codes(scores["verdict"])
    known = codes >= 0
    if not known.any():
        raise ArenaError(
            "no row has a verdict to judge by",
            where="scores",
            remedy="report on rows with votes, such as the validation fold",
        )
    table = scores[known].reset_index(drop=True)
    ids = table["id"].astype(str).tolist()
    texts = texts.set_index(texts["id"].astype(str)).loc[ids]
    baselines = baseline_probabilities(train_rows, texts, seed) | {name: p[known] for name, p in untrained.items()}
    orders = None
    if kind_of(table) == "logits" and has_both_orders(table):
        raw_scores(table, orders=2)  # raises for rows that lack one of the orders
        orders = tuple(softmax(table[list(names)].to_numpy(np.float64)) for names in (AB_COLUMNS, BA_COLUMNS))
    return _Judged(
        table=table,
        truth=codes[known],
        model=probabilities[known],
        baselines=baselines,
        bayes=None if truth is None else probabilities_of(truth, ids),
        orders=orders,
        bootstrap=metrics.GroupBootstrap(metrics.as_groups(table["group"]), seed),
    )


def _quality(judged: _Judged, fitted: FittedLink) -> dict[str, Any]:
    """Return every figure that comes from probabilities and verdicts."""
    truth, model = judged.truth, judged.model
    intervals, share, share_interval = _intervals(judged)
    baselines = {name: metrics.log_loss(p, truth) for name, p in judged.baselines.items()}
    loss, gain, losses = metrics.log_loss(model, truth), intervals["gain_over_prior"], judged.losses(model)
    biased = []
    if judged.orders:  # whose probability of A moved most when the answers changed places
        ab, ba = judged.orders
        moved = np.abs(ab[:, 0] - ba[:, 0])
        biased = _listed(judged, moved, lambda row: {"change": moved[row], "a_first": ab[row], "b_first": ba[row]})
    return {
        "rows": len(truth),
        "class_counts": _counts(truth),
        "log_loss": loss,
        "log_loss_ci95": intervals["model"],
        "accuracy": metrics.accuracy(model, truth),
        "ece": metrics.ece(model, truth),
        "per_class_log_loss": metrics.per_class_log_loss(model, truth),
        "baselines": baselines,
        "baselines_ci95": {name: ends for name, ends in intervals.items() if name in baselines or name == "bayes"},
        # Uniform and prior both ignore the texts: to beat a prior that is itself worse than 1/3 each is no success.
        "beats_prior": gain is not None and gain[0] > 0 and loss < baselines["uniform"],
        "gain_over_prior": baselines["prior"] - loss,
        "gain_over_prior_ci95": gain,
        "bayes": None if judged.bayes is None else metrics.log_loss(judged.bayes, truth),
        "learned_share": share,
        "learned_share_ci95": share_interval,
        "with_baselines": _with_baselines(judged, loss, baselines),
        **_position(judged, fitted, intervals),
        "reliability": metrics.reliability(model, truth),
        "confusion": metrics.confusion(model, truth),
        "slices": slice_losses(judged.table, losses, judged.losses(judged.baselines["prior"]), judged.bootstrap),
        "worst": _listed(judged, losses, lambda row: {"probabilities": _by_class(model[row]), "log_loss": losses[row]}),
        "most_biased": biased,
    }


def _with_baselines(judged: _Judged, loss: float, baselines: Mapping[str, float]) -> dict[str, Any] | None:
    """Return what `ensemble` makes of the judge and the baselines that are better; None where none is."""
    better = {name: judged.baselines[name] for name in ("length", "tfidf") if baselines[name] < loss}
    groups, seed = judged.bootstrap.groups, judged.bootstrap.seed
    mixed = blend({"judge": judged.model, **better}, judged.truth, groups, seed)[0] if better else None
    return None if mixed is None else {"names": list(better), "log_loss": metrics.log_loss(mixed, judged.truth)}


def _intervals(judged: _Judged) -> tuple[dict[str, list | None], float | None, list | None]:
    """Return the 95% interval of each mean loss, all from the same draws, and the learned share with its interval."""
    columns = {name: judged.losses(p) for name, p in judged.baselines.items()}
    columns["model"] = judged.losses(judged.model)
    columns["gain_over_prior"] = columns["prior"] - columns["model"]
    if judged.bayes is not None:
        columns["bayes"] = judged.losses(judged.bayes)
    if judged.orders:
        ab, ba = judged.orders
        columns["tta_gain"] = judged.losses(ab) - judged.losses((ab + ba) / 2)
    samples = dict(zip(columns, judged.bootstrap.samples(np.column_stack(list(columns.values()))).T, strict=True))
    intervals = {name: judged.interval(found) for name, found in samples.items()}
    if judged.bayes is None or columns["prior"].mean() <= columns["bayes"].mean():
        return intervals, None, None
    share = columns["gain_over_prior"].mean() / (columns["prior"].mean() - columns["bayes"].mean())
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = samples["gain_over_prior"] / (samples["prior"] - samples["bayes"])
    return intervals, float(share), judged.interval(shares[np.isfinite(shares)])


def _position(judged: _Judged, fitted: FittedLink, intervals: Mapping[str, list | None]) -> dict[str, Any]:
    """Return position bias of the uncalibrated softmax in both orders, or null with the reason.

    `final_flip_rate` is the share of rows whose first choice by the final probabilities changes with the order.
    """
    if judged.orders is None:
        alone, missing = "each answer is rewarded alone", "the swapped order was not scored"
        return {"position_bias": None, "position_bias_reason": missing if fitted.kind == "logits" else alone}
    ab, ba = judged.orders
    bias = {
        **metrics.position_bias(ab, ba),
        "final_flip_rate": _final_flip_rate(judged.table, fitted),
        "tta_gain": metrics.log_loss(ab, judged.truth) - metrics.log_loss((ab + ba) / 2, judged.truth),
        "tta_gain_ci95": intervals["tta_gain"],
    }
    return {"position_bias": bias, "position_bias_reason": None}


def _final_flip_rate(table: pd.DataFrame, fitted: FittedLink) -> float:
    """Return how often the final first choice changes when A and B are exchanged.

    It may change even where both orders are averaged: a link's class bias for A stays with the place.
    """
    exchanged = [VERDICTS.index(name) for name in ("b", "a", "tie")]
    other = table.copy()
    for here, there in ((AB_COLUMNS, BA_COLUMNS), (BA_COLUMNS, AB_COLUMNS)):
        other[list(here)] = table[[there[i] for i in exchanged]].to_numpy()
    final, swapped = fitted.apply(table), fitted.apply(other)[:, exchanged]
    return float((final.argmax(axis=1) != swapped.argmax(axis=1)).mean())


def _listed(judged: _Judged, cost: np.ndarray, describe: Callable[[int], dict[str, Any]]) -> list[dict[str, Any]]:
    """Return id, verdict and what `describe` says of the rows with the highest `cost` [n], highest first."""
    ids, verdicts = judged.table["id"].astype(str), judged.table["verdict"]
    rows = np.argsort(-cost, kind="stable")[:LISTED]
    return [{"id": ids.iloc[row], "verdict": verdicts.iloc[row], **describe(row)} for row in rows]


def _truncation(judged: _Judged, audited: Mapping[str, Any]) -> dict[str, Any]:
    """Return the audit's truncation, and how many of the judged rows were cut and what they cost."""
    found = dict(audited)
    if "cut" in judged.table:
        cut = judged.table["cut"].fillna(False).to_numpy(dtype=bool)
        losses = judged.losses(judged.model)
        found["judged"] = {
            "rows_cut": int(cut.sum()),
            "rows_cut_share": float(cut.mean()),
            "log_loss_cut": float(losses[cut].mean()) if cut.any() else None,
            "log_loss_whole": float(losses[~cut].mean()) if not cut.all() else None,
        }
    return found


def _weighted_to_target(judged: _Judged, fitted: FittedLink) -> dict[str, Any] | None:
    """Estimate the corrected log loss under the declared prior.

    Each row counts (declared share / observed share) of its class.
    """
    if fitted.target_prior is None:
        return None
    target = np.array([fitted.target_prior[name] for name in VERDICTS])
    observed = np.bincount(judged.truth, minlength=3) / len(judged.truth)
    found = {"declared": fitted.target_prior, "source": fitted.source_prior}
    unseen = [name for code, name in enumerate(VERDICTS) if observed[code] == 0 and target[code] > 0]
    if unseen:
        reason = f"no judged row of class {', '.join(unseen)}"
        return {**found, "log_loss": None, "log_loss_ci95": None, "prior": None, "reason": reason}
    with np.errstate(divide="ignore", invalid="ignore"):
        weights = np.where(observed > 0, target / observed, 0.0)[judged.truth]
    model = judged.losses(correct_prior(judged.model, found["source"], found["declared"]))
    prior = -np.log(np.clip(target, metrics.EPS, 1))[judged.truth]
    return {
        **found,
        "log_loss": float(np.average(model, weights=weights)),
        "log_loss_ci95": judged.bootstrap.interval(model, weights),
        "log_loss_uncorrected": float(np.average(judged.losses(judged.model), weights=weights)),
        "prior": float(np.average(prior, weights=weights)),
        "reason": "estimated on these rows, weighted to the declared class shares",
    }


def _require_texts(scores: pd.DataFrame, texts: pd.DataFrame) -> None:
    """Raise ArenaError where ids repeat or a scored row has no text."""
    for frame, what in ((scores, "scores"), (texts, "battles")):
        if len(twice := frame["id"][frame["id"].duplicated()]):
            raise ArenaError(f"id {name_of(twice.iloc[0])} occurs twice", where=what, remedy="score the stage again")
    if len(absent := scores["id"][~scores["id"].isin(texts["id"])]):
        what, remedy = f"no text for id {name_of(absent.iloc[0])}", "prepare the data again, then score again"
        raise ArenaError(what, where="battles", remedy=remedy)


def _counts(truth: np.ndarray) -> dict[str, int]:
    return {name: int((truth == code).sum()) for code, name in enumerate(VERDICTS)}


def _by_class(values: Sequence[float]) -> dict[str, float]:
    return dict(zip(VERDICTS, map(float, values), strict=True))


def _jsonable(value: Any) -> Any:
    """Return the same as plain JSON values; what is not a finite number becomes null."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_jsonable(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
