"""A real run, looked at for what it must never hold, checked again, and repeated byte for byte."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from chain import SECRETS, run_py

pytestmark = pytest.mark.slow


def test_no_secret_is_in_anything_that_a_run_wrote_or_prints(chain):
    done = run_py(chain, "verify", "outputs/demo/sft", "-v")
    told = [done.stdout, done.stderr]
    files = [path for path in chain.rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"report.json", "report.html", "train.log", "merge.log", "state.json"}
    for value in SECRETS.values():
        assert not [path for path in files if value.encode() in path.read_bytes()]
        assert not any(value in text for text in told)


def test_a_real_run_is_verified(chain):
    done = run_py(chain, "verify", "outputs/demo/sft", "--json")
    result = json.loads(done.stdout)
    assert done.returncode == 0 and result["sound"], result
    checked = {finding["what"].split(": ")[0] for finding in result["findings"] if finding["state"] == "ok"}
    assert checked >= {"made from", "train", "merge", "score", "rows"}


def test_the_same_seed_trains_the_same_bytes(chain, tmp_path):
    folder = tmp_path / "again"
    shutil.copytree(chain, folder, symlinks=True, ignore=shutil.ignore_patterns("outputs", "saves", "cache"))
    done = run_py(folder, "sft", "-e", "demo", "--until", "train")
    assert done.returncode == 0, done.stderr
    (ours,) = folder.glob("saves/*/lora/demo_sft/adapter_model.safetensors")
    theirs = chain / ours.relative_to(folder)
    assert ours.read_bytes() == Path(theirs).read_bytes()
