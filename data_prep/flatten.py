"""One history, two responses: the form in which a battle of several turns enters pairwise training.

LLaMA-Factory's pairwise rows have one history for both responses, but A and B share only the user's first message:
from the first answer on there are two conversations. So the history is the first user turn, and everything
after it, later user turns included, is the response's text, under header lines:

    prompt      first user turn, unchanged
    response    first answer, then for each later turn
                (empty line) ### User         that turn's user text
                (empty line) ### Assistant    its answer

A line of a text that is itself such a header (any number of backslashes before it, white space behind it) gets one
more backslash in front. So the form can be read back: unflatten(flatten(battle)) is the battle. A battle of one turn
stays as it is, but for such lines.

The price: the later user turns are scored as a part of the response. They are the same in A and B, so what is
learned from them is how well they follow from the answers before them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from common.battle import Battle
from common.errors import ArenaError

USER = "\n\n### User\n"
ASSISTANT = "\n\n### Assistant\n"
_HEADER = r"### (?:User|Assistant)[ \t\r]*$"
_LOOKS_LIKE_HEADER = re.compile(rf"^(?=\\*{_HEADER})", re.MULTILINE)
_ESCAPED_HEADER = re.compile(rf"^\\(?=\\*{_HEADER})", re.MULTILINE)
_SEPARATOR = re.compile(r"\n\n### (?:User|Assistant)\n")


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two responses to it, each one string."""

    id: str
    prompt: str
    response_a: str
    response_b: str


def flatten(battle: Battle) -> Pair:
    """Return the battle as one prompt and two responses; verdict and language are left behind."""
    later = battle.prompts[1:]
    return Pair(
        battle.id,
        battle.prompts[0],
        join_turns(battle.responses_a, later),
        join_turns(battle.responses_b, later),
    )


def unflatten(pair: Pair) -> Battle:
    """Return the battle that `flatten` made the pair from; raises ArenaError if the two responses do not agree."""
    answers_a, later = split_turns(pair.response_a)
    answers_b, later_b = split_turns(pair.response_b)
    if later != later_b:
        raise ArenaError(
            "the two responses do not hold the same user turns",
            where=f"pair {pair.id}",
            remedy="make pairs with `python run.py prepare`",
        )
    return Battle(pair.id, (pair.prompt, *later), answers_a, answers_b)


def join_turns(answers: Sequence[str], later_prompts: Sequence[str]) -> str:
    """Return one response text: n answers with the n - 1 user turns between them."""
    parts = [_escape(answers[0])]
    for prompt, answer in zip(later_prompts, answers[1:], strict=True):
        parts += (USER, _escape(prompt), ASSISTANT, _escape(answer))
    return "".join(parts)


def split_turns(response: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (n answers, n - 1 user turns) of a text that `join_turns` made."""
    texts = [_ESCAPED_HEADER.sub("", text) for text in _SEPARATOR.split(response)]
    return tuple(texts[::2]), tuple(texts[1::2])


def _escape(text: str) -> str:
    # Nearly no text has one, and `in` is far faster than a regular expression.
    return _LOOKS_LIKE_HEADER.sub(r"\\", text) if "### " in text else text
