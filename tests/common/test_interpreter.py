"""The wrong Python: one message and exit code 2 instead of a traceback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from common import interpreter

ROOT = Path(__file__).resolve().parents[2]
NOT_HERE = "Error: the packages of this project are not in this Python ("


def called(*options: str, path: str = "", folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Call run.py --help in a Python without the packages of its environment, those under `path` excepted."""
    own = {**os.environ, "PYTHONPATH": path}
    call = [sys.executable, "-S", *options]
    return subprocess.run(call, cwd=folder, env=own, capture_output=True, text=True, timeout=60)


def test_a_python_without_the_packages_is_told_how_to_get_them(tmp_path):
    done = called("run.py", "--help")
    assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
    assert done.stderr.startswith(NOT_HERE) and "no click, " in done.stderr
    assert len(done.stderr.splitlines()) == 2 and "  remedy: " in done.stderr
    elsewhere = called(str(ROOT / "run.py"), "--help", folder=tmp_path)
    assert elsewhere.returncode == 2 and str(ROOT) in elsewhere.stderr.splitlines()[1]


def test_another_click_is_no_traceback(tmp_path):
    for name in interpreter._PACKAGES:
        (tmp_path / f"{name}.py").write_text("class Argument:\n    def __init__(self, names): pass\n")
    done = called("run.py", "--help", path=str(tmp_path))
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr.startswith(NOT_HERE) and "its click is too old" in done.stderr


def test_an_old_python_is_told_its_version():
    code = "import sys, runpy; sys.version_info = (3, 9, 1); runpy.run_path('run.py', run_name='__main__')"
    done = called("-c", f"import sys; sys.path.insert(0, '.'); {code}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "needs Python 3.11 or newer, and " in done.stderr and " is 3.9" in done.stderr


@pytest.mark.parametrize(
    ("prefix", "synced", "remedy"),
    [
        ("/usr", False, "`make install`, then `source .venv/bin/activate`"),
        ("/usr", True, "`source .venv/bin/activate`"),
        (".venv", True, "`rm -r .venv`, then `make install`"),
    ],
)
def test_the_remedy_is_the_step_that_is_missing(tmp_path, monkeypatch, prefix, synced, remedy):
    (tmp_path / ".venv").mkdir()
    if synced:
        (tmp_path / ".venv/.synced").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(interpreter, "_ROOT", tmp_path)
    monkeypatch.setattr(sys, "prefix", prefix)
    assert interpreter._remedy() == remedy
