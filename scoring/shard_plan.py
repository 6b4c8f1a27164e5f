"""Which rows are scored together: shards, the pieces in which scores are computed, kept and gone on from.

The plan depends on the rows alone. So a run that goes on, one with more workers and an undisturbed one make the same
batches, and their scores are the same to the last digit wherever the kernels are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from scoring.row_store import WINDOW, RowStore

# A shard is what a kill can cost: seconds on a GPU, minutes on a CPU. Several full batches of the engine fit in it.
SHARD_TOKENS = 2**17
SHARD_ROWS = 1024
# Rows of similar uncertainty that are put in order of length together: few enough to spend a last hour well.
_RANKED_TOGETHER = 1024
STRAIGHT, SWAPPED = "ab", "ba"


@dataclass(frozen=True, eq=False)
class Shard:
    """Some rows in one order of their answers: `rows` are numbers in a store, the longest row first."""

    name: str  # ab-00012
    rows: np.ndarray
    tokens: int

    @property
    def swapped(self) -> bool:
        """Whether the answers change places."""
        return self.name.startswith(SWAPPED)


def constants() -> list[int]:
    """Return what the plan is made with: shards of another plan are not those of this one."""
    return [1, WINDOW, SHARD_TOKENS, SHARD_ROWS, _RANKED_TOGETHER]


def straight_shards(store: RowStore) -> Iterator[Shard]:
    """Yield the shards of all rows in the straight order, window by window, in each the longest rows first."""
    number = 0
    for start in range(0, store.rows, WINDOW):
        lengths = store.lengths(start, start + WINDOW)
        for rows in _cut(start + np.arange(len(lengths)), lengths):
            yield _shard(STRAIGHT, number, rows, lengths[rows - start])
            number += 1


def swapped_shards(store: RowStore, uncertainty: np.ndarray) -> Iterator[Shard]:
    """Yield the shards of all rows in the swapped order, the most uncertain rows first; `uncertainty` [rows]."""
    lengths, number = store.lengths(), 0
    ranked = np.argsort(-uncertainty, kind="stable")
    for start in range(0, len(ranked), _RANKED_TOGETHER):
        together = ranked[start : start + _RANKED_TOGETHER]
        for rows in _cut(together, lengths[together]):
            yield _shard(SWAPPED, number, rows, lengths[rows])
            number += 1


def _cut(rows: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Cut rows, the longest first, into runs of at most `SHARD_ROWS` rows and `SHARD_TOKENS` tokens (or one row)."""
    order = np.argsort(-lengths, kind="stable")
    rows, sums = rows[order], np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
    start = 0
    while start < len(rows):
        stop = int(np.searchsorted(sums, sums[start] + SHARD_TOKENS, side="right")) - 1
        stop = min(max(stop, start + 1), start + SHARD_ROWS, len(rows))
        yield rows[start:stop]
        start = stop


def _shard(order: str, number: int, rows: np.ndarray, lengths: np.ndarray) -> Shard:
    return Shard(f"{order}-{number:05d}", rows, int(lengths.sum()))
