"""Two processes for real, as far as a CPU goes: torchrun with gloo, and Ray workers; in a folder with a blank."""

from __future__ import annotations

import io
import json
import re
import signal
import threading
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest

from common.errors import ArenaError
from common.experiment import parse_experiment
from common.progress import Show
from factory import train as steps
from factory.base_model import BaseModelSize, build_base_model
from factory.recipes import TEMPLATES, write_recipe
from factory.stage_context import StageContext
from factory.trainer_log import loss_curve

RECIPE = {
    "max_steps": 40,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": None,
    "eval_strategy": "no",
    "logging_steps": 1,
    "lora_rank": 4,
    "additional_target": "embed_tokens,lm_head",
    "preprocessing_num_workers": 1,
    "dataloader_num_workers": 0,
    "learning_rate": 1.0e-2,
    "bf16": False,
    "plot_loss": False,
    "report_to": "none",
}


def turn(speaker: str, text: str) -> dict[str, str]:
    return {"from": speaker, "value": text}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """A function that makes an experiment which LLaMA-Factory trains in seconds: a tiny base, 16 battles, nf4."""
    place = tmp_path / "my own place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NPROC_PER_NODE", "2")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    Path("templates").symlink_to(TEMPLATES)
    rows = [{"conversations": [turn("human", f"Which is better, {i}?"), turn("gpt", "ABC"[i % 3])]} for i in range(20)]
    size = BaseModelSize(vocabulary=300, hidden=32, layers=2, heads=2, feed_forward=64, positions=256)
    build_base_model(Path("models/a tiny one"), [json.dumps(row) for row in rows], seed=1, size=size)
    data = Path("data/demo")
    (data / "sft_train").mkdir(parents=True)  # a folder of parts
    for name, kept in (
        ("sft_train/part-00000", rows[:9]),
        ("sft_train/part-00001", rows[9:16]),
        ("sft_valid", rows[16:]),
    ):
        (data / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in kept))
    shape = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    files = {"demo_sft_train": "sft_train", "demo_sft_valid": "sft_valid.jsonl"}
    info = {name: {"file_name": file, **shape} for name, file in files.items()}
    (data / "dataset_info.json").write_text(json.dumps(info))

    def experiment(engine: str, **recipe):
        values = {"model": "models/a tiny one", "template": "qwen3_nothink", "cutoff_len": 128, "distributed": engine}
        made = parse_experiment({**values, "recipes": {"sft": {**RECIPE, **recipe}}}, "demo", where="here")
        write_recipe(made, "sft", force=True)
        return made

    return experiment


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
def test_a_killed_worker_is_told_and_the_run_resumes_to_its_end(make):
    experiment, killed = make("ddp"), []
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
def test_ray_workers_train_together(make):
    experiment = make("ray", max_steps=4, save_steps=4)
    adapter, _ = train(experiment)
    log = Path("outputs/demo/sft/train.log").read_text()
    assert "Using ray.remote mode with 2 workers" in log
    assert "Total train batch size (w. parallel, distributed & accumulation) = 4" in log
    assert [row["step"] for row in loss_curve(adapter / "trainer_log.jsonl")] == [1, 2, 3, 4]
    assert (adapter / "adapter_model.safetensors").is_file()
    assert not [p for p in psutil.Process().children(recursive=True) if "ray" in p.name()], "nothing is left behind"
