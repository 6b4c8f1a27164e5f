"""The pace of scoring: its own speed, what that makes of the time left, and what a time limit still allows.

pace = Pace(must=9_000_000, limit=parse_duration("9h"))
pace.update(tokens_done)     # raises ArenaError early where even one order of the answers does not fit
pace.allows(tokens)          # whether the other order does, too: it is scored whole or not at all
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from common.console import duration
from common.errors import ArenaError, UsageError, same_command

_UNITS = re.compile(r"(?:(\d+(?:\.\d+)?)h)?(?:(\d+(?:\.\d+)?)m)?(?:(\d+(?:\.\d+)?)s)?")
# The share of a limit, and the most seconds of it, that calibrating and writing the files are left.
_RESERVE, _RESERVE_SECONDS = 0.02, 60.0
# A forecast is made once this share of the limit, or that many seconds, were measured.
_MEASURED, _MEASURED_SECONDS = 0.01, 20.0
# How far over the limit a forecast may be: much at first, because the longest rows come first, later little.
_EARLY, _LATE, _EARLY_UNTIL = 1.25, 1.05, 0.1
_SAFETY = 1.1
ONE_ORDER = "the time limit leaves no room for the other order of the answers"


def parse_duration(text: str) -> float:
    """Return the seconds of 9h, 90m, 1h30m or 3600s; raises UsageError."""
    found = _UNITS.fullmatch(text.strip().lower())
    seconds = sum(float(n or 0) * unit for n, unit in zip(found.groups(), (3600, 60, 1), strict=True)) if found else 0
    if seconds <= 0:
        raise UsageError(
            f"{text!r} is not a length of time", where="--time-limit", remedy="write it as 9h, 90m, 1h30m or 3600s"
        )
    return seconds


class Pace:
    """How fast this call scores, over all that it scores; `must` are the tokens of every row in one order.

    Speed is measured from now on, when the model is loaded; `started` is when the time limit began to run, on `clock`
    in seconds.
    """

    def __init__(
        self,
        must: int,
        limit: float | None = None,
        *,
        started: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._clock, self.limit, self._begun = clock, limit, clock()
        self._started = self._begun if started is None else started
        self._must = self._total = must
        self._tokens = 0.0

    @property
    def speed(self) -> float | None:
        """Tokens a second so far in this call, None before anything was measured."""
        return self._tokens / max(self._clock() - self._begun, 1e-6) if self._tokens else None

    @property
    def seconds_left(self) -> float:
        """Seconds that the limit leaves for scoring; without a limit, infinity."""
        if self.limit is None:
            return float("inf")
        reserve = min(_RESERVE * self.limit, _RESERVE_SECONDS)
        return self._started + self.limit - reserve - self._clock()

    def forecast(self, tokens: float) -> float | None:
        """Return the seconds that so many more tokens take, None before anything was measured."""
        return None if self.speed is None else tokens / self.speed

    def skip(self, tokens: int) -> None:
        """Count tokens that every row needs as done by an earlier call."""
        self._must -= tokens

    def update(self, tokens: float, *, must: bool) -> None:
        """Count tokens as done, `must` where every row needs them; raises ArenaError where the limit cannot be kept."""
        self._tokens += tokens
        if must:
            self._must -= tokens
        if self.limit is not None and self._must > 0.5:
            self._require_possible()

    def allows(self, tokens: float) -> bool:
        """Return whether so many more tokens fit in the limit; not where this call has measured nothing yet."""
        needed = self.forecast(tokens)
        return self.limit is None or (needed is not None and needed * _SAFETY <= self.seconds_left)

    def _require_possible(self) -> None:
        """Raise ArenaError where the rows cannot all be scored once within the limit."""
        needed, left = self.forecast(self._must), self.seconds_left
        measured = self._clock() - self._begun >= min(_MEASURED * self.limit, _MEASURED_SECONDS)
        early = self._total and 1 - self._must / self._total < _EARLY_UNTIL
        if left <= 0:
            what = "the time limit has passed before every row was scored once"
        elif measured and needed is not None and needed > (_EARLY if early else _LATE) * left:
            takes = f"every row once takes {duration(needed)} more at {self.speed:,.0f} tokens/s"
            what = f"{takes}, and the limit leaves {duration(left)}"
        else:
            return
        raise ArenaError(
            f"{what}; no table of probabilities is written",
            where=f"--time-limit {duration(self.limit)}",
            remedy="a smaller or quantised model (--precision 8bit), more GPUs (--workers), a lower cutoff_len, or a "
            f"longer limit; {same_command()} then goes on from what is scored already",
        )
