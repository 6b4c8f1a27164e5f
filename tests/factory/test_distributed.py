"""Two processes for real, as far as a CPU goes: torchrun with gloo, and Ray workers."""

import io
import re
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from common.errors import ArenaError
from common.progress import Show
from factory import train as steps
from factory.stage_context import StageContext
from factory.trainer_log import loss_curve

FORTY = {"max_steps": 40, "eval_strategy": "no"}


@pytest.fixture(autouse=True)
def two_processes(monkeypatch):
    monkeypatch.setenv("NPROC_PER_NODE", "2")


def train(experiment, **options) -> tuple[Path, str]:
    stream = io.StringIO()
    adapter = steps.train(StageContext(experiment, "sft"), show=Show(stream), **options)
    return adapter, stream.getvalue()


def kill_rank_one_after(checkpoint: Path, killed: list[int]) -> None:
    """Send signal 9 to the second worker as soon as a checkpoint is whole."""
    until = time.monotonic() + 240
    while time.monotonic() < until and not (checkpoint / "trainer_state.json").is_file():
        time.sleep(0.01)
    for process in psutil.Process().children(recursive=True):
        try:
            if process.environ().get("LOCAL_RANK") == "1" and "launcher.py" in " ".join(process.cmdline()):
                process.send_signal(signal.SIGKILL)
                killed.append(process.pid)
        except psutil.Error:
            continue


@pytest.mark.slow
def test_a_killed_worker_is_told_and_the_run_resumes_to_its_end(trainable):
    experiment, killed = trainable(FORTY, distributed="ddp"), []
    adapter = experiment.adapter_folder("sft")
    killer = threading.Thread(target=kill_rank_one_after, args=(adapter / "checkpoint-2", killed))
    killer.start()
    with pytest.raises(ArenaError) as caught:
        train(experiment)
    killer.join()
    assert len(killed) == 1
    assert "training sft ended with exit code 1" in caught.value.what
    assert f"Signal 9 (SIGKILL) received by PID {killed[0]}" in caught.value.what
    assert "--resume" in caught.value.remedy
    with pytest.raises(ArenaError, match="an unfinished run"):
        train(experiment)
    _, shown = train(experiment, resume=True)
    assert re.search(r"going on from .*/checkpoint-\d+", shown)
    log = Path("outputs/demo/sft/train.log").read_text()
    assert "Num examples = 16" in log, "all parts were read"
    assert log.count("Total train batch size (w. parallel, distributed & accumulation) = 4") == 2, "2 rows, 2 processes"
    curve = loss_curve(adapter / "trainer_log.jsonl")
    assert [row["step"] for row in curve] == list(range(1, 41)), "one process writes the log"
    assert curve[-1]["loss"] < curve[0]["loss"]
    assert (adapter / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed: make extra-ray")
def test_ray_workers_train_together(trainable):
    experiment = trainable(distributed="ray")
    adapter, _ = train(experiment)
    log = Path("outputs/demo/sft/train.log").read_text()
    assert "Using ray.remote mode with 2 workers" in log
    assert "Total train batch size (w. parallel, distributed & accumulation) = 4" in log
    assert [row["step"] for row in loss_curve(adapter / "trainer_log.jsonl")] == [1, 2, 3, 4]
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()], "nothing is left behind"
