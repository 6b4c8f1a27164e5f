"""Facts: what is known of a battle as it was voted on, whatever is cut from it later to fit a budget.

Export and scoring take them from here and from the vote itself: the same battle has the same group and the same
lengths in every table, so the same fold and the same probabilities.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING, Any

from common.battle import Battle
from data_prep.folds import prompt_group

if TYPE_CHECKING:
    import numpy as np


def battle_facts(battle: Battle) -> dict[str, Any]:
    """Return id, group, verdict, language, turns and the characters of prompts, A and B of a battle that is whole."""
    return {
        "id": battle.id,
        "group": prompt_group(battle),
        "verdict": battle.verdict,
        "language": battle.language,
        "turns": battle.turns,
        "chars_prompt": sum(map(len, battle.prompts)),
        "chars_a": sum(map(len, battle.responses_a)),
        "chars_b": sum(map(len, battle.responses_b)),
    }


def first_prompts(battles: Iterable[Battle]) -> np.ndarray:
    """Return uint64 [battles], equal for the same first prompt but for white space and the case of ASCII letters.

    A second opinion on the folds, which are made of `prompt_group`: it is noted where the table is read, and the run
    checks ask it whether a prompt is on both sides. What is equal here is of one group, not the other way round.
    """
    import numpy as np

    return np.fromiter(map(_digest, battles), dtype=np.uint64)


def _digest(battle: Battle) -> int:
    words = battle.prompts[0].encode(errors="surrogatepass").lower().split()
    return int.from_bytes(blake2b(b" ".join(words), digest_size=8).digest(), "big")


def noting(chunks: Iterable[list[Battle]], noted: list[np.ndarray]) -> Iterator[list[Battle]]:
    """Yield chunks of battles, and append each chunk's `first_prompts` to `noted` as it goes by."""
    for chunk in chunks:
        noted.append(first_prompts(chunk))
        yield chunk
