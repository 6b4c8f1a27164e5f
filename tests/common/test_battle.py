"""The battle: exchanging A and B is its own inverse and takes the verdict along."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.battle import PROBABILITY_COLUMNS, SWAPPED_ORDER, VERDICTS, Battle, swap, swap_verdict

TURNS = st.lists(st.text(max_size=8), min_size=1, max_size=3).map(tuple)
BATTLES = st.builds(
    Battle, st.text(max_size=4), TURNS, TURNS, TURNS, st.sampled_from([*VERDICTS, None]), st.sampled_from(["en", None])
)


@given(BATTLES)
def test_swapping_twice_is_the_identity(battle):
    assert swap(swap(battle)) == battle


@given(BATTLES)
def test_swapping_exchanges_answers_and_verdict_and_nothing_else(battle):
    swapped = swap(battle)
    assert (swapped.responses_a, swapped.responses_b) == (battle.responses_b, battle.responses_a)
    assert swapped.verdict == {"a": "b", "b": "a", "tie": "tie", None: None}[battle.verdict]
    assert (swapped.id, swapped.prompts, swapped.language) == (battle.id, battle.prompts, battle.language)
    assert swapped.turns == len(battle.prompts)


def test_swapped_order_maps_class_places_as_swap_verdict_maps_verdicts():
    assert [VERDICTS[i] for i in SWAPPED_ORDER] == [swap_verdict(verdict) for verdict in VERDICTS]


def test_columns_stand_in_the_order_of_the_verdicts():
    assert [name.removeprefix("winner_").removeprefix("model_") for name in PROBABILITY_COLUMNS] == list(VERDICTS)


def test_a_battle_cannot_be_changed():
    with pytest.raises(AttributeError):
        Battle("1", ("p",), ("a",), ("b",)).verdict = "a"
