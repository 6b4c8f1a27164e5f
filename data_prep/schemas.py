"""Which table of votes is this, and how are its cells read.

schema_of(["id", "prompt", "response_a", "response_b", "winner"]).name == "wsdm"
read_turns(['["hi"]', '["a"]', '["b"]']) == (("hi",), ("a",), ("b",))

A new table format is a new `Schema` here: which columns hold the texts and the verdict, and what reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from common.battle import PROBABILITY_COLUMNS, VERDICTS

Texts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]  # prompts, responses_a, responses_b
_PLAIN = ("prompt", "response_a", "response_b")
_CONVERSATIONS = ("conversation_a", "conversation_b")
_WINNERS = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie"}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# A raw tab or newline inside a JSON string is against the letter of JSON, but it can mean one thing only.
_decode_json = json.JSONDecoder(strict=False).decode


class BadCell(ValueError):
    """A cell that cannot be read; the message is the reason, with the column's name."""


class BadVerdict(ValueError):
    """A row without exactly one known winner; the message shows the cells."""


@dataclass(frozen=True, slots=True)
class Schema:
    """A kind of table: the columns of its ids, texts and verdicts, and what reads their cells."""

    name: str
    ids: tuple[str, ...]  # alternatives, the preferred first
    texts: tuple[str, ...]
    read_texts: Callable[[Sequence[object]], Texts]  # raises BadCell
    verdict: tuple[str, ...]
    read_verdict: Callable[[Sequence[object]], str]  # raises BadVerdict

    def missing(self, columns: Sequence[str], labelled: bool) -> list[str]:
        """Return the columns that a table of this kind lacks."""
        needed = self.texts + (self.verdict if labelled else ())
        no_id = [] if set(self.ids) & set(columns) else [" or ".join(self.ids)]
        return no_id + [name for name in needed if name not in columns]


def read_turns(cells: Sequence[object]) -> Texts:
    """Return the texts of three JSON lists (text or real lists); null turns become "".

    Lone surrogates become U+FFFD, escaped pairs one character. Raises BadCell.
    """
    prompts, responses_a, responses_b = (_parse_turns(cell, name) for cell, name in zip(cells, _PLAIN, strict=True))
    return prompts, responses_a, responses_b


def read_texts(cells: Sequence[object]) -> Texts:
    """Return the texts of three plain cells, one turn each. Raises BadCell."""
    prompt, a, b = (_parse_turn(cell, name) for cell, name in zip(cells, _PLAIN, strict=True))
    return (prompt,), (a,), (b,)


def read_conversations(cells: Sequence[object]) -> Texts:
    """Return the texts of two lists of {role, content}: user and assistant by turns. Raises BadCell."""
    prompts, responses_a = _parse_conversation(cells[0], "conversation_a")
    prompts_b, responses_b = _parse_conversation(cells[1], "conversation_b")
    if prompts != prompts_b:
        raise BadCell("the user's turns in conversation_a and conversation_b differ: not one battle")
    return prompts, responses_a, responses_b


def read_one_hot(cells: Sequence[object]) -> str:
    """Return the verdict of winner_model_a, winner_model_b, winner_tie (0 and 1 in any spelling). Raises BadVerdict."""
    try:
        flags = [float(cell) for cell in cells]
    except (TypeError, ValueError):
        flags = []
    if sorted(flags) != [0, 0, 1]:
        winners = flags.count(1)
        what = {0: "no winner", 1: "no clear winner"}.get(winners, f"{winners} winners")
        raise BadVerdict(f"{what}: winner_model_a, winner_model_b, winner_tie = {', '.join(map(_shown, cells))}")
    return VERDICTS[flags.index(1)]


def read_winner(cells: Sequence[object]) -> str:
    """Return the verdict of one `winner` cell: model_a, model_b, tie or "tie (bothbad)". Raises BadVerdict."""
    (cell,) = cells
    verdict = _WINNERS.get(cell.strip()) if isinstance(cell, str) else None
    if verdict is None:
        empty = cell is None or cell != cell or cell == ""
        what = "no winner" if empty else f"unknown winner {_shown(cell)}"
        raise BadVerdict(f"{what}: must be one of {', '.join(_WINNERS)}")
    return verdict


def parse_id(cell: object) -> str | None:
    """Return an id as text, a whole number without its point; None for an empty cell."""
    if isinstance(cell, float):
        if cell != cell:
            return None
        return str(int(cell)) if cell.is_integer() else str(cell)
    return str(cell).strip() or None if cell is not None else None


def is_formula(identity: str) -> bool:
    """Return whether a spreadsheet would take an id for a formula: = + - @ at its front, and not a number."""
    return identity[:1] in ("=", "+", "-", "@") and _NUMBER.fullmatch(identity) is None


def _parse_turns(cell: object, name: str) -> tuple[str, ...]:
    turns = [_parse_turn(turn, f"{name} turn {i}") for i, turn in enumerate(_parse_list(cell, name), 1)]
    return _without_lone_surrogates(cell, turns)


def _parse_conversation(cell: object, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    texts: list[str] = []
    for i, message in enumerate(_parse_list(cell, name)):
        where = f"{name} message {i + 1}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadCell(f"{where} is not an object with role and content")
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise BadCell(f"{where} has the role {_shown(message['role'])} instead of {expected!r}")
        texts.append(_parse_turn(message["content"], where))
    if len(texts) % 2:
        raise BadCell(f"{name} ends with the user, without an answer")
    turns = _without_lone_surrogates(cell, texts)
    return turns[::2], turns[1::2]


def _parse_list(cell: object, name: str) -> list:
    values = cell
    if isinstance(cell, str):
        try:
            values = _decode_json(cell)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too large"
            raise BadCell(f"{name} is not a JSON list ({reason}): {_shown(cell)}") from None
    if not isinstance(values, list):
        raise BadCell(f"{name} is not a JSON list: {_shown(cell)}")
    if not values:
        raise BadCell(f"{name} has no turn")
    return values


def _parse_turn(turn: object, where: str) -> str:
    if turn is None:
        return ""
    if not isinstance(turn, str):
        raise BadCell(f"{where} is not a text: {_shown(turn)}")
    return turn


def _without_lone_surrogates(cell: object, texts: Sequence[str]) -> tuple[str, ...]:
    # Files are decoded strictly, so that only a JSON escape can bring a surrogate in.
    if isinstance(cell, str) and ("\\ud" in cell or "\\uD" in cell):
        return tuple(text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text) for text in texts)
    return tuple(texts)


def _shown(value: object, limit: int = 40) -> str:
    text = ascii(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"


_KAGGLE = Schema("kaggle", ("id",), _PLAIN, read_turns, PROBABILITY_COLUMNS, read_one_hot)
_WSDM = Schema("wsdm", ("id",), _PLAIN, read_texts, ("winner",), read_winner)
_ARENA_IDS = ("question_id", "id")
_ARENA = Schema("arena_conversations", _ARENA_IDS, _CONVERSATIONS, read_conversations, ("winner",), read_winner)
_WSDM_MARKS = frozenset({"winner", "scored", "language"})


def schema_of(columns: Sequence[str]) -> Schema:
    """Return the schema that the columns speak for; a table without any of their marks counts as the competition's."""
    found = set(columns)
    if found & set(_CONVERSATIONS):
        return _ARENA
    return _WSDM if found & _WSDM_MARKS and not found & set(PROBABILITY_COLUMNS) else _KAGGLE


def advice_on(schema: Schema, columns: Sequence[str], missing: Sequence[str]) -> str:
    """Return what a table that lacks columns seems to be, and which one to give instead."""
    if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
        return "the header looks like one cell: separate the cells with commas"
    if set(missing) == set(schema.verdict):
        return (
            "this is a table without verdicts, such as the competition's test.csv: --train wants the one with verdicts "
            "(train.csv); pass a file without verdicts as the test set (--test)"
        )
    if not set(schema.texts) & set(columns) and set(PROBABILITY_COLUMNS) <= set(columns):
        return (
            "this is a table of probabilities, such as the competition's sample_submission.csv: --train wants "
            "train.csv, --test wants test.csv"
        )
    if not {*_PLAIN, *_CONVERSATIONS, *PROBABILITY_COLUMNS, *_WSDM_MARKS} & set(columns):
        wanted = ", ".join((*_KAGGLE.ids, *_PLAIN, *PROBABILITY_COLUMNS))
        return f"this is not a table of battles: give one with the competition's columns {wanted}, or a known data set"
    return f"the nearest known schema is {schema.name}: add or rename these columns"
