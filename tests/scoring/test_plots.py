"""The plots: which are written, that they are pictures with something on them, and that they are repeatable."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from scoring.report.plots import write_plots

ASSETS = Path(__file__).parent / "assets"
NAMES = ["loss_curve.png", "reliability.png", "confusion.png", "ladder.png"]


@pytest.fixture
def report() -> dict:
    return json.loads((ASSETS / "report.json").read_text())


@pytest.fixture(scope="module")
def plots(tmp_path_factory) -> list[Path]:
    return write_plots(json.loads((ASSETS / "report.json").read_text()), tmp_path_factory.mktemp("run") / "plots")


def size_of(path: Path) -> tuple[int, int]:
    head = path.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    return struct.unpack(">II", head[16:24])


def ink(path: Path):
    """Return the picture as [height, width] of True where it is not white."""
    from matplotlib.image import imread

    return (imread(path)[:, :, :3] < 0.97).any(axis=2)


def test_all_plots_are_written_with_something_on_them(plots):
    assert [path.name for path in plots] == NAMES
    for path in plots:
        width, height = size_of(path)
        assert 500 <= width <= 1600
        assert 400 <= height <= 900
        # Ink in every quarter, and room left.
        dots = ink(path)
        for half in (dots[: height // 2], dots[height // 2 :]):
            assert half[:, : width // 2].any()
            assert half[:, width // 2 :].any()
        assert 0.005 < dots.mean() < 0.7
        assert path.stat().st_size < 200_000


def test_same_figures_give_the_same_bytes_and_others_do_not(tmp_path, report, plots):
    report["confusion"][0][0] += 100
    again = {path.name: path.read_bytes() for path in write_plots(report, tmp_path)}
    assert [path.name for path in plots if path.read_bytes() != again[path.name]] == ["confusion.png"]


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        ({"loss_curve": None}, "loss_curve.png"),
        ({"loss_curve": [{"step": 1, "loss": float("nan")}]}, "loss_curve.png"),
        ({"reliability": None}, "reliability.png"),
        ({"reliability": {"top": [{"confidence": None, "frequency": None, "count": 0}]}}, "reliability.png"),
        ({"confusion": None}, "confusion.png"),
        ({"baselines": None, "log_loss": None, "bayes": None}, "ladder.png"),
    ],
)
def test_a_plot_without_data_is_left_out_and_its_earlier_file_removed(tmp_path, report, missing, name):
    (tmp_path / name).write_bytes(b"of an earlier run")
    written = write_plots(report | missing, tmp_path)
    assert [path.name for path in written] == [other for other in NAMES if other != name]
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(path.name for path in written)


def test_little_data_and_odd_names_are_drawn(tmp_path):
    report = {
        "experiment": "$x_{1$ <b>",
        "loss_curve": [{"step": 1, "loss": 2.0}],
        "reliability": {"top": [{"confidence": 1.0, "frequency": 0.0, "count": 1}]},
        "confusion": [[0, 0, 0], [0, 1, 0], [0, 0, 0]],
        "log_loss": 1.0,
    }
    assert [path.name for path in write_plots(report, tmp_path)] == NAMES


def test_plots_need_no_display_and_leave_pyplot_alone(tmp_path):
    code = (
        "import json, pathlib, sys\n"
        "report, folder = map(pathlib.Path, sys.argv[1:])\n"
        "from scoring.report.plots import write_plots\n"
        "assert 'matplotlib' not in sys.modules\n"
        "write_plots(json.loads(report.read_text()), folder)\n"
        "assert 'matplotlib.pyplot' not in sys.modules or not sys.modules['matplotlib.pyplot'].get_fignums()\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "DISPLAY"} | {"MPLBACKEND": "svg"}
    command = [sys.executable, "-c", code, ASSETS / "report.json", tmp_path]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2], env=environment)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(NAMES)
