"""One set of rows on its way to raw scores, interruptible at any moment.

job = open_job(base, "test", scorer, executor, inputs=…, rows=…, label=…, show=show)
job.score(executor, pace)                  # every row, A before B
job.score(executor, pace, swapped=True)    # every row, B before A
for table in job.tables(): ...             # facts and scores of some thousand rows at a time, in the input's order
job.remove()                               # once the final files are written

Everything lies in one folder (scoring.score_store). The next call with the same inputs takes what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from common.battle import SWAPPED_ORDER
from common.errors import ArenaError
from common.progress import Line, Show
from scoring import score_store
from scoring.calibration import AB_COLUMNS, BA_COLUMNS
from scoring.executor import Executor
from scoring.score_store import FACTS_SCHEMA, STRAIGHT, SWAPPED, Facts, ModelInput, RowStore, Shard, ShardFolder, shards
from scoring.scorer import Scorer
from scoring.time_limit import Pace


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
