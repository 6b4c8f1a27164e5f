"""A job: one set of rows on its way to raw scores, interruptible at any moment.

job = open_job(base, "test", scorer, executor, inputs=…, rows=…, show=show)
job.straight(executor, pace)               # every row, A before B
job.swapped(executor, pace)                # B before A, the most uncertain rows first, as far as the pace allows
for table in job.tables(): ...             # facts and scores of some thousand rows at a time, in the input's order
job.remove()                               # once the final files are written

Everything lies in one folder of shards (scoring.score_store). The next call with the same inputs takes what is there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.battle import SWAPPED_ORDER
from common.errors import ArenaError
from scoring.calibration import AB_COLUMNS, BA_COLUMNS
from scoring.links import log_softmax
from scoring.score_store import (
    STRAIGHT,
    SWAPPED,
    WINDOW,
    Facts,
    Fed,
    RowStore,
    Shard,
    ShardFolder,
    constants,
    facts_schema,
    straight_shards,
    swapped_shards,
)
from scoring.scorer import Scorer
from scoring.time_limit import Pace
from scoring.workers import Executor

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

    from common.progress import Line, Show


def open_job(
    base: Path,
    target: str,
    scorer: Scorer,
    executor: Executor,
    *,
    inputs: Mapping[str, Any],
    rows: Callable[[], Iterable[tuple[Facts, Fed]]],
    label: str,
    show: Show,
    fresh: bool = False,
) -> Job:
    """Open the job of these inputs under `base`: its rows are read (once), its finished shards are there.

    `inputs` are what the rows come from; what the scores depend on beside them is added here. With `fresh` what an
    interrupted call left is deleted.
    """
    depends = {
        **inputs,
        "model": scorer.inputs(),
        "label_ids": list(scorer.label_ids),
        "engine": executor.engine,
        "precision": executor.precision,
        "device": executor.device,
        "columns": list(scorer.columns),
        "plan": constants(),
    }
    folder = ShardFolder(base, target, depends, show.note, fresh=fresh)
    return Job(folder, _rows_of(folder, rows, label, show), scorer.columns, label, show)


def _rows_of(folder: ShardFolder, rows: Callable[[], Iterable], label: str, show: Show) -> RowStore:
    if folder.resumed:
        try:
            return RowStore(folder.path)
        except ArenaError:  # killed while they were read, or damaged: they are read again, and are the same
            pass
    with show.line(f"{label}: reading the rows") as line:
        return RowStore.write(folder.path, rows(), lambda count: count % 100_000 or line.update(f"{count:,} rows"))


class Job:
    """One set of rows, its shards and the scores that are known so far."""

    def __init__(self, folder: ShardFolder, store: RowStore, columns: Sequence[str], label: str, show: Show):
        self._folder, self._store, self._columns = folder, store, tuple(columns)
        self._label, self._show = label, show
        self._scores = {STRAIGHT: _ScoreFile(folder.path / "ab.f64", store.rows, len(columns))}

    @property
    def rows(self) -> int:
        """How many rows there are."""
        return self._store.rows

    @property
    def tokens(self) -> int:
        """How many tokens every row once takes."""
        return self._store.tokens

    def straight(self, executor: Executor, pace: Pace) -> None:
        """Score every row, A before B."""
        self._run(executor, pace, STRAIGHT, straight_shards(self._store), "", must=True, whole=True)

    def swapped(self, executor: Executor, pace: Pace, *, whole: bool = False) -> int:
        """Score rows with B before A, the most uncertain first, while the pace allows; return how many have both.

        With `whole` all rows are scored, whatever the pace. Uncertain is a row whose plain softmax in the straight
        order has a high entropy.
        """
        if SWAPPED not in self._scores:
            self._scores[SWAPPED] = _ScoreFile(self._folder.path / "ba.f64", self.rows, len(self._columns))
        plan = swapped_shards(self._store, self._uncertainty())
        return self._run(executor, pace, SWAPPED, plan, ", swapped", must=False, whole=whole)

    def tables(self) -> Iterator[pd.DataFrame]:
        """Yield facts and scores of up to `WINDOW` rows at a time; a row without the swapped order has NaN there."""
        for first, table in self._store.windows():
            scores = self._scores[STRAIGHT].read(first, len(table))
            for i, name in enumerate(self._columns):
                table[name] = scores[:, i]
            if self._columns == AB_COLUMNS:
                swapped = self._scores[SWAPPED].read(first, len(table)) if SWAPPED in self._scores else None
                for i, name in enumerate(BA_COLUMNS):
                    table[name] = np.nan if swapped is None else swapped[:, SWAPPED_ORDER[i]]
            yield table

    def schema(self) -> pa.Schema:
        """Return the columns of `tables`, as Arrow has them."""
        import pyarrow as pa

        names = (*self._columns, *(BA_COLUMNS if self._columns == AB_COLUMNS else ()))
        return pa.schema([*facts_schema(), *((name, pa.float64()) for name in names)])

    def ids(self) -> Iterator[str]:
        """Yield the rows' ids in the input's order."""
        return self._store.ids()

    def cut_rows(self) -> int:
        """Return how many rows were shortened to fit."""
        return sum(int(facts["cut"].sum()) for _, facts in self._store.windows())

    def remove(self) -> None:
        """Delete the folder of the job: its scores are in the final files."""
        self._store.close()
        for file in self._scores.values():
            file.close()
        self._folder.remove()

    def _run(
        self, executor: Executor, pace: Pace, order: str, plan: Iterator[Shard], more: str, *, must: bool, whole: bool
    ) -> int:
        """Take the shards that are there and have the others computed; return the number of rows with a score."""
        with self._show.line(f"{self._label}{more}") as line:
            tally = _Tally(line, pace, self, must)
            for shard, scores in executor.run(self._store, self._missing(order, plan, tally, whole), tally.progress):
                self._folder.write(shard, scores)
                self._scores[order].put(shard.rows, scores)
                tally.finish(shard)
        if tally.kept:
            self._show.note(f"{self._label}{more}: {tally.kept:,} rows were scored by an earlier call, and kept")
        return tally.rows

    def _missing(self, order: str, plan: Iterator[Shard], tally: _Tally, whole: bool) -> Iterator[Shard]:
        """Yield the shards that must be computed; those that are there go to the scores."""
        spent = False
        for shard in plan:
            scores = self._folder.read(shard, len(self._columns))
            if scores is not None:
                self._scores[order].put(shard.rows, scores)
                tally.keep(shard)
            elif whole or not (spent := spent or not tally.pace.allows(shard.tokens)):
                tally.pace.send(shard.tokens)
                yield shard

    def _uncertainty(self) -> np.ndarray:
        found = np.empty(self.rows)
        for start in range(0, self.rows, WINDOW):
            logs = log_softmax(self._scores[STRAIGHT].read(start, WINDOW))
            found[start : start + len(logs)] = -(np.exp(logs) * logs).sum(axis=1)
        return found


class _Tally:
    """How far one pass over the rows is, for the live line and the pace."""

    def __init__(self, line: Line, pace: Pace, job: Job, must: bool):
        self.pace, self.must, self._line = pace, must, line
        self._total, self._left = job.rows, float(job.tokens)
        self.rows = self.kept = 0
        self._begun: dict[Shard, float] = {}  # the share of each shard that is being computed

    def keep(self, shard: Shard) -> None:
        """Count a shard of an earlier call."""
        self.kept += len(shard.rows)
        self.rows += len(shard.rows)
        self._left -= shard.tokens
        if self.must:
            self.pace.skip(shard.tokens)

    def progress(self, shard: Shard, share: float) -> None:
        """Count what was done of a shard since the last time; one that is computed again counts from where it was."""
        before = self._begun.get(shard, 0.0)
        if before < share < 1:  # the end is counted once the scores are kept
            self._begun[shard] = share
            self._count((share - before) * shard.tokens)

    def finish(self, shard: Shard) -> None:
        """Count a shard as computed and kept."""
        before = self._begun.pop(shard, 0.0)
        self.rows += len(shard.rows)
        self._count((1 - before) * shard.tokens)

    def _count(self, tokens: float) -> None:
        self._left -= tokens
        self.pace.update(tokens, must=self.must)
        rows = self.rows + sum(int(share * len(shard.rows)) for shard, share in self._begun.items())
        speed = f"  {self.pace.speed:,.0f} tokens/s" if self.pace.speed else ""
        left = self.pace.forecast(max(self._left, 0))
        self._line.update(f"{rows:,}/{self._total:,}{speed}", rows / max(self._total, 1), left)


class _ScoreFile:
    """Scores [rows, columns] on disk, NaN where there are none; memory holds what is read at a time."""

    def __init__(self, path: Path, rows: int, columns: int):
        self._rows, self._columns = rows, columns
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        for start in range(0, rows, WINDOW):
            self._write(np.full((min(WINDOW, rows - start), columns), np.nan).tobytes(), 8 * columns * start)

    def put(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Keep the scores of some rows."""
        size = 8 * self._columns
        for row, values in zip(rows.tolist(), np.ascontiguousarray(scores, "<f8"), strict=True):
            self._write(values.tobytes(), row * size)

    def read(self, start: int, count: int) -> np.ndarray:
        """Return the scores of up to `count` rows from `start` on."""
        size = 8 * self._columns
        count = min(count, self._rows - start)
        return np.frombuffer(os.pread(self._file, count * size, start * size), "<f8").reshape(count, self._columns)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)

    def _write(self, content: bytes, place: int) -> None:
        while content:  # a disk that is nearly full takes a part, and says why only when it is asked again
            taken = os.pwrite(self._file, content, place)
            content, place = content[taken:], place + taken
