"""How good class probabilities are: losses, calibration, position bias, slices, and intervals by prompt group.

Arrays of probabilities are [rows, 3] in the order of `VERDICTS`; `truth` is [rows] of class codes 0, 1, 2.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from common.battle import VERDICTS
from common.errors import ArenaError

# Probabilities are clipped to [EPS, 1] before the logarithm: the machine epsilon of float64, as scikit-learn does.
EPS = float(np.finfo(np.float64).eps)
ECE_BINS = 15
CURVE_BINS = 10
DRAWS = 2_000
CHANCE_DRAWS = 500
# Group sums are resampled a few draws at a time, so that 57k rows need megabytes and not gigabytes.
_CELLS_AT_ONCE = 4_000_000
# Languages beyond these are one slice.
LANGUAGES = 8


def verdict_codes(verdicts: Iterable[str | None]) -> np.ndarray:
    """Return [rows] class codes in the order of `VERDICTS`, −1 for a row without a verdict.

    Raises ArenaError that lists the words which are no verdict.
    """
    codes = {name: code for code, name in enumerate(VERDICTS)}
    values = [None if value is None or value != value else value for value in verdicts]
    unknown = sorted({str(value) for value in values if value is not None and value not in codes})
    if unknown:
        raise ArenaError(
            f"unknown verdicts: {', '.join(map(repr, unknown[:5]))}",
            where="column verdict",
            remedy=f"use {', '.join(VERDICTS)} or leave it empty",
        )
    return np.array([-1 if value is None else codes[value] for value in values], dtype=np.int64)


def row_losses(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return [rows] −ln p(true class), in nats."""
    chosen = np.asarray(probabilities, dtype=np.float64)[np.arange(len(truth)), truth]
    return -np.log(np.clip(chosen, EPS, 1.0))


def log_loss(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Return the mean of `row_losses`: multi-class log loss in nats, the competition's metric."""
    return float(row_losses(probabilities, truth).mean())


def per_class_log_loss(probabilities: np.ndarray, truth: np.ndarray) -> dict[str, float | None]:
    """Return the mean loss of the rows of each true class; None for a class without rows."""
    losses = row_losses(probabilities, truth)
    return {
        name: float(losses[truth == code].mean()) if (truth == code).any() else None
        for code, name in enumerate(VERDICTS)
    }


def accuracy(probabilities: np.ndarray, truth: np.ndarray) -> float:
    """Return the share of rows whose most probable class is the true one (the first class wins an exact tie)."""
    return float((np.argmax(probabilities, axis=1) == truth).mean())


def confusion(probabilities: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return [3, 3] counts: row = true class, column = most probable class."""
    predicted = np.argmax(probabilities, axis=1)
    return np.bincount(truth * 3 + predicted, minlength=9).reshape(3, 3)


def reliability_points(predicted: np.ndarray, happened: np.ndarray, bins: int) -> list[dict[str, float]]:
    """Return one point a bin: mean prediction, share that happened, and count, by rising prediction.

    Bins hold about equally many rows (quantiles of `predicted`); rows with one same prediction are never
    split, so a constant forecast gives one point. `predicted` [rows] in 0..1, `happened` [rows] of bool.
    """
    place = _bin_of(predicted, bins)
    counts = np.bincount(place)
    sums, hits = (np.bincount(place, weights=column) for column in (predicted, happened))
    return [
        {"confidence": float(s / n), "frequency": float(h / n), "count": int(n)}
        for s, h, n in zip(sums, hits, counts, strict=True)
        if n
    ]


def reliability(probabilities: np.ndarray, truth: np.ndarray, bins: int = CURVE_BINS) -> dict[str, list[dict]]:
    """Return the reliability points of each class and of the most probable class (key `top`)."""
    curves = {
        name: reliability_points(probabilities[:, code], truth == code, bins) for code, name in enumerate(VERDICTS)
    }
    hit = np.argmax(probabilities, axis=1) == truth
    return {"top": reliability_points(np.max(probabilities, axis=1), hit, bins), **curves}


def ece(probabilities: np.ndarray, truth: np.ndarray, bins: int = ECE_BINS) -> float:
    """Return the expected calibration error of the most probable class, 0..1.

    Σ over bins of (rows in bin / rows) · |mean confidence − accuracy|, in 15 bins of equal mass (Naeini et al.,
    AAAI 2015, with the equal-mass bins of Nguyen & O'Connor, EMNLP 2015).
    """
    hit = np.argmax(probabilities, axis=1) == truth
    points = reliability_points(np.max(probabilities, axis=1), hit, bins)
    return float(sum(p["count"] * abs(p["confidence"] - p["frequency"]) for p in points) / len(truth))


def ece_by_chance(probabilities: np.ndarray, *, seed: int, bins: int = ECE_BINS, draws: int = CHANCE_DRAWS) -> float:
    """Return the ECE that an honest judge with these probabilities stays below in 95 of 100 cases.

    Few rows a bin look miscalibrated by chance alone: first choices are drawn true with their own probability
    (consistency resampling, Bröcker & Smith, Weather and Forecasting 22, 2007).
    """
    confidence = np.max(probabilities, axis=1)
    place = _bin_of(confidence, bins)
    random, found = np.random.default_rng(seed), []
    for _ in range(draws):
        surplus = confidence - (random.random(len(confidence)) < confidence)
        found.append(np.abs(np.bincount(place, weights=surplus)).sum() / len(confidence))
    return float(np.quantile(found, 0.95))


def _bin_of(values: np.ndarray, bins: int) -> np.ndarray:
    """Return the bin of each value: quantiles, but equal values are never split."""
    edges = np.unique(np.quantile(values, np.linspace(0, 1, bins + 1)[1:-1]))
    return np.searchsorted(edges, values, side="right")


@dataclass(frozen=True)
class GroupBootstrap:
    """Resamples whole prompt groups with replacement, because the rows of one prompt are not independent.

    `groups` [rows] of any hashable; `interval` and `samples` of one object use the same draws, which pairs them.
    """

    groups: np.ndarray
    seed: int
    draws: int = DRAWS

    def samples(self, values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        """Return [draws, columns] weighted means of `values` [rows, columns] over resampled groups.

        `weights` [rows, columns] (a mask, importance weights) count a row more, less or not; a draw without
        any weight is NaN. Efron & Tibshirani, An Introduction to the Bootstrap, 1993 (cluster resampling).
        """
        values = np.asarray(values, dtype=np.float64).reshape(len(self.groups), -1)
        weights = np.ones_like(values) if weights is None else np.asarray(weights, np.float64)
        codes, names = pd.factorize(pd.Series(self.groups), use_na_sentinel=False)
        sums = np.zeros((len(names), 2 * values.shape[1]))
        np.add.at(sums, codes, np.hstack([values * weights, weights]))
        random = np.random.default_rng(self.seed)
        step = max(1, _CELLS_AT_ONCE // len(names))
        parts = [_resampled_sums(sums, min(step, self.draws - at), random) for at in range(0, self.draws, step)]
        top, bottom = np.hsplit(np.vstack(parts), 2)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(bottom > 0, top / bottom, np.nan)

    def interval(self, values: np.ndarray, weights: np.ndarray | None = None) -> list[float] | None:
        """Return the 95% percentile interval [low, high] of the mean of `values` [rows], None under two groups."""
        weights = None if weights is None else np.asarray(weights).reshape(-1, 1)
        return percentile_interval(self.samples(values, weights)[:, 0], self.groups, weights)


def percentile_interval(
    samples: np.ndarray, groups: np.ndarray, weights: np.ndarray | None = None
) -> list[float] | None:
    """Return [2.5%, 97.5%] of `samples` [draws]; None where fewer than two groups carry weight."""
    used = groups if weights is None else groups[np.asarray(weights).reshape(-1) > 0]
    if len(set(used.tolist())) < 2:
        return None
    low, high = np.nanpercentile(samples, [2.5, 97.5])
    return [float(low), float(high)]


def position_bias(ab: np.ndarray, ba: np.ndarray) -> dict[str, float]:
    """Compare the probabilities of both orders of presentation, `ba` already mapped back to the classes of `ab`.

    `mean_abs_diff` = mean |P(A|AB) − P(A|BA)|; `flip_rate` = share of rows whose most probable class changes;
    `first_slot_advantage` = mean probability that an answer gains by being shown first (negative: loses).
    """
    gap = ab - ba
    return {
        "mean_abs_diff": float(np.abs(gap[:, 0]).mean()),
        "flip_rate": float((ab.argmax(axis=1) != ba.argmax(axis=1)).mean()),
        "first_slot_advantage": float((gap[:, 0] - gap[:, 1]).mean() / 2),
    }


def as_groups(groups: Iterable) -> np.ndarray:
    """Return group names as [rows] of object."""
    return pd.Series(list(groups), dtype=object).to_numpy()


def _resampled_sums(sums: np.ndarray, draws: int, random: np.random.Generator) -> np.ndarray:
    """Return [draws, columns]: the sums of as many groups as there are, drawn with replacement."""
    count = len(sums)
    picks = random.integers(0, count, size=(draws, count)) + np.arange(draws)[:, None] * count
    times = np.bincount(picks.ravel(), minlength=draws * count).reshape(draws, count)
    return times.astype(np.float64) @ sums


def slice_losses(
    table: pd.DataFrame, losses: np.ndarray, prior: np.ndarray, bootstrap: GroupBootstrap
) -> dict[str, list[dict[str, Any]]]:
    """Return the log loss of each slice that has rows, its interval, and the prior's on the same rows, by family.

    `table` one row a battle; `losses` and `prior` [rows]: what the judge and the class prior lose on each.
    """
    turns = table["turns"].to_numpy()
    by_turns = {"1 turn": turns <= 1, "2 turns": turns == 2, "3 or more turns": turns >= 3}
    families = {"length": _by_length(table), "turns": by_turns, "language": _by_language(table)}
    families = {name: {key: mask for key, mask in masks.items() if mask.any()} for name, masks in families.items()}
    masks = [mask for slices in families.values() for mask in slices.values()]
    weights = np.column_stack(masks).astype(np.float64)
    samples = iter(bootstrap.samples(np.tile(losses[:, None], len(masks)), weights).T)
    return {
        family: [
            {
                "name": name,
                "rows": int(mask.sum()),
                "log_loss": float(losses[mask].mean()),
                "log_loss_ci95": percentile_interval(next(samples), bootstrap.groups, mask),
                "prior": float(prior[mask].mean()),
            }
            for name, mask in slices.items()
        ]
        for family, slices in families.items()
    }


def _by_length(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by quarters of the characters of prompt, A and B together; equal lengths stay together."""
    total = table[["chars_prompt", "chars_a", "chars_b"]].sum(axis=1).to_numpy()
    edges = np.unique(np.quantile(total, [0.25, 0.5, 0.75]).astype(int))
    quarter = np.searchsorted(edges, total, side="left")
    names = [
        f"up to {edges[0]:,} characters",
        *(f"{low + 1:,} to {high:,} characters" for low, high in pairwise(edges)),
        f"over {edges[-1]:,} characters",
    ]
    return {name: quarter == place for place, name in enumerate(names)}


def _by_language(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by the stated language, the most frequent ones first; empty where no row states one."""
    if "language" not in table or table["language"].isna().all():
        return {}
    names = table["language"].astype("string").fillna("")
    common = names[names != ""].value_counts().index[:LANGUAGES].tolist()
    return {
        **{name: (names == name).to_numpy(bool) for name in common},
        "other languages": ~names.isin([*common, ""]).to_numpy(bool),
        "not stated": (names == "").to_numpy(bool),
    }
