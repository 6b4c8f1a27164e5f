"""scoring.time_limit: lengths of time as people write them, and limits that are kept or refused early."""

from __future__ import annotations

import pytest

from common.errors import ArenaError, UsageError
from scoring.time_limit import Pace, parse_duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("9h", 32400), ("90m", 5400), ("1h30m", 5400), ("3600s", 3600), ("1.5H", 5400), (" 2m5s ", 125)],
)
def test_lengths_of_time(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "9", "nine hours", "-1h", "0m", "30m1h", "1d", "nan"])
def test_what_is_no_length_of_time_is_wrong_use(text):
    with pytest.raises(UsageError, match="is not a length of time") as caught:
        parse_duration(text)
    assert "1h30m" in caught.value.remedy


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def paced(limit, must=100_000, started=0.0):
    clock, notes = Clock(), []
    pace = Pace(notes.append, must, limit, started=started, clock=clock)
    pace.begin()
    return pace, clock, notes


def test_what_cannot_fit_is_refused_on_the_first_batches():
    pace, clock, notes = paced(3600)
    clock.now = 40.0
    with pytest.raises(ArenaError, match="every row once takes") as caught:
        pace.update(500, must=True)  # 12.5 tokens a second: 8,000 s for all
    assert "8bit" in caught.value.remedy and "goes on from what is scored" in caught.value.remedy
    assert "no table of probabilities is written" in caught.value.what
    assert "1:00:00" in caught.value.where and notes == []


def test_a_slow_beginning_alone_refuses_nothing():
    pace, clock, _ = paced(1000)
    clock.now = 12.0
    pace.update(1100, must=True)  # 1,090 s for all: the longest rows come first, so this may still get faster
    clock.now = 200.0
    with pytest.raises(ArenaError, match="every row once takes"):
        pace.update(15_000, must=True)


def test_before_anything_is_measured_nothing_is_said():
    pace, clock, notes = paced(10_000)
    clock.now = 1.0
    pace.update(1, must=True)
    assert notes == [] and pace.speed == 1.0


def test_a_limit_that_passes_before_every_row_has_a_score_is_an_error():
    pace, clock, _ = paced(100)
    clock.now = 50.0
    pace.update(99_000, must=True)
    clock.now = 99.0
    with pytest.raises(ArenaError, match="passed before every row was scored once"):
        pace.update(1, must=True)


def test_the_rest_is_spent_and_no_more():
    pace, clock, _ = paced(100)
    clock.now = 40.0
    pace.update(100_000, must=True)  # 2,500 tokens a second, 58 s left less the reserve
    assert pace.allows(130_000) and not pace.allows(150_000)
    pace.send(100_000)
    assert not pace.allows(100_000), "what is being worked on counts"
    clock.now = 99.0
    pace.update(100_000, must=False)
    assert not pace.allows(1)


def test_the_time_before_the_first_batch_counts():
    pace, clock, _ = paced(100, started=-90.0)
    clock.now = 5.0
    assert pace.seconds_left == pytest.approx(100 - 2 - 95)


def test_without_a_limit_everything_is_allowed():
    pace, clock, notes = paced(None)
    clock.now = 1e6
    pace.update(10, must=True)
    assert pace.allows(1e12) and notes == []


def test_what_an_earlier_call_scored_is_not_forecast():
    pace, clock, notes = paced(1000)
    pace.skip(90_000)
    clock.now = 20.0
    pace.update(1000, must=True)
    assert notes and "0:03:00 more" in notes[0]
