"""Whether two processes train the same judge as one: the loss at every step at the same global batch.

    python benchmarks/distributed_loss.py --work FOLDER [--steps 20]

The demo arena and tiny base (nf4 QLoRA, fp32, on the CPU), SFT for some steps without dropout: one process with a
batch of 16, two processes of torchrun (gloo) with 8 each, two local Ray workers with 8 each where ray is installed.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

from figures import options, publish, row, table
from safetensors.numpy import load_file
from workbench import Workbench

from data_prep.synthetic import write_arena
from factory.trainer_log import loss_curve

WAYS = {"one process": ("auto", 16), "torchrun, 2 processes": ("ddp", 8), "Ray, 2 workers": ("ray", 8)}
RECIPE = {"logging_steps": 1, "save_strategy": "no", "save_total_limit": None, "lora_dropout": 0.0}


def main() -> None:
    asked = options(__doc__, "work", steps=20).parse_args()
    os.environ["NPROC_PER_NODE"] = "2"
    bench, rows, first = Workbench(asked.work), [], None
    write_arena(bench.folder / "arena", seed=1, train_rows=600, test_rows=10)
    for number, (way, (engine, batch)) in enumerate(WAYS.items()):
        if engine == "ray" and find_spec("ray") is None:
            continue
        name = f"way{number}"
        recipe = {**RECIPE, "max_steps": asked.steps, "per_device_train_batch_size": batch}
        bench.variant(name, "--train", "arena/train.csv", distributed=engine, recipes={"sft": recipe})
        seconds = bench.run("sft", "-e", name, "--until", "train")
        adapter = bench.folder / "saves" / "arena-tiny" / "lora" / f"{name}_sft"
        losses = [point["loss"] for point in loss_curve(adapter / "trainer_log.jsonl") if point["loss"] is not None]
        weights = load_file(adapter / "adapter_model.safetensors")
        first = first or (losses, weights)
        apart = max(abs(x - y) for x, y in zip(losses, first[0], strict=True))
        moved = max(float(abs(weights[key] - first[1][key]).max()) for key in weights)
        ends = f"{losses[0]:.5f}", f"{losses[-1]:.5f}"
        rows.append(row(way, f"{batch} x {16 // batch}", *ends, f"{apart:.1e}", f"{moved:.1e}", f"{seconds:.0f} s"))
    headings = ["way", "batch", "first loss", f"loss at step {asked.steps}"]
    headings += ["largest difference of a step's loss", "largest difference of a weight", "whole run"]
    publish("", table(headings, rows))


if __name__ == "__main__":
    main()
