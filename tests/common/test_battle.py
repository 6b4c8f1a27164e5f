from hypothesis import given
from hypothesis import strategies as st

from common.battle import VERDICTS, Battle, swap

TURNS = st.lists(st.text(max_size=8), min_size=1, max_size=3).map(tuple)
BATTLES = st.builds(
    Battle, st.text(max_size=4), TURNS, TURNS, TURNS, st.sampled_from([*VERDICTS, None]), st.sampled_from(["en", None])
)


@given(BATTLES)
def test_swapping_exchanges_answers_and_verdict_and_twice_is_the_identity(battle):
    swapped = swap(battle)
    assert (swapped.responses_a, swapped.responses_b) == (battle.responses_b, battle.responses_a)
    assert swapped.verdict == {"a": "b", "b": "a", "tie": "tie", None: None}[battle.verdict]
    assert (swapped.id, swapped.prompts, swapped.language) == (battle.id, battle.prompts, battle.language)
    assert swap(swapped) == battle
