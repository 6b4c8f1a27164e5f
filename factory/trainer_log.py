"""LLaMA-Factory's trainer_log.jsonl: one line a logged step or evaluation, read while the training writes it.

{"current_steps": 5, "total_steps": 40, "loss": 1.2, "lr": 1e-4, "epoch": 0.25, "elapsed_time": "0:00:07"}
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from common.progress import Line

_DAMAGED = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # what a bad line raises
_MOST_STEPS = 10**12
_MOST_READ = 1 << 24  # bytes at its end: some hundred thousand steps
_ELAPSED = re.compile(r"(?:(\d{1,5}) days?, )?(\d{1,2}):(\d\d):(\d\d)(?:\.\d+)?")  # str(timedelta)
_SHOWN = ("loss", "eval_loss", "lr")


@dataclass(frozen=True)
class LogPoint:
    """One line of trainer_log.jsonl; what the line does not hold is None. `elapsed` is in seconds."""

    step: int
    total: int
    loss: float | None = None
    eval_loss: float | None = None
    lr: float | None = None
    elapsed: float | None = None

    @property
    def finite(self) -> bool:
        """Whether neither loss is NaN or infinite."""
        return all(math.isfinite(value) for value in (self.loss, self.eval_loss) if value is not None)


class TrainerLog:
    """A trainer_log.jsonl that another process is writing; each line is returned once, when it is complete."""

    def __init__(self, path: Path, *, skip_existing: bool = False):
        self.path = path
        self._offset = path.stat().st_size if skip_existing and path.exists() else 0

    def read_new(self) -> list[LogPoint]:
        """Return the points since the last call; a half-written last line waits, a damaged one is left out."""
        try:
            size = self.path.stat().st_size
            if size < self._offset:  # a new run emptied it
                self._offset = 0
            self._offset = max(self._offset, size - _MOST_READ)
            with self.path.open("rb") as file:
                file.seek(self._offset)
                block = file.read()
        except FileNotFoundError:
            return []
        complete = block[: block.rfind(b"\n") + 1]
        self._offset += len(complete)
        return [point for line in complete.splitlines() if (point := _parse(line)) is not None]


def loss_curve(path: Path) -> list[dict[str, float | None]]:
    """Return one dict(step, loss, lr, eval_loss) a logged step, in order of steps.

    Of steps that a resumed run repeated only the values of the resumed run are kept.
    """
    rows: dict[int, dict[str, float | None]] = {}
    last = 0
    for point in TrainerLog(path).read_new():
        if point.step < last:  # resumed from an earlier checkpoint
            rows = {step: row for step, row in rows.items() if step < point.step}
        last = point.step
        if point.loss is None and point.eval_loss is None:
            continue  # the closing line of a run has no loss
        row = rows.setdefault(point.step, {"step": point.step, "loss": None, "lr": None, "eval_loss": None})
        row.update({key: value for key in _SHOWN if (value := getattr(point, key)) is not None})
    return [rows[step] for step in sorted(rows)]


def resumed_at(points: Sequence[LogPoint]) -> int:
    """Return the step from which the newest run in a log goes on, 0 if it began at the beginning.

    A resumed run appends to the same log with a clock of its own, and repeats the steps after its checkpoint.
    """
    start, every = 0, 1  # `every`: steps between two lines
    for before, point in pairwise(points):
        if point.step < before.step or (point.elapsed or 0) < (before.elapsed or 0):
            start = max(0, min(before.step, point.step - every))
        elif point.step > before.step:
            every = point.step - before.step
    return start


def seconds_left(point: LogPoint, start_step: int = 0) -> float | None:
    """Return the seconds to the last step at the mean speed since `start_step`, None before the first step.

    LLaMA-Factory's own `remaining_time` is wrong after a resume: it counts the earlier run's steps as this run's.
    """
    done = point.step - start_step
    if done <= 0 or not point.elapsed:  # the log has whole seconds: 0 says nothing about the speed
        return None
    return point.elapsed / done * max(point.total - point.step, 0)


def describe(point: LogPoint) -> str:
    """Return loss, validation loss and learning rate of a point as one short text."""
    parts = {"training loss {:.4f}": point.loss, "validation loss {:.4f}": point.eval_loss, "lr {:.2e}": point.lr}
    return "  ".join(text.format(value) for text, value in parts.items() if value is not None)


def show_points(line: Line, start_step: int = 0) -> Callable[[LogPoint], None]:
    """Return a callback that shows points on a live line, each with the last known value of what it lacks."""
    last: dict[str, float] = {}

    def show(point: LogPoint) -> None:
        if point.loss is None and point.eval_loss is None:
            return
        last.update({key: value for key in _SHOWN if (value := getattr(point, key)) is not None})
        text = f"step {point.step}/{point.total}  {describe(LogPoint(point.step, point.total, **last))}"
        line.update(text, point.step / max(point.total, 1), seconds_left(point, start_step))

    return show


def _parse(line: bytes) -> LogPoint | None:
    try:
        values = json.loads(line)
        step, total = int(values["current_steps"]), int(values["total_steps"])
        found: dict[str, Any] = {name: values.get(name) for name in _SHOWN}
        numbers = {name: float(value) if isinstance(value, int | float) else None for name, value in found.items()}
    except _DAMAGED:  # e.g. what a crash left in the middle of a line
        return None
    if not 0 <= step <= _MOST_STEPS or not 0 <= total <= _MOST_STEPS:
        return None
    return LogPoint(step, total, elapsed=_seconds(values.get("elapsed_time")), **numbers)


def _seconds(text: Any) -> float | None:
    """Return the seconds of e.g. '1 day, 2:03:04'; None for any other text."""
    found = _ELAPSED.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        return None
    days, hours, minutes, seconds = (int(number or 0) for number in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)
