"""Numbers as a reader sees them, and the names of classes and baselines.

number(0.95123) == "0.951", percent(0.071) == "7.1%", interval([0.93, 0.97]) == "0.930 to 0.970"
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

# Shown where a value was not measured.
MISSING = "–"
CLASS_NAMES = {"a": "A wins", "b": "B wins", "tie": "Tie"}
# Name and meaning of each baseline, from the one that knows nothing to the one that nothing can beat.
BASELINES = {
    "uniform": ("Uniform, 1/3 each", "reads no text, knows no shares"),
    "prior": ("Class prior", "always the shares of the classes; reads no text"),
    "length": ("Length features", "logistic regression on the lengths of the texts"),
    "tfidf": ("TF-IDF", "logistic regression on words and phrases"),
    "base": ("Untrained base", "asked as the judge is, and calibrated"),
    "probe": ("Linear probe", "a linear model on the untrained base's hidden states"),
    "bayes": ("Bayes: the best possible", "knows the true probabilities"),
}
BASELINE_NAMES = {key: name for key, (name, _) in BASELINES.items()}


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed count of decimals and a true minus sign."""
    if not _measured(value):
        return MISSING
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign always shown."""
    text = number(value, digits)
    return f"+{text}" if _measured(value) and round(value, digits) > 0 else text


def count(value: float | None) -> str:
    """Return a whole number with thousands separated; fractions keep up to four digits."""
    if not _measured(value):
        return MISSING
    return (f"{int(value):,}" if value == int(value) else f"{value:,.4g}").replace("-", "−")


def percent(share: float | None) -> str:
    """Return a share as a percentage: one decimal below 10%, none above."""
    if not _measured(share):
        return MISSING
    decimals = 0 if abs(share) >= 0.0995 or share == 0 else 1
    return f"{100 * share:.{decimals}f}%".replace("-", "−")


def shares(values: Iterable[float | None]) -> str:
    """Return the probabilities of the three classes as "70% / 20% / 10%"."""
    return " / ".join(map(percent, values))


def points(share: float | None) -> str:
    """Return a difference of two shares as percentage points, without the words; a tiny one as "less than 0.01"."""
    if not _measured(share):
        return MISSING
    if 0 < abs(share) < 1e-4:
        return "less than 0.01"
    return f"{100 * share:.2g}" if abs(share) < 0.1 else f"{100 * share:.0f}"


def interval(ends: Sequence[float] | None, digits: int = 3) -> str:
    """Return an interval as "low to high"."""
    return MISSING if ends is None else f"{number(ends[0], digits)} to {number(ends[1], digits)}"


def _measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)
