"""Flattening: any battle can be read back, and the form is the stated one."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from common.battle import Battle
from common.errors import ArenaError
from data_prep.preference_pairs import Pair, flatten, join_turns, split_turns, unflatten

PIECES = ["### User", "### Assistant", "\\### User", "\\\\### Assistant", "\n", "\n\n", "\\", "x", " ", "\t", "\r", "#"]
TEXT = st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
def test_every_battle_can_be_read_back(turns):
    prompts, a, b = zip(*turns, strict=True)
    battle = Battle("7", prompts, a, b)
    assert unflatten(flatten(battle)) == battle


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=4))
def test_headers_mark_the_turns_and_nothing_else(turns):
    answers, (_, *later) = [a for a, _ in turns], [p for _, p in turns]
    lines = [line.rstrip(" \t\r") for line in join_turns(answers, later).split("\n")]
    assert [line for line in lines if line in ("### User", "### Assistant")] == ["### User", "### Assistant"] * len(
        later
    )


def test_the_form():
    battle = Battle("7", ("one?", "two?"), ("1", "2"), ("I", "### User\nII"), "a", "English")
    assert flatten(battle) == Pair(
        "7",
        "one?",
        "1\n\n### User\ntwo?\n\n### Assistant\n2",
        "I\n\n### User\ntwo?\n\n### Assistant\n\\### User\nII",
    )


@pytest.mark.parametrize("text", ["", "plain", "a\nb\n", "## User", "### Users", "see ### User", "\\ ### User"])
def test_one_turn_stays_as_it_is(text):
    assert flatten(Battle("7", (text,), (text,), (text,))) == Pair("7", text, text, text)


@pytest.mark.parametrize(
    ("text", "flat"),
    [
        ("### User", "\\### User"),
        ("\\### User \t", "\\\\### User \t"),
        ("a\n### Assistant\r\nb", "a\n\\### Assistant\r\nb"),
    ],
)
def test_a_line_like_a_header_gets_a_backslash(text, flat):
    assert join_turns([text], []) == flat
    assert split_turns(flat) == ((text,), ())


def test_two_different_conversations_are_refused():
    with pytest.raises(ArenaError, match=r"pair 9: the two responses do not hold the same user turns.*\n.*prepare"):
        unflatten(Pair("9", "p", join_turns("ab", "x"), join_turns("ab", "y")))
