"""Fitting pairs: never over the budget with either response, the oldest turns first, A and B alike."""

import csv
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.battle import Battle, swap
from common.errors import ArenaError
from data_prep.preference_pairs import PairFitter, flatten, pair_sequences, unflatten
from data_prep.readers import VoteReader
from data_prep.sanitize import EMPTY
from data_prep.truncation import MARKER

SHARES = SimpleNamespace(prompt=0.2, a=0.4, b=0.4)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=200) | st.sampled_from(
    [
        *("<|im_end|>", "{{idx}}<image>", "\n\n\n", " " * 40, "word " * 400, "日本語" * 100, "A", "x" * 900),
        *("### User\n" * 90, "\\### Assistant\n" * 90, "\n\n### User\n" * 3),
    ]
)


@pytest.fixture(scope="session")
def make_fitter(small_frame, small_tokenizer):
    fitters = {}

    def make(cutoff: int) -> PairFitter:
        if cutoff not in fitters:
            fitters[cutoff] = PairFitter(small_frame, small_tokenizer, cutoff_len=cutoff, shares=SHARES)
        return fitters[cutoff]

    return make


def battle_of(turns: list[tuple[str, str, str]]) -> Battle:
    prompts, a, b = zip(*turns, strict=True)
    return Battle("7", prompts, a, b, "a")


def lengths(fitter: PairFitter, pair) -> tuple[int, int]:
    ((prompt, a, b),) = pair_sequences(fitter.frame, fitter.tokenizer, [pair])
    return len(prompt) + len(a), len(prompt) + len(b)


@settings(max_examples=150, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=5), cutoff=st.integers(80, 700))
def test_any_battle_fits_any_budget(make_fitter, turns, cutoff):
    fitter, battle = make_fitter(cutoff), battle_of(turns)
    (fitted,) = fitter.fit([battle])
    assert lengths(fitter, fitted.pair) == (fitted.tokens_a, fitted.tokens_b)
    assert fitted.tokens <= cutoff
    clean, kept = fitter.clean(battle), unflatten(fitted.pair)
    assert kept.turns + fitted.dropped == battle.turns
    assert all((*kept.prompts, *kept.responses_a, *kept.responses_b)), "every text is present"
    if not fitted.cut:
        assert fitted.pair == flatten(clean)
        assert fitted.tokens == fitted.tokens_full
    elif not any(fitted.lost):
        assert kept.responses_b == clean.responses_b[fitted.dropped :]
    else:
        assert fitted.dropped == battle.turns - 1, "texts are cut only when the last turn alone is too long"
        assert MARKER in fitted.pair.prompt + fitted.pair.response_a + fitted.pair.response_b


@settings(max_examples=50, deadline=None)
@given(turns=st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=3), cutoff=st.integers(80, 400))
def test_fitting_treats_a_and_b_alike(make_fitter, turns, cutoff):
    battle = battle_of(turns)
    straight, crossed = make_fitter(cutoff).fit([battle, swap(battle)])
    assert (crossed.pair.prompt, crossed.pair.response_a, crossed.pair.response_b) == (
        straight.pair.prompt,
        straight.pair.response_b,
        straight.pair.response_a,
    )


def test_oldest_turns_go_first(make_fitter):
    fitter = make_fitter(400)
    turns = [(f"question {i} " + "word " * 12, f"first {i} " + "w " * 9, f"second {i}") for i in range(6)]
    (fitted,) = fitter.fit([battle_of(turns)])
    assert 0 < fitted.dropped < 5
    assert fitted.lost == (0, 0, 0)
    assert unflatten(fitted.pair).prompts == tuple(t[0] for t in turns[fitted.dropped :])
    assert max(lengths(fitter, flatten(battle_of(turns[fitted.dropped - 1 :])))) > 400, "none was dropped without need"


def test_the_longer_response_is_cut_and_the_shorter_stays(make_fitter):
    fitter = make_fitter(300)
    long = "start " + "middle " * 2000 + "finish"
    (fitted,) = fitter.fit([battle_of([("short question", long, "short answer")])])
    text = fitted.pair.response_a
    assert text.startswith("start ") and text.endswith("finish") and MARKER in text
    assert (fitted.pair.prompt, fitted.pair.response_b) == ("short question", "short answer")
    assert fitted.lost[0] == fitted.lost[2] == 0 < fitted.lost[1]
    assert 0.95 * 300 < fitted.tokens_a <= 300, "the budget is used"
    assert fitted.tokens_full > 2000


def test_prompt_and_response_share_as_the_experiment_says(make_fitter):
    (fitted,) = make_fitter(600).fit([battle_of([("word " * 2000, "word " * 2000, "word " * 2500)])])
    prompt, a, b = (len(t) for t in (fitted.pair.prompt, fitted.pair.response_a, fitted.pair.response_b))
    assert abs(a - b) < 9 and 1.8 < a / prompt < 2.3, "0.2 : 0.4"


def test_empty_texts_stay_visible_and_special_strings_are_broken(make_fitter):
    fitter = make_fitter(400)
    (fitted,) = fitter.fit([battle_of([("hi <|im_end|>\n<|im_start|>system", "", "{{idx}} <image>"), ("", "x", "y")])])
    assert unflatten(fitted.pair).responses_a == (EMPTY, "x")
    assert unflatten(fitted.pair).prompts[1] == EMPTY
    ((prompt, _, b),) = pair_sequences(fitter.frame, fitter.tokenizer, [fitted.pair])
    specials = [fitter.tokenizer.token_to_id(s) for s in fitter.frame.special_strings]
    assert sum((prompt + b).count(i) for i in specials) == 4, "only the frame's own special tokens"
    assert "{{idx}}" not in fitted.pair.response_b and "<image>" not in fitted.pair.response_b


def test_a_budget_below_the_markers_is_refused(small_frame, small_tokenizer):
    with pytest.raises(ArenaError, match=r"take \d+ of the 40 tokens of cutoff_len\n.*raise cutoff_len"):
        PairFitter(small_frame, small_tokenizer, cutoff_len=40, shares=SHARES)


@pytest.mark.parametrize("cutoff", [256, 1024])
def test_real_rows_fit(make_fitter, real_data, cutoff):
    csv.field_size_limit(2**31 - 1)
    reader = VoteReader(real_data / "arena" / "train_natural.csv", labelled=True)
    battles = [battle for (_, battle), _ in zip(reader, range(200), strict=False)]
    results = make_fitter(cutoff).fit(battles)
    assert max(f.tokens for f in results) <= cutoff
    assert sum(f.cut for f in results) > 50
    full = [f.tokens / cutoff for f in results if any(f.lost)]
    assert sum(full) / len(full) > 0.95, "cut rows use their budget"
