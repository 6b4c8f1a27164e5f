"""Calibration: which link turns a stage's raw scores into probabilities, and whether it earns its place.

Fitted on the validation fold, judged by cross-fitting on prompt-grouped parts, kept only where that improves.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from common.battle import VERDICTS
from common.errors import ArenaError
from scoring.links import (
    TIE,
    DavidsonLink,
    Link,
    SoftmaxLink,
    checked_prior,
    correct_prior,
    link_from_json,
    log_softmax,
    smoothed_prior,
)
from scoring.metrics import EPS, as_groups, log_loss, verdict_codes

if TYPE_CHECKING:
    import pandas as pd
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

Kind = Literal["logits", "rewards"]
# The order of the columns is that of VERDICTS.
AB_COLUMNS = tuple(f"ab_{name}" for name in VERDICTS)
BA_COLUMNS = tuple(f"ba_{name}" for name in VERDICTS)
REWARD_COLUMNS = ("reward_a", "reward_b")
LENGTH_COLUMNS = ("chars_a", "chars_b")
FEWEST_ROWS = 50
PARTS = 5
# Far beyond float32; sums of larger ones would overflow float64.
_LARGEST_LOGIT = 1e150
_IDENTITY = SoftmaxLink()
_LINK_NAMES = {"logits": "temperature and class bias", "rewards": "Davidson link"}


@dataclass(frozen=True)
class RawScores:
    """Checked raw scores as `inputs` of a link: (logits [rows, 3],) or (reward difference, log-length difference)."""

    kind: Kind
    inputs: tuple[np.ndarray, ...]

    def __len__(self) -> int:
        return len(self.inputs[0])

    def at(self, rows: np.ndarray) -> RawScores:
        """Return the scores of some rows (a mask or positions)."""
        return RawScores(self.kind, tuple(column[rows] for column in self.inputs))

    def fit(self, truth: np.ndarray) -> Link:
        """Fit the link of this kind on class codes [rows]."""
        return (SoftmaxLink if self.kind == "logits" else DavidsonLink).fit(*self.inputs, truth)

    def through(self, link: Link) -> np.ndarray:
        """Return [rows, 3] probabilities."""
        return link.probabilities(*self.inputs)


def kind_of(scores: pd.DataFrame) -> Kind:
    """Return whether a score table holds label logits or rewards; raises ArenaError if it holds neither or both."""
    logits, rewards = set(AB_COLUMNS) <= set(scores.columns), set(REWARD_COLUMNS) <= set(scores.columns)
    if logits == rewards:
        raise ArenaError(
            f"must hold either {', '.join(AB_COLUMNS)} or {', '.join(REWARD_COLUMNS)}",
            where="scores",
            remedy="score the stage again",
        )
    return "logits" if logits else "rewards"


def has_both_orders(scores: pd.DataFrame) -> bool:
    """Return whether the swapped order was scored: its columns exist and are not all NaN."""
    return set(BA_COLUMNS) <= set(scores.columns) and bool(scores[list(BA_COLUMNS)].notna().any(axis=None))


def raw_scores(scores: pd.DataFrame, kind: Kind, *, swap_tta: bool = False) -> RawScores:
    """Return the checked raw scores of a score table (one row a battle).

    With `swap_tta` the logits are the logarithm of the mean of both orders' softmax, so that the identity link
    gives the averaged probabilities.
    Raises ArenaError that names the ids whose scores are NaN or infinite, or a missing column.
    """
    if kind == "logits":
        if not swap_tta:
            return RawScores(kind, (_finite(scores, AB_COLUMNS),))
        if not has_both_orders(scores):
            raise ArenaError(
                "averaging both orders was asked for, but the swapped order was not scored",
                where="scores",
                remedy="score again with swap_tta: true, or set it to false",
            )
        both = log_softmax(_finite(scores, AB_COLUMNS)), log_softmax(_finite(scores, BA_COLUMNS))
        return RawScores(kind, (np.logaddexp(*both) - np.log(2),))
    rewards, lengths = _finite(scores, REWARD_COLUMNS), _finite(scores, LENGTH_COLUMNS)
    with np.errstate(over="ignore"):
        difference = rewards[:, 0] - rewards[:, 1]
    _refuse(scores, ~np.isfinite(difference), "reward differences that overflow")
    return RawScores(kind, (difference, np.log1p(lengths[:, 0]) - np.log1p(lengths[:, 1])))


@dataclass(frozen=True)
class Calibration:
    """How raw scores of one stage become probabilities: a link where one was kept, else what `reason` says.

    `log_loss_before`: of the identity (label logits) or of the class prior (rewards), on the labelled rows;
    `log_loss_cross_fitted`: of links fitted without the row's part; `probabilities` [rows, 3]: the cross-fitted
    ones where the link was kept, for judging, and free of any target prior. `source_prior` [3]: the mean of these
    probabilities on the labelled rows, which is what the judge takes the class shares to be; `target_prior`, where
    declared, is what `apply` corrects them to.
    """

    kind: Kind
    kept: bool
    link: Link | None
    reason: str
    log_loss_before: float | None
    log_loss_cross_fitted: float | None
    rows: int
    swap_tta: bool
    source_prior: tuple[float, float, float]
    target_prior: tuple[float, float, float] | None
    probabilities: np.ndarray

    def apply(self, scores: pd.DataFrame) -> np.ndarray:
        """Return final [rows, 3] probabilities of a score table of the same stage; raises as `raw_scores`."""
        found = self.uncorrected(scores)
        if self.target_prior is None:
            return found
        return correct_prior(found, _named(self.source_prior), _named(self.target_prior))

    def uncorrected(self, scores: pd.DataFrame) -> np.ndarray:
        """Return what `apply` returns before the target prior."""
        raw = raw_scores(scores, self.kind, swap_tta=self.swap_tta)
        return _through(raw, self.link, np.array(self.source_prior))

    def to_json(self) -> dict[str, Any]:
        """Return everything but the probabilities as plain values; `calibration_from_json` is the inverse."""
        return {
            "kind": _LINK_NAMES[self.kind],
            "scores": self.kind,
            "kept": self.kept,
            "reason": self.reason,
            "parameters": self.link.parameters() if self.link else None,
            "link": self.link.to_json() if self.link else None,
            "log_loss_before": self.log_loss_before,
            "log_loss_cross_fitted": self.log_loss_cross_fitted,
            "rows": self.rows,
            "swap_tta": self.swap_tta,
            "source_prior": _named(self.source_prior),
            "target_prior": _named(self.target_prior) if self.target_prior else None,
        }


def calibration_from_json(value: Mapping[str, Any]) -> Calibration:
    """Return the calibration that `to_json` described, without its probabilities; raises ArenaError if broken."""
    try:
        priors = {
            key: tuple(checked_prior(value[key], key).tolist()) if value[key] else None
            for key in ("source_prior", "target_prior")
        }
        link = link_from_json(value["link"]) if value["link"] else None
        names = ("kept", "reason", "log_loss_before", "log_loss_cross_fitted", "rows", "swap_tta")
        plain = {"kind": value["scores"], **{name: value[name] for name in names}}
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ArenaError(
            f"the saved calibration lacks a value or holds a wrong one ({error})",
            where="calibration",
            remedy="score the stage again",
        ) from None
    return Calibration(**plain, **priors, link=link, probabilities=np.empty((0, 3)))


def calibrate(
    scores: pd.DataFrame,
    kind: Kind,
    *,
    groups: Iterable,
    verdicts: Iterable[str | None],
    seed: int,
    swap_tta: bool = False,
    train_prior: Mapping[str, float] | None = None,
    target_prior: Mapping[str, float] | None = None,
) -> Calibration:
    """Fit a link on the validation fold and keep it only where its cross-fitted log loss is lower.

    `scores` one row a battle, `groups` and `verdicts` aligned with it (rows without a verdict fit nothing).
    `train_prior`: the class shares of the training rows, which stand in where no link can be fitted.
    `target_prior`: the class shares of the rows to come, where they differ from these.
    Without a link label logits go through a plain softmax, and rewards, which have no such identity, become the
    class prior; `reason` says so. Raises ArenaError for NaN or infinite scores (naming ids) or a broken prior.
    """
    raw, truth, groups = raw_scores(scores, kind, swap_tta=swap_tta), verdict_codes(verdicts), as_groups(groups)
    known = np.flatnonzero(truth >= 0)
    prior = checked_prior(train_prior, "training prior") if train_prior else smoothed_prior(truth)
    target = tuple(checked_prior(target_prior, "target prior").tolist()) if target_prior else None
    judged, codes, parts = raw.at(known), truth[known], groups[known]
    fault = _unfit(judged, codes, parts)
    before = log_loss(_through(judged, None, prior), codes) if len(known) else None
    kept, link, crossed, after = False, None, None, None
    if not fault:
        crossed, base = _cross_fitted(judged, codes, parts, seed, None if kind == "logits" else "prior")
        before, after = log_loss(base, codes), log_loss(crossed, codes)
        kept = after < before
        link = judged.fit(codes) if kept else None
    probabilities = _through(raw, link, prior)
    if kept:
        probabilities[known] = crossed
    source = tuple(_marginal(probabilities[known] if len(known) else prior[None]).tolist())
    return Calibration(
        kind=kind,
        kept=kept,
        link=link,
        reason=fault or _verdict(kind, kept, before, after, ties=bool((codes == TIE).any())),
        log_loss_before=before,
        log_loss_cross_fitted=after,
        rows=len(known),
        swap_tta=swap_tta,
        source_prior=source,
        target_prior=target,
        probabilities=probabilities,
    )


def grouped_parts(groups: np.ndarray, seed: int, parts: int = PARTS) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (rows to fit on, rows to judge) for each part; the rows of one group are never on both sides."""
    import pandas as pd
    from sklearn.model_selection import GroupKFold

    codes, names = pd.factorize(pd.Series(groups), use_na_sentinel=False)
    folds = GroupKFold(min(parts, len(names)), shuffle=True, random_state=seed)
    yield from folds.split(codes, groups=codes)


def _cross_fitted(
    raw: RawScores, truth: np.ndarray, groups: np.ndarray, seed: int, base: str | None
) -> tuple[np.ndarray, np.ndarray]:
    """Return what links fitted without a row's part say of it, and what they must beat, both [rows, 3]."""
    crossed, beaten = np.empty((len(raw), 3)), np.empty((len(raw), 3))
    for fit, judge in grouped_parts(groups, seed):
        crossed[judge] = raw.at(judge).through(raw.at(fit).fit(truth[fit]))
        beaten[judge] = smoothed_prior(truth[fit]) if base == "prior" else raw.at(judge).through(_IDENTITY)
    return crossed, beaten


def _unfit(raw: RawScores, truth: np.ndarray, groups: np.ndarray) -> str | None:
    """Return why no link can be fitted on these rows, or None."""
    instead = {
        "logits": "the probabilities are the plain softmax of the label logits",
        "rewards": "rewards have no probabilities without one, so every row gets the class prior",
    }[raw.kind]
    missing = [name for code, name in enumerate(VERDICTS) if not (truth == code).any()]
    spread = np.ptp(raw.inputs[0], axis=1) if raw.kind == "logits" else raw.inputs[0]
    if len(truth) < FEWEST_ROWS:
        fault = f"only {len(truth)} validation rows have a verdict, and fewer than {FEWEST_ROWS} fit no link"
    elif missing and (raw.kind, missing) != ("rewards", ["tie"]):  # Davidson's link is then Bradley and Terry's
        fault = f"the validation fold has no row of class {', '.join(missing)}"
    elif len(set(groups.tolist())) < 2:
        fault = "all validation rows share one prompt, so nothing can be cross-fitted"
    elif not spread.any():
        fault = "every battle has the same score for all its sides"
    else:
        return None
    return f"not calibrated: {fault}; {instead}"


def _verdict(kind: Kind, kept: bool, before: float, after: float, *, ties: bool) -> str:
    """Say what was decided and on which figures."""
    name, other = _LINK_NAMES[kind], {"logits": "the plain softmax", "rewards": "the class prior"}[kind]
    # Not the ladder's prior, which comes from the training rows: both sides of this choice see the other parts only.
    rival = {"logits": other, "rewards": "a class prior fitted in the same way, on the other parts of the fold"}[kind]
    figures = f"cross-fitted log loss {after:.4f} against {before:.4f} of {rival}"
    if not ties:
        figures += "; no tie was seen, so ties get the share of one imagined row"
    return f"kept {name}: {figures}" if kept else f"did not keep {name}, {other} stays: {figures}"


def _marginal(probabilities: np.ndarray) -> np.ndarray:
    """Return the mean of probabilities [rows, 3], no class below machine epsilon.

    The shares that the judge predicts and not those of its training rows: a judge that saw no tie still gives ties
    some share, and dividing by a smaller one would hand every battle to them.
    """
    shares = np.maximum(probabilities.mean(axis=0), EPS)
    return shares / shares.sum()


def _through(raw: RawScores, link: Link | None, prior: np.ndarray) -> np.ndarray:
    """Return [rows, 3] probabilities; without a link the softmax of logits, or the prior for rewards."""
    if link is None and raw.kind == "rewards":
        return np.tile(prior, (len(raw), 1))
    return raw.through(link or _IDENTITY)


def _finite(scores: pd.DataFrame, columns: tuple[str, ...]) -> np.ndarray:
    """Return the columns as float64 [rows, columns]; raises ArenaError for a missing one, NaN or infinity."""
    absent = [name for name in columns if name not in scores.columns]
    if absent:
        raise ArenaError(f"column(s) {', '.join(absent)} are missing", where="scores", remedy="score the stage again")
    values = scores[list(columns)].to_numpy(dtype=np.float64, na_value=np.nan)
    _refuse(scores, ~np.isfinite(values).all(axis=1), f"NaN or infinite {', '.join(columns)}")
    if columns in (AB_COLUMNS, BA_COLUMNS):
        _refuse(scores, (np.abs(values) > _LARGEST_LOGIT).any(axis=1), "logits that no model gives")
    return values


def _refuse(scores: pd.DataFrame, broken: np.ndarray, what: str) -> None:
    """Raise ArenaError that names the ids of the rows where `broken` [rows] is true, if any is."""
    if broken.any():
        ids = scores["id"].astype(str).to_numpy()[broken]
        names = ", ".join(ids[:5]) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")
        raise ArenaError(
            f"{len(ids)} row(s) have {what}: id {names}",
            where="scores",
            remedy="the model overflowed or is broken: train with a lower learning rate or score in a wider type",
        )


def _named(shares: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(VERDICTS, shares, strict=True))


_KEY = "calibrations"


@dataclass(frozen=True)
class OrderCalibrations:
    """The calibration of rows with one order and that of rows with both; None where there is none (rewards: both)."""

    one: Calibration | None
    both: Calibration | None

    def apply(self, table: pd.DataFrame) -> np.ndarray:
        """Return the final probabilities [rows, 3] of a score table, row by row with the calibration of its kind."""
        both = _has_both(table)
        found = np.empty((len(table), 3))
        for rows, calibration in ((both, self.both), (~both, self.one)):
            if rows.any():
                found[rows] = _there(calibration).apply(table[rows])
        return found

    def require_one(self) -> None:
        """Raise ArenaError if rows with one order only could not be calibrated."""
        _there(self.one)

    def to_json(self) -> dict[str, Any]:
        """Return what the report keeps under "calibrations"."""
        pairs = {"one_order": self.one, "both_orders": self.both}
        return {name: each.to_json() if each else None for name, each in pairs.items()}


def fit_orders(valid: pd.DataFrame, used: Calibration, *, seed: int, target_prior: Mapping | None) -> OrderCalibrations:
    """Return both calibrations of a validation fold; `used` is the one that its report was made with."""
    if kind_of(valid) == "rewards":
        return OrderCalibrations(used, None)
    if not has_both_orders(valid):
        return OrderCalibrations(used, None)
    other = calibrate(
        valid,
        "logits",
        groups=valid["group"],
        verdicts=valid["verdict"],
        seed=seed,
        swap_tta=not used.swap_tta,
        target_prior=target_prior,
    )
    return OrderCalibrations(other, used) if used.swap_tta else OrderCalibrations(used, other)


def orders_of(report: Mapping[str, Any]) -> OrderCalibrations:
    """Return the calibrations of a report; one that an earlier version wrote has only that which it used."""
    used = calibration_from_json(report["calibration"])
    kept = report.get(_KEY) or {}
    named = {
        name: calibration_from_json(kept[name]) if kept.get(name) else None for name in ("one_order", "both_orders")
    }
    named["both_orders" if used.swap_tta else "one_order"] = used
    return OrderCalibrations(named["one_order"], named["both_orders"])


def _has_both(table: pd.DataFrame) -> np.ndarray:
    if not set(BA_COLUMNS) <= set(table.columns):
        return np.zeros(len(table), dtype=bool)
    return table[list(BA_COLUMNS)].notna().all(axis=1).to_numpy()


def _there(calibration: Calibration | None) -> Calibration:
    if calibration is None:
        raise ArenaError(
            "the report holds no calibration for rows with this number of orders",
            where="calibrations",
            remedy="score the stage again (run.py score --fresh), or without --time-limit",
        )
    return calibration
