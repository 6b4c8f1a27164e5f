"""Which table of votes is this: its texts and its verdicts are recognised apart, by columns and then by cells.

schema = find_schema(["id", "prompt", "response_a", "response_b", "winner"])
schema.decided([("7", '["hi"]', '["a"]', '["b"]', "tie")]).described()["texts"] == "JSON lists of turns"

Any way to write texts goes with any way to write verdicts. Other columns of texts: LAYOUTS; other columns of a verdict:
`find_schema` and cells.VERDICT_FORMATS; how a cell is read: `data_prep.cells`; a kind of file: `data_prep.tables`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from typing import Any

from common.battle import PROBABILITY_COLUMNS
from common.errors import UsageError
from data_prep.cells import (
    ENCODINGS,
    VERDICT_FORMATS,
    Shares,
    Texts,
    are_shares,
    encoding_of,
    holds_messages,
    read_conversations,
    read_pair,
)

# The columns that hold the texts, and what reads them; of a table that has none of them the first are missing.
LAYOUTS: dict[tuple[str, ...], Callable[[Sequence[Any], Sequence[str]], Texts]] = {
    ("prompt", "response_a", "response_b"): read_pair,
    ("conversation_a", "conversation_b"): read_conversations,
    ("prompt", "chosen", "rejected"): read_pair,
    ("chosen", "rejected"): read_pair,
}
_ANSWERS, _CONVERSATIONS = ("prompt", "response_a", "response_b"), ("conversation_a", "conversation_b")
# Here the layout is the verdict: the chosen answer won.
_PREFERENCES = tuple(names for names in LAYOUTS if {"chosen", "rejected"} <= set(names))
IDS = ("id", "question_id")
KEYS = ("model_a", "model_b", "judge", "turn")  # they make ids of several votes on one question differ
EXTRAS = ("language", "turn", "anony", "model_a", "model_b")
VERDICT_NAMES = ("winner", *PROBABILITY_COLUMNS)
NAMES = tuple(dict.fromkeys([*IDS, *sum(LAYOUTS, ()), *VERDICT_NAMES, *EXTRAS, *KEYS]))
# What our columns are called elsewhere, for "did you mean".
_ALIASES = {
    "id": ("ID", "Id", "uid", "battle_id", "pair_id"),
    "prompt": ("question", "instruction", "input", "query", "user_prompt", "context"),
    "response_a": ("left", "answer_a", "output_a", "completion_a", "response_1", "response1", "output_1"),
    "response_b": ("right", "answer_b", "output_b", "completion_b", "response_2", "response2", "output_2"),
    "winner": ("label", "preference", "verdict", "vote", "choice", "preferred"),
}
_LOOKED_AT = 1000  # columns of a header that are compared with ours
_PYTHON = 0.1  # from this share of lists that only Python reads on, all are Python's


@dataclass(frozen=True, slots=True)
class Schema:
    """The columns of a table of votes, by our names, and how their cells are read."""

    id: str | None  # None: the rows are numbered
    texts: tuple[str, ...]
    verdict_format: str | None
    encodings: tuple[str, ...] = ()
    shapes: tuple[str, ...] = ()

    @property
    def verdict(self) -> tuple[str, ...]:
        """The columns of the verdict; of a table of preferences none, its texts tell it."""
        return VERDICT_FORMATS[self.verdict_format][0] if self.verdict_format else ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that every row has: id, texts, verdict."""
        return (*([self.id] if self.id else ()), *self.texts, *self.verdict)

    @property
    def is_plain(self) -> bool:
        """Whether all texts stand in their cells as they are, one turn each."""
        return set(self.encodings) == {"plain"}

    def decided(self, sample: Sequence[Sequence[object]]) -> Schema:
        """Return the schema with its formats, from the cells of `columns` in some rows."""
        cells = list(zip(*sample, strict=True)) if sample else [()] * len(self.columns)
        first, end = len(self.columns) - len(self.texts) - len(self.verdict), len(self.columns) - len(self.verdict)
        texts, verdicts = cells[first:end], cells[end : len(self.columns)]
        encodings = _encodings(texts, "plain" if self.texts != _CONVERSATIONS else "JSON")
        shared = self.verdict_format == "one-hot" and any(map(are_shares, zip(*verdicts, strict=True)))
        return replace(
            self,
            encodings=encodings,
            shapes=tuple(map(_shape, encodings, texts)),
            verdict_format="shares" if shared else self.verdict_format,
        )

    def read_texts(self, cells: Sequence[object]) -> Texts:
        """Return the texts of a battle from the cells of `texts`. Raises BadCell."""
        names = self.texts
        values = [ENCODINGS[how](cell, name) for how, cell, name in zip(self.encodings, cells, names, strict=True)]
        return LAYOUTS[names](values, names)

    def read_verdict(self, cells: Sequence[object]) -> str | Shares:
        """Return the verdict from the cells of `verdict`, or the shares of the votes. Raises BadVerdict."""
        return VERDICT_FORMATS[self.verdict_format][1](cells)

    def described(self) -> dict[str, str]:
        """Return in words how texts, verdicts and ids are read."""
        kinds = dict(zip(self.texts, self.shapes, strict=True))
        same = len(set(self.shapes)) == 1
        return {
            "texts": self.shapes[0] if same else ", ".join(f"{kind} in {name}" for name, kind in kinds.items()),
            "verdicts": self.verdict_format or "none",
            "ids": self.id or "row numbers",
        }


def find_schema(columns: Sequence[str]) -> Schema:
    """Return the schema that the columns speak for; its formats are not decided yet."""
    found = set(columns)
    texts = max(LAYOUTS, key=lambda names: (len(found.intersection(names) - {"prompt"}), found.issuperset(names)))
    if found.issuperset(PROBABILITY_COLUMNS):
        verdict = "one-hot"
    elif "winner" in found:
        verdict = "winner"
    else:
        verdict = "chosen" if texts in _PREFERENCES else None
    return Schema(next((name for name in IDS if name in found), None), texts, verdict)


def missing_columns(schema: Schema, columns: Sequence[str], *, labelled: bool) -> list[str]:
    """Return the columns that a table lacks."""
    found = set(columns)
    missing = [name for name in schema.columns if name not in found] + [n for n in schema.texts if n not in found]
    if labelled and schema.verdict_format is None:
        some = found & set(PROBABILITY_COLUMNS)
        missing += [name for name in PROBABILITY_COLUMNS if name not in found] if some else ["winner"]
    if schema.id is None and _meant("id", columns, 1.0):
        missing.insert(0, "id")
    return list(dict.fromkeys(missing))


def renamed(columns: Collection[str], given: Mapping[str, str], *, labelled: bool, where: str) -> dict[str, str]:
    """Return which of the --columns apply to a table: those of the verdict need not, or none where all are ours.

    Raises UsageError for an unknown name of ours, and for one that the table lacks.
    """
    for name in given:
        if name not in NAMES:
            meant = get_close_matches(name, NAMES, 1)
            remedy = f"did you mean {meant[0]}? " if meant else ""
            raise UsageError(f"--columns: {name!r} is no name of ours", remedy=f"{remedy}Known: {', '.join(NAMES)}")
    used = {name: theirs for name, theirs in given.items() if theirs in columns}
    needed = [name for name in given if labelled or name not in VERDICT_NAMES]
    if lacking := [name for name in needed if name not in used and (used or name not in columns)]:
        raise no_such_column(lacking[0], given, columns, where)
    return used


def no_such_column(name: str, given: Mapping[str, str], columns: Collection[str], where: str) -> UsageError:
    """Return the error for a table without the column that --columns gives for one of ours."""
    meant, shown = get_close_matches(given[name], list(columns)[:_LOOKED_AT], 1), ", ".join(list(columns)[:30])
    remedy = f"did you mean --columns {name}={meant[0]}? " if meant else ""
    return UsageError(f"has no column {given[name]!r}", where=where, remedy=f"{remedy}It has: {shown}")


def advice_on(schema: Schema, columns: Sequence[str], missing: Sequence[str]) -> str:
    """Return what a table that lacks columns seems to be, and which one to give instead."""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        return "the header looks like one cell: separate the cells with commas"
    if not set(schema.texts) & set(columns) and set(PROBABILITY_COLUMNS) <= set(columns):
        return (
            "this is a table of probabilities, such as the competition's sample_submission.csv: --train wants "
            "train.csv, --test wants test.csv"
        )
    meant = {name: found for name in missing if (found := _meant(name, columns))}
    if meant:
        return f"did you mean --columns {','.join(f'{name}={theirs}' for name, theirs in meant.items())}?"
    if set(missing) <= set(VERDICT_NAMES) and not set(columns) & set(PROBABILITY_COLUMNS):
        return (
            "this is a table without verdicts, such as the competition's test.csv: --train wants the one with verdicts "
            "(train.csv); pass a file without verdicts as the test set (--test)"
        )
    if not set(NAMES) & set(columns):
        return (
            f"this is not a table of battles: give one with the columns id, {', '.join(_ANSWERS)}, winner, or with "
            "other names: --columns prompt=question,response_a=left,… (docs/votes.md lists what is read)"
        )
    return "add or rename these columns, or name yours: --columns prompt=question,response_a=left,…"


def _meant(name: str, columns: Sequence[str], cutoff: float = 0.75) -> str | None:
    """Return the column that may be what one of ours is called in this table."""
    looked_at = [column for column in columns[:_LOOKED_AT] if column not in NAMES]
    if name == "id" and cutoff == 1.0:
        return next((column for column in looked_at if column.strip().lower() in IDS), None)
    by_case = {column.strip().lower(): column for column in looked_at}
    known = next(
        (by_case[alias.lower()] for alias in (name, *_ALIASES.get(name, ())) if alias.lower() in by_case), None
    )
    return known or next(iter(get_close_matches(name, looked_at, 1, cutoff)), None)


def _encodings(texts: Sequence[Sequence[object]], usual: str) -> tuple[str, ...]:
    """Return the encoding of each column of cells: what most of its cells speak for.

    Where plain texts stand beside lists, a column of lists holds nothing else: texts may look like lists.
    """
    votes = [Counter(filter(None, map(encoding_of, cells))) for cells in texts]
    total = sum(votes, Counter())
    python = total["Python"] > 0 and total["Python"] >= _PYTHON * (total["JSON"] + total["Python"])
    lists = "Python" if python else "JSON"
    are_lists = [2 * vote["plain"] < sum(vote.values()) if vote else None for vote in votes]
    if False in are_lists:
        are_lists = [each and not vote["plain"] for each, vote in zip(are_lists, votes, strict=True)]
    rest = usual if False in are_lists else lists
    return tuple({True: lists, False: usual, None: rest}[each] for each in are_lists)


def _shape(encoding: str, cells: Sequence[object]) -> str:
    """Return in words what the cells of a column hold."""
    if encoding == "plain" and not any(isinstance(cell, list) for cell in cells):
        lists = sum(encoding_of(cell) in ("JSON", "Python") for cell in cells)
        return "plain texts" + (f" ({lists} of the first {len(cells)} are written as lists)" if lists else "")
    known = [cell for cell in cells if cell is not None]
    written = "" if any(isinstance(cell, list) for cell in known) else f"{encoding} "
    try:
        messages = any(holds_messages(ENCODINGS[encoding](cell, "")) for cell in known[:1])
    except ValueError:
        messages = False
    return f"{written}lists of {'messages' if messages else 'turns'}"
