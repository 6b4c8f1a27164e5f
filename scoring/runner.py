"""One set of rows on its way to raw scores, interruptible at any moment, and within a time limit.

job = open_job(base, "test", scorer, executor, inputs=…, rows=…, label=…, show=show)
pace = Pace(job.tokens, limit=parse_duration("9h"))
job.score(executor, pace)                  # every row, A before B; early an ArenaError where the limit is too short
if pace.allows(job.tokens):                # the other order is scored whole or not at all
    job.score(executor, pace, swapped=True)
for table in job.tables(): ...             # facts and scores of some thousand rows at a time, in the input's order
job.remove()                               # once the final files are written

Everything lies in one folder (scoring.score_store). The next call with the same inputs takes what is there.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from common.battle import SWAPPED_ORDER
from common.console import duration
from common.errors import ArenaError, UsageError, same_command
from common.progress import Line, Show
from scoring import score_store
from scoring.calibration import AB_COLUMNS, BA_COLUMNS
from scoring.executor import Executor
from scoring.score_store import FACTS_SCHEMA, STRAIGHT, SWAPPED, Facts, ModelInput, RowStore, Shard, ShardFolder, shards
from scoring.scorer import Scorer

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


def open_job(
    base: Path,
    target: str,
    scorer: Scorer,
    executor: Executor,
    *,
    inputs: Mapping[str, Any],
    rows: Callable[[], Iterable[tuple[Facts, ModelInput]]],
    label: str,
    show: Show,
    fresh: bool = False,
) -> Job:
    """Open the job of these inputs under `base`: its rows are read once, its finished shards are used.

    `inputs` are the rows' source and the scorer's `model`; how they are scored is added here. With `fresh` what an
    interrupted call left is deleted.
    """
    depends = {
        **inputs,
        "label_ids": list(scorer.label_ids),
        "engine": executor.engine,
        "precision": executor.precision,
        "device": executor.device,
        "columns": list(scorer.columns),
        "plan": score_store.plan(),
    }
    folder = ShardFolder(base, target, depends, show.note, fresh=fresh)
    if folder.resumed:
        try:
            return Job(folder, RowStore(folder.path), scorer.columns, label, show)
        except ArenaError:  # killed while they were read, or damaged: they are read again, and are the same
            pass
    with show.line(f"{label}: reading the rows") as line:
        store = RowStore.write(folder.path, rows(), lambda count: count % 1000 or line.update(f"{count:,} rows"))
    return Job(folder, store, scorer.columns, label, show)


class Job:
    """One set of rows, its shards and the scores that are known so far."""

    def __init__(self, folder: ShardFolder, store: RowStore, columns: Sequence[str], label: str, show: Show):
        self._folder, self._store, self._columns = folder, store, tuple(columns)
        self._label, self._show = label, show
        self.rows, self.tokens, self.ids, self.unread = store.rows, store.tokens, store.ids, store.unread
        self.inputs = store.inputs
        self._scores = {order: np.full((store.rows, len(columns)), np.nan) for order in (STRAIGHT, SWAPPED)}

    def score(self, executor: Executor, pace: Pace, *, swapped: bool = False) -> None:
        """Score every row, A before B or `swapped`: take the shards that are there and have the others computed."""
        order, label = (SWAPPED, f"{self._label}, swapped") if swapped else (STRAIGHT, self._label)
        with self._show.line(label) as line:
            count = _Count(line, pace, self, must=not swapped)
            for shard, scores in executor.run(self._store, self._missing(order, count), count.progress):
                self._folder.write(shard, scores)
                self._scores[order][shard.rows] = scores
                count.finish(shard)
        if count.kept:
            self._show.note(f"{label}: {count.kept:,} rows were scored by an earlier call, and kept")

    def tables(self) -> Iterator[pd.DataFrame]:
        """Yield facts and scores of some thousand rows at a time; a row without the swapped order has NaN there."""
        first = 0
        for table in self._store.windows():
            part = slice(first, first + len(table))
            table[list(self._columns)] = self._scores[STRAIGHT][part]
            if self._columns == AB_COLUMNS:
                table[list(BA_COLUMNS)] = self._scores[SWAPPED][part][:, SWAPPED_ORDER]
            yield table
            first += len(table)

    def schema(self) -> pa.Schema:
        """Return the columns of `tables`, as Arrow has them."""
        names = (*self._columns, *(BA_COLUMNS if self._columns == AB_COLUMNS else ()))
        return pa.schema([*FACTS_SCHEMA, *((name, pa.float64()) for name in names)])

    def remove(self) -> None:
        """Delete the folder of the job: its scores are in the final files."""
        self._folder.remove()

    def _missing(self, order: str, count: _Count) -> Iterator[Shard]:
        """Yield the shards that must be computed; the scores of the others are taken from the folder."""
        for shard in shards(self._store, order):
            scores = self._folder.read(shard, len(self._columns))
            if scores is None:
                yield shard
            else:
                self._scores[order][shard.rows] = scores
                count.keep(shard)


class _Count:
    """How far one pass over the rows is, for the live line and the pace."""

    def __init__(self, line: Line, pace: Pace, job: Job, must: bool):
        self.pace, self._must, self._line = pace, must, line
        self._total, self._tokens, self._left = job.rows, max(job.tokens, 1), float(job.tokens)
        self.rows = self.kept = 0
        self._begun = 0.0  # tokens that are counted of a shard that is being computed

    def keep(self, shard: Shard) -> None:
        """Count a shard of an earlier call."""
        self.kept += len(shard.rows)
        self.rows += len(shard.rows)
        self._left -= shard.tokens
        if self._must:
            self.pace.skip(shard.tokens)

    def progress(self, shard: Shard, share: float) -> None:
        """Count what is done of a shard."""
        if share < 1:  # the end is counted once the scores are kept
            self._count(share * shard.tokens)

    def finish(self, shard: Shard) -> None:
        """Count a shard as computed and kept."""
        self.rows += len(shard.rows)
        self._count(shard.tokens)
        self._begun = 0.0

    def _count(self, tokens: float) -> None:
        self._left -= tokens - self._begun
        self.pace.update(tokens - self._begun, must=self._must)
        self._begun = tokens
        speed = f", {self.pace.speed:,.0f} tokens/s" if self.pace.speed else ""
        left = self.pace.forecast(max(self._left, 0)) or 0
        self._line.update(f"{self.rows:,}/{self._total:,}{speed}", 1 - max(self._left, 0) / self._tokens, left)
