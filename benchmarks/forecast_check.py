"""How close the forecast comes: to real short trainings on this CPU, and to figures that others published of GPUs.

    python benchmarks/forecast_check.py --votes FILE --work FOLDER [--steps 8] [--write]
    python benchmarks/forecast_check.py [--write]      # what others published: arithmetic, a second

Random bases of three sizes, with a tokenizer of the votes, are trained for a few steps through LLaMA-Factory as run.py
does it. Forecast and measurement see the same rows, recipe and number of steps. Peak memory is the largest resident set
of the training process; seconds count from the command's start to its end.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from figures import options, publish, put, row, table
from workbench import Workbench, battles_of, texts_of, write_votes

from factory.devices import CARDS, GIB
from factory.forecast import training_work
from factory.memory import SLACK, training_memory
from factory.workload import ModelSize, TokenLengths, TrainConfig, size_of

SIZES = {
    "tiny": {"vocabulary": 2048, "hidden": 64, "layers": 2, "heads": 8, "feed_forward": 128},
    "small": {"vocabulary": 8000, "hidden": 256, "layers": 4, "heads": 8, "feed_forward": 768},
    "medium": {"vocabulary": 20000, "hidden": 512, "layers": 8, "heads": 8, "feed_forward": 1536},
}
RECIPE = {"save_strategy": "no", "report_to": "none", "plot_loss": False, "logging_steps": 1}
# Shape, stage, batch, checkpointing, bits, tokens of a row.
CASES = (
    ("tiny", "sft", 16, False, 4, 256),
    ("tiny", "dpo_reward", 16, False, 4, 256),
    ("small", "sft", 8, False, 4, 512),
    ("small", "sft", 8, True, None, 512),
    ("small", "rm", 4, False, 4, 512),
    ("medium", "sft", 4, True, 4, 512),
    ("medium", "dpo_reward", 2, True, None, 512),
)


class Published(NamedTuple):
    """A training that somebody measured on an A100 at batch 1: GB of its card, and tokens a second where they say."""

    name: str
    size: ModelSize
    bits: int | None
    rank: int
    tokens: int
    gigabytes: float
    speed: float | None = None
    casts: bool = False  # by peft's prepare_model_for_kbit_training, which LLaMA-Factory does not call

    def forecast(self) -> tuple[float, float]:
        """Return GiB and tokens a second by the formula, for the code that was measured."""
        recipe = {"stage": "sft", "per_device_train_batch_size": 1, "bf16": True, "num_train_epochs": 1.0}
        config = TrainConfig.of({**recipe, "quantization_bit": self.bits, "lora_rank": self.rank})
        parts, rows = training_memory(self.size, config, self.tokens), np.full((1000, 1), self.tokens)
        if self.casts:
            # Embedding, head and so the residual stream have 32 bits; the loss of transformers 4.4x copied the
            # shifted logits: 16 bytes an entry of the vocabulary instead of 12 (allocations counted on a CPU).
            parts["weights"] += 2 * (self.size.embedding + self.size.head) * SLACK["cuda"] / GIB
            parts["activations"], parts["logits"] = 2 * parts["activations"], parts["logits"] * 16 / 12
        work = training_work(self.size, config, TokenLengths(rows, rows[:0], rows.ravel()))
        return sum(parts.values()), rows.sum() / (work.operations / CARDS["A100-80GB"].training_rate)


# github.com/QwenLM/Qwen, README.md, "Profiling of Memory and Speed": s/it of 8 x 2,048 tokens; FlashAttention 2.
_QWEN_7B = ModelSize(4096, 32, 32, 32, 128, 11008, 151936, tied=False)
_QWEN_14B = ModelSize(5120, 40, 40, 40, 128, 13696, 152064, tied=False)
# github.com/unslothai/unsloth, README.md, "Context length benchmarks": the longest row that "Hugging Face + FA2" fits.
_LLAMA = size_of("meta-llama/Llama-3.1-8B-Instruct")
PUBLISHED = (
    Published("Qwen-7B, QLoRA", _QWEN_7B, 4, 64, 2048, 13.9, 8 * 2048 / 7.0),
    Published("Qwen-7B, LoRA", _QWEN_7B, None, 64, 2048, 23.8, 8 * 2048 / 5.2),
    Published("Qwen-14B, QLoRA", _QWEN_14B, 4, 64, 2048, 19.9, 8 * 2048 / 11.8),
    Published("Llama-3.1-8B, QLoRA", _LLAMA, 4, 32, 932, 12, casts=True),
    Published("Llama-3.1-8B, QLoRA", _LLAMA, 4, 32, 5789, 24, casts=True),
    Published("Llama-3.1-8B, QLoRA", _LLAMA, 4, 32, 28454, 80, casts=True),
)


def publish_others(write: bool) -> None:
    """Publish what others measured beside the formula."""
    rows = []
    for each in PUBLISHED:
        gib, speed = each.forecast()
        there = [f"{gib:.1f}", f"{each.gigabytes:g}", f"{gib / each.gigabytes - 1:+.0%}"]
        if each.speed:
            there += [f"{speed:,.0f}", f"{each.speed:,.0f}", f"{each.speed / speed - 1:+.0%}"]
        rows.append([each.name, f"{each.tokens:,}", *there, *[""] * (6 - len(there))])
    headings = ["training", "tokens a row", "GiB, forecast", "published", "off by"]
    text = table([*headings, "tokens/s, forecast", "published", "time off by"], rows)
    print(text)
    if write:
        put("published figures", f"{text}\n\nCommand: `python benchmarks/forecast_check.py`")


def publish_trainings(asked: Namespace) -> None:
    """Train every case and publish the table."""
    bench, battles, lines = Workbench(asked.work), battles_of(*asked.votes), []
    os.chdir(bench.folder)
    write_votes(Path("votes.csv"), battles)
    for shape, stage, batch, checkpointing, bits, cutoff in CASES:
        name = f"{shape}-{stage.replace('_', '-')}-{bits}-{checkpointing}".lower()
        recipe = {"per_device_train_batch_size": batch, "disable_gradient_checkpointing": not checkpointing}
        keys = {"model": bench.base(shape, texts_of(battles), **SIZES[shape]), "cutoff_len": cutoff}
        keys |= {"quantization_bit": bits, "recipes": {stage: recipe | RECIPE | {"max_steps": asked.steps}}}
        bench.variant(name, "--train", "votes.csv", "--pairs", **keys)
        device, *real = bench.trained(name, stage, "cpu")
        seconds, gib = zip((3600 * device["training_hours"], device["memory"]), real, strict=True)
        off = [f"{a / b - 1:+.0%}" for a, b in (seconds, gib)]
        case = f"{shape}, {stage}, batch {batch}, {bits or 'none'} bits{', checkpointing' if checkpointing else ''}"
        lines.append(row(case, *(f"{s:.0f} s" for s in seconds), off[0], *(f"{g:.2f} GiB" for g in gib), off[1]))
    headings = ["training", "forecast", "measured", "off by", "peak forecast", "peak measured", "off by"]
    publish("forecast check", table(headings, lines), asked.write)


if __name__ == "__main__":
    arguments = options(__doc__, "votes", "work", required=False, steps=8).parse_args()
    publish_trainings(arguments) if arguments.votes and arguments.work else publish_others(arguments.write)
