"""The progress of a run: one live line on a terminal that a person watches, else plain lines at a modest rate."""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.segment import Segment
from rich.table import Column

from common.console import duration, printable

_INTERVAL = 30.0  # seconds between two plain lines
_SOONEST = 1.0  # seconds of work before the time left is estimated


class PlainConsole(Console):
    """Shows text of unknown origin literally: no markup, no emoji codes, no character that steers the terminal."""

    def __init__(self, **options: Any):
        """Take rich's own options."""
        super().__init__(markup=False, emoji=False, highlight=False, **options)

    def render(self, *given: Any, **options: Any) -> Iterator[Segment]:
        """Yield what is drawn; rich's own escapes are no text, and come later."""
        for each in super().render(*given, **options):
            yield each if each.control else Segment(printable(each.text), each.style)


class Show:
    """Where notes and the live line of a command go (standard error); `attended` if a person watches it."""

    def __init__(
        self,
        stream: TextIO | None = None,
        *,
        attended: bool | None = None,
        verbose: bool = False,
        interval: float = _INTERVAL,
    ):
        self.stream = sys.stderr if stream is None else stream
        self.attended = _is_attended(self.stream) if attended is None else attended
        self.verbose, self.interval = verbose, interval
        self._bar: Progress | None = None

    def note(self, text: str) -> None:
        """Print a lasting line, above the live one if there is one."""
        if self._bar is None:
            print(printable(text), file=self.stream, flush=True)
        else:
            self._bar.console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def line(self, label: str) -> Iterator[Line]:
        """Yield the live line of one step of work; it vanishes when the block ends (plain lines stay)."""
        if not self.attended:
            yield Line(self, label, None)
            return
        text = TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, no_wrap=True))
        self._bar = Progress(
            *(SpinnerColumn("line"), text, BarColumn(bar_width=16)),
            console=Console(file=self.stream, force_terminal=True),
            transient=True,
            expand=True,
            refresh_per_second=4,
        )
        try:
            with self._bar:
                yield Line(self, label, self._bar)
        finally:
            self._bar = None


class Line:
    """What one step of work is doing, and how far it is."""

    def __init__(self, show: Show, label: str, bar: Progress | None):
        self._show, self._label, self._bar = show, printable(label), bar
        self._task = bar and bar.add_task(self._label, total=None)
        self._phase, self._phases = "", set[str]()
        self._printed, self._printed_at = "", -math.inf
        self._began: tuple[float, float] | None = None  # time and share of the first update

    def update(self, text: str, share: float | None = None, left: float | None = None) -> None:
        """Show a phase of the work, or with `share` (0 to 1) how much of it is done.

        `left` are the seconds to the end; without it they are estimated from the mean speed so far.
        """
        if share is None:
            if text == self._phase:
                return  # the progress shown since then stays in sight
            due = text not in self._phases
            self._phase = text
            self._phases.add(text)
        else:
            now = time.monotonic()
            left = self._seconds_left(share, now) if left is None else left
            text = f"{share:.0%}{'' if left is None else f'  {duration(left)} left'}  {text}"
            due = share >= 1 or now - self._printed_at >= self._show.interval
            self._printed_at = now if due else self._printed_at
        if self._bar is not None and self._task is not None:
            total = None if share is None else 1.0
            self._bar.update(self._task, description=printable(f"{self._label}: {text}"), completed=share, total=total)
        elif due and text != self._printed:  # "100%" may come for every file that is closed after the last byte
            self._printed = text
            self._show.note(f"{self._label}: {text}")

    def _seconds_left(self, share: float, now: float) -> float | None:
        if self._began is None or share < self._began[1]:  # the first share, or that of another phase
            self._began = now, share
        began, first = self._began
        if share <= first or share >= 1 or now - began < _SOONEST:
            return None
        return (now - began) / (share - first) * (1 - share)


def _is_attended(stream: TextIO) -> bool:
    """Return whether a person watches `stream`: a real terminal, and neither CI nor a dumb one."""
    return stream.isatty() and not os.environ.get("CI") and os.environ.get("TERM") != "dumb"
