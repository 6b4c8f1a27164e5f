"""The progress of a training run: read from LLaMA-Factory's trainer_log.jsonl, shown as one live line."""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

_PLAIN_NAME = re.compile(r"[\w.:/@+-]{1,80}", re.ASCII)
_SECRET = re.compile(r"TOKEN|API_?KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.IGNORECASE)
# A shorter value is a switch or a number, and would be found everywhere.
_SHORTEST_SECRET = 8
_LONGEST_NAME = 60


def printable(text: str) -> str:
    """Return the text as a terminal may have it: what would steer it made visible, secrets hidden."""
    return visible(hide_secrets(text))


def name_of(value: object) -> str:
    """Return an id as an error names it: a plain one as it is, any other quoted, in ASCII and not too long."""
    text = str(value)
    if _PLAIN_NAME.fullmatch(text):
        return text
    return ascii(text if len(text) <= _LONGEST_NAME else f"{text[:_LONGEST_NAME]}…")


def hide_secrets(text: str) -> str:
    """Return the text with the values of our environment's tokens, keys and passwords replaced by their names."""
    for name, value in secrets().items():
        text = text.replace(value, f"<{name}>")
    return text


def secrets() -> dict[str, str]:
    """Return the environment's variables that hold something secret, by their names (HF_TOKEN, WANDB_API_KEY, …)."""
    return {
        name: value for name, value in os.environ.items() if len(value) >= _SHORTEST_SECRET and _SECRET.search(name)
    }


# What moves a terminal's cursor, rings, recolours, turns the writing round or cannot be encoded.
_UNSAFE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return a text that a terminal prints as it stands: control characters become signs that can be read.

    Line ends and tabs stay; ESC becomes ␛, other controls their pictures or \\x9b, \\u202e.
    """
    return _UNSAFE.sub(lambda match: _picture(ord(match[0])), text)


def _picture(code: int) -> str:
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


_WIDE, _BAR = 120, 16  # columns of a terminal with room for a bar, and of the bar
_PLAIN_INTERVAL = 30.0  # seconds between two lines where nobody watches
_DAMAGES = (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError)  # of a line of a log
_MOST_STEPS, _LONGEST = 10**12, 1e9  # steps, and seconds (thirty years), that a line may tell
_SOONEST = 1.0  # seconds of work that a first guess at the time left is made from


@dataclass(frozen=True)
class LogPoint:
    """One line of trainer_log.jsonl; what the line does not hold is None. `elapsed` is in seconds."""

    step: int
    total: int
    loss: float | None = None
    eval_loss: float | None = None
    accuracy: float | None = None
    lr: float | None = None
    epoch: float | None = None
    elapsed: float | None = None

    @property
    def finite(self) -> bool:
        """Whether neither loss is NaN or infinite."""
        return all(math.isfinite(value) for value in (self.loss, self.eval_loss) if value is not None)


class TrainerLog:
    """A trainer_log.jsonl that another process is writing; each line is handed out once, when it is whole."""

    def __init__(self, path: Path, *, skip_existing: bool = False):
        self.path = path
        self._offset = path.stat().st_size if skip_existing and path.exists() else 0

    def read_new(self) -> list[LogPoint]:
        """Return the points since the last call; a half-written last line waits, a damaged one is left out."""
        try:
            if self.path.stat().st_size < self._offset:  # begun anew
                self._offset = 0
            with self.path.open("rb") as file:
                file.seek(self._offset)
                block = file.read()
        except FileNotFoundError:
            return []
        whole = block[: block.rfind(b"\n") + 1]
        self._offset += len(whole)
        return [point for line in whole.splitlines() if (point := _parse(line)) is not None]


def loss_curve(path: Path) -> list[dict[str, float | None]]:
    """Return one dict(step, loss, lr, eval_loss) a logged step, in order of steps, for the report.

    Steps that a resumed run repeated are there once, as the resumed run logged them.
    """
    rows: dict[int, dict[str, float | None]] = {}
    last = 0
    for point in TrainerLog(path).read_new():
        if point.step < last:  # resumed from an earlier checkpoint
            rows = {step: row for step, row in rows.items() if step < point.step}
        last = point.step
        values = {"loss": point.loss, "lr": point.lr, "eval_loss": point.eval_loss}
        if point.loss is None and point.eval_loss is None:
            continue  # the closing line of a run has no loss
        row = rows.setdefault(point.step, {"step": point.step, "loss": None, "lr": None, "eval_loss": None})
        row.update({key: value for key, value in values.items() if value is not None})
    return [rows[step] for step in sorted(rows)]


def resumed_at(points: Sequence[LogPoint]) -> int:
    """Return the step from which the newest run in a log goes on, 0 where it began at the beginning.

    A resumed run writes on in the same log, with a clock of its own. It may begin before the last line: what came after
    its checkpoint is done again.
    """
    start, every = 0, 1  # steps between two lines
    for before, point in pairwise(points):
        if point.step < before.step or (point.elapsed or 0) < (before.elapsed or 0):
            start = max(0, min(before.step, point.step - every))
        elif point.step > before.step:
            every = point.step - before.step
    return start


def seconds_left(point: LogPoint, start_step: int = 0) -> float | None:
    """Return the seconds to the last step at the mean speed since `start_step`, None before the first step.

    Not LLaMA-Factory's own `remaining_time`: after a resume that counts the steps of the earlier run as done
    in the time of this one.
    """
    done = point.step - start_step
    if done <= 0 or not point.elapsed:  # whole seconds: in the first one nothing can be told
        return None
    return point.elapsed / done * max(point.total - point.step, 0)


class Countdown:
    """The time left of some work, at its mean speed since its share was first told."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._began: tuple[float, float] | None = None

    def left(self, share: float) -> str:
        """Return ", h:mm:ss left" once it can be told, else nothing; `share` is the part done, 0 to 1."""
        now = self._clock()
        if self._began is None or share < self._began[1]:
            self._began = now, share
        began, first = self._began
        if share <= first or share >= 1 or now - began < _SOONEST:
            return ""
        return f", {duration((now - began) / (share - first) * (1 - share))} left"


class Show:
    """Where notes and live lines go: a bar that a person watches, or plain lines at a modest rate."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        attended: bool | None = None,
        verbose: bool = False,
        interval: float = _PLAIN_INTERVAL,
    ):
        self.stream = sys.stderr if stream is None else stream
        self.attended = is_attended(self.stream) if attended is None else attended
        self.verbose, self.interval = verbose, interval
        self._live: Line | None = None

    def note(self, text: str) -> None:
        """Print one lasting line, above the live one if there is one."""
        if self._live is not None:
            self._live.print(text)
        else:
            print(printable(text), file=self.stream, flush=True)

    @contextmanager
    def line(self, label: str, start_step: int = 0) -> Iterator[Line]:
        """Yield the live line of one step of work; it vanishes when the block ends (plain lines stay)."""
        kind = _BarLine if self.attended else _PlainLine
        self._live = kind(self, label, start_step)
        try:
            with self._live:
                yield self._live
        finally:
            self._live = None


class Line:
    """One live line: what is being done, and once training runs how far it is."""

    def __init__(self, show: Show, label: str, start_step: int):
        self.show, self.label, self.start_step = show, printable(label), start_step

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *_: object) -> None:
        """Take the line off the screen."""

    def print(self, text: str) -> None:
        """Print a lasting line beside the live one."""
        print(printable(text), file=self.show.stream, flush=True)

    def phase(self, text: str) -> None:
        """Say what is being done now (loading, training, validating)."""
        raise NotImplementedError

    def point(self, point: LogPoint) -> None:
        """Show a new point of the trainer's log."""
        raise NotImplementedError

    def count(self, done: int, total: int | None, detail: str) -> None:
        """Show how much of some other work is done; `total` is None where it is not known."""
        raise NotImplementedError

    def part(self, share: float, detail: str) -> None:
        """Show which part, 0 to 1, of some other work is done, where what is counted has no known total."""
        raise NotImplementedError


class _PlainLine(Line):
    def __init__(self, show: Show, label: str, start_step: int):
        super().__init__(show, label, start_step)
        self._printed_at, self._phases = -math.inf, set[str]()
        self._began = time.monotonic()

    def phase(self, text: str) -> None:
        if text not in self._phases:  # once: a long run validates and saves again and again
            self._phases.add(text)
            self.print(f"{self.label}: {text}")

    def point(self, point: LogPoint) -> None:
        has_loss = point.loss is not None or point.eval_loss is not None
        if has_loss and self._due(point.step >= point.total):
            self.print(f"{self.label}: step {point.step}/{point.total}  {describe(point, self.start_step)}")

    def count(self, done: int, total: int | None, detail: str) -> None:
        if self._due(done == total):
            self.print(f"{self.label}: {_of(done, total)}  {detail}")

    def part(self, share: float, detail: str) -> None:
        soon = time.monotonic() - self._began < self.show.interval  # what is soon done needs no line
        if not soon and self._due():
            self.print(f"{self.label}: {share:.0%}  {detail}")

    def _due(self, anyway: bool = False) -> bool:
        """Return whether it is time for a line, or one is wanted `anyway`; the next one is then due later."""
        now = time.monotonic()
        due = anyway or now - self._printed_at >= self.show.interval
        if due:
            self._printed_at = now
        return due


class _BarLine(Line):
    def __init__(self, show: Show, label: str, start_step: int):
        super().__init__(show, label, start_step)
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        console = Console(file=show.stream, force_terminal=True)  # NO_COLOR is rich's own business
        wide = console.width >= _WIDE
        bar, elapsed = ([BarColumn(bar_width=_BAR)], [TimeElapsedColumn()]) if wide else ([], [])
        told = (SpinnerColumn(), TextColumn("{task.description}"), *bar, TextColumn("{task.fields[detail]}"), *elapsed)
        self._bar = Progress(*told, console=console, transient=True, refresh_per_second=4)
        self._task = self._bar.add_task(self.label, total=None, detail="starting")
        self._beside = _BAR + 14 if wide else 4  # columns that spinner, bar, time and the gaps between them take
        self._description = self.label
        self._seen: dict[str, float] = {}

    def __enter__(self) -> Line:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def print(self, text: str) -> None:
        self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def phase(self, text: str) -> None:
        if self._description == f"{self.label}: {text}":
            return  # what stands beside the phase belongs to it as long as it lasts
        self._description = f"{self.label}: {text}"
        self._bar.update(self._task, description=self._description, detail="")

    def point(self, point: LogPoint) -> None:
        for key in ("loss", "eval_loss", "lr"):  # an evaluation's line has no loss: keep the last one in sight
            if (value := getattr(point, key)) is not None:
                self._seen[key] = value
        shown = LogPoint(point.step, point.total, elapsed=point.elapsed, **self._seen)
        self._bar.update(self._task, completed=point.step, total=point.total, detail=self._fitting(shown))

    def _fitting(self, point: LogPoint) -> str:
        """Return as much of a point as the terminal has room for: the time left stays, the learning rate goes first."""
        room = self._bar.console.width - len(self._description) - self._beside
        text = ""
        for left_out in ({}, {"lr": None}, {"lr": None, "eval_loss": None}, dict.fromkeys(("lr", "eval_loss", "loss"))):
            text = f"{point.step}/{point.total}  {describe(replace(point, **left_out), self.start_step)}"
            if len(text) <= room:
                break
        return text

    def count(self, done: int, total: int | None, detail: str) -> None:
        self._bar.update(self._task, completed=done, total=total, detail=f"{_of(done, total)}  {detail}")

    def part(self, share: float, detail: str) -> None:
        self._bar.update(self._task, completed=share, total=1, detail=f"{share:.0%}  {detail}")


def _of(done: int, total: int | None) -> str:
    return f"{done:,}" if total is None else f"{done:,}/{total:,}"


def describe(point: LogPoint, start_step: int = 0) -> str:
    """Return loss, validation loss, learning rate and time left of a point as one short text."""
    parts = []
    if point.loss is not None:
        parts.append(f"loss {point.loss:.4f}")
    if point.eval_loss is not None:
        parts.append(f"validation loss {point.eval_loss:.4f}")
    if point.lr is not None:
        parts.append(f"lr {point.lr:.2e}")
    left = seconds_left(point, start_step)
    if left is not None:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def teller(line: Line) -> Callable[[Any], None]:
    """Return what shows an export's progress (data_prep.export.Progress) on a live line, with the time left."""
    countdowns: dict[str, Countdown] = {}

    def tell(progress: Any) -> None:
        if progress.share is None:
            line.phase(progress.phase)
            return
        left = countdowns.setdefault(progress.phase, Countdown()).left(progress.share)
        line.part(progress.share, f"{progress.rows:,} {progress.phase}{left}")

    return tell


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss."""
    return str(timedelta(seconds=round(min(seconds, _LONGEST))))


def is_attended(stream: TextIO) -> bool:
    """Return whether a person watches `stream`: a real terminal, and neither CI nor a dumb one."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"


def _parse(line: bytes) -> LogPoint | None:
    names = ("loss", "eval_loss", "accuracy", "lr", "epoch")
    try:
        values = json.loads(line)
        step, total = int(values["current_steps"]), int(values["total_steps"])
        numbers: dict[str, Any] = {name: values.get(name) for name in names}
        numbers = {k: float(v) if isinstance(v, (int, float)) else None for k, v in numbers.items()}
    except _DAMAGES:  # e.g. what a crash left in the middle of a line
        return None
    if not 0 <= step <= _MOST_STEPS or not 0 <= total <= _MOST_STEPS:
        return None
    return LogPoint(step, total, elapsed=_seconds(values.get("elapsed_time")), **numbers)


def _seconds(text: Any) -> float | None:
    """Return the seconds of str(timedelta), e.g. '1 day, 2:03:04'; None for what no run can have taken."""
    if not isinstance(text, str):
        return None
    days, _, clock = text.rpartition(",")
    try:
        hours, minutes, seconds = (float(part) for part in clock.split(":"))
        told = float(days.split()[0] if days else 0) * 86400 + hours * 3600 + minutes * 60 + seconds
    except (ValueError, IndexError):
        return None
    return told if 0 <= told <= _LONGEST else None
