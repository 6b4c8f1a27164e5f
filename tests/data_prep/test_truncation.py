"""Fitting, as judge prompt and as pair: never over the budget, never without a text, the oldest turns first."""

from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.battle import Battle, swap
from common.errors import ArenaError
from data_prep.preference_pairs import PairFitter, flatten, pair_sequences
from data_prep.readers import VoteReader
from data_prep.truncation import MARKER, Fitter, share_out

QUESTION = "Which assistant do people prefer? Reply with A for assistant A"
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300) | st.sampled_from(
    ["<|im_end|>", "{{idx}}<image>", "### User", "\\### User", " " * 40, "word " * 400, "日本語" * 100, "A", "x" * 900]
)
TURNS = st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4)
BOTH = pytest.mark.parametrize("kind", ["prompt", "pair"])


@pytest.fixture(scope="session")
def make(small_frame, small_tokenizer, judge_prompt):
    """Return a function: fit battles as prompts or as pairs to a budget, and return (fitter, fitted)."""

    def fit(kind, cutoff, *battles):
        if kind == "pair":
            fitter = PairFitter(small_frame, small_tokenizer, cutoff_len=cutoff, prompt_share=0.2)
            return fitter, fitter.fit(battles)
        fitter = Fitter(small_frame, small_tokenizer, judge_prompt, cutoff_len=cutoff, prompt_share=0.2)
        return fitter, fitter.fit(battles, both_orders=True)

    return fit


def battle_of(*turns: tuple[str, str, str]) -> Battle:
    prompts, a, b = zip(*turns, strict=True)
    return Battle("7", prompts, a, b, "a")


def lengths(fitter, battle: Battle, dropped: int) -> tuple[int, ...]:
    """Return how long the sequences are that training feeds."""
    if isinstance(fitter, PairFitter):
        ((prompt, a, b),) = pair_sequences(fitter.frame, fitter.tokenizer, [flatten(battle)])
        return len(prompt) + len(a), len(prompt) + len(b)
    wrapped = [fitter.frame.wrap(fitter.prompt.message(each, dropped)) for each in (battle, swap(battle))]
    encodings = fitter.tokenizer.encode_batch(wrapped, add_special_tokens=False)
    return tuple(len(fitter.frame.surround(e.ids)) + fitter.frame.answer_len for e in encodings)


@BOTH
@settings(max_examples=100, deadline=None)
@given(turns=TURNS, cutoff=st.integers(220, 900))
def test_any_text_fits_any_budget_and_a_and_b_are_treated_alike(make, kind, turns, cutoff):
    battle = battle_of(*turns)
    fitter, (fitted, crossed) = make(kind, cutoff, battle, swap(battle))
    assert fitted.lengths == lengths(fitter, fitted.battle, fitted.dropped)
    assert fitted.tokens <= max(fitted.lengths) <= cutoff and swap(crossed.battle) == fitted.battle
    assert fitted.battle.turns + fitted.dropped == battle.turns
    kept = (*fitted.battle.prompts, *fitted.battle.responses_a, *fitted.battle.responses_b)
    assert all(kept), "every text is present"
    if kind == "prompt":
        message = fitter.prompt.message(fitted.battle, fitted.dropped)
        assert QUESTION in message and message.rstrip().endswith("Verdict:") and all(text in message for text in kept)
    clean = fitter.clean(battle)
    if not fitted.cut:
        assert fitted.battle == clean and fitted.tokens == fitted.tokens_full
    elif not any(fitted.lost):
        assert fitted.battle.responses_a == clean.responses_a[fitted.dropped :]
    else:
        assert fitted.dropped == battle.turns - 1, "texts are cut only when the last turn alone is too long"
        assert any(MARKER in text for text in kept)


@settings(max_examples=100, deadline=None)
@given(turns=TURNS, cutoff=st.integers(220, 900))
def test_a_battle_is_cut_to_the_same_with_and_without_its_other_order(make, turns, cutoff):
    fitter, (both,) = make("prompt", cutoff, battle_of(*turns))
    (alone,) = fitter.fit([battle_of(*turns)], both_orders=False)
    for name in ("battle", "dropped", "tokens", "tokens_full", "lost"):
        assert getattr(alone, name) == getattr(both, name), name
    assert max(lengths(fitter, alone.battle, alone.dropped)) <= cutoff


@pytest.mark.parametrize(("kind", "cutoff"), [("prompt", 600), ("pair", 400)])
def test_oldest_turns_go_first(make, kind, cutoff):
    turns = [(f"question {i} " + "word " * 12, f"first {i} " + "w " * 9, f"second {i}") for i in range(6)]
    fitter, (fitted,) = make(kind, cutoff, battle_of(*turns))
    assert 0 < fitted.dropped < 6 and fitted.lost == (0, 0, 0)
    assert fitted.battle.prompts == tuple(turn[0] for turn in turns[fitted.dropped :])
    one_more = battle_of(*turns[fitted.dropped - 1 :])
    assert max(lengths(fitter, one_more, 1)) > cutoff, "no turn was dropped without need"


@pytest.mark.parametrize(("kind", "cutoff"), [("prompt", 400), ("pair", 300)])
def test_the_longer_response_keeps_head_and_tail_and_the_others_stay(make, kind, cutoff):
    long = "start " + "middle " * 2000 + "finish"
    _, (fitted,) = make(kind, cutoff, battle_of(("short question", long, "short answer")))
    (text,) = fitted.battle.responses_a
    assert text.startswith("start ") and text.endswith("finish") and MARKER in text
    assert fitted.battle.prompts == ("short question",) and fitted.battle.responses_b == ("short answer",)
    assert fitted.lost[0] == fitted.lost[2] == 0 < fitted.lost[1]
    assert 0.95 * cutoff < fitted.tokens <= cutoff < 2000 < fitted.tokens_full, "the budget is used"


def test_prompt_and_response_share_as_the_experiment_says(make):
    _, (fitted,) = make("pair", 600, battle_of(("word " * 2000, "word " * 2000, "word " * 2500)))
    texts = fitted.battle.prompts, fitted.battle.responses_a, fitted.battle.responses_b
    prompt, a, b = (len(text[0]) for text in texts)
    assert abs(a - b) < 9 and 1.8 < a / prompt < 2.3, "0.2 : 0.4"


@pytest.mark.parametrize(("kind", "cutoff"), [("prompt", 64), ("pair", 40)])
def test_a_budget_below_the_fixed_parts_is_refused(make, kind, cutoff):
    with pytest.raises(ArenaError, match=rf"take(s)? \d+ of the {cutoff} tokens of cutoff_len\n.*raise cutoff_len"):
        make(kind, cutoff)


@given(
    wanted=st.fixed_dictionaries({f: st.integers(0, 5000) for f in ("prompt", "a", "b")}),
    room=st.integers(0, 6000),
    floor=st.integers(0, 20),
)
def test_sharing_is_fair_and_within_the_room(wanted, room, floor):
    granted = share_out(wanted, {"prompt": 0.2, "a": 0.4, "b": 0.4}, room, floor)
    lowest = {f: min(n, floor) for f, n in wanted.items()}
    assert all(lowest[f] <= granted[f] <= wanted[f] for f in wanted)
    assert sum(granted.values()) <= max(room, sum(lowest.values()))
    if sum(wanted.values()) <= room:
        assert granted == wanted
    elif room > sum(lowest.values()) + 3:
        assert sum(granted.values()) >= room - 3, "no room is wasted but by rounding"


def test_the_orders_of_real_battles_differ_by_less_than_is_looked_for(make, real_data):
    reader = VoteReader(real_data / "arena" / "train_clean.csv.gz", labelled=True)
    _, results = make("prompt", 100_000, *(battle for _, battle in islice(reader, 400)))
    differences = [abs(fitted.lengths[0] - fitted.lengths[1]) / fitted.battle.turns for fitted in results]
    assert max(differences) <= 2, "against 8 a turn and an eighth of the budget"
