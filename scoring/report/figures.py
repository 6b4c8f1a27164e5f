"""Chart geometry of the pages: values in, positions in percent of the drawing area out; templates draw them.

Positions are percentages, so that a drawing stretches with the window while its text keeps its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from scoring.report.formatting import RUNGS, finite, humanised, pair

# More points than this are averaged in groups: a screen shows no more, and the page stays small.
CURVE_POINTS = 400
# How many neighbours on each side the smoothed loss averages, as a share of all points.
SMOOTHING = 0.03


@dataclass(frozen=True, slots=True)
class Axis:
    """A range of values and its round ticks."""

    low: float
    high: float
    ticks: tuple[float, ...]

    def at(self, value: float) -> float:
        """Return the position of `value` in percent of the axis, held inside it."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)


@dataclass(frozen=True, slots=True)
class Mark:
    """One row of an interval chart: a dot with its interval; positions are None where nothing was measured."""

    name: str
    note: str
    kind: str
    value: float | None
    ends: tuple[float, float] | None
    x: float | None = None
    x_low: float | None = None
    x_high: float | None = None
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Intervals:
    """Rows of dots with intervals on one axis, and a vertical line for comparison."""

    marks: tuple[Mark, ...]
    axis: Axis | None
    reference: float | None

    @property
    def ticks(self) -> list[tuple[float, float]]:
        """The ticks as (value, position)."""
        return [(tick, self.axis.at(tick)) for tick in self.axis.ticks] if self.axis else []

    @property
    def digits(self) -> int:
        """Decimals that tell neighbouring ticks apart."""
        return decimals(self.axis.ticks) if self.axis else 0


def axis_of(values: list[float], *, most_ticks: int = 6, padding: float = 0.06) -> Axis | None:
    """Return an axis that holds all values with some room at both ends, or None without values."""
    if not values:
        return None
    low, high = min(values), max(values)
    if low == high:  # one value stands in the middle of its axis
        low, high = low - max(abs(low), 1.0) * 0.05, high + max(abs(high), 1.0) * 0.05
    span = high - low
    low, high = low - padding * span, high + padding * span
    step = _round_step((high - low) / most_ticks)
    first, last = math.ceil(low / step), math.floor(high / step)
    return Axis(low, high, tuple(round(step * index, 10) for index in range(first, last + 1)))


def _round_step(rough: float) -> float:
    power = 10 ** math.floor(math.log10(rough))
    return next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))


def decimals(ticks: tuple[float, ...]) -> int:
    """Return how many decimals the ticks need to be told apart."""
    if len(ticks) < 2:
        return 3
    return max(0, -math.floor(math.log10(abs(ticks[1] - ticks[0])) + 1e-9))


def intervals(marks: list[Mark], reference: float | None = None) -> Intervals:
    """Place marks on one axis; `reference` (a value) becomes the vertical line."""
    values = [mark.value for mark in marks if mark.value is not None]
    values += [end for mark in marks if mark.ends for end in mark.ends]
    axis = axis_of(values + ([reference] if reference is not None else []))
    placed = tuple(_placed(mark, axis) for mark in marks)
    return Intervals(placed, axis, None if reference is None or axis is None else axis.at(reference))


def _placed(mark: Mark, axis: Axis | None) -> Mark:
    if axis is None or mark.value is None:
        return mark
    low, high = (axis.at(end) for end in mark.ends) if mark.ends else (None, None)
    return Mark(mark.name, mark.note, mark.kind, mark.value, mark.ends, axis.at(mark.value), low, high, mark.extra)


def mark(name: str, value: Any, ends: Any, *, note: str = "", kind: str = "model", **extra: Any) -> Mark:
    """Return an unplaced mark from raw values of a report; what is not a finite number counts as missing."""
    low_high = pair(ends)
    # A constant (uniform's log loss) has no interval worth drawing; resampling leaves rounding noise in it.
    spread = low_high if low_high and low_high[1] - low_high[0] > 1e-9 else None
    return Mark(str(name), note, kind, finite(value), spread, extra=extra)


def ladder(report: dict) -> Intervals:
    """Return the ladder: every baseline, this model and Bayes where it is known, with the prior as the line."""
    baselines, ends = report.get("baselines") or {}, report.get("baselines_ci95") or {}
    marks = [
        mark(name, baselines.get(key), ends.get(key), note=note, kind="baseline") for key, (name, note) in RUNGS.items()
    ]
    marks += [
        mark(humanised(key), value, ends.get(key), note="baseline", kind="baseline")
        for key, value in baselines.items()
        if key not in RUNGS
    ]
    marks.append(mark("This model", report.get("log_loss"), report.get("log_loss_ci95"), note="the judge"))
    if finite(report.get("bayes")) is not None:
        note = "the best possible: knows the true probabilities"
        marks.append(mark("Bayes", report["bayes"], ends.get("bayes"), note=note, kind="bayes"))
    return intervals(marks, finite(baselines.get("prior")))


def curve(points: list[dict]) -> dict | None:
    """Return the loss curve's drawing: raw and smoothed training loss, evaluation dots, ticks; None if empty.

    Polylines are "x,y x,y …" in a 100 × 100 box with y downwards.
    """
    train, evals = curve_values(points)
    if not train and not evals:
        return None
    steps = axis_of([step for step, _ in train + evals], padding=0.0)
    losses = axis_of([loss for _, loss in train + evals], most_ticks=5)
    return {
        "raw": _polyline(train, steps, losses),
        "smooth": _polyline(smoothed(train), steps, losses),
        "evals": [(steps.at(step), 100 - losses.at(loss), step, loss) for step, loss in evals],
        "eval_line": _polyline(evals, steps, losses),
        "x_ticks": [(tick, steps.at(tick)) for tick in steps.ticks if tick == int(tick)],
        "y_ticks": [(tick, 100 - losses.at(tick)) for tick in losses.ticks],
        "digits": decimals(losses.ticks),
        "first": train[0] if train else None,
        "last": train[-1] if train else None,
        "last_eval": evals[-1] if evals else None,
    }


def curve_values(points: list[dict]) -> tuple[list[tuple[float, float]], list[tuple[float, float]]]:
    """Return (step, loss) of training and of evaluation, each in step order and thinned by averaging."""
    found: dict[str, list[tuple[float, float]]] = {"loss": [], "eval_loss": []}
    for point in points:
        step = finite(point.get("step"))
        for key, rows in found.items():
            loss = finite(point.get(key))
            if step is not None and loss is not None:
                rows.append((step, loss))
    return _thinned(sorted(found["loss"])), _thinned(sorted(found["eval_loss"]))


def _thinned(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    size = math.ceil(len(rows) / CURVE_POINTS)
    if size <= 1:
        return rows
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


def smoothed(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the centred running mean; nothing for fewer than 12 points, where the raw line is clear enough."""
    if len(rows) < 12:
        return []
    reach = max(1, round(SMOOTHING * len(rows)))
    result = []
    for index, (step, _) in enumerate(rows):
        # The window shrinks at both ends alike, so that the line is not pulled to one side there.
        near = min(reach, index, len(rows) - 1 - index)
        window = rows[index - near : index + near + 1]
        result.append((step, sum(loss for _, loss in window) / len(window)))
    return result


def _polyline(rows: list[tuple[float, float]], steps: Axis, losses: Axis) -> str:
    return " ".join(f"{steps.at(step):g},{round(100 - losses.at(loss), 3):g}" for step, loss in rows)


def reliability(points: list[dict]) -> list[dict]:
    """Return the bins that hold battles as dots: x, y in percent (y downwards), radius by the root of the count."""
    bins = []
    for point in points:
        x, y, size = (finite(point.get(key)) for key in ("confidence", "frequency", "count"))
        if x is not None and y is not None and size is not None and size > 0:
            bins.append({"confidence": x, "frequency": y, "count": size})
    bins.sort(key=lambda row: row["confidence"])
    largest = max((row["count"] for row in bins), default=1)
    for row in bins:
        row["x"], row["y"] = round(100 * row["confidence"], 2), round(100 - 100 * row["frequency"], 2)
        # Area stands for the count; the smallest dot stays visible.
        row["radius"] = round(max(1.2, 4.2 * math.sqrt(row["count"] / largest)), 2)
    return bins


def confusion(counts: Any) -> list[list[dict]] | None:
    """Return the cells of a 3 × 3 table as count and share of the row (rows are the truth), or None."""
    if not isinstance(counts, list | tuple) or len(counts) != 3:
        return None
    if any(not isinstance(row, list | tuple) or len(row) != 3 for row in counts):
        return None
    values = [[finite(cell) or 0.0 for cell in row] for row in counts]
    return [[{"count": cell, "share": cell / sum(row) if sum(row) else None} for cell in row] for row in values]
