"""The ground truth of a synthetic arena: each battle's true probabilities, with which reports compare their figures.

id,winner_model_a,winner_model_b,winner_tie
100228,0.412,0.391,0.197
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile

from common.battle import PROBABILITY_COLUMNS
from common.console import name_of
from common.errors import ArenaError
from data_prep.cells import parse_id
from data_prep.tables import BrokenRow, CsvTable, open_table

_NAMES = ("id", *PROBABILITY_COLUMNS)
_ENOUGH = 20  # rows of a real arena are never all certain
_REMEDY = "--truth is the truth.csv of a synthetic arena; leave it out for votes of people"
_OF_THESE = "give the truth.csv that was made with these votes, or leave --truth out"


def read_truth_ids(path: Path) -> Collection[str]:
    """Return the ids of a truth.csv. Raises ArenaError unless it is a plain CSV of three probabilities an id."""
    found = read_distributions(path, _REMEDY)
    if len(found) >= _ENOUGH and all(max(each) == 1 for each in found.values()):
        what = "holds verdicts (each row one 1 and two 0), not probabilities: the best possible would be perfect"
        raise ArenaError(what, where=str(path), remedy=_REMEDY)
    return found.keys()


def read_distributions(path: Path, remedy: str) -> dict[str, tuple[float, float, float]]:
    """Return the three probabilities of each id of a plain CSV; raises ArenaError, with `remedy`, for what is none."""
    table = open_table(path)
    if not isinstance(table, CsvTable) or table.compressed:
        raise ArenaError("is no plain CSV file", where=str(path), remedy=remedy)
    if missing := [name for name in _NAMES if name not in table.columns]:
        raise ArenaError(f"lacks the column(s) {missing}", where=str(path), remedy=remedy)
    rows: dict[str, int] = {}
    found = {}
    for number, cells in enumerate(table.rows(_NAMES), 1):
        where = f"{path} row {number}"
        if isinstance(cells, BrokenRow) or not _is_distribution(cells[1:]):
            raise ArenaError("holds no three probabilities", where=where, remedy=remedy)
        if (identity := parse_id(cells[0])) is None:
            raise ArenaError("has no id", where=where, remedy=remedy)
        if (first := rows.setdefault(identity, number)) != number:
            what = f"the id {name_of(identity)} is in row {first} and again in row {number}"
            raise ArenaError(what, where=where, remedy="keep one of the two rows")
        values = tuple(float(cell) for cell in cells[1:])
        found[identity] = tuple(value / sum(values) for value in values)
    return found


def require_truth_of(rows: Path, known: Collection[str], where: Path) -> None:
    """Raise ArenaError where a battle of the first source in a rows.parquet is not among the `known` ids."""
    battles, missing, first = 0, 0, None
    with ParquetFile(rows) as file:
        for batch in file.iter_batches(columns=["source", "id"], use_threads=False):
            sources, ids = (batch.column(name).to_pylist() for name in ("source", "id"))
            judged = [identity for source, identity in zip(sources, ids, strict=True) if source == "train"]
            absent = [identity for identity in judged if identity not in known]
            battles, missing = battles + len(judged), missing + len(absent)
            first = first or next(iter(absent), None)
    if first is not None:
        raise ArenaError(
            f"has no true probabilities of {missing:,} of the {battles:,} battles, the first id is {name_of(first)}",
            where=str(where),
            remedy=_OF_THESE,
        )


def probabilities_of(truth: pd.DataFrame, ids: Sequence[str], where: str = "truth.csv") -> np.ndarray:
    """Return the true probabilities [ids, 3] of some battles; `truth` has `id` and `PROBABILITY_COLUMNS`.

    Raises ArenaError where one of them has none, or two.
    """
    known = truth.set_index(truth["id"].astype(str))
    counts = known.index.value_counts()
    if wrong := [name for name in ids if counts.get(name) != 1]:
        what = f"{len(wrong)} judged row(s) have no true probabilities or two, the first id is {name_of(wrong[0])}"
        raise ArenaError(what, where=where, remedy="prepare again with the truth.csv that was made with these votes")
    return known.loc[list(ids), list(PROBABILITY_COLUMNS)].to_numpy(float)


def _is_distribution(cells: Sequence[object]) -> bool:
    try:
        values = [float(cell) for cell in cells]
    except (TypeError, ValueError):
        return False
    return all(0 <= value <= 1 for value in values) and abs(sum(values) - 1) < 1e-3
