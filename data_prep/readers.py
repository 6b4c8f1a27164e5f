"""Readers of votes: a table on the disk in, one `Battle` after another out.

    reader = VoteReader(Path("train.csv"), labelled=True)
    for row, battle in reader:         # row 1 is the first after the header
        ...
    reader.rejected                    # the rows that were left out, each with its reason

Three schemas are told apart by their columns, never by the file's name: the competition's ("kaggle"),
LMSYS chatbot_arena_conversations ("arena_conversations") and the WSDM Cup's ("wsdm").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.battle import PROBABILITY_COLUMNS, Battle
from data_prep.cells import (
    BadCell,
    BadVerdict,
    parse_conversation,
    parse_id,
    parse_language,
    parse_one_hot,
    parse_text,
    parse_turns,
    parse_winner,
)
from data_prep.errors import ArenaError
from data_prep.tables import BrokenRow, open_table

_MOST_BAD = 0.01
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
    if not found & set(PROBABILITY_COLUMNS) and found & {"winner", "scored", "language"}:
        return _WSDM
    return _KAGGLE


class VoteReader:
    """The battles of one table of votes, streamed; iterating again reads the file again.

    `labelled`: every row must have a verdict; otherwise winner columns are read where they are valid.
    Raises ArenaError for a file that is no table of votes, or that lacks columns.
    """

    def __init__(self, path: Path, *, labelled: bool):
        self.path, self.labelled = Path(path), labelled
        self.rejected: list[Rejected] = []
        self.rows_read = 0
        self._table = open_table(self.path)
        columns = self._table.columns
        self._schema = schema = _schema_of(columns)
        missing = schema.missing(columns, labelled)
        if missing:
            raise self._missing_columns(missing)
        # Only a complete set of winner columns says anything.
        self._winners = schema.winners if set(schema.winners) <= set(columns) else ()
        identity = next(name for name in schema.ids if name in columns)
        language = ("language",) if "language" in columns else ()
        self._names = (identity, *schema.texts, *self._winners, *language)

    @property
    def schema(self) -> str:
        """The kind of table: kaggle, arena_conversations or wsdm."""
        return self._schema.name

    def __iter__(self) -> Iterator[tuple[int, Battle]]:
        """Yield (row number, battle) in the file's order; bad rows go to `rejected`.

        Raises ArenaError at once for duplicate ids and for a row without exactly one winner, and at the
        end when more than one row and more than 1 % of the rows are bad, or when none is left.
        """
        self.rejected, self.rows_read = [], 0
        rows_by_id: dict[str, int] = {}
        for number, cells in enumerate(self._table.rows(self._names), 1):
            self.rows_read = number
            broken = isinstance(cells, BrokenRow)
            identity = parse_id(cells.first if broken else cells[0])
            # The first cell of a broken row may be any scrap of text: it is reported, and not compared.
            if identity is not None and not broken:
                first = rows_by_id.setdefault(identity, number)
                if first != number:
                    raise self._duplicate(identity, first, number)
            try:
                battle = self._battle(identity, cells)
            except BadCell as error:
                self.rejected.append(Rejected(str(self.path), number, identity, str(error)))
            except BadVerdict as error:
                raise self._bad_verdict(number, identity, error) from None
            else:
                yield number, battle
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
        listed = [f"  - row {r.row} (id {r.id if r.id is not None else 'missing'}): {r.reason}" for r in first]
        more = [f"  - … and {bad - _SHOWN} more"] if bad > _SHOWN else []
        verb = "no row is left" if bad == rows else f"more than {_MOST_BAD:.0%} of the rows are bad"
        raise ArenaError(
            "\n".join([f"{verb}: {bad} of {rows} rows", *listed, *more]),
            where=f"{self.path} row {first[0].row}",
            remedy=f"mend or remove these rows; the columns were read as the {self.schema} schema",
        )

    def _missing_columns(self, missing: list[str]) -> ArenaError:
        columns = self._table.columns
        remedy = f"the nearest known schema is {self.schema}: add or rename these columns"
        if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
            remedy = "the header looks like one cell: separate the cells with commas"
        elif missing == list(self._schema.winners):
            remedy += ", or pass a file without verdicts as the test set"
        return ArenaError(
            f"lacks {len(missing)} column(s) {missing}; found {columns[:30]}",
            where=f"{self.path} header",
            remedy=remedy,
        )

    def _duplicate(self, identity: str, first: int, second: int) -> ArenaError:
        return ArenaError(
            f"the {self._names[0]} {identity!r} stands in row {first} and again in row {second}",
            where=f"{self.path} row {second}",
            remedy="remove one of the two rows, or give each its own id",
        )

    def _bad_verdict(self, number: int, identity: str | None, error: BadVerdict) -> ArenaError:
        return ArenaError(
            f"(id {identity}) {error}",
            where=f"{self.path} row {number}",
            remedy="give the row exactly one winner, or remove it",
        )
