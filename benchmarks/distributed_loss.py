"""Whether two processes train the same judge as one: the loss at every step at the same global batch.

    python benchmarks/distributed_loss.py --work FOLDER [--steps 20]

The demo arena and tiny base (nf4 QLoRA, fp32, on the CPU), SFT for some steps without dropout: one process with a
batch of 16, two processes of torchrun (gloo) with 8 each, two local Ray workers with 8 each where ray is installed.
"""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from figures import measured_on, table
from workbench import Workbench

from data_prep.synthetic import write_arena
from factory.trainer_log import loss_curve

WAYS = {"one process": ("auto", 16), "torchrun, 2 processes": ("ddp", 8), "Ray, 2 workers": ("ray", 8)}


def losses(bench: Workbench, name: str, engine: str, batch: int, steps: int) -> tuple[list[float], float]:
    """Train one way; return the loss of every step and the seconds."""
    recipe = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "logging_steps": 1,
        "save_strategy": "no",
        "save_total_limit": None,
        "num_train_epochs": 3.0,
        "lora_dropout": 0.0,
    }
    bench.variant(name, "demo", distributed=engine, recipes={"sft": recipe})
    bench.prepare(name, "--train", "arena/train.csv")
    seconds = bench.run("sft", "-e", name, "--until", "train")
    curve = loss_curve(bench.folder / "saves" / "arena-tiny" / "lora" / f"{name}_sft" / "trainer_log.jsonl")
    return [row["loss"] for row in curve if row["loss"] is not None], seconds


def weights(bench: Workbench, name: str) -> dict:
    from safetensors.numpy import load_file

    return load_file(bench.folder / "saves" / "arena-tiny" / "lora" / f"{name}_sft" / "adapter_model.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    os.environ["NPROC_PER_NODE"] = "2"
    bench = Workbench(arguments.work.resolve())
    if not (bench.folder / "arena").exists():
        write_arena(bench.folder / "arena", seed=1, train_rows=600, test_rows=10)
    rows, first = [], None
    for number, (way, (engine, batch)) in enumerate(WAYS.items()):
        if engine == "ray" and find_spec("ray") is None:
            continue
        found, seconds = losses(bench, f"way{number}", engine, batch, arguments.steps)
        own = weights(bench, f"way{number}")
        first = first or (found, own)
        apart = max(abs(x - y) for x, y in zip(found, first[0], strict=True))
        moved = max(float(abs(own[key] - first[1][key]).max()) for key in own)
        end = [f"{found[-1]:.5f}", f"{apart:.1e}", f"{moved:.1e}", f"{seconds:.0f} s"]
        rows.append([way, f"{batch} x {16 // batch}", f"{found[0]:.5f}", *end])
        print(" | ".join(rows[-1]), flush=True)
    headings = [
        *("way", "batch", "first loss", f"loss at step {arguments.steps}"),
        *("largest difference of a step's loss", "largest difference of a weight", "whole run"),
    ]
    print(f"{table(headings, rows)}\n\n{measured_on('python benchmarks/distributed_loss.py --work FOLDER')}")


if __name__ == "__main__":
    main()
