"""A few kills of benchmarks/kills.py: it finds nothing in a sound project, and would find what is not sound."""

import json
import random
import subprocess
import sys

import pytest
from chain import ROOT
from kills import difference


@pytest.mark.slow
def test_random_kills_lose_nothing(tmp_path):
    call = [sys.executable, str(ROOT / "benchmarks" / "kills.py"), "--kills", "24", "--minutes", "4"]
    call += ["--steps", "prepare", "merge", "--place", str(tmp_path / "place")]
    call += ["--results", str(tmp_path / "kills.json")]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "kills.json").read_text())
    assert found["tried"] == found["survived"] >= 5
    assert {each["step"] for each in found["rounds"]} == {"prepare", "merge"}
    assert not list((tmp_path / "place").glob("round_*")), "folders of good rounds are removed"


def test_what_differs_is_found(tmp_path):
    for name in ("mine", "theirs"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "p.csv").write_text("id\n1\n")
        (tmp_path / name / "r.json").write_text(json.dumps({"log_loss": 1.0, "run": [{"seconds": random.random()}]}))
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    assert difference(mine, theirs, ["*"]) is None
    (mine / "p.csv").write_text("id\n2\n")
    assert "p.csv" in difference(mine, theirs, ["*"])
    (mine / "p.csv").unlink()
    assert "p.csv" in difference(mine, theirs, ["*"])
    (theirs / "p.csv").unlink()
    (mine / "r.json").write_text(json.dumps({"log_loss": 1.1, "run": []}))
    assert "r.json" in difference(mine, theirs, ["*"])
    assert difference(mine, theirs, ["*.none"]), "nothing to compare is not equal"
