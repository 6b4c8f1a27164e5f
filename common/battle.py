"""One human vote between two answers, and the order of the classes, declared here and nowhere else.

Battle("65089", ("hi",), ("Hello!",), ("Hey, what's up?",), "b")
"""

from __future__ import annotations

from dataclasses import dataclass, replace

# The order of the classes in every array, table and file of this project.
VERDICTS = ("a", "b", "tie")
# The competition's columns, in the same order.
PROBABILITY_COLUMNS = ("winner_model_a", "winner_model_b", "winner_tie")
# Where each class goes when the two answers change places.
SWAPPED_ORDER = (1, 0, 2)
# The columns of a battle's texts.
TEXTS = ("prompts", "responses_a", "responses_b")


@dataclass(frozen=True, slots=True)
class Battle:
    """A prompt (one string a turn), two answers to it (one string a turn each) and the verdict, or None.

    `shares` are the votes' shares in the order of VERDICTS, where the table had them instead of one verdict;
    `model_a` and `model_b` are the names of the models that answered, where it had them.
    """

    id: str
    prompts: tuple[str, ...]
    responses_a: tuple[str, ...]
    responses_b: tuple[str, ...]
    verdict: str | None = None
    language: str | None = None
    shares: tuple[float, float, float] | None = None
    model_a: str | None = None
    model_b: str | None = None

    @property
    def turns(self) -> int:
        """The number of turns."""
        return len(self.prompts)

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The columns of TEXTS."""
        return self.prompts, self.responses_a, self.responses_b

    @property
    def characters(self) -> int:
        """The characters of all texts."""
        return sum(len(text) for column in self.texts for text in column)


def swap_verdict(verdict: str | None) -> str | None:
    """Return the verdict of the same battle with A and B exchanged."""
    return {"a": "b", "b": "a"}.get(verdict, verdict)


def swap(battle: Battle) -> Battle:
    """Return the battle with A and B exchanged, the verdict with them; twice is the identity."""
    return replace(
        battle,
        responses_a=battle.responses_b,
        responses_b=battle.responses_a,
        model_a=battle.model_b,
        model_b=battle.model_a,
        verdict=swap_verdict(battle.verdict),
        shares=battle.shares and tuple(battle.shares[place] for place in SWAPPED_ORDER),
    )
