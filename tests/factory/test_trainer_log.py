import io
import json
import math

import pytest

from common.progress import Show
from factory.trainer_log import LogPoint, TrainerLog, loss_curve, resumed_at, seconds_left, show_points


@pytest.fixture
def path(tmp_path):
    return tmp_path / "trainer_log.jsonl"


def write(path, *points, mode="a"):
    with path.open(mode, encoding="utf-8") as file:
        for point in points:
            file.write(json.dumps(point) + "\n")


def point(step, total=10, **values):
    return {"current_steps": step, "total_steps": total, **values}


def test_each_line_is_returned_once_and_a_half_written_one_waits(path):
    log = TrainerLog(path)
    assert log.read_new() == []
    write(path, point(1, loss=1.5, lr=1e-4, epoch=0.1, elapsed_time="0:00:07"))
    with path.open("a") as file:
        file.write('{"current_steps": 2, "tot')
    assert log.read_new() == [LogPoint(1, 10, loss=1.5, lr=1e-4, elapsed=7.0)]
    with path.open("a") as file:
        file.write('al_steps": 10, "eval_loss": 1.25}\n')
    assert log.read_new() == [LogPoint(2, 10, eval_loss=1.25)] and log.read_new() == []
    write(path, point(1, loss=2.0), mode="w")  # a new run empties the file
    assert [p.loss for p in log.read_new()] == [2.0]
    log = TrainerLog(path, skip_existing=True)
    write(path, point(2, loss=0.9))
    assert [p.step for p in log.read_new()] == [2]


@pytest.mark.parametrize(
    "line",
    [
        '{"current_steps": 1}',
        '{"current_steps": 1e999, "total_steps": 10}',
        '{"current_steps": 1, "total_steps": 1' + "0" * 30 + "}",
        '{"current_steps": -3, "total_steps": 10}',
        '{"current_steps": 1, "total_steps": 10, "loss": 1' + "0" * 400 + "}",
        "[" * 100_000,
        "[1]",
        "\xff\xfe",
    ],
)
def test_a_damaged_line_is_left_out_whatever_is_in_it(path, line):
    path.write_text(line + '\n{"current_steps": 2, "total_steps": 10, "loss": 0.5, "lr": "x"}\n', encoding="latin-1")
    assert TrainerLog(path).read_new() == [LogPoint(2, 10, loss=0.5)] and len(loss_curve(path)) == 1


def test_the_elapsed_time_is_read_and_nonsense_is_none(path):
    texts = ("0:00:07", "1 day, 2:00:05", "inf:00:00", "-5:00:00", "", 7)
    write(path, *(point(step, elapsed_time=text, loss=math.nan) for step, text in enumerate(texts)))
    found = TrainerLog(path).read_new()
    assert [each.elapsed for each in found] == [7, 93605, None, None, None, None]
    assert not any(each.finite for each in found) and LogPoint(1, 2).finite


def test_the_curve_joins_training_and_validation_and_keeps_the_resumed_run(path):
    write(path, point(2, loss=1.2, lr=0.1), point(4, loss=1.1, lr=0.1), point(4, eval_loss=1.15))
    write(path, point(6, loss=9.0, lr=0.1))
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


def test_a_point_is_shown_with_what_was_logged_before_it():
    stream = io.StringIO()
    with Show(stream, interval=0).line("sft") as line:
        show = show_points(line)
        for each in (LogPoint(3, 10, loss=1.5, lr=2e-4, elapsed=3.0), LogPoint(3, 10, eval_loss=1.75), LogPoint(9, 10)):
            show(each)
    first, second = stream.getvalue().splitlines()
    assert "0:00:07 left" in first and "3/10" in first and "loss 1.5000" in first and "2.00e-04" in first
    assert "loss 1.5000" in second and "validation loss 1.7500" in second


@pytest.mark.parametrize(
    ("log", "start"),
    [
        ([], 0),
        ([(5, 9), (10, 19)], 0),
        ([(5, 9), (10, 19), (10, 19), (15, 30)], 0),  # an evaluation has a line of its own
        ([(5, 9), (10, 19), (15, 2), (20, 12)], 10),  # killed at its checkpoint
        ([(5, 9), (10, 19), (15, 29), (10, 10), (15, 20)], 5),  # killed after it: steps are repeated
        ([(5, 9), (10, 19), (15, 9), (20, 19), (25, 3)], 20),  # twice
        ([(5, 9), (10, 19), (5, 9), (10, 19)], 0),  # started again in the same log
    ],
)
def test_the_start_of_a_resumed_run_is_read_from_its_log(log, start):
    assert resumed_at([LogPoint(step, 100, elapsed=elapsed) for step, elapsed in log]) == start
