"""The drawings of the pages as geometry: values in, positions in percent of the drawing area out; templates draw them.

Positions are percentages, so that a drawing stretches with the window while its text keeps its size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from scoring.report.findings import BASELINES

# More points than this are averaged in groups, which smooths the curve and keeps the page small.
CURVE_POINTS = 100
# The log loss at the top of a running training's chart; a third for each class costs 1.0986.
_HIGHEST = 1.6


@dataclass(frozen=True)
class Axis:
    """A range of values, its round ticks, and the decimals that tell them apart."""

    low: float
    high: float
    ticks: tuple[float, ...]
    digits: int

    def at(self, value: float) -> float:
        """Return the position of `value` in percent of the axis, held inside it."""
        share = (value - self.low) / (self.high - self.low)
        return round(100 * min(max(share, 0.0), 1.0), 3)


@dataclass(frozen=True)
class Mark:
    """One row of an interval chart: a dot at `value` and a bar between `ends`, if there are any."""

    name: str
    value: float
    ends: Sequence[float] | None = None
    note: str = ""
    kind: str = "model"
    extra: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Intervals:
    """Rows of dots with intervals on one axis, and a vertical line at `reference`."""

    marks: Sequence[Mark]
    reference: float | None = None

    @cached_property
    def axis(self) -> Axis:
        """The axis that holds every dot, interval and the line."""
        values = [value for mark in self.marks for value in (mark.value, *(mark.ends or ()))]
        return axis_of(values if self.reference is None else [*values, self.reference])


def axis_of(values: Sequence[float], *, most_ticks: int = 6, padding: float = 0.06) -> Axis:
    """Return an axis that holds all values (at least one) with some room at both ends."""
    low, high = min(values), max(values)
    if low == high:  # one value lies in the middle of its axis
        low, high = low - max(abs(low), 1.0) * 0.05, high + max(abs(high), 1.0) * 0.05
    room = padding * (high - low)
    low, high = low - room, high + room
    rough = (high - low) / most_ticks
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * (1 - 1e-9))
    ticks = tuple(round(step * index, 10) for index in range(math.ceil(low / step), math.floor(high / step) + 1))
    return Axis(low, high, ticks, digits=max(0, -math.floor(math.log10(step) + 1e-9)))


def log_loss_chart(compared: Mapping[str, Any], models: Sequence[Mark]) -> Intervals:
    """Return the baselines, the models and Bayes where it is known, with the class prior as the line.

    `compared`: a report or a comparison, with its `baselines`, `baselines_ci95` and `bayes`.
    """
    # Uniform always loses log 3: what resampling leaves there is rounding noise.
    ends = {**compared["baselines_ci95"], "uniform": None}
    marks = [
        Mark(BASELINES[key][0], loss, ends.get(key), BASELINES[key][1], "baseline")
        for key, loss in compared["baselines"].items()
    ]
    marks += models
    if compared["bayes"] is not None:
        marks.append(Mark(BASELINES["bayes"][0], compared["bayes"], ends.get("bayes"), BASELINES["bayes"][1], "bayes"))
    marks.sort(key=lambda mark: -mark.value)  # the judge stands among the methods that it beats or not
    return Intervals(marks, compared["baselines"].get("prior"))


def report_chart(report: Mapping[str, Any]) -> Intervals:
    """Return the chart of one stage's report."""
    return log_loss_chart(
        report, [Mark(f"This judge ({report['stage']})", report["log_loss"], report["log_loss_ci95"])]
    )


def curve(points: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Return the loss curve's drawing: training loss, evaluation dots, axes; None if empty.

    Polylines are "x,y x,y …" in a 100 × 100 box with y downwards.
    """
    train, evals = (_thinned(_losses(points, key)) for key in ("loss", "eval_loss"))
    if not train and not evals:
        return None
    steps = axis_of([step for step, _ in train + evals], padding=0.0)
    begun = train[0][0] + (train[-1][0] - train[0][0]) / 10 if train else 0
    later = [loss for step, loss in train + evals if step >= begun] or [loss for _, loss in train + evals]
    highest = max(loss for _, loss in train + evals)
    # A first loss far above all later ones would press those into a line.
    clipped = highest > max(later) + (max(later) - min(later))
    losses = axis_of(later if clipped else [*later, highest], most_ticks=5)

    def polyline(rows: list[tuple[float, float]]) -> str:
        return " ".join(f"{steps.at(step):g},{round(100 - losses.at(loss), 3):g}" for step, loss in rows)

    return {
        "steps": steps,
        "losses": losses,
        "clipped": highest if clipped else None,
        "train": polyline(train),
        "evals": evals,
        "eval_line": polyline(evals),
    }


def log_losses_by_step(
    bounds: Sequence[tuple[int, float]], measured: Sequence[tuple[int, float]], ladder: Mapping[str, float], steps: int
) -> dict[str, Any] | None:
    """Return the drawing of a running training's log losses, as (step, loss), over the baselines' lines; None if empty.

    A bound that is far above all baselines lies at the top: it must not flatten the rest.
    """
    highest = max([_HIGHEST, *ladder.values()])
    found = [min(loss, highest) for _, loss in (*bounds, *measured)] + list(ladder.values())
    if not found:
        return None
    losses, lines, place = axis_of(found, most_ticks=5), [], 0.0
    for name, loss in sorted(ladder.items(), key=lambda item: item[1]):
        place = max(losses.at(loss), place + 7)  # names do not cover each other
        lines.append({"name": BASELINES[name][0], "loss": loss, "y": 100 - losses.at(loss), "text_y": 100 - place})
    return {
        "steps": axis_of([0, max(steps, 1)], padding=0.0),
        "losses": losses,
        "lines": lines,
        "bounds": bounds,
        "measured": measured,
        "beyond": max([loss for _, loss in bounds if loss > highest], default=None),
    }


def _losses(points: Sequence[Mapping[str, Any]], key: str) -> list[tuple[float, float]]:
    return sorted((point["step"], point[key]) for point in points if point.get(key) is not None)


def _thinned(rows: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most `CURVE_POINTS` points, neighbours averaged."""
    size = math.ceil(len(rows) / CURVE_POINTS)
    if size <= 1:
        return rows
    groups = [rows[start : start + size] for start in range(0, len(rows), size)]
    return [tuple(sum(column) / len(group) for column in zip(*group, strict=True)) for group in groups]


def reliability(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return the bins as dots by rising confidence: x, y in percent (y downwards), area by the count."""
    largest = max((point["count"] for point in points), default=1)
    return [
        {
            **point,
            "x": round(100 * point["confidence"], 2),
            "y": round(100 - 100 * point["frequency"], 2),
            # The smallest dot stays visible.
            "radius": round(max(1.2, 4.2 * math.sqrt(point["count"] / largest)), 2),
        }
        for point in sorted(points, key=lambda point: point["confidence"])
    ]


def confusion(counts: Sequence[Sequence[int]]) -> list[list[dict[str, Any]]]:
    """Return the cells of a 3 × 3 table as count and share of the row (rows are the truth)."""
    return [[{"count": cell, "share": cell / sum(row) if sum(row) else None} for cell in row] for row in counts]
