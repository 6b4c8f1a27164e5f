import os
import pickle
import subprocess
import sys
from pathlib import Path

from common.errors import ArenaError, first_line

ROOT = Path(__file__).resolve().parents[2]


def test_an_error_says_what_where_and_what_to_do():
    error = ArenaError("is not a table", where="votes.csv row 3", remedy="write it again")
    assert str(error) == "votes.csv row 3: is not a table\n  remedy: write it again"
    assert vars(pickle.loads(pickle.dumps(error))) == vars(error), "whole out of another process"


def called(*options: str, folder: Path = ROOT) -> subprocess.CompletedProcess:
    """Call Python without the packages of its environment."""
    own = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run([sys.executable, "-S", *options], cwd=folder, env=own, capture_output=True, text=True)


def test_a_python_without_the_packages_ends_with_the_way_to_get_them(tmp_path):
    for done in (called("run.py", "--help"), called(str(ROOT / "run.py"), "--help", folder=tmp_path)):
        assert done.returncode == 2 and "Traceback" not in done.stderr and not done.stdout
        assert "no click, " in done.stderr and f"remedy: `make -C {ROOT} install`" in done.stderr


def test_an_old_python_is_refused():
    code = "import sys, runpy; sys.version_info = (3, 9, 1); runpy.run_path('run.py', run_name='__main__')"
    done = called("-c", f"import sys; sys.path.insert(0, '.'); {code}")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "needs Python 3.11 or newer" in done.stderr


def test_an_error_has_a_first_line_even_without_a_text():
    assert [first_line(error) for error in (ValueError(), OSError("\n a\nb"))] == ["ValueError()", "a"]
