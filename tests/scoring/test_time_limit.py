"""scoring.time_limit: lengths of time as people write them, and limits that are kept or refused early."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from common.errors import ArenaError, UsageError
from scoring.time_limit import Pace, parse_duration


def test_lengths_of_time():
    texts = {"9h": 32400, "90m": 5400, "1h30m": 5400, "3600s": 3600, "1.5H": 5400, " 2m5s ": 125}
    assert {text: parse_duration(text) for text in texts} == texts
    for text in ("", "9", "nine hours", "-1h", "0m", "30m1h", "1d", "nan"):
        with pytest.raises(UsageError, match="is not a length of time") as caught:
            parse_duration(text)
        assert "1h30m" in caught.value.remedy


def paced(limit, must=100_000):
    clock = SimpleNamespace(now=0.0)
    return Pace(must, limit, clock=lambda: clock.now), clock


def test_what_cannot_fit_is_refused_on_the_first_batches():
    pace, clock = paced(3600)
    clock.now = 40.0
    with pytest.raises(ArenaError, match="every row once takes") as caught:
        pace.update(500, must=True)  # 12.5 tokens a second: 8,000 s for all
    assert "8bit" in caught.value.remedy and "goes on from what is scored" in caught.value.remedy
    assert "no table of probabilities is written" in caught.value.what
    assert "1:00:00" in caught.value.where


def test_a_slow_beginning_alone_refuses_nothing():
    pace, clock = paced(1000)
    clock.now = 12.0
    pace.update(1100, must=True)  # 1,090 s for all: the longest rows come first, so this may still get faster
    clock.now = 200.0
    with pytest.raises(ArenaError, match="every row once takes"):
        pace.update(15_000, must=True)


def test_a_limit_that_passes_before_every_row_has_a_score_is_an_error():
    pace, clock = paced(100)
    clock.now = 50.0
    pace.update(99_000, must=True)
    clock.now = 99.0
    with pytest.raises(ArenaError, match="passed before every row was scored once"):
        pace.update(1, must=True)


def test_the_other_order_is_allowed_where_it_fits():
    pace, clock = paced(100)
    assert not pace.allows(1), "nothing was measured yet"
    clock.now = 40.0
    pace.update(100_000, must=True)  # 2,500 tokens a second, 58 s left less the reserve
    assert pace.allows(130_000) and not pace.allows(150_000)
    assert Pace(100_000).allows(10**9), "no limit"


def test_what_an_earlier_call_scored_is_not_forecast():
    pace, clock = paced(1000)
    pace.skip(90_000)
    clock.now = 20.0
    pace.update(1000, must=True)  # 50 tokens a second: 10,000 tokens fit in 1,000 s, 100,000 would not
