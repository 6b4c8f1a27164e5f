"""How close the forecast comes on this CPU: seconds and peak memory of real short trainings against the formula.

    python benchmarks/forecast_check.py --votes FILE --work FOLDER [--steps 8] [--docs]

Random bases of three sizes, with a tokenizer of the votes, are trained for a few steps through LLaMA-Factory as run.py
does it. Forecast and measurement see the same rows, recipe and number of steps. Peak memory is the largest resident set
of the training process; seconds count from the command's start to its end.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

from figures import ROOT, measured_on, put, table
from workbench import Workbench

from common.experiment import load_experiment
from data_prep.readers import VoteReader
from factory.base_model import BaseModelSize, build_base_model
from factory.forecast import forecast
from factory.process import llamafactory


class Case(NamedTuple):
    """One training: the base's size and what its recipe says."""

    size: str
    stage: str
    batch: int
    checkpointing: bool
    bits: int | None
    cutoff: int

    def __str__(self) -> str:
        bits = f"{self.bits or 'none'} bits{', checkpointing' if self.checkpointing else ''}"
        return f"{self.size}, {self.stage}, batch {self.batch}, {bits}"


SIZES = {
    "tiny": BaseModelSize(vocabulary=2048, hidden=64, layers=2, heads=8, feed_forward=128),
    "small": BaseModelSize(vocabulary=8000, hidden=256, layers=4, heads=8, feed_forward=768),
    "medium": BaseModelSize(vocabulary=20000, hidden=512, layers=8, heads=8, feed_forward=1536),
}
CASES = (
    Case("tiny", "sft", 16, False, 4, 256),
    Case("tiny", "dpo_reward", 16, False, 4, 256),
    Case("small", "sft", 8, False, 4, 512),
    Case("small", "sft", 8, True, None, 512),
    Case("small", "rm", 4, False, 4, 512),
    Case("medium", "sft", 4, True, 4, 512),
    Case("medium", "dpo_reward", 2, True, None, 512),
)


def prepare(bench: Workbench, case: Case, votes: Path, steps: int = 8) -> str:
    """Build the base and export the votes for a case; return the experiment's name."""
    folder = bench.folder / "models" / case.size
    if not folder.exists():
        battles = [battle for _, battle in VoteReader(votes, labelled=True)]
        texts = (text for b in battles for text in (*b.prompts, *b.responses_a, *b.responses_b))
        build_base_model(folder, texts, seed=1, size=SIZES[case.size])
    name = f"{case.size}-{case.stage.replace('_', '-')}-{case.bits}-{case.checkpointing}".lower()
    recipe = {"per_device_train_batch_size": case.batch, "disable_gradient_checkpointing": not case.checkpointing}
    recipe |= {"max_steps": steps, "save_strategy": "no", "report_to": "none", "plot_loss": False, "logging_steps": 1}
    keys = {"model": f"models/{case.size}", "cutoff_len": case.cutoff, "quantization_bit": case.bits}
    bench.variant(name, "demo", **keys, recipes={case.stage: recipe})
    bench.prepare(name, "--train", str(votes), "--pairs")
    return name


def measure(folder: Path, name: str, stage: str) -> tuple[float, float]:
    """Train once; return (seconds, peak GiB) of the process."""
    shutil.rmtree(folder / "saves" / name.split("-")[0] / "lora" / f"{name}_{stage}", ignore_errors=True)
    log, started = folder / "training.log", time.monotonic()
    with log.open("w") as output:
        call = llamafactory("train", f"factory_configs/{name}/{stage}.yaml")
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(call, cwd=folder, env=environment, stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{name}: the training failed, see {log}")
    return time.monotonic() - started, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    bench, votes, lines = Workbench(arguments.work.resolve()), arguments.votes.resolve(), []
    for case in CASES:
        name = prepare(bench, case, votes, arguments.steps)
        os.chdir(bench.folder)
        device = forecast(load_experiment(name), [case.stage], ["cpu"])["stages"][case.stage]["devices"]["cpu"]
        formula = device["training_hours"] * 3600, device["memory"]
        real = measure(bench.folder, name, case.stage)
        off = [f"{a / b - 1:+.0%}" for a, b in zip(formula, real, strict=True)]
        seconds, gib = zip(formula, real, strict=True)
        lines.append([str(case), *(f"{s:.0f} s" for s in seconds), off[0], *(f"{g:.2f} GiB" for g in gib), off[1]])
        print(" | ".join(lines[-1]), flush=True)
    headings = ["training", "forecast", "measured", "off by", "peak forecast", "peak measured", "off by"]
    command = f"python benchmarks/forecast_check.py --votes {votes.name} --work FOLDER --steps {arguments.steps}"
    text = f"{table(headings, lines)}\n\n{measured_on(command)}"
    print(text)
    if arguments.docs:
        put(ROOT / "docs" / "forecast.md", "forecast check", text)


if __name__ == "__main__":
    main()
