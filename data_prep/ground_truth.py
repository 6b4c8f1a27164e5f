"""The truth of a synthetic arena: each battle's true probabilities, which reports hold their figures against.

id,winner_model_a,winner_model_b,winner_tie
100228,0.412,0.391,0.197
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from common.battle import PROBABILITY_COLUMNS
from common.console import name_of
from common.errors import ArenaError
from data_prep.readers import first_repeat, hash_of
from data_prep.schemas import parse_id
from data_prep.tables import BrokenRow, CsvTable, open_table

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

_NAMES = ("id", *PROBABILITY_COLUMNS)
_BATCH = 4096  # rows whose ids are in memory as text
_SOME = 20  # rows that no real arena is sure of, all of them
_REMEDY = "--truth is the truth.csv of a synthetic arena; leave it out for votes of people"
_OF_THESE = "give the truth.csv that was made with these votes, or leave --truth out"


def check_truth(path: Path) -> None:
    """Raise ArenaError unless this is a plain CSV file of three probabilities an id, each id once."""
    table = open_table(path)
    if not isinstance(table, CsvTable) or table.compressed:
        raise ArenaError("is no plain CSV file", where=str(path), remedy=_REMEDY)
    if missing := [name for name in _NAMES if name not in table.columns]:
        raise ArenaError(f"lacks the column(s) {missing}", where=str(path), remedy=_REMEDY)
    graded = rows = 0
    for number, cells in enumerate(table.rows(_NAMES), 1):
        if isinstance(cells, BrokenRow) or not _is_distribution(cells[1:]):
            raise ArenaError("holds no three probabilities", where=f"{path} row {number}", remedy=_REMEDY)
        if parse_id(cells[0]) is None:
            raise ArenaError("has no id", where=f"{path} row {number}", remedy=_REMEDY)
        rows, graded = number, graded + (max(map(float, cells[1:])) < 1)
    if rows >= _SOME and not graded:
        what = "holds verdicts (each row one 1 and two 0), not probabilities: the best possible would be perfect"
        raise ArenaError(what, where=str(path), remedy=_REMEDY)
    _refuse_repeats(path, _hashes(path))


def require_truth_of(rows: Path, path: Path) -> None:
    """Raise ArenaError where a battle of a rows.parquet that has a verdict has no true probabilities in `path`.

    Ids are compared by 64-bit hashes: eight bytes of each of the truth's rows are in memory.
    """
    import numpy as np
    from pyarrow.parquet import ParquetFile

    known, battles, missing, first = _hashes(path), 0, 0, None
    with ParquetFile(rows) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=["split", "id"]):
            splits, ids = (batch.column(name).to_pylist() for name in ("split", "id"))
            judged = [identity for split, identity in zip(splits, ids, strict=True) if split != "test"]
            hashes = np.array([hash_of(identity) for identity in judged], np.int64)
            absent = np.flatnonzero(~_among(known, hashes))
            if len(absent) and first is None:
                first = judged[absent[0]]
            battles, missing = battles + len(judged), missing + len(absent)
    if first is not None:
        raise ArenaError(
            f"has no true probabilities of {missing:,} of the {battles:,} battles, the first id is {name_of(first)}",
            where=str(path),
            remedy=_OF_THESE,
        )


def probabilities_of(truth: pd.DataFrame, ids: Sequence[str], where: str = "truth.csv") -> np.ndarray:
    """Return the true probabilities [ids, 3] of some battles; `truth` has `id` and `PROBABILITY_COLUMNS`.

    Raises ArenaError where one of them has none, or an id stands twice.
    """
    known = truth.set_index(truth["id"].astype(str))
    missing = [name for name in ids if name not in known.index]
    double = known.index[known.index.duplicated()]
    if missing or len(double):
        what = (
            f"{len(missing)} judged row(s) have no true probabilities, the first id is {name_of((missing or [0])[0])}"
        )
        if not missing:
            what = f"the id {name_of(double[0])} stands twice"
        raise ArenaError(what, where=where, remedy="prepare again with the truth.csv that was made with these votes")
    return known.loc[list(ids), list(PROBABILITY_COLUMNS)].to_numpy(float)


def _is_distribution(cells: Sequence[object]) -> bool:
    try:
        values = [float(cell) for cell in cells]
    except (TypeError, ValueError):
        return False
    return all(0 <= value <= 1 for value in values) and abs(sum(values) - 1) < 1e-3


def _ids(path: Path) -> Iterator[tuple[str, int]]:
    """Yield the ids of a checked truth with their row numbers."""
    for number, cells in enumerate(open_table(path).rows(_NAMES[:2]), 1):
        if not isinstance(cells, BrokenRow):
            yield str(parse_id(cells[0])), number


def _hashes(path: Path) -> np.ndarray:
    """Return the hashes of all ids, sorted."""
    import numpy as np

    found = array("q", (hash_of(identity) for identity, _ in _ids(path)))
    hashes = np.frombuffer(found, np.int64) if found else np.empty(0, np.int64)
    hashes.sort()
    return hashes


def _among(known: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Tell of each hash whether it is among sorted ones."""
    import numpy as np

    if not len(known):
        return np.zeros(len(hashes), bool)
    return known[np.minimum(np.searchsorted(known, hashes), len(known) - 1)] == hashes


def _refuse_repeats(path: Path, hashes: np.ndarray) -> None:
    """Raise ArenaError if an id really comes twice; the file is read once more to see."""
    suspects = set(hashes[1:][hashes[1:] == hashes[:-1]].tolist())
    if suspects and (repeat := first_repeat(_ids(path), suspects)):
        identity, first, again = repeat
        what = f"the id {name_of(identity)} stands in row {first} and again in row {again}"
        raise ArenaError(what, where=str(path), remedy=_OF_THESE)
