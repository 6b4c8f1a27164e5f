"""The overlap of two tables: rows of the test set that are training rows, whose probabilities would test nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ArenaError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

_COLUMNS = ("split", "id", "group")
_REMEDY = (
    "give the battles without verdicts (the competition's test.csv), or leave --test out: a part of the votes is held "
    "out and scored anyway, and `run.py score --input FILE` answers for any other table"
)


def refuse_same_table(train: Path, test: Path) -> None:
    """Raise ArenaError where one table is given twice."""
    if train.samefile(test):
        raise ArenaError("is the train table, given as the test set", where=str(test), remedy=_REMEDY)


def check_overlap(rows: Path, test: Path, *, has_verdicts: bool) -> int:
    """Return how many test rows of a rows.parquet are training rows: same id, same prompt.

    Raises ArenaError where all of them are and the test table has verdicts: it is a copy of the votes.
    """
    total, found = _count(rows)
    if found and found == total and has_verdicts:
        raise ArenaError(f"all of its {total:,} rows are training rows", where=str(test), remedy=_REMEDY)
    return found


def _count(path: Path) -> tuple[int, int]:
    """Return (test rows, how many of them are labelled rows, too); eight bytes of each test row are in memory."""
    import numpy as np
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        parts = [_keys(batch, test=True) for batch in file.iter_batches(columns=_COLUMNS)]
        tests = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
        if not len(tests):
            return 0, 0
        seen = np.zeros(len(tests), bool)
        for batch in file.iter_batches(columns=_COLUMNS):
            keys = _keys(batch, test=False)
            at = np.minimum(np.searchsorted(tests, keys), len(tests) - 1)
            seen[at[tests[at] == keys]] = True
    return len(tests), int(seen.sum())


def _keys(batch: pa.RecordBatch, *, test: bool) -> np.ndarray:
    """Return a hash of id and prompt of each test row, or of each other row."""
    import numpy as np

    names = (batch.column(name).to_pylist() for name in _COLUMNS)
    mine = [hash((identity, group)) for split, identity, group in zip(*names, strict=True) if (split == "test") == test]
    return np.array(mine, np.int64)
