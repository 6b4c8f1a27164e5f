"""Cells of a table of votes: turns, conversations, texts, ids and winners, parsed or refused with a reason.

parse_turns('["hi","and \\u4f60?"]', "prompt") == ("hi", "and 你?")
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from common.battle import VERDICTS

_WINNERS = {"model_a": "a", "model_b": "b", "tie": "tie", "tie (bothbad)": "tie"}
_ONE_HOT = {("1", "0", "0"): "a", ("0", "1", "0"): "b", ("0", "0", "1"): "tie"}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# A raw tab or newline inside a JSON string is against the letter of JSON, but it can mean one thing only.
_decode_json = json.JSONDecoder(strict=False).decode


class BadCell(ValueError):
    """A cell that cannot be read; the message is the reason, with the column's name."""


class BadVerdict(ValueError):
    """A row without exactly one known winner; the message says what stands there."""


def parse_turns(cell: object, name: str) -> tuple[str, ...]:
    """Return the turns of a JSON list (text) or of a real list; null turns become "".

    Lone surrogates become U+FFFD, escaped pairs one character. Raises BadCell.
    """
    turns = _parse_list(cell, name)
    if set(map(type, turns)) != {str}:
        turns = [_parse_turn(turn, f"{name} turn {i}") for i, turn in enumerate(turns, 1)]
    if _may_hold_surrogates(cell):
        turns = map(_replace_lone, turns)
    return tuple(turns)


def parse_conversation(cell: object, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (prompts, responses) of a list of {role, content}: user and assistant by turns. Raises BadCell."""
    texts: tuple[list[str], list[str]] = ([], [])
    for i, message in enumerate(_parse_list(cell, name)):
        where = f"{name} message {i + 1}"
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadCell(f"{where} is not an object with role and content")
        expected = ("user", "assistant")[i % 2]
        if message["role"] != expected:
            raise BadCell(f"{where} is by {_shown(message['role'])} where {expected!r} must speak")
        texts[i % 2].append(_parse_turn(message["content"], where))
    if len(texts[0]) != len(texts[1]):
        raise BadCell(f"{name} ends with the user, without an answer")
    if _may_hold_surrogates(cell):
        texts = (list(map(_replace_lone, texts[0])), list(map(_replace_lone, texts[1])))
    return tuple(texts[0]), tuple(texts[1])


def parse_text(cell: object, name: str) -> tuple[str, ...]:
    """Return a plain text as its single turn; null becomes "". Raises BadCell."""
    return (_parse_turn(cell, name),)


def parse_id(cell: object) -> str | None:
    """Return an id as text, a whole number without its point; None where there is none."""
    if isinstance(cell, float):
        if cell != cell:
            return None
        return str(int(cell)) if cell.is_integer() else str(cell)
    return str(cell).strip() or None if cell is not None else None


def is_formula(identity: str) -> bool:
    """Tell whether a spreadsheet would take an id for a formula: = + - @ at its front, and not a number."""
    return identity[:1] in ("=", "+", "-", "@") and _NUMBER.fullmatch(identity) is None


def parse_language(cell: object) -> str | None:
    """Return the language as it is written, None where there is none."""
    return cell.strip() or None if isinstance(cell, str) else None


def parse_one_hot(cells: Sequence[object]) -> str:
    """Return the verdict of winner_model_a, winner_model_b, winner_tie (0 and 1 in any spelling). Raises BadVerdict."""
    if all(isinstance(cell, str) for cell in cells) and (verdict := _ONE_HOT.get(tuple(cells))):
        return verdict
    try:
        flags = [float(cell) for cell in cells]
    except (TypeError, ValueError):
        flags = []
    if sorted(flags) != [0, 0, 1]:
        winners = flags.count(1)
        what = {0: "no winner", 1: "no clear winner"}.get(winners, f"{winners} winners")
        raise BadVerdict(f"{what}: winner_model_a, winner_model_b, winner_tie = {', '.join(map(_shown, cells))}")
    return VERDICTS[flags.index(1)]


def parse_winner(cell: object) -> str:
    """Return the verdict of a `winner` cell: model_a, model_b, tie or "tie (bothbad)". Raises BadVerdict."""
    verdict = _WINNERS.get(cell.strip()) if isinstance(cell, str) else None
    if verdict is None:
        empty = cell is None or cell != cell or cell == ""
        what = "no winner" if empty else f"unknown winner {_shown(cell)}"
        raise BadVerdict(f"{what}: must be one of {', '.join(_WINNERS)}")
    return verdict


def _parse_list(cell: object, name: str) -> list:
    if isinstance(cell, str):
        try:
            values = _decode_json(cell)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too large"
            raise BadCell(f"{name} is not a JSON list ({reason}): {_shown(cell)}") from None
    else:
        values = cell
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


def _may_hold_surrogates(cell: object) -> bool:
    # Files are decoded strictly, so that only a JSON escape can bring a surrogate in.
    return isinstance(cell, str) and ("\\ud" in cell or "\\uD" in cell)


def _replace_lone(text: str) -> str:
    return text if text.isascii() else _LONE_SURROGATE.sub("\ufffd", text)


def _shown(value: object, limit: int = 40) -> str:
    text = ascii(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"
