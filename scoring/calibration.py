"""Calibration: which link turns a stage's raw scores into probabilities, and whether it is worth keeping.

A link is fitted on the validation fold, judged by cross-fitting on prompt-grouped parts, and kept only where that
lowers the log loss. Rows that were scored in one order of the answers and rows that were scored in both have a link
each, because the mean of two orders is less sure of itself than one. The formulas are in scoring.links.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
from sklearn.model_selection import GroupKFold

from common.battle import VERDICTS
from common.errors import ArenaError
from scoring.links import (
    LARGEST_SCORE,
    DavidsonLink,
    Link,
    SoftmaxLink,
    correct_prior,
    fit_conditional_logit,
    link_from_json,
    log_softmax,
    smoothed_prior,
    softmax,
)
from scoring.metrics import EPS, as_groups, log_loss, verdict_codes

Kind = Literal["logits", "rewards"]
Shares = Mapping[str, float]
# The order of the columns is that of VERDICTS.
AB_COLUMNS = tuple(f"ab_{name}" for name in VERDICTS)
BA_COLUMNS = tuple(f"ba_{name}" for name in VERDICTS)
REWARD_COLUMNS = ("reward_a", "reward_b")
LENGTH_COLUMNS = ("chars_a", "chars_b")
FEWEST_ROWS = 50
PARTS = 5
# The link of each kind, what a row gets where it is not kept, and what it must beat. The latter is not the baselines'
# prior, which comes from the training rows: both sides of the choice see the other parts of the fold only.
_LINK_NAMES = {"logits": "temperature and class bias", "rewards": "Davidson link"}
_WITHOUT = {"logits": "the plain softmax stays", "rewards": "every row gets the class prior"}
_RIVALS = {"logits": "the plain softmax", "rewards": "a class prior fitted in the same way"}
# What a fitted link and its JSON hold alike.
_PLAIN = ("kept", "reason", "log_loss_before", "log_loss_cross_fitted", "rows", "source_prior", "target_prior")
# The smallest probability whose logarithm enters the blend: one certain mistake must not rule the weights.
_FLOOR = 1e-6
# Probabilities [rows, 3], None where nothing can be blended, and a dictionary with `weights` and `reason`.
Blend = tuple[np.ndarray | None, dict[str, Any]]
_ORDERS = {"one_order": 1, "both_orders": 2}  # as report.json names them


@dataclass(frozen=True)
class RawScores:
    """Checked raw scores as `inputs` of a link: (logits [rows, 3],) or (reward difference, log-length difference)."""

    kind: Kind
    inputs: tuple[np.ndarray, ...]

    def at(self, rows: np.ndarray) -> RawScores:
        """Return the scores of some rows (a mask or positions)."""
        return RawScores(self.kind, tuple(column[rows] for column in self.inputs))

    def fit(self, truth: np.ndarray) -> Link:
        """Fit the link of this kind on class codes [rows]."""
        return (SoftmaxLink if self.kind == "logits" else DavidsonLink).fit(*self.inputs, truth)

    def probabilities(self, link: Link | None, prior: np.ndarray) -> np.ndarray:
        """Return [rows, 3] probabilities; without a link the softmax of logits, and the prior [3] for rewards."""
        if link is None and self.kind == "rewards":
            return np.tile(prior, (len(self.inputs[0]), 1))
        return (link or SoftmaxLink()).probabilities(*self.inputs)


def kind_of(scores: pd.DataFrame) -> Kind:
    """Return whether a score table holds rewards or label logits."""
    return "rewards" if set(REWARD_COLUMNS) <= set(scores.columns) else "logits"


def has_both_orders(scores: pd.DataFrame) -> bool:
    """Return whether the swapped order was scored: its columns exist and are not all NaN."""
    return set(BA_COLUMNS) <= set(scores) and bool(scores[list(BA_COLUMNS)].notna().any(axis=None))


def raw_scores(scores: pd.DataFrame, orders: int = 1) -> RawScores:
    """Return the checked raw scores of a score table (one row a battle).

    With two `orders` the logits are the logarithm of the mean of both orders' softmax, so that the plain softmax gives
    the averaged probabilities. Raises ArenaError that names a missing column, or the ids whose scores are NaN or
    infinite.
    """
    kind = kind_of(scores)
    if kind == "logits":
        logits = _finite(scores, AB_COLUMNS)
        if orders == 2:
            logits = np.logaddexp(log_softmax(logits), log_softmax(_finite(scores, BA_COLUMNS))) - np.log(2)
        return RawScores(kind, (logits,))
    rewards, lengths = _finite(scores, REWARD_COLUMNS), _finite(scores, LENGTH_COLUMNS)
    return RawScores(kind, (rewards[:, 0] - rewards[:, 1], np.log1p(lengths[:, 0]) - np.log1p(lengths[:, 1])))


@dataclass(frozen=True)
class FittedLink:
    """How rows with this many `orders` become probabilities: a link where one was kept, else what `reason` says.

    `log_loss_before`: of the plain softmax (label logits) or of the class prior (rewards), on the labelled rows;
    `log_loss_cross_fitted`: of links fitted without the row's part; `probabilities` [rows, 3]: the cross-fitted
    ones where the link was kept, for judging, and free of any target prior. `source_prior`: the mean of these
    probabilities on the labelled rows, which is what the judge takes the class shares to be; `target_prior`, where
    declared, is what `apply` corrects them to.
    """

    kind: Kind
    orders: int
    kept: bool
    link: Link | None
    reason: str
    log_loss_before: float | None
    log_loss_cross_fitted: float | None
    rows: int
    source_prior: Shares
    target_prior: Shares | None
    probabilities: np.ndarray

    @property
    def swap_tta(self) -> bool:
        """Whether it is for the mean of both orders."""
        return self.orders == 2

    def apply(self, scores: pd.DataFrame) -> np.ndarray:
        """Return final [rows, 3] probabilities of a score table of the same stage; raises as `raw_scores`."""
        prior = np.array([self.source_prior[name] for name in VERDICTS])
        found = raw_scores(scores, self.orders).probabilities(self.link, prior)
        return found if self.target_prior is None else correct_prior(found, self.source_prior, self.target_prior)

    def to_json(self) -> dict[str, Any]:
        """Return everything but the probabilities as plain values; `fitted_from_json` is the inverse."""
        return {
            "kind": _LINK_NAMES[self.kind],
            "scores": self.kind,
            "link": self.link.to_json() if self.link else None,
            "swap_tta": self.swap_tta,
            **{name: getattr(self, name) for name in _PLAIN},
        }


@dataclass(frozen=True)
class Calibration:
    """The fitted links of a stage by the number of orders that rows were scored in, 1 or 2.

    `orders` says which of them the stage's own figures are made with: 2 where it averages both orders (swap_tta).
    """

    links: Mapping[int, FittedLink]
    orders: int

    @property
    def used(self) -> FittedLink:
        """The link that the stage's own figures are made with."""
        return self.links[self.orders]

    def apply(self, scores: pd.DataFrame) -> np.ndarray:
        """Return final [rows, 3] probabilities by the link for the number of orders that the rows were scored in."""
        both = scores.reindex(columns=list(BA_COLUMNS)).notna().all(axis=None)
        orders = 2 if both and len(scores) else 1
        self.require(orders)
        return self.links[orders].apply(scores)

    def require(self, orders: int) -> None:
        """Raise ArenaError where there is no link for rows that were scored in so many orders."""
        if orders not in self.links:
            raise ArenaError(
                "the report holds no calibration for rows with this number of orders",
                where="calibrations",
                remedy="score the stage again (run.py score --fresh), or without --time-limit",
            )

    def to_json(self) -> dict[str, Any]:
        """Return what report.json keeps under `calibration` and `calibrations`; `from_json` is the inverse."""
        each = {n: link.to_json() for n, link in self.links.items()}
        return {
            "calibration": each[self.orders],
            "calibrations": {name: each.get(n) for name, n in _ORDERS.items()},
        }

    @classmethod
    def from_json(cls, report: Mapping[str, Any]) -> Calibration:
        """Return the calibration of a report, without its probabilities; raises ArenaError if it is broken."""
        used = _fitted_from_json(report["calibration"])
        others = report.get("calibrations") or {}
        links = {n: _fitted_from_json(others[name]) for name, n in _ORDERS.items() if others.get(name)}
        return cls({**links, used.orders: used}, used.orders)


def _fitted_from_json(value: Mapping[str, Any]) -> FittedLink:
    try:
        for key in ("source_prior", "target_prior"):
            if (key == "source_prior" or value[key]) and not _are_shares(value[key]):
                raise ValueError(f"{key} {value[key]!r} is not three shares that sum to 1")
        return FittedLink(
            **{name: value[name] for name in _PLAIN},
            kind=value["scores"],
            orders=2 if value["swap_tta"] else 1,
            link=link_from_json(value["link"]) if value["link"] else None,
            probabilities=np.empty((0, 3)),
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArenaError(
            f"the saved calibration lacks a value or holds a wrong one ({error})",
            where="calibration",
            remedy="score the stage again",
        ) from None


def _are_shares(prior: Any) -> bool:
    try:
        shares = np.array([float(prior[name]) for name in VERDICTS])
    except (TypeError, ValueError, LookupError):
        return False
    return len(prior) == len(shares) and bool((shares >= 0).all()) and abs(shares.sum() - 1) <= 1e-6


def calibrate(
    scores: pd.DataFrame,
    *,
    seed: int,
    swap_tta: bool = False,
    train_prior: Shares | None = None,
    target_prior: Shares | None = None,
) -> Calibration:
    """Fit a link on the validation fold for each number of orders, and keep it where its cross-fitted loss is lower.

    `scores`: one row a battle with its `group` and `verdict` (rows without a verdict fit nothing).
    `train_prior`: the class shares of the training rows, which stand in where no link can be fitted.
    `target_prior`: the class shares of the rows to come, where they differ from these.
    Without a link label logits go through a plain softmax, and rewards, which have no such identity, become the
    class prior; `reason` says so. Raises ArenaError for NaN or infinite scores (naming ids).
    """
    swapped = kind_of(scores) == "logits" and has_both_orders(scores)
    if swap_tta and not swapped:
        raise ArenaError(
            "the mean of both orders is wanted, but the swapped order was not scored",
            where="scores",
            remedy="score again with swap_tta: true, or set it to false",
        )
    links = {n: _fit(scores, n, seed, train_prior, target_prior) for n in ((1, 2) if swapped else (1,))}
    return Calibration(links, 2 if swap_tta else 1)


def _fit(scores: pd.DataFrame, orders: int, seed: int, train: Shares | None, target: Shares | None) -> FittedLink:
    raw, truth, groups = raw_scores(scores, orders), verdict_codes(scores["verdict"]), as_groups(scores["group"])
    known = np.flatnonzero(truth >= 0)
    prior = np.array([train[name] for name in VERDICTS]) if train else smoothed_prior(truth)
    judged, codes, parts = raw.at(known), truth[known], groups[known]
    # Without a tie, Davidson's link is Bradley and Terry's.
    reason = too_few_to_fit(codes, parts, VERDICTS if raw.kind == "logits" else ("a", "b"))
    before = log_loss(judged.probabilities(None, prior), codes) if len(known) else None
    kept, link, crossed, after = False, None, None, None
    if reason:
        reason = f"not calibrated: {reason}; {_WITHOUT[raw.kind]}"
    else:
        crossed, base = _cross_fitted(judged, codes, parts, seed)
        before, after = log_loss(base, codes), log_loss(crossed, codes)
        kept = after < before
        link = judged.fit(codes) if kept else None
        figures = f"cross-fitted log loss {after:.4f} against {before:.4f} of {_RIVALS[raw.kind]}"
        verb, then = ("kept", "") if kept else ("did not keep", f"; {_WITHOUT[raw.kind]}")
        reason = f"{verb} {_LINK_NAMES[raw.kind]}: {figures}{then}"
    probabilities = raw.probabilities(link, prior)
    if kept:
        probabilities[known] = crossed
    return FittedLink(
        kind=raw.kind,
        orders=orders,
        kept=kept,
        link=link,
        reason=reason,
        log_loss_before=before,
        log_loss_cross_fitted=after,
        rows=len(known),
        source_prior=_marginal(probabilities[known] if len(known) else prior[None]),
        target_prior=target,
        probabilities=probabilities,
    )


def blend(
    models: Mapping[str, np.ndarray],
    truth: np.ndarray,
    groups: np.ndarray,
    seed: int,
    given: np.ndarray | None = None,
) -> Blend:
    """Return cross-fitted probabilities [rows, 3] of the weighted mean of log probabilities, and its description.

    p(c) ∝ Π p_m(c)^w_m with w_m ≥ 0: a logarithmic opinion pool (Genest & Zidek, Statistical Science 1986). The
    weights need not sum to 1, so that the blend may be sharper than its parts; where it is not better than the best of
    them, that one has all the weight. `given` weights are not fitted.
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
    losses = {name: log_loss(p, truth) for name, p in models.items()}
    best, fitted = min(losses, key=losses.get), log_loss(mixed, truth)
    if fitted >= losses[best]:
        reason = f"only {best}, of log loss {losses[best]:.4f}: a fitted blend has {fitted:.4f} (cross-fitted)"
        return models[best], {"weights": {name: float(name == best) for name in models}, "reason": reason}
    return mixed, {"weights": weights, "reason": "cross-fitted; the weights shown are those of all rows"}


def pool(members: Iterable[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Return the blend [rows, 3] of members' probabilities with these weights."""
    return softmax(_design(members) @ weights)


def _design(members: Iterable[np.ndarray]) -> np.ndarray:
    return np.stack([np.log(np.clip(p, _FLOOR, 1)) for p in members], axis=2)


def grouped_parts(groups: np.ndarray, seed: int, parts: int = PARTS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows to fit on, rows to judge) for each part; the rows of one group are never on both sides."""
    codes, names = pd.factorize(pd.Series(groups), use_na_sentinel=False)
    folds = GroupKFold(min(parts, len(names)), shuffle=True, random_state=seed)
    yield from folds.split(codes, groups=codes)


def _cross_fitted(raw: RawScores, truth: np.ndarray, groups: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what links say that were fitted without a row's part, and what they must beat, both [rows, 3]."""
    crossed, beaten = np.empty((len(truth), 3)), np.empty((len(truth), 3))
    for fit, judge in grouped_parts(groups, seed):
        prior = smoothed_prior(truth[fit])
        crossed[judge] = raw.at(judge).probabilities(raw.at(fit).fit(truth[fit]), prior)
        beaten[judge] = raw.at(judge).probabilities(None, prior)
    return crossed, beaten


def too_few_to_fit(truth: np.ndarray, groups: np.ndarray, classes: Iterable[str] = VERDICTS) -> str | None:
    """Return why nothing can be fitted and cross-fitted on these rows, or None; `classes` are those that it needs."""
    missing = [name for name in classes if not (truth == VERDICTS.index(name)).any()]
    if len(truth) < FEWEST_ROWS:
        return f"only {len(truth)} validation rows have a verdict, at least {FEWEST_ROWS} are needed"
    if missing:
        return f"the validation fold has no row of class {', '.join(missing)}"
    if len(set(groups.tolist())) < 2:
        return "all validation rows share one prompt, so nothing can be cross-fitted"
    return None


def _marginal(probabilities: np.ndarray) -> Shares:
    """Return the mean of probabilities [rows, 3], no class below machine epsilon.

    The shares that the judge predicts and not those of its training rows: a judge that saw no tie still gives ties
    some share, and dividing by a smaller one would hand every battle to them.
    """
    shares = np.maximum(probabilities.mean(axis=0), EPS)
    return dict(zip(VERDICTS, (shares / shares.sum()).tolist(), strict=True))


def _finite(scores: pd.DataFrame, columns: tuple[str, ...]) -> np.ndarray:
    """Return the columns as float64 [rows, columns]; raises ArenaError for a missing one or what no model gives."""
    if absent := [name for name in columns if name not in scores.columns]:
        raise ArenaError(f"column(s) {', '.join(absent)} are missing", where="scores", remedy="score the stage again")
    values = scores[list(columns)].to_numpy(dtype=np.float64, na_value=np.nan)
    broken = ~(np.abs(values) <= LARGEST_SCORE).all(axis=1)  # also where one is NaN
    if broken.any():
        ids = scores["id"].astype(str).to_numpy()[broken]
        names = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        raise ArenaError(
            f"{len(ids)} row(s) have NaN, infinite or huge {', '.join(columns)}: id {names}",
            where="scores",
            remedy="the model overflowed or is broken: train with a lower learning rate or score in a wider type",
        )
    return values
