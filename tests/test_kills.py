"""A few kills of benchmarks/kills.py: it finds nothing on a sound project, and would find what is not sound."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def killing(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import killing

    return killing


@pytest.mark.slow
def test_random_kills_of_prepare_and_scoring_lose_nothing(chain, tmp_path):
    finished = tmp_path / "finished"
    shutil.copytree(chain, finished, symlinks=True, ignore=shutil.ignore_patterns("cache", "checkpoint-*"))
    call = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--finished", str(finished), "--kills", "14"]
    call += ["--steps", "prepare,score --input", "--place", str(tmp_path / "place")]
    call += ["--results", str(tmp_path / "kills.json"), "--minutes", "3"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["tried"] == found["survived"] >= 5
    assert set(found["by_step"]) == {"prepare", "score --input"}
    assert not list((tmp_path / "place").glob("round_*")), "folders of good rounds are removed"


def test_what_differs_is_found(killing, tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.csv").write_text("id\n1\n")
        (tmp_path / name / "r.json").write_text(json.dumps({"log_loss": 1.0, "seconds": random.random()}))
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    assert killing.difference(mine, theirs, ["*"]) is None
    (mine / "p.csv").write_text("id\n2\n")
    assert killing.difference(mine, theirs, ["*"]) == "differ from the undisturbed run: p.csv"
    (mine / "p.csv").unlink()
    assert killing.difference(mine, theirs, ["*"]) == "not in both: p.csv"
    (theirs / "p.csv").unlink()
    (mine / "r.json").write_text(json.dumps({"log_loss": 1.1, "seconds": 1}))
    assert killing.difference(mine, theirs, ["*"]) == "differ from the undisturbed run: r.json"
    assert "nothing to compare" in killing.difference(mine, theirs, ["*.none"])


def test_a_call_is_run_py_and_is_watched(killing, tmp_path):
    code = f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "benchmarks")!r}]
from pathlib import Path
from killing import Call
call = Call(Path({str(tmp_path)!r}), ("prepare", "-e", "none", "--train", "x"), Path({str(tmp_path / "log")!r}))
print(call.wait(), "no factory_configs/" in call.said())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "True"]
