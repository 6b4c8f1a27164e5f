"""How fast training is on this device: our recipes against LLaMA-Factory's own example recipe, in the same run.

    python benchmarks/training_speed.py --votes FILE --work FOLDER [--shape 8b] [--steps 30] [--write]

The base has random weights of the true shape (speed and memory do not depend on their values) and a tokenizer of the
votes, so no download is needed. Both recipes train on the same exported rows, with the same rows in a step, adapter and
seed; what differs is what ours may choose: batches of like lengths, the batch that fits, liger. Tokens are those of the
texts, without padding. Peak memory is what the trainer's own tracker saw on the GPU. `8b` needs a GPU of 40 GB or more;
`--shape tiny` tries the script out.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
from pathlib import Path
from typing import Any

from figures import options, publish, table
from workbench import Workbench, battles_of, child_peak, matrix_rate, texts_of, write_votes

from common.experiment import load_experiment
from factory.model_size import size_of
from factory.process import llamafactory

# Qwen3-8B's shape but for the vocabulary, which is that of the tokenizer made here.
SHAPES = {
    "8b": {"hidden": 4096, "layers": 36, "heads": 32, "feed_forward": 12288, "vocabulary": 128_000},
    "tiny": {"hidden": 64, "layers": 2, "heads": 8, "feed_forward": 128, "vocabulary": 2048},
}
# LLaMA-Factory's examples/train_qlora recipe for bitsandbytes: what differs from ours in speed.
EXAMPLE = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "train_sampling_strategy": "random",
    "enable_liger_kernel": False,
}
OURS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "group_by_length",
    "enable_liger_kernel": True,
}
# Two sequences a row, and logits that liger does not take away.
PAIRS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "enable_liger_kernel": False}
# What both recipes share for the measurement.
COMMON = {
    "disable_gradient_checkpointing": False,
    "lora_rank": 64,
    "lora_alpha": 16,
    "learning_rate": 1.0e-4,
    "additional_target": None,
    "logging_steps": 1,
    "save_strategy": "no",
    "eval_strategy": "no",
    "report_to": "none",
    "plot_loss": False,
    "include_num_input_tokens_seen": "non_padding",
    "skip_memory_metrics": False,
}


def train(bench: Workbench, name: str, stage: str) -> dict[str, Any]:
    """Train by the recipe; return tokens a second, peak GiB, first and last loss."""
    adapter = load_experiment(name).adapter_folder(stage)
    shutil.rmtree(adapter, ignore_errors=True)
    call = llamafactory("train", f"factory_configs/{name}/{stage}.yaml")
    child_peak(call, bench.folder, bench.folder / f"{name}_{stage}.log")
    history = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    results = json.loads((adapter / "all_results.json").read_text())
    losses = [entry["loss"] for entry in history if "loss" in entry]
    tokens = max((entry.get("num_input_tokens_seen", 0) for entry in history), default=0)
    ends = ("gpu_peaked_delta", "gpu_alloc_delta", "before_init_mem_gpu")
    return {
        "speed": tokens / results["train_runtime"],
        "peak": sum(value for key, value in results.items() if key.endswith(ends)) / 2**30,
        "loss": f"{statistics.mean(losses[:3]):.3f} → {statistics.mean(losses[-5:]):.3f}",
    }


def main() -> None:
    parser = options(__doc__, votes=True, work=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo_reward", "rm"])
    asked = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    bench, battles, rate, rows = Workbench(asked.work), battles_of(*asked.votes), matrix_rate(gpu), []
    os.chdir(bench.folder)
    write_votes(Path("votes.csv"), battles)
    model = bench.base(asked.shape, texts_of(battles), **SHAPES[asked.shape])
    size = size_of(model)
    keys = {"model": model, "cutoff_len": 2048, "quantization_bit": 4, "swap_copies": False}
    for stage in asked.stages:
        ours = {**OURS, **({} if stage == "sft" else PAIRS), **({} if gpu else {"enable_liger_kernel": False})}
        for title, values in (("LLaMA-Factory's example", EXAMPLE), ("ours", ours)):
            name = f"{'example' if values is EXAMPLE else 'ours'}-{stage.replace('_', '-')}"
            recipe = {**COMMON, "max_steps": asked.steps, "bf16": gpu, **values}
            bench.variant(name, "demo", **keys, recipes={stage: recipe})
            bench.prepare(name, "--train", "votes.csv", *([] if stage == "sft" else ["--pairs"]))
            found = train(bench, name, stage)
            # Operations: 6 a weight and token, 8 with DPO's reference.
            share = found["speed"] * (8 if stage == "dpo_reward" else 6) * (size.linear + size.embedding) / rate
            peak = f"{found['peak']:.1f} GiB" if gpu else "-"
            rows.append([stage, title, f"{found['speed']:,.0f}", f"{share:.2f}", peak, found["loss"]])
            print(" | ".join(rows[-1]), flush=True)
    headings = ["stage", "recipe", "tokens/s", "share of the matrix rate", "peak memory", "loss"]
    publish("training figures", table(headings, rows), asked.write)


if __name__ == "__main__":
    main()
