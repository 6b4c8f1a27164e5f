"""Seen ids: repeats are found across blocks, and a hash that two ids share is no repeat."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import readers as seen_ids
from data_prep.readers import SeenIds, first_repeat, hash_of


@given(st.lists(st.integers(0, 60).map(str), max_size=120), st.integers(1, 9))
def test_exactly_the_ids_that_repeat_are_suspects(ids, block):
    seen, suspects = SeenIds(block), set()
    for identity in ids:
        suspects |= seen.add(identity)
    suspects |= seen.check()
    assert suspects == {hash_of(i) for i in ids if ids.count(i) > 1}
    repeat = first_repeat(zip(ids, range(len(ids)), strict=True), suspects)
    second = next((n for n, i in enumerate(ids) if i in ids[:n]), None)
    assert repeat == (None if second is None else (ids[second], ids.index(ids[second]), second))


def test_ids_that_share_a_hash_are_told_apart(monkeypatch):
    monkeypatch.setattr(seen_ids, "hash_of", lambda identity: len(identity))
    seen = SeenIds(2)
    assert seen.add("aa") == set()
    assert seen.add("bb") == {2}, "a suspect, for both have the hash 2"
    assert first_repeat(iter([("aa", 1), ("bb", 2)]), {2}) is None
    assert first_repeat(iter([("aa", 1), ("bb", 2), ("aa", 3)]), {2}) == ("aa", 1, 3)


@pytest.mark.parametrize("gap", [3, 70_000, 200_000])
def test_a_repeat_far_away_is_seen_when_its_block_is_full(gap):
    seen = SeenIds()
    found = [n for n in range(gap + 1) if seen.add(str(n if n < gap else 0))]
    assert seen.check() or found
    runs = sum(len(run) for run in seen._runs)
    assert runs in (gap, gap + 1)
    assert len(seen._runs) <= 4, "few sorted runs, not one a block"
