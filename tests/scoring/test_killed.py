"""A scoring process that is killed (SIGKILL) again and again ends in the same bytes as one that nobody disturbed."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from tests.scoring.places import judged_place, write_battles

ROOT = Path(__file__).resolve().parents[2]
# Imports once; each attempt is a process of its own (a fork before any thread of torch's exists), which is killed when
# some shards more are there, a random moment later.
DRIVER = """
import os, pickle, random, signal, sys, time
from pathlib import Path
import pandas, pyarrow.parquet, torch, transformers.models.llama.modeling_llama
from common.progress import Show
from factory.stage_context import StageContext
from scoring import score_input as module
from scoring import score_store as shard_plan
shard_plan.SHARD_TOKENS = 2000
experiment = pickle.loads(Path("experiment.pickle").read_bytes())

def attempt(output):
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)
            context, show = StageContext(experiment, "sft"), Show(interval=0.0)
            module.score_input(context, Path("battles.csv"), Path(output), show=show)
            os._exit(0)
        finally:
            os._exit(1)
    return child

assert os.waitpid(attempt("whole.csv"), 0)[1] == 0
draw, killed = random.Random(5), 0
there = lambda: len(list(Path("outputs").rglob("input-killed*/*.scores")))
for _ in range(4):
    child, goal = attempt("killed.csv"), there() + draw.randint(0, 8)
    while there() < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.002)
    time.sleep(draw.random() * 0.05)
    os.kill(child, signal.SIGKILL)
    killed += os.waitpid(child, 0)[1] == signal.SIGKILL
    print("KILLED AT", there())
assert not Path("killed.csv").exists()
assert os.waitpid(attempt("killed.csv"), 0)[1] == 0
print("KILLED", killed)
"""


@pytest.mark.slow
def test_killed_again_and_again_the_bytes_are_the_same(
    workplace, make_experiment, tiny_model, small_tokenizer, small_frame, judge_prompt
):
    experiment = make_experiment(cutoff_len=400, swap_tta=True)
    judged_place(experiment, tiny_model(), small_tokenizer, small_frame, judge_prompt, swap_tta=True)
    write_battles(Path("battles.csv"), 250)
    Path("experiment.pickle").write_bytes(pickle.dumps(experiment))
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "KILLED 4" in done.stdout
    moments = [int(line.split()[-1]) for line in done.stdout.splitlines() if line.startswith("KILLED AT")]
    assert moments == sorted(moments) and moments[-1] > 0, "each attempt went on from the one before"
    assert Path("killed.csv").read_bytes() == Path("whole.csv").read_bytes()
    lines = Path("whole.csv").read_text().splitlines()
    assert [line.split(",")[0] for line in lines[1:]] == [f"b{n}" for n in range(250)]
    assert len(set(lines)) == 251, "not constant"
    assert "rows were scored by an earlier call, and kept" in done.stderr
    assert not list(Path("outputs").rglob("*.scores")), "nothing is left behind"
    assert json.loads(Path("outputs/exam/sft/report.json").read_text())["scoring"]["engine"] == "torch"
