"""scoring.batches: the same items in the same order, made ahead; errors arrive, and nothing goes on after the end."""

from __future__ import annotations

import threading
import time

import pytest

from scoring.batches import ahead


def test_the_items_come_in_their_order():
    assert list(ahead(range(100), depth=3)) == list(range(100))
    assert list(ahead([])) == []


def test_the_next_is_made_while_the_present_is_used():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number

    stream = ahead(items(), depth=2)
    assert next(stream) == 0
    deadline = time.monotonic() + 5
    while len(made) < 4 and time.monotonic() < deadline:  # 0 is out, 1 and 2 wait, 3 is in hand
        time.sleep(0.01)
    time.sleep(0.05)
    assert made == [0, 1, 2, 3]
    stream.close()


def test_an_error_comes_in_its_place():
    def items():
        yield 1
        raise KeyError("broken")

    stream = ahead(items())
    assert next(stream) == 1
    with pytest.raises(KeyError, match="broken"):
        next(stream)


def test_closed_it_makes_nothing_more_and_leaves_no_thread():
    before = threading.active_count()
    stream = ahead(iter(int, 1), depth=2)
    next(stream)
    stream.close()
    assert threading.active_count() == before
