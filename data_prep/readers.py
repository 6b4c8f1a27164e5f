"""Readers of votes: a table on the disk in, one `Battle` after another out, at flat memory.

    reader = VoteReader(Path("train.csv"), labelled=True)
    for row, battle in reader:         # row 1 is the first after the header
        ...
    reader.rejected                    # the rows that were left out, each with its reason

A table may be a folder of parts, which are read in the order of their names; rows are counted in each part.

Three schemas are told apart by their columns, never by the file's name: the competition's ("kaggle"),
LMSYS chatbot_arena_conversations ("arena_conversations") and the WSDM Cup's ("wsdm").
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from common.battle import PROBABILITY_COLUMNS, Battle
from common.console import name_of
from common.errors import ArenaError
from data_prep.schemas import (
    BadCell,
    BadVerdict,
    is_formula,
    parse_conversation,
    parse_id,
    parse_language,
    parse_one_hot,
    parse_text,
    parse_turns,
    parse_winner,
)
from data_prep.tables import BrokenRow, CsvTable, ParquetTable, open_tables

# Ids that are compared one by one, with their texts; older ones are sorted hashes, compared a block at a time.
_BLOCK = 1 << 16


class SeenIds:
    """The ids of a table: repeats within a block are seen at once, others when the block is full."""

    def __init__(self, block: int = _BLOCK):
        self._size = block
        self._block: dict[str, int] = {}  # id to its number, of the newest ids
        self._hashes = array("q")  # of the same
        self._runs: list[np.ndarray] = []  # sorted hashes, the longest first
        self._count = 0

    def add(self, identity: str) -> set[int]:
        """Note an id; return the hashes that came twice, each a suspect: `hash_of` tells which ids have them."""
        if self._block.setdefault(identity, self._count) != self._count:
            return {hash_of(identity)}
        self._hashes.append(hash_of(identity))
        self._count += 1
        return self.check() if len(self._block) >= self._size else set()

    def check(self) -> set[int]:
        """Compare the newest ids with all others; to be called once more at the table's end."""
        import numpy as np

        run = np.sort(np.frombuffer(self._hashes, dtype=np.int64)) if self._hashes else np.empty(0, np.int64)
        self._block, self._hashes = {}, array("q")
        suspects = set(run[1:][run[1:] == run[:-1]].tolist())
        for older in self._runs:
            places = np.searchsorted(older, run)
            found = older[np.minimum(places, len(older) - 1)] == run
            suspects.update(run[found].tolist())
        self._keep(run)
        return suspects

    def _keep(self, run: np.ndarray) -> None:
        """Merge runs of like length, so that there are few of them and each hash is merged few times."""
        import numpy as np

        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # two sorted runs: a merge
        if len(run):
            self._runs.append(run)


def hash_of(identity: str) -> int:
    """Return the 64-bit hash by which ids are compared first (of this process only)."""
    return hash(identity)


def first_repeat(ids: Iterator[tuple[str, object]], suspects: set[int]) -> tuple[str, object, object] | None:
    """Return (id, its first place, its second) of the first id that really comes twice, None for mere collisions."""
    places: dict[str, object] = {}
    for identity, place in ids:
        if hash_of(identity) in suspects:
            if identity in places:
                return identity, places[identity], place
            places[identity] = place
    return None


_MOST_BAD = 0.01
# Bad rows that, more than half of those read so far, end the reading: they wait in memory for the audit.
_HOPELESS = 10_000
_SHOWN = 5
Texts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Rejected:
    """A row that was left out; `row` counts data rows from 1, the header is not one."""

    file: str
    row: int
    id: str | None
    reason: str


def _turns(cells: Sequence[object]) -> Texts:
    return (
        parse_turns(cells[0], "prompt"),
        parse_turns(cells[1], "response_a"),
        parse_turns(cells[2], "response_b"),
    )


def _texts(cells: Sequence[object]) -> Texts:
    return (
        parse_text(cells[0], "prompt"),
        parse_text(cells[1], "response_a"),
        parse_text(cells[2], "response_b"),
    )


def _conversations(cells: Sequence[object]) -> Texts:
    prompts, responses_a = parse_conversation(cells[0], "conversation_a")
    prompts_b, responses_b = parse_conversation(cells[1], "conversation_b")
    if prompts != prompts_b:
        raise BadCell("the user's turns in conversation_a and conversation_b differ: not one battle")
    return prompts, responses_a, responses_b


def _winner(cells: Sequence[object]) -> str:
    return parse_winner(cells[0])


@dataclass(frozen=True, slots=True)
class _Schema:
    """The columns of one kind of table, and how their cells become a battle."""

    name: str
    ids: tuple[str, ...]  # alternatives, the preferred first
    texts: tuple[str, ...]
    winners: tuple[str, ...]
    parse_texts: Callable[[Sequence[object]], Texts]
    parse_verdict: Callable[[Sequence[object]], str]

    def missing(self, columns: Sequence[str], labelled: bool) -> list[str]:
        """Return the columns that a table of this kind lacks."""
        needed = self.texts + (self.winners if labelled else ())
        no_id = [] if set(self.ids) & set(columns) else [" or ".join(self.ids)]
        return no_id + [name for name in needed if name not in columns]


_WSDM_MARKS = frozenset({"winner", "scored", "language"})
_PLAIN = ("prompt", "response_a", "response_b")
_KAGGLE = _Schema("kaggle", ("id",), _PLAIN, PROBABILITY_COLUMNS, _turns, parse_one_hot)
_WSDM = _Schema("wsdm", ("id",), _PLAIN, ("winner",), _texts, _winner)
_CONVERSATIONS = _Schema(
    "arena_conversations",
    ("question_id", "id"),
    ("conversation_a", "conversation_b"),
    ("winner",),
    _conversations,
    _winner,
)


def _schema_of(columns: Sequence[str]) -> _Schema:
    """Return the schema that the columns speak for; a table without any of their marks counts as the competition's."""
    found = set(columns)
    if found & set(_CONVERSATIONS.texts):
        return _CONVERSATIONS
    if not found & set(PROBABILITY_COLUMNS) and found & _WSDM_MARKS:
        return _WSDM
    return _KAGGLE


def _what_it_is(schema: _Schema, columns: Sequence[str], missing: Sequence[str]) -> str:
    """Say what a table that lacks columns is, where that can be told, and which one is wanted."""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        return "the header looks like one cell: separate the cells with commas"
    if set(missing) == set(schema.winners):
        what = "the competition's test.csv, or another table" if schema is _KAGGLE else "a table"
        return (
            f"this is {what} without verdicts (no {', '.join(schema.winners)}): --train wants the one with verdicts "
            "(train.csv); pass a file without verdicts as the test set (--test)"
        )
    found = set(columns)
    texts = {name for each in (_KAGGLE, _CONVERSATIONS) for name in each.texts}
    if not found & texts and found >= set(PROBABILITY_COLUMNS):
        return (
            "this is the competition's sample_submission.csv, or another table of probabilities (no prompt, no "
            "responses): --train wants train.csv, --test wants test.csv"
        )
    if not found & (texts | {*PROBABILITY_COLUMNS, *_WSDM_MARKS}):
        return (
            "this is not a table of battles: give one with the columns of the competition's train.csv "
            f"({', '.join((*_KAGGLE.ids, *_KAGGLE.texts, *_KAGGLE.winners))}), of LMSYS chatbot_arena_conversations or "
            "of the WSDM Cup"
        )
    return f"the nearest known schema is {schema.name}: add or rename these columns"


class VoteReader:
    """The battles of one table of votes, streamed; iterating again reads the file again.

    `labelled`: every row must have a verdict; otherwise winner columns are read where they are valid.
    Raises ArenaError for a file that is no table of votes, or that lacks columns.
    """

    def __init__(self, path: Path, *, labelled: bool):
        self.path, self.labelled = Path(path), labelled
        self.rejected: list[Rejected] = []
        self.rows_read = 0
        self.formulas = 0  # ids that a spreadsheet would run
        self._tables = open_tables(self.path)
        self._sizes = [table.path.stat().st_size for table in self._tables]
        self._reading = 0  # which of them
        columns = self._tables[0].columns
        self._schema = schema = _schema_of(columns)
        for table in self._tables:
            missing = schema.missing(table.columns, labelled)
            if missing:
                raise self._missing_columns(table, missing)
        # Only a complete set of winner columns says anything.
        self._winners = schema.winners if set(schema.winners) <= set(columns) else ()
        identity = next(name for name in schema.ids if name in columns)
        language = ("language",) if "language" in columns else ()
        self._names = (identity, *schema.texts, *self._winners, *language)
        for table in self._tables[1:]:
            if missing := [name for name in self._names if name not in table.columns]:
                raise self._missing_columns(table, missing)

    @property
    def schema(self) -> str:
        """The kind of table: kaggle, arena_conversations or wsdm."""
        return self._schema.name

    @property
    def has_verdicts(self) -> bool:
        """Whether the table has all winner columns of its kind."""
        return bool(self._winners)

    @property
    def parts(self) -> list[Path]:
        """The files that are read, in their order."""
        return [table.path for table in self._tables]

    @property
    def share(self) -> float:
        """The part of the whole table, 0 to 1, that was read so far, by the sizes of its files."""
        at, sizes = self._reading, self._sizes
        return (sum(sizes[:at]) + sizes[at] * self._tables[at].share) / max(sum(sizes), 1)

    def __iter__(self) -> Iterator[tuple[int, Battle]]:
        """Yield (row number in its file, battle) in the files' order; bad rows go to `rejected`.

        Raises ArenaError for duplicate ids (65,536 rows after the second at the latest), at once for a row without
        exactly one winner, and at the end when more than one row and more than 1 % of the rows are bad, or when
        none is left.
        """
        self.rejected, self.rows_read, self.formulas = [], 0, 0
        seen = SeenIds()
        for where, number, cells in self._rows(self._names):
            self.rows_read += 1
            broken = isinstance(cells, BrokenRow)
            identity = parse_id(cells.first if broken else cells[0])
            # The first cell of a broken row may be any scrap of text: it is reported, and not compared.
            if identity is not None and not broken:
                self._refuse_repeats(seen.add(identity))
            try:
                battle = self._battle(identity, cells)
            except BadCell as error:
                self._reject(Rejected(str(where), number, identity, str(error)))
            except BadVerdict as error:
                raise self._bad_verdict(where, number, identity, error) from None
            else:
                self.formulas += is_formula(battle.id)
                yield number, battle
        self._refuse_repeats(seen.check())
        self._check_rejected()

    def _rows(self, names: Sequence[str]) -> Iterator[tuple[Path, int, Sequence[object] | BrokenRow]]:
        """Yield (file, row number in it, cells) of all parts."""
        for place, table in enumerate(self._tables):
            self._reading = place
            for number, cells in enumerate(table.rows(names), 1):
                yield table.path, number, cells

    def _refuse_repeats(self, suspects: set[int]) -> None:
        """Raise ArenaError if ids of these hashes really come twice; the table is read once more to see."""
        if not suspects:
            return
        rows = self._rows(self._names[:2])
        whole = ((parse_id(cells[0]), (where, n)) for where, n, cells in rows if not isinstance(cells, BrokenRow))
        if repeat := first_repeat(((i, place) for i, place in whole if i is not None), suspects):
            raise self._duplicate(*repeat)

    def _reject(self, row: Rejected) -> None:
        """Note a bad row; raises ArenaError as soon as there are too many for any table that could still follow."""
        self.rejected.append(row)
        if len(self.rejected) >= _HOPELESS and 2 * len(self.rejected) > self.rows_read:
            self._check_rejected()

    def _battle(self, identity: str | None, cells: Sequence[object] | BrokenRow) -> Battle:
        if isinstance(cells, BrokenRow):
            raise BadCell(cells.reason)
        if identity is None:
            raise BadCell(f"has no {self._names[0]}")
        winners = 1 + len(self._schema.texts)
        after = winners + len(self._winners)
        prompts, responses_a, responses_b = self._schema.parse_texts(cells[1:winners])
        if not len(prompts) == len(responses_a) == len(responses_b):
            raise BadCell(
                f"the numbers of turns differ: prompt {len(prompts)}, response_a {len(responses_a)}, "
                f"response_b {len(responses_b)}"
            )
        verdict = self._verdict(cells[winners:after]) if self._winners else None
        language = parse_language(cells[after]) if after < len(cells) else None
        return Battle(identity, prompts, responses_a, responses_b, verdict, language)

    def _verdict(self, cells: Sequence[object]) -> str | None:
        try:
            return self._schema.parse_verdict(cells)
        except BadVerdict:
            if self.labelled:
                raise
            return None

    def _check_rejected(self) -> None:
        bad, rows = len(self.rejected), self.rows_read
        if not rows:
            raise ArenaError("has a header and no row", where=str(self.path), remedy="give a file with rows")
        if bad < rows and (bad <= 1 or bad <= _MOST_BAD * rows):
            return
        first = self.rejected[:_SHOWN]
        listed = [f"  - row {r.row} (id {name_of(r.id) if r.id is not None else 'missing'}): {r.reason}" for r in first]
        more = [f"  - … and {bad - _SHOWN} more"] if bad > _SHOWN else []
        verb = "no row is left" if bad == rows else f"more than {_MOST_BAD:.0%} of the rows are bad"
        raise ArenaError(
            "\n".join([f"{verb}: {bad} of {rows} rows", *listed, *more]),
            where=f"{first[0].file} row {first[0].row}",
            remedy=f"mend or remove these rows; the columns were read as the {self.schema} schema",
        )

    def _missing_columns(self, table: CsvTable | ParquetTable, missing: list[str]) -> ArenaError:
        columns = table.columns
        return ArenaError(
            f"lacks {len(missing)} column(s) {missing}; found {columns[:30]}",
            where=f"{table.path} header",
            remedy=_what_it_is(self._schema, columns, missing),
        )

    def _duplicate(self, identity: str, first: tuple[Path, int], second: tuple[Path, int]) -> ArenaError:
        (file, row), (other, again) = first, second
        row_of_file = f"row {row}" if file == other else f"{file} row {row}"
        return ArenaError(
            f"the {self._names[0]} {identity[:80]!a} stands in {row_of_file} and again in row {again}",
            where=f"{other} row {again}",
            remedy="remove one of the two rows, or give each its own id",
        )

    def _bad_verdict(self, where: Path, number: int, identity: str | None, error: BadVerdict) -> ArenaError:
        return ArenaError(
            f"(id {name_of(identity)}) {error}",
            where=f"{where} row {number}",
            remedy="give the row exactly one winner, or remove it",
        )
