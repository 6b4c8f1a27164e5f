import io
import json
import math
import re
from dataclasses import replace

import pytest

from common.console import (
    Countdown,
    LogPoint,
    Show,
    TrainerLog,
    describe,
    duration,
    is_attended,
    loss_curve,
    resumed_at,
    seconds_left,
    teller,
)
from data_prep.export import Progress


def write(path, *points, mode="a"):
    with path.open(mode, encoding="utf-8") as file:
        for point in points:
            file.write(json.dumps(point) + "\n")


def point(step, total=10, **values):
    return {"current_steps": step, "total_steps": total, **values}


def test_each_line_is_handed_out_once_and_a_half_written_one_waits(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    log = TrainerLog(path)
    assert log.read_new() == []
    write(path, point(1, loss=1.5, lr=1e-4, epoch=0.1, elapsed_time="0:00:07"))
    with path.open("a") as file:
        file.write('{"current_steps": 2, "tot')
    assert log.read_new() == [LogPoint(1, 10, loss=1.5, lr=1e-4, epoch=0.1, elapsed=7.0)]
    with path.open("a") as file:
        file.write('al_steps": 10, "eval_loss": 1.25}\n')
    assert log.read_new() == [LogPoint(2, 10, eval_loss=1.25)]
    assert log.read_new() == []


def test_damaged_lines_are_left_out_and_an_emptied_file_is_read_anew(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    path.write_bytes(b'{"current_steps": 1}\n\xff\xfe\n[]\n{"current_steps": 3, "total_steps": 4, "loss": "x"}\n')
    log = TrainerLog(path)
    assert log.read_new() == [LogPoint(3, 4)]
    write(path, point(1, loss=2.0), mode="w")
    assert [p.loss for p in log.read_new()] == [2.0]


def test_existing_lines_can_be_skipped(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    write(path, point(1, loss=1.0))
    log = TrainerLog(path, skip_existing=True)
    write(path, point(2, loss=0.9))
    assert [p.step for p in log.read_new()] == [2]


def test_nan_is_read_and_recognised(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    path.write_text('{"current_steps": 1, "total_steps": 2, "loss": NaN}\n')
    (found,) = TrainerLog(path).read_new()
    assert math.isnan(found.loss)
    assert not found.finite
    assert LogPoint(1, 2).finite


def test_the_curve_joins_training_and_validation_and_keeps_the_resumed_run(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    write(
        path,
        point(2, loss=1.2, lr=0.1),
        point(4, loss=1.1, lr=0.1),
        point(4, eval_loss=1.15),
        point(6, loss=9.0, lr=0.1),
    )
    write(path, point(5, loss=1.0, lr=0.2), point(10, epoch=1.0))  # resumed at 4, logs at other steps, closing line
    assert loss_curve(path) == [
        {"step": 2, "loss": 1.2, "lr": 0.1, "eval_loss": None},
        {"step": 4, "loss": 1.1, "lr": 0.1, "eval_loss": 1.15},
        {"step": 5, "loss": 1.0, "lr": 0.2, "eval_loss": None},
    ]


def test_the_time_left_counts_only_the_steps_of_this_run():
    assert seconds_left(LogPoint(4, 10, elapsed=8.0)) == pytest.approx(12.0)
    assert seconds_left(LogPoint(4, 10, elapsed=8.0), start_step=2) == pytest.approx(24.0)
    assert seconds_left(LogPoint(2, 10, elapsed=8.0), start_step=2) is None
    assert seconds_left(LogPoint(4, 10)) is None


def test_long_runs_have_days(tmp_path):
    path = tmp_path / "trainer_log.jsonl"
    write(path, point(5, elapsed_time="1 day, 2:00:05"))
    assert TrainerLog(path).read_new()[0].elapsed == 86400 + 7200 + 5


def test_a_point_is_described_in_one_text():
    text = describe(LogPoint(4, 10, loss=1.23456, lr=1e-4, elapsed=4000.0))
    assert text == "loss 1.2346  lr 1.00e-04  1:40:00 left"


def test_plain_lines_come_at_a_modest_rate_with_first_and_last_and_without_colour():
    stream = io.StringIO()
    show = Show(stream, interval=3600)
    with show.line("sft") as line:
        for phase in ("training", "validating", "training"):
            line.phase(phase)
        for step in range(1, 11):
            line.point(LogPoint(step, 10, loss=2 - step / 10, lr=1e-4, elapsed=float(step)))
        show.note("a note")
    assert stream.getvalue().splitlines() == [
        "sft: training",
        "sft: validating",
        "sft: step 1/10  loss 1.9000  lr 1.00e-04  0:00:09 left",
        "sft: step 10/10  loss 1.0000  lr 1.00e-04  0:00:00 left",
        "a note",
    ]


def test_an_attended_line_shows_step_loss_rate_and_vanishes(monkeypatch):
    monkeypatch.setenv("COLUMNS", "140")
    stream = io.StringIO()
    show = Show(stream, attended=True)
    with show.line("sft") as line:
        line.phase("training")
        line.point(LogPoint(3, 10, loss=1.5, lr=2e-4, elapsed=3.0))
        line.point(LogPoint(3, 10, eval_loss=1.75, elapsed=3.0))
        show.note("kept")
    written = stream.getvalue()
    assert "3/10  loss 1.5000  validation loss 1.7500  lr 2.00e-04  0:00:07 left" in written
    assert "kept" in written
    assert written.endswith(("\x1b[2K", "\x1b[?25h")) or "\x1b[2K" in written.rsplit("left", 1)[1]  # erased


@pytest.mark.parametrize(
    ("width", "shown", "absent"),
    [
        (160, "120/350  loss 0.5015  validation loss 0.5693  lr 2.54e-06  0:05:45 left", None),
        (100, "120/350  loss 0.5015  validation loss 0.5693  0:05:45 left", "lr "),
        (80, "120/350  loss 0.5015  0:05:45 left", "validation loss"),
        (60, "120/350  0:05:45 left", "loss"),
    ],
)
def test_the_time_left_stays_in_sight_on_a_narrow_terminal(monkeypatch, width, shown, absent):
    monkeypatch.setenv("COLUMNS", str(width))
    stream = io.StringIO()
    with Show(stream, attended=True).line("qwen3-4b dpo_judge") as line:
        line.phase("validating")
        line.point(LogPoint(120, 350, loss=0.5015, eval_loss=0.5693, lr=2.54e-6, elapsed=180.0))
        line._bar.refresh()
    screen = re.split(r"[\r\n]", re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue()))
    (last,) = {each.rstrip() for each in screen if "120/350" in each}
    assert shown in last and "…" not in last and len(last) <= width
    assert absent is None or absent not in last


def test_no_color_is_respected_by_the_attended_line(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = io.StringIO()
    with Show(stream, attended=True).line("sft") as line:
        line.point(LogPoint(3, 10, loss=1.5, elapsed=3.0))
    assert "loss 1.5000" in stream.getvalue()
    assert "\x1b[3" not in stream.getvalue()  # no colour; moving the cursor is no colour
    assert "[38;5" not in stream.getvalue()


def test_a_pipe_and_ci_are_not_attended(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert is_attended(terminal)
    assert not is_attended(io.StringIO())
    monkeypatch.setenv("TERM", "dumb")
    assert not is_attended(terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("CI", "true")
    assert not is_attended(terminal)


def test_the_countdown_goes_by_the_mean_speed_since_the_first_share():
    now = iter([100.0, 100.5, 110.0, 120.0, 130.0, 131.0])
    countdown = Countdown(lambda: next(now))
    said = [countdown.left(share) for share in (0.1, 0.11, 0.2, 0.5, 1.0, 0.0)]
    assert said == ["", "", ", 0:01:20 left", ", 0:00:25 left", "", ""], "too soon, then told, then done, then anew"


@pytest.mark.parametrize("attended", [True, False])
def test_an_export_is_shown_by_its_share(attended):
    said = io.StringIO()
    show = Show(said, attended=attended, interval=0)
    with show.line("prepare exam") as line:
        tell = teller(line)
        tell(Progress("train battles", 512, 0.25))
        tell(Progress("test battles", 12, 1.0))
        tell(Progress("dividing into folds", 524, None))
        if attended:
            line._bar.refresh()
    if attended:
        assert "dividing into folds" in said.getvalue()
    else:
        assert said.getvalue().splitlines() == [
            "prepare exam: 25%  512 train battles",
            "prepare exam: 100%  12 test battles",
            "prepare exam: dividing into folds",
        ]


@pytest.mark.parametrize(
    ("log", "start"),
    [
        ([], 0),
        ([(5, 9), (10, 19)], 0),
        ([(5, 9), (10, 19), (10, 19), (15, 30)], 0),  # an evaluation has a line of its own
        ([(5, 9), (10, 19), (15, 2), (20, 12)], 10),  # killed at its checkpoint
        ([(5, 9), (10, 19), (15, 29), (10, 10), (15, 20)], 5),  # killed after it: steps are done again
        ([(5, 9), (10, 19), (15, 9), (20, 19), (25, 3)], 20),  # twice
        ([(5, 9), (10, 19), (5, 9), (10, 19)], 0),  # anew, in the same log
    ],
)
def test_a_resumed_run_is_told_from_its_log(log, start):
    assert resumed_at([LogPoint(step, 100, elapsed=elapsed) for step, elapsed in log]) == start


@pytest.mark.parametrize(
    "line",
    [
        '{"current_steps": 1e999, "total_steps": 10}',
        '{"current_steps": 1, "total_steps": 1' + "0" * 30 + "}",
        '{"current_steps": -3, "total_steps": 10}',
        '{"current_steps": 1, "total_steps": 10, "loss": 1' + "0" * 400 + "}",
        "[" * 100_000,
        "[1]",
    ],
)
def test_a_damaged_line_is_left_out_whatever_is_in_it(tmp_path, line):
    path = tmp_path / "trainer_log.jsonl"
    path.write_text(line + '\n{"current_steps": 2, "total_steps": 10, "loss": 0.5}\n')
    assert [(point.step, point.loss) for point in TrainerLog(path).read_new()] == [(2, 0.5)]
    assert len(loss_curve(path)) == 1


@pytest.mark.parametrize("elapsed", ["inf:00:00", "nan:00:00", "1e300:00:00", "-5:00:00", "inf days, 0:00:00"])
def test_a_time_that_no_run_takes_is_none(tmp_path, elapsed):
    path = tmp_path / "trainer_log.jsonl"
    path.write_text(json.dumps({"current_steps": 2, "total_steps": 10**12, "elapsed_time": elapsed}) + "\n")
    (point,) = TrainerLog(path).read_new()
    assert point.elapsed is None and "left" not in describe(point)
    assert describe(replace(point, elapsed=1e9)).endswith(" left") and duration(float("inf")) == duration(1e9)


def test_the_same_phase_again_keeps_what_stands_beside_it():
    stream = io.StringIO()
    with Show(stream, attended=True).line("sft") as line:
        line.phase("training")
        line.point(LogPoint(3, 10, loss=1.5, elapsed=3.0))
        line.phase("training")
        assert "3/10" in line._bar.tasks[0].fields["detail"]
        line.phase("merging")
        assert line._bar.tasks[0].fields["detail"] == ""
