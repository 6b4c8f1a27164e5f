"""The table of raw scores: what the judge said of each battle, before any link makes probabilities of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.battle import Battle
from common.errors import ArenaError
from common.screen import name_of
from data_prep.export_reader import readable, require_pairs
from data_prep.readers import VoteReader
from data_prep.row_statistics import battle_facts
from scoring.row_store import ROW_FACTS, Facts

# The first columns of every score table.
COLUMNS = ROW_FACTS
_BATCH = 512
_AGAIN = "run prepare again"


def exported_rows(data: Path, split: str, texts: str) -> Iterator[tuple[Facts, dict[str, Any]]]:
    """Yield (facts and `dropped`, texts as fed) of one exported split, in the order of the input.

    `texts` is the table that lies beside rows.parquet, row by row: battles.parquet or pairs.parquet. Raises ArenaError
    where it was not exported.
    """
    from pyarrow.parquet import ParquetFile

    if texts == "pairs.parquet":
        require_pairs(data)
    columns = ["split", "dropped", *COLUMNS]
    with readable(data / texts):
        fed = ParquetFile(data / texts)
    with readable(data / "rows.parquet"), fed, ParquetFile(data / "rows.parquet") as rows:
        beside = (text for batch in fed.iter_batches(batch_size=_BATCH) for text in batch.to_pylist())
        for batch in rows.iter_batches(batch_size=_BATCH, columns=columns):
            for facts in batch.to_pylist():
                text = next(beside, None)
                if text is None:
                    raise ArenaError("has fewer rows than rows.parquet", where=str(data / texts), remedy=_AGAIN)
                if facts.pop("split") == split:
                    yield facts, text


def battles_to_score(path: Path) -> Iterator[Battle]:
    """Yield the battles of a table; at its end raises ArenaError if a row could not be read: each needs its answer."""
    reader = VoteReader(path, labelled=False)
    yield from (battle for _, battle in reader)
    if reader.rejected:
        first = reader.rejected[0]
        named = f" (id {name_of(first.id)})" if first.id is not None else ""
        raise ArenaError(
            f"{len(reader.rejected)} row(s) cannot be scored; the first{named}: {first.reason}",
            where=f"{path} row {first.row}",
            remedy="mend or remove these rows: every row needs its own probabilities",
        )


def describe(battle: Battle, *, tokens: int, cut: bool) -> Facts:
    """Return one row of `COLUMNS` for a battle as it was before it was fitted."""
    return {**battle_facts(battle), "tokens": tokens, "cut": cut}
