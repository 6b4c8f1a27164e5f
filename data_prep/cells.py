"""What a cell of a table of votes says: texts and verdicts, each in the ways in which tables write them.

ENCODINGS["JSON"]('["hi"]', "prompt") == ["hi"]
read_pair(["hi", "yes", "no"], ("prompt", "chosen", "rejected")) == (("hi",), ("yes",), ("no",))

Another spelling of a winner is one more entry of _WINNERS; another way to write texts is an entry of ENCODINGS that
`encoding_of` recognises.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from common.battle import PROBABILITY_COLUMNS, VERDICTS

Texts = tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]  # prompts, responses_a, responses_b
Shares = tuple[float, float, float]
# Spellings of a winner without case and punctuation.
_WINNERS = (
    dict.fromkeys(("modela", "a", "responsea", "answera", "assistanta", "left"), "a")
    | dict.fromkeys(("modelb", "b", "responseb", "answerb", "assistantb", "right"), "b")
    | dict.fromkeys(("tie", "tiebothbad", "bothbad", "bothgood", "draw", "equal"), "tie")
)
_ROLES = {"human": "user", "gpt": "assistant", "model": "assistant"}
_FLAGS = {"true": 1.0, "false": 0.0}
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?")
_LONE_SURROGATE = re.compile("[\ud800-\udfff]")
# A string of Python; one that is not closed reaches to the end, so that this is linear.
_LITERAL = re.compile(r"""'(?:[^'\\]|\\.)*(?:'|\Z)|"(?:[^"\\]|\\.)*(?:"|\Z)""", re.DOTALL)
_ARRAY = re.compile(r"S\s*S|[}\]]\s*[{\[]|\.\.\.|array\(")  # what numpy writes and Python does not
_TURN_OF_TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")
_LARGEST_LITERAL = 1 << 22  # characters; Python's parser takes a hundred times their memory
# A raw tab or newline inside a JSON string is against the letter of JSON, but it can mean one thing only.
DECODER = json.JSONDecoder(strict=False)


class BadCell(ValueError):
    """A cell that cannot be read; the message is the reason, with the column's name."""

    def __init__(self, reason: str, remedy: str | None = None):
        super().__init__(reason)
        self.remedy = remedy


class BadVerdict(ValueError):
    """A row without exactly one known winner; the message shows the cells."""


def from_json(cell: object, name: str) -> list:
    """Return the list in a cell, written as JSON or a real one. Raises BadCell."""
    value, is_text = cell, isinstance(cell, str)
    if is_text:
        try:
            value = DECODER.decode(cell)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "nested too deeply or too large"
            raise BadCell(f"{name} is not a JSON list ({reason}): {_shown(cell)}") from None
    if _is_message(value):
        value = [value]
    if not isinstance(value, list):
        raise BadCell(f"{name} is not a JSON list: {_shown(cell)}")
    return without_lone_surrogates(value) if is_text and ("\\ud" in cell or "\\uD" in cell) else value


def from_python(cell: object, name: str) -> list:
    """Return the list in a cell that Python or pandas wrote; nothing in it is run. Raises BadCell."""
    if not isinstance(cell, str):
        return from_json(cell, name)
    if len(cell) > _LARGEST_LITERAL:
        raise BadCell(f"{name} is a Python list of more than {_LARGEST_LITERAL:,} characters")
    if _ARRAY.search(_LITERAL.sub("S", cell)):
        raise BadCell(
            f"{name} is pandas' text of lists (numpy arrays), which lost what parted the turns: {_shown(cell)}",
            "write parquet instead of CSV, or first: table[c] = table[c].map(lambda x: json.dumps(x, default=list))",
        )
    try:
        value = ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        raise BadCell(f"{name} is not a Python list: {_shown(cell)}") from None
    if not isinstance(value, list):
        raise BadCell(f"{name} is not a Python list: {_shown(cell)}")
    return without_lone_surrogates(value) if "\\u" in cell else value


def from_plain(cell: object, name: str) -> str | list:
    """Return a text as it stands; an empty cell is "". Raises BadCell."""
    if cell is None:
        return ""
    if _is_message(cell):
        return [cell]
    if not isinstance(cell, (str, list)):
        raise BadCell(f"{name} is not a text: {_shown(cell)}")
    return cell


ENCODINGS: dict[str, Callable[[object, str], Any]] = {"plain": from_plain, "JSON": from_json, "Python": from_python}


def encoding_of(cell: object) -> str | None:
    """Return the encoding that a cell speaks for, None where it speaks for none. Python's lists may be JSON, too."""
    if not isinstance(cell, str):
        return "JSON" if isinstance(cell, list) and cell else None
    if not (text := cell.strip()).startswith("["):
        return "plain" if text else None
    for name in ("JSON", "Python"):
        try:
            turns = ENCODINGS[name](text, "")
        except BadCell as error:
            if error.remedy:  # it is known well
                return name
        else:
            texts = turns and all(turn is None or isinstance(turn, str) or _is_message(turn) for turn in turns)
            return name if texts else None
    return None


def read_pair(values: Sequence[Any], names: Sequence[str]) -> Texts:
    """Return the texts of (prompt,) answer and answer: one text, or a list of turns, or of messages. Raises BadCell.

    Messages may hold the history that both answers share; without a prompt they must.
    """
    if len(values) == 3 and not any(map(holds_messages, values)) and not _is_transcript(values[0]):
        prompts, responses_a, responses_b = map(_turns, values, names)
        return prompts, responses_a, responses_b
    history = _messages(values[0], names[0], "user") if len(values) == 3 else []
    conversations = []
    for value, name in zip(values[-2:], names[-2:], strict=True):
        messages = _messages(value, name, "assistant" if len(values) == 3 else None)
        conversations.append(messages if _role(messages[0]) != "assistant" else [*history, *messages])
    return read_conversations(conversations, names[-2:])


def read_conversations(values: Sequence[Any], names: Sequence[str]) -> Texts:
    """Return the texts of two lists of messages: user and assistant by turns. Raises BadCell."""
    prompts, responses_a = _conversation(values[0], names[0])
    prompts_b, responses_b = _conversation(values[1], names[1])
    shared = min(len(prompts), len(prompts_b))
    if prompts[:shared] != prompts_b[:shared]:
        raise BadCell(f"the user's turns in {names[0]} and {names[1]} differ: not one battle")
    return max(prompts, prompts_b, key=len), responses_a, responses_b


def first_turns(texts: Texts, cell: object) -> Texts:
    """Return the texts up to the judged turn, which counts from 1; all of them for an empty cell. Raises BadCell."""
    if cell is None or cell == "" or cell != cell:
        return texts
    try:
        turn = float(cell)
    except (TypeError, ValueError):
        turn = 0.0
    if not 1 <= turn <= min(map(len, texts)) or turn % 1:
        raise BadCell(f"turn {_shown(cell)} was judged, and turns count from 1 to {min(map(len, texts))}")
    prompts, responses_a, responses_b = (each[: int(turn)] for each in texts)
    return prompts, responses_a, responses_b


def read_one_hot(cells: Sequence[object]) -> str | Shares:
    """Return the verdict of winner_model_a, winner_model_b, winner_tie: 0 and 1, true and false; or their shares.

    Raises BadVerdict.
    """
    flags = _numbers(cells)
    if sorted(flags) == [0, 0, 1]:
        return VERDICTS[flags.index(1)]
    total = sum(flags)
    if flags and min(flags) >= 0 and abs(total - 1) <= 0.01:
        a, b, tie = flags
        return a / total, b / total, tie / total
    empty = all(cell is None or cell != cell or str(cell).strip() == "" or is_no(cell) for cell in cells)
    both = sorted(flags)[1:] == [1, 1] and "several winners"
    what = "no winner" if empty else both or "no clear winner, nor shares that sum to 1"
    raise BadVerdict(f"{what}: {', '.join(PROBABILITY_COLUMNS)} = {', '.join(map(_shown, cells))}")


def read_winner(cells: Sequence[object]) -> str:
    """Return the verdict of one `winner` cell: model_a, B, tie, both_bad, … in any case. Raises BadVerdict."""
    (cell,) = cells
    verdict = winner_of(cell)
    if verdict is None:
        empty = cell is None or cell != cell or cell == ""
        what = "no winner" if empty else f"unknown winner {_shown(cell)}"
        raise BadVerdict(f"{what}: must be model_a, model_b (or A, B), tie or both_bad")
    return verdict


def winner_of(cell: object) -> str | None:
    """Return the verdict that a `winner` cell says, None where it says none."""
    return _WINNERS.get(re.sub("[^a-z]", "", cell.lower())) if isinstance(cell, str) else None


# Which columns hold the verdict, and what reads them; schemas.find_schema chooses among them.
VERDICT_FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Sequence[object]], str | Shares]]] = {
    "one-hot": (PROBABILITY_COLUMNS, read_one_hot),
    "shares": (PROBABILITY_COLUMNS, read_one_hot),  # one-hot where some rows hold shares
    "winner": (("winner",), read_winner),
    "chosen": ((), lambda _: "a"),  # of a preference table; the reader shuffles the sides
}


def parse_id(cell: object) -> str | None:
    """Return an id as it is written, white space included, for it must come back so; None for an empty cell.

    A whole number that is stored as a float, as pandas does where one is missing, loses its point.
    """
    if isinstance(cell, float) and cell.is_integer():
        return str(int(cell))
    text = "" if cell is None or cell != cell else str(cell)
    return text if text.strip() else None


def is_formula(identity: str) -> bool:
    """Return whether a spreadsheet would take an id for a formula: = + - @ at its front, and not a number."""
    return identity[:1] in ("=", "+", "-", "@") and _NUMBER.fullmatch(identity) is None


def fraction_of(identity: str) -> float:
    """Return a number from 0 to 1 that an id draws, the same one every time."""
    digest = blake2b(identity.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def drawn_verdict(shares: Shares, identity: str) -> str:
    """Return the verdict that an id draws from shares: over many battles each class has its share."""
    fraction = fraction_of(identity)
    return "a" if fraction < shares[0] else "b" if fraction < shares[0] + shares[1] else "tie"


def without_lone_surrogates(value: Any) -> Any:
    """Return what JSON or Python decoded, with U+FFFD for each half of a surrogate pair, which no file can hold."""
    if isinstance(value, str):
        return value if value.isascii() else _LONE_SURROGATE.sub("\ufffd", value)
    if isinstance(value, list):
        return [without_lone_surrogates(each) for each in value]
    if isinstance(value, dict):
        return {without_lone_surrogates(key): without_lone_surrogates(each) for key, each in value.items()}
    return value


def _numbers(cells: Sequence[object]) -> list[float]:
    try:
        return [float(_FLAGS.get(cell.strip().lower(), cell) if isinstance(cell, str) else cell) for cell in cells]
    except (TypeError, ValueError):
        return []


def is_no(cell: object) -> bool:
    """Return whether a cell says false, or 0."""
    return _numbers([cell]) == [0.0]


def are_shares(cells: Sequence[object]) -> bool:
    """Return whether three cells are shares of votes, and not one verdict."""
    try:
        return not isinstance(read_one_hot(cells), str)
    except BadVerdict:
        return False


def holds_messages(value: object) -> bool:
    """Return whether a value is a list of objects with role and content."""
    return isinstance(value, list) and bool(value) and _is_message(value[0])


def _is_message(value: object) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _role(message: Any) -> object:
    role = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return _ROLES.get(role, role) if isinstance(role, str) else role


def _turns(value: str | list, name: str) -> tuple[str, ...]:
    """Return the turns of a text (one) or of a list; a null turn is "". Raises BadCell."""
    if isinstance(value, str):
        return (value,)
    if not value:
        raise BadCell(f"{name} has no turn")
    return tuple(turn if type(turn) is str else _text(turn, f"{name} turn {i}") for i, turn in enumerate(value, 1))


def _is_transcript(value: object) -> bool:
    """Return whether a value is a text as HH-RLHF and Nectar write conversations."""
    return isinstance(value, str) and value.startswith("\n\nHuman: ")


def _messages(value: str | list, name: str, role: str | None) -> list:
    """Return a cell as messages; a text is one of `role`, or a transcript of Human and Assistant."""
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str):
        value = value[0]
    if _is_transcript(value):
        parts = _TURN_OF_TRANSCRIPT.split(value)[1:]
        if role == "user" and not parts[-1].strip():  # the place of the answer
            del parts[-2:]
        turns = zip(parts[::2], parts[1::2], strict=True)
        return [{"role": {"Human": "user"}.get(who, "assistant"), "content": text} for who, text in turns]
    if isinstance(value, str) and role is None:
        remedy = "add a column prompt, or name it: --columns prompt=COLUMN"
        raise BadCell(f"{name} is a text without its prompt: {_shown(value)}", remedy)
    if not value and isinstance(value, list):
        raise BadCell(f"{name} has no turn")
    return [{"role": role, "content": value}] if isinstance(value, str) else value


def _conversation(messages: Sequence[Any], name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the user's and the assistant's texts; a system's text goes before the first of the user."""
    texts: list[str] = []
    system = ""
    for i, message in enumerate(messages, 1):
        where = f"{name} message {i}"
        if not _is_message(message) or not ("content" in message or "value" in message):
            raise BadCell(f"{where} is not an object with role and content")
        role, expected = _role(message), ("user", "assistant")[len(texts) % 2]
        text = _content(message.get("content", message.get("value")), where)
        if role == "system" and i == 1:
            system = text
        elif role == expected:
            texts.append(text)
        else:
            raise BadCell(f"{where} has the role {_shown(role)} instead of {expected!r}")
    if not texts:
        raise BadCell(f"{name} has no turn")
    if len(texts) % 2:
        raise BadCell(f"{name} ends with the user, without an answer")
    if system:
        texts[0] = f"{system}\n\n{texts[0]}"
    return tuple(texts[::2]), tuple(texts[1::2])


def _content(value: object, where: str) -> str:
    """Return the text of a message: a text, or the texts of its parts. Raises BadCell for an image and the like."""
    if not isinstance(value, list):
        return _text(value, where)
    texts = []
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        if kind != "text":
            raise BadCell(
                f"{where} holds {_shown(kind)}, and the judge reads texts alone",
                "leave out the battles with images: the judge would see a question without what it asks about",
            )
        texts.append(_text(part.get("text") if isinstance(part, dict) else part, where))
    return "\n".join(texts)


def _text(value: object, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise BadCell(f"{where} is not a text: {_shown(value)}")
    return value


def _shown(value: object, limit: int = 40) -> str:
    text = ascii(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else f"{text[:limit]}…"
