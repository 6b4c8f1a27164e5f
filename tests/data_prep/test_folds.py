"""Folds: prompts are recognised through their spelling, never split, and the classes keep their shares."""

import random
import time
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from common.battle import VERDICTS, Battle
from common.errors import ArenaError
from data_prep.folds import fold_numbers, group_number, normalise_prompt, prompt_group, validation_mask

ROWS = st.lists(st.tuples(st.integers(0, 40).map(str), st.sampled_from(VERDICTS)), min_size=1, max_size=120)
SHARES = st.floats(0.05, 0.5)
SPELLINGS = ["What is  LOVE?", "what is love", "\n What is love ?!\t", "“What is love?”", "ｗｈａｔ is love？"]
SPELLINGS += ["¿what\u00a0is\u3000love…", "**What is love** 🙂"]


def validation_rows(names, verdicts, *, share: float, seed: int) -> list[bool]:
    """Choose among rows whose groups are any names."""
    groups = np.array([group_number(prompt_group(f"prompt {name}")) for name in names], np.uint64)
    kinds = np.array([VERDICTS.index(verdict) for verdict in verdicts], np.int8)
    return validation_mask(groups, kinds, share=share, seed=seed).tolist()


@pytest.mark.parametrize("text", SPELLINGS)
def test_spellings_of_one_prompt_are_one_group(text):
    assert prompt_group(text) == prompt_group("What is love?")
    assert prompt_group(Battle("1", (text, "more"), ("a", "a"), ("b", "b"))) == prompt_group("what is love")


@pytest.mark.parametrize(
    ("one", "other"),
    [("what is love", "what is live"), ("1 2", "12"), ("?", "!"), ("", "?"), ("你好", "您好"), ("a.b", "a b")],
)
def test_different_prompts_are_different_groups(one, other):
    assert prompt_group(one) != prompt_group(other)


@given(st.text(alphabet=st.characters()))
def test_normalising_twice_changes_nothing_for_the_group(text):
    once = normalise_prompt(text)
    assert prompt_group(once) == prompt_group(text)


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_fast_path_for_ascii_agrees_with_the_general_one(text):
    # U+FB01 folds to two letters that cannot vanish, so that its presence takes the general path
    general = normalise_prompt(f"{text} x\ufb01")
    assert general == normalise_prompt(f"{text} xfi")


@given(ROWS, SHARES, st.integers(0, 2**64))
@settings(deadline=None)
def test_groups_are_whole_and_the_share_is_met_within_one_group(rows, share, seed):
    groups, verdicts = zip(*rows, strict=True)
    try:
        chosen = validation_rows(groups, verdicts, share=share, seed=seed)
    except ArenaError as error:
        assert error.remedy
        return
    inside = {group for group, is_in in zip(groups, chosen, strict=True) if is_in}
    outside = {group for group, is_in in zip(groups, chosen, strict=True) if not is_in}
    assert inside
    assert outside and not inside & outside
    assert abs(sum(chosen) - share * len(rows)) <= max(Counter(groups).values())


@given(st.integers(0, 2**32), st.integers(150, 1500), SHARES)
@settings(max_examples=40, deadline=None)
def test_class_shares_are_close_to_the_declared_one(table_seed, size, share):
    random_ = random.Random(table_seed)
    weights = [random_.uniform(0.1, 1) for _ in VERDICTS]
    verdicts = random_.choices(VERDICTS, weights, k=size)
    groups = [str(random_.randrange(size)) for _ in range(size)]
    chosen = validation_rows(groups, verdicts, share=share, seed=table_seed)
    assert abs(sum(chosen) - share * size) <= 1
    for verdict, count in Counter(verdicts).items():
        inside = sum(c for c, v in zip(chosen, verdicts, strict=True) if v == verdict)
        assert abs(inside - share * count) <= 2


@given(ROWS, SHARES, st.randoms(use_true_random=False))
@settings(deadline=None)
def test_the_choice_does_not_depend_on_the_order_of_the_rows(rows, share, random_):
    def inside(table):
        chosen = validation_rows(*zip(*table, strict=True), share=share, seed=7)
        return sorted(row for row, is_in in zip(table, chosen, strict=True) if is_in)

    try:
        expected = inside(rows)
    except ArenaError:
        assume(False)
    shuffled = list(rows)
    random_.shuffle(shuffled)
    assert inside(shuffled) == expected


def test_frequent_prompts_validate_as_often_as_rare_ones():
    groups = [f"big {i // 20}" for i in range(2000)] + [f"small {i}" for i in range(2000)]
    verdicts = [VERDICTS[i % 3] for i in range(4000)]
    chosen = validation_rows(groups, verdicts, share=0.25, seed=3)
    assert abs(sum(chosen[:2000]) - 500) <= 20 and abs(sum(chosen[2000:]) - 500) <= 20


def test_a_share_that_whole_groups_cannot_meet_is_refused_with_a_remedy():
    halves = ["g"] * 50 + ["h"] * 50  # a half is the nearest to a tenth
    tables = [(["g"] * 50, 0.1), ([], 0.1), (halves, 0.1), (["g"] * 100 + ["h"], 0.5), (["g", "h"], 0), (["g", "h"], 1)]
    for groups, share in tables:
        with pytest.raises(ArenaError, match="valid_share"):
            validation_rows(groups, ["a"] * len(groups), share=share, seed=1)


def test_hundreds_of_thousands_of_rows_take_seconds_and_some_bytes_each():
    draw = np.random.default_rng(0)
    numbers = draw.integers(0, 2**64, 300_000, dtype=np.uint64)
    groups = np.concatenate([numbers[:100_000], numbers[draw.integers(0, 100_000, 200_000)]])
    kinds = draw.choice(3, 300_000).astype(np.int8)
    tracemalloc.start()
    start = time.process_time()
    try:
        mask = validation_mask(groups, kinds, share=0.1, seed=1)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert mask.mean() == pytest.approx(0.1, abs=1e-3)
    assert peak < 300_000 * 40 + 100_000 * 150
    assert time.process_time() - start < 60  # tracing makes it several times slower


def test_the_choice_is_that_of_the_first_edition():
    groups = np.arange(40, dtype=np.uint64) // 2 * np.uint64(2**58 + 12345)
    first, other = (validation_mask(groups, (np.arange(40) % 3).astype(np.int8), share=0.2, seed=n) for n in (42, 43))
    assert np.flatnonzero(first).tolist() == [0, 1, 4, 5, 26, 27, 32, 33]
    assert other.sum() == 8 and (other != first).any(), "the seed decides"


def test_folds_are_whole_groups_of_like_size_and_verdicts():
    random = np.random.default_rng(5)
    groups = random.integers(0, 700, 1500).astype(np.uint64)
    kinds = random.choice(3, 1500, p=[0.5, 0.3, 0.2])
    numbers = fold_numbers(groups, kinds, folds=5, seed=1)
    assert len(set(zip(groups.tolist(), numbers.tolist(), strict=True))) == len(set(groups.tolist()))
    counts = np.array([np.bincount(kinds[numbers == fold], minlength=3) for fold in range(5)])
    assert (counts.max(axis=0) - counts.min(axis=0) <= 3).all(), counts
    assert (numbers != fold_numbers(groups, kinds, folds=5, seed=2)).any()
