import io
import re

import pytest

from common import progress
from common.console import duration
from common.progress import Show


def seen(stream: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())


@pytest.fixture
def clock(monkeypatch):
    """The time that the live line sees; a test sets `clock.now`."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    monkeypatch.setattr(progress, "time", found := Clock())
    return found


def test_plain_lines_come_at_a_modest_rate_with_first_and_last(clock):
    stream = io.StringIO()
    show = Show(stream)
    with show.line("sft") as line:
        for phase in ("training", "validating", "training"):
            line.update(phase)
        for step in range(1, 11):
            line.update(f"step {step}", step / 10)
            clock.now += 5
        show.note("a note")
    said = ["training", "validating", "10%  step 1", "70%  0:00:15 left  step 7", "100%  step 10"]
    assert stream.getvalue().splitlines() == [*(f"sft: {text}" for text in said), "a note"]


def test_the_time_left_goes_by_the_mean_speed_since_the_first_share(clock):
    stream = io.StringIO()
    with Show(stream, interval=0).line("x") as line:
        for now, share in ((100.0, 0.1), (100.5, 0.11), (110.0, 0.2), (120.0, 0.5), (130.0, 1.0), (131.0, 0.0)):
            clock.now = now
            line.update("rows", share)
        line.update("rows", 0.5, left=7.0)
    left = [re.search(r"[\d:]+ left", text) for text in stream.getvalue().splitlines()]
    assert [found and found[0][:7] for found in left] == [None, None, "0:01:20", "0:00:25", None, None, "0:00:07"]


def test_a_time_of_any_length_is_shown():
    assert duration(4000) == "1:06:40" and duration(float("inf")) == duration(1e9)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_an_attended_line_keeps_share_and_time_left_in_sight_and_vanishes(monkeypatch, width):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO()
    show = Show(stream, attended=True)
    with show.line("qwen3-4b dpo_judge") as line:
        line.update("training [bold]")
        line.update("step 3/10  loss 1.5000  validation loss 1.7500  lr 2.00e-04", 0.3, left=345.0)
        line.update("training [bold]")  # the same phase again hides nothing
        show.note("kept [bold]")
    lines = [text for text in re.split(r"[\r\n]", seen(stream)) if "30%" in text]
    assert lines and all("qwen3-4b dpo_judge: 30%  0:05:45 left" in text and len(text) <= width for text in lines)
    assert "kept [bold]" in seen(stream)
    assert "\x1b[2K" in stream.getvalue().rsplit("left", 1)[1], "erased at the end"


def test_no_color_is_respected(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = io.StringIO()
    with Show(stream, attended=True).line("sft") as line:
        line.update("rows", 0.5)
    assert "50%" in stream.getvalue() and not re.search(r"\x1b\[3\d|\[38;5", stream.getvalue())


@pytest.mark.parametrize(
    ("terminal", "environment", "attended"),
    [(True, {}, True), (False, {}, False), (True, {"TERM": "dumb"}, False), (True, {"CI": "true"}, False)],
)
def test_a_pipe_and_ci_are_not_attended(monkeypatch, terminal, environment, attended):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert Show(stream).attended is attended
