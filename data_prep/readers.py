"""The reader of votes: a table on the disk in, one `Battle` after another out, at flat memory.

    reader = VoteReader(Path("train.csv"), labelled=True)
    for row, battle in reader:         # row 1 is the first after the header
        ...
    reader.rejected                    # the rows that were left out, each with its reason

A table may be a folder of parts, which are read in the order of their names; rows are counted in each part.
Which columns mean what: `data_prep.schemas`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.battle import Battle
from common.console import name_of
from common.errors import ArenaError
from data_prep.schemas import BadCell, BadVerdict, advice_on, is_formula, parse_id, schema_of
from data_prep.tables import BrokenRow, CsvTable, ParquetTable, open_tables

_MOST_BAD = 0.01
# Bad rows that, more than half of those read so far, end the reading: they wait in memory for the audit.
_HOPELESS = 10_000
_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out; `row` counts data rows from 1, the header is not one."""

    file: str
    row: int
    id: str | None
    reason: str


class VoteReader:
    """The battles of one table of votes, streamed; iterating again reads the file again.

    `labelled`: every row must have a verdict; otherwise winner columns are read where they are valid.
    Raises ArenaError for a file that is not a table of votes or that lacks columns.
    """

    def __init__(self, path: Path, *, labelled: bool, columns: Mapping[str, str] | None = None):
        """`columns` are the table's own names for ours, as --columns gives them."""
        self.path, self.labelled, self._named = Path(path), labelled, dict(columns or {})
        self.rejected: list[Rejected] = []
        self.rows_read = 0
        self.formulas = 0  # ids that a spreadsheet would run
        self._tables = open_tables(self.path)
        self.parts = [table.path for table in self._tables]  # the files that are read, in their order
        self._sizes = [path.stat().st_size for path in self.parts]
        self._part = 0  # which of them is being read
        columns = self._columns(self._tables[0])
        self._schema = schema = schema_of(columns)
        self.schema = schema.name  # kaggle, arena_conversations or wsdm
        # Only a complete set of winner columns says anything.
        self.has_verdicts = set(schema.verdict) <= set(columns)
        identity = next((name for name in schema.ids if name in columns), schema.ids[0])
        winners = schema.verdict if self.has_verdicts else ()
        language = ("language",) if "language" in columns else ()
        self._names = (identity, *schema.texts, *winners, *language)
        for table in self._tables:
            columns = self._columns(table)
            missing = schema.missing(columns, labelled)
            if missing := missing or [name for name in self._names if name not in columns]:
                raise ArenaError(
                    f"lacks {len(missing)} column(s) {missing}; found {table.columns[:30]}",
                    where=f"{table.path} header",
                    remedy=advice_on(schema, table.columns, missing),
                )

    @property
    def is_wsdm(self) -> bool:
        """Whether this is a test set of the WSDM Cup, whose submission is `id,winner`."""
        return self.schema == "wsdm" and "scored" in self._tables[0].columns

    @property
    def facts(self) -> dict[str, Any]:
        """How the table is read, for the audit and for a line of `prepare`; the counts are known after reading."""
        return {"schema": self.schema, "columns": self._named}

    def _columns(self, table: CsvTable | ParquetTable) -> list[str]:
        """Return a table's columns by our names."""
        ours = {theirs: name for name, theirs in self._named.items()}
        return [ours.get(name, name) for name in table.columns if name in ours or name not in self._named]

    @property
    def share(self) -> float:
        """The part of the whole table, 0 to 1, that was read so far, by the sizes of its files."""
        at, sizes = self._part, self._sizes
        return (sum(sizes[:at]) + sizes[at] * self._tables[at].share) / max(sum(sizes), 1)

    def __iter__(self) -> Iterator[tuple[int, Battle]]:
        """Yield (row number in its file, battle) in the files' order; bad rows go to `rejected`.

        Raises ArenaError at once for a row without exactly one winner, and at the end for an id that comes twice, when
        more than one row and more than 1 % of the rows are bad, or when no row is left.
        """
        self.rejected, self.rows_read, self.formulas = [], 0, 0
        hashes = array("q")  # of all ids, eight bytes each
        for where, number, cells in self._rows(self._names):
            self.rows_read += 1
            broken = isinstance(cells, BrokenRow)
            identity = parse_id(cells.first if broken else cells[0])
            try:
                if broken:
                    # Its first cell may be any scrap of text: it is reported, and not compared with other ids.
                    raise BadCell(cells.reason)
                if identity is None:
                    raise BadCell(f"has no {self._names[0]}")
                hashes.append(hash(identity))
                battle = self._battle(identity, cells)
            except BadCell as error:
                self.rejected.append(Rejected(str(where), number, identity, str(error)))
                if len(self.rejected) >= _HOPELESS and 2 * len(self.rejected) > self.rows_read:
                    self._check_rejected()
            except BadVerdict as error:
                raise ArenaError(
                    f"(id {name_of(identity)}) {error}",
                    where=f"{where} row {number}",
                    remedy="give the row exactly one winner, or remove it",
                ) from None
            else:
                self.formulas += is_formula(battle.id)
                yield number, battle
        self._refuse_repeats(hashes)
        self._check_rejected()

    def _rows(self, names: Sequence[str]) -> Iterator[tuple[Path, int, Sequence[object] | BrokenRow]]:
        """Yield (file, row number in it, cells) of all parts."""
        for part, table in enumerate(self._tables):
            self._part = part
            for number, cells in enumerate(table.rows([self._named.get(name, name) for name in names]), 1):
                yield table.path, number, cells

    def _battle(self, identity: str, cells: Sequence[object]) -> Battle:
        schema, end = self._schema, 1 + len(self._schema.texts)
        prompts, responses_a, responses_b = schema.read_texts(cells[1:end])
        if not len(prompts) == len(responses_a) == len(responses_b):
            raise BadCell(
                f"the numbers of turns differ: prompt {len(prompts)}, response_a {len(responses_a)}, "
                f"response_b {len(responses_b)}"
            )
        verdict = None
        if self.has_verdicts:
            start, end = end, end + len(schema.verdict)
            try:
                verdict = schema.read_verdict(cells[start:end])
            except BadVerdict:
                if self.labelled:
                    raise
        language = cells[end].strip() or None if end < len(cells) and isinstance(cells[end], str) else None
        return Battle(identity, prompts, responses_a, responses_b, verdict, language)

    def _refuse_repeats(self, hashes: array) -> None:
        """Raise ArenaError if an id comes twice; where hashes do, the table is read once more to compare the ids."""
        sorted_hashes = np.sort(np.frombuffer(hashes, np.int64)) if hashes else np.empty(0, np.int64)
        double = set(sorted_hashes[1:][sorted_hashes[1:] == sorted_hashes[:-1]].tolist())
        places: dict[str, str] = {}
        for where, number, cells in self._rows(self._names[:2]) if double else ():
            identity = None if isinstance(cells, BrokenRow) else parse_id(cells[0])
            if identity is None or hash(identity) not in double:
                continue
            if identity in places:
                raise ArenaError(
                    f"the {self._names[0]} {identity[:80]!a} is in {places[identity]} and again in row {number}",
                    where=f"{where} row {number}",
                    remedy="remove one of the two rows, or give each its own id",
                )
            places[identity] = f"row {number}" if len(self._tables) == 1 else f"{where} row {number}"

    def _check_rejected(self) -> None:
        bad, rows = len(self.rejected), self.rows_read
        if not rows:
            raise ArenaError("has a header and no row", where=str(self.path), remedy="give a file with rows")
        if bad < rows and (bad <= 1 or bad <= _MOST_BAD * rows):
            return
        first = self.rejected[:_SHOWN]
        listed = [f"  - row {r.row} (id {name_of(r.id) if r.id is not None else 'missing'}): {r.reason}" for r in first]
        more = [f"  - … and {bad - _SHOWN} more"] if bad > _SHOWN else []
        what = "no row is left" if bad == rows else f"more than {_MOST_BAD:.0%} of the rows are bad"
        raise ArenaError(
            "\n".join([f"{what}: {bad} of {rows} rows", *listed, *more]),
            where=f"{first[0].file} row {first[0].row}",
            remedy=f"correct or remove these rows; the columns were read as the {self.schema} schema",
        )
