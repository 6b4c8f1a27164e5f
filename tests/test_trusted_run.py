"""A real run, looked at for what it must never hold, checked again, and met by other votes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

from chain import ROOT, SECRETS, run_py

from data_prep.synthetic import write_arena

LAY_OUT = "import sys; sys.path.insert(0, sys.argv[1]); from factory.board import lay_out; lay_out()"


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
    assert checked >= {"made from", "train", "merge", "score"}


def test_other_votes_under_a_finished_judge_are_told_and_mixed_with_nothing(chain, tmp_path):
    folder = shutil.copytree(chain, tmp_path / "copy", symlinks=True)
    write_arena(folder / "others", seed=12, train_rows=700, test_rows=30)
    done = run_py(folder, "prepare", "-e", "demo", "--train", "others/train.csv", "--test", "others/test.csv")
    assert done.returncode == 0 and "is replaced; what was trained on it is outdated" in done.stderr
    for call in (["score", "--fresh"], ["compare"], ["dpo", "--view", "judge"]):
        refused = run_py(folder, call[0], "-e", "demo", *call[1:])
        assert refused.returncode == 1 and "sft was trained" in refused.stderr, refused.stderr
        assert "--fresh" in refused.stderr and "Traceback" not in refused.stderr
    told = run_py(folder, "status", "-e", "demo")
    assert "outdated" in told.stdout and "next: python run.py sft -e demo --fresh" in told.stdout
    seen = run_py(folder, "watch", "-e", "demo", "--stage", "sft", "--once")
    assert "outdated" in seen.stdout and "to beat" not in seen.stdout and "sft -e demo --fresh" in seen.stdout
    votes = ["--train", "arena/train.csv", "--test", "arena/test.csv", "--truth", "arena/truth.csv"]
    assert run_py(folder, "prepare", "-e", "demo", *votes).returncode == 0
    (adapter,) = folder.glob("saves/*/lora/demo_sft/adapter_model.safetensors")
    subprocess.run([sys.executable, "-c", LAY_OUT, str(ROOT)], cwd=folder, check=True)
    assert adapter.with_name("running_log.txt").is_file(), "LLaMA Board's files beside the adapter change nothing"
    kept = run_py(folder, "sft", "-e", "demo")
    assert kept.returncode == 0 and "scores kept" in kept.stderr, "the earlier votes again, and all is as it was"
