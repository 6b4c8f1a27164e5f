"""How near the forecast comes on this CPU: seconds and peak memory of real short trainings against the formula.

    python benchmarks/forecast_check.py --votes FILE --work FOLDER [--steps 8] [--docs]

Random bases of three shapes, with a tokenizer of the votes, are trained for a few steps through LLaMA-Factory as
run.py does it. Forecast and measurement see the same rows, recipe and number of steps. Peak memory is the largest
resident set of the training process; seconds are those from the command's start to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from figures import ROOT, measured_on, put, table
from workbench import Workbench

from data_prep.readers import VoteReader


@dataclass(frozen=True)
class Case:
    """One training: the base's shape and what its recipe says."""

    size: str
    stage: str
    batch: int
    checkpointing: bool
    bits: int | None
    cutoff: int


SIZES = {
    "tiny": {"vocabulary": 2048, "hidden": 64, "layers": 2, "heads": 8, "feed_forward": 128},
    "small": {"vocabulary": 8000, "hidden": 256, "layers": 4, "heads": 8, "feed_forward": 768},
    "medium": {"vocabulary": 20000, "hidden": 512, "layers": 8, "heads": 8, "feed_forward": 1536},
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


def prepare(bench: Workbench, case: Case, votes: Path) -> str:
    """Build the base and export the votes for a case; return the experiment's name."""
    from factory.base_model import BaseModelSize, build_base_model

    folder = bench.folder / "models" / case.size
    if not folder.exists():
        battles = [battle for _, battle in VoteReader(votes, labelled=True)]
        texts = (text for b in battles for text in (*b.prompts, *b.responses_a, *b.responses_b))
        build_base_model(folder, texts, seed=1, size=BaseModelSize(**SIZES[case.size]))
    name = f"{case.size}-{case.stage.replace('_', '-')}-{case.bits}-{case.checkpointing}".lower()
    recipe = {
        "per_device_train_batch_size": case.batch,
        "disable_gradient_checkpointing": not case.checkpointing,
        "max_steps": STEPS,
        "save_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "logging_steps": 1,
    }
    keys = {"model": f"models/{case.size}", "cutoff_len": case.cutoff, "quantization_bit": case.bits}
    bench.variant(name, "demo", **keys, recipes={case.stage: recipe})
    bench.prepare(name, "--train", str(votes), "--pairs")
    return name


def measure(bench: Workbench, name: str, stage: str) -> tuple[float, float]:
    """Train once; return (seconds, peak GiB) of the process."""
    adapter = bench.folder / "saves" / name.split("-")[0] / "lora" / f"{name}_{stage}"
    shutil.rmtree(adapter, ignore_errors=True)
    call = [sys.executable, "-m", "factory.launcher", "train", f"factory_configs/{name}/{stage}.yaml"]
    code = (
        "import resource, subprocess, sys\n"
        "done = subprocess.run(sys.argv[1:], capture_output=True, text=True)\n"
        "sys.stderr.write(done.stderr[-2000:] if done.returncode else '')\n"
        "print(done.returncode, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    started = time.monotonic()
    shown = subprocess.run(
        [sys.executable, "-c", code, *call], cwd=bench.folder, env=environment, stdout=subprocess.PIPE, text=True
    ).stdout.split()
    seconds = time.monotonic() - started
    if shown[0] != "0":
        raise SystemExit(f"{name}: the training failed")
    return seconds, int(shown[1]) / 2**20


def predicted(bench: Workbench, name: str, stage: str) -> tuple[float, float]:
    """Return (seconds, peak GiB) by the formula."""
    here = Path.cwd()
    os.chdir(bench.folder)
    try:
        from common.experiment import load_experiment
        from factory.forecast import forecast

        device = forecast(load_experiment(name), [stage], ["cpu"])["stages"][stage]["devices"]["cpu"]
    finally:
        os.chdir(here)
    return device["training_hours"] * 3600, device["memory"]


def main() -> None:
    global STEPS
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", nargs="+", type=int, default=list(range(len(CASES))))
    parser.add_argument("--prepare-only", action="store_true")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    STEPS = arguments.steps
    bench = Workbench(arguments.work.resolve())
    lines = []
    for number in arguments.cases:
        case = CASES[number]
        name = prepare(bench, case, arguments.votes.resolve())
        if arguments.prepare_only:
            continue
        (time_by, memory_by), (time_real, memory_real) = (
            predicted(bench, name, case.stage),
            measure(bench, name, case.stage),
        )
        bits = str(case.bits or "none")
        what = f"{case.size}, {case.stage}, batch {case.batch}, {bits} bits"
        what += ", checkpointing" if case.checkpointing else ""
        lines.append(
            [
                what,
                f"{time_by:.0f} s",
                f"{time_real:.0f} s",
                f"{time_by / time_real - 1:+.0%}",
                f"{memory_by:.2f} GiB",
                f"{memory_real:.2f} GiB",
                f"{memory_by / memory_real - 1:+.0%}",
            ]
        )
        print(" | ".join(lines[-1]), json.dumps(case.__dict__), flush=True)
    headings = ["training", "forecast", "measured", "off by", "peak forecast", "peak measured", "off by"]
    how = measured_on(
        f"python benchmarks/forecast_check.py --votes {arguments.votes.name} --work FOLDER --steps {arguments.steps}"
    )
    text = f"{table(headings, lines)}\n\n{how}"
    print(text)
    if arguments.docs:
        put(ROOT / "docs" / "forecast.md", "forecast check", text)


STEPS = 8

if __name__ == "__main__":
    main()
