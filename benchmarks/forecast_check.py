"""How close the forecast comes on this CPU: seconds and peak memory of real short trainings against the formula.

    python benchmarks/forecast_check.py --votes FILE --work FOLDER [--steps 8] [--write]

Random bases of three sizes, with a tokenizer of the votes, are trained for a few steps through LLaMA-Factory as run.py
does it. Forecast and measurement see the same rows, recipe and number of steps. Peak memory is the largest resident set
of the training process; seconds count from the command's start to its end.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import NamedTuple

from figures import options, publish, table
from workbench import Workbench, battles_of, child_peak, texts_of, write_votes

from common.battle import Battle
from common.experiment import load_experiment
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


def prepare(bench: Workbench, case: Case, battles: list[Battle], steps: int) -> str:
    """Build the base and export the votes for a case; return the experiment's name."""
    name = f"{case.size}-{case.stage.replace('_', '-')}-{case.bits}-{case.checkpointing}".lower()
    recipe = {"per_device_train_batch_size": case.batch, "disable_gradient_checkpointing": not case.checkpointing}
    recipe |= {"max_steps": steps, "save_strategy": "no", "report_to": "none", "plot_loss": False, "logging_steps": 1}
    keys = {"model": bench.base(case.size, texts_of(battles), **SIZES[case.size]), "cutoff_len": case.cutoff}
    bench.variant(name, "demo", **keys, quantization_bit=case.bits, recipes={case.stage: recipe})
    bench.prepare(name, "--train", "votes.csv", "--pairs")
    return name


def main() -> None:
    parser = options(__doc__, votes=True, work=True)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--cases", type=int, default=len(CASES), help="only the first ones, to try the script")
    asked = parser.parse_args()
    bench, battles, lines = Workbench(asked.work), battles_of(*asked.votes), []
    os.chdir(bench.folder)
    write_votes(Path("votes.csv"), battles)
    for case in CASES[: asked.cases]:
        name = prepare(bench, case, battles, asked.steps)
        device = forecast(load_experiment(name), [case.stage], ["cpu"])["stages"][case.stage]["devices"]["cpu"]
        formula = device["training_hours"] * 3600, device["memory"]
        shutil.rmtree(load_experiment(name).adapter_folder(case.stage), ignore_errors=True)
        call = llamafactory("train", f"factory_configs/{name}/{case.stage}.yaml")
        real = child_peak(call, bench.folder, bench.folder / f"{name}.log")
        off = [f"{a / b - 1:+.0%}" for a, b in zip(formula, real, strict=True)]
        seconds, gib = zip(formula, real, strict=True)
        lines.append([str(case), *(f"{s:.0f} s" for s in seconds), off[0], *(f"{g:.2f} GiB" for g in gib), off[1]])
        print(" | ".join(lines[-1]), flush=True)
    headings = ["training", "forecast", "measured", "off by", "peak forecast", "peak measured", "off by"]
    publish("forecast check", table(headings, lines), asked.write)


if __name__ == "__main__":
    main()
