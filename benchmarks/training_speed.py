"""How fast training is on this device: our recipes against LLaMA-Factory's own example recipe, in the same run.

    python benchmarks/training_speed.py --votes FILE --work FOLDER [--shape 8b] [--steps 30] [--docs]

The base has random weights of the true shape (speed and memory do not depend on their values) and a tokenizer of the
votes, so no download is needed. Both recipes train on the same exported rows, with the same rows in a step, adapter and
seed; what differs is what ours may choose: batches of like lengths, the batch that fits, liger, no needless
checkpointing. Tokens are those of the texts, without padding. On a GPU peak memory is what the trainer's own tracker
saw; on a CPU the process's resident set. Wants a GPU of 40 GB or more for `8b`; `--shape tiny` tries the script out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from figures import ROOT, measured_on, put, table
from workbench import Workbench

from data_prep.readers import VoteReader

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
    "disable_gradient_checkpointing": False,
}
OURS = {
    "per_device_train_batch_size": 8,
    "gradient_accumulation_steps": 2,
    "train_sampling_strategy": "group_by_length",
    "enable_liger_kernel": True,
    "disable_gradient_checkpointing": False,
}
# Two sequences a row, and logits that liger does not take away.
PAIRS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4, "enable_liger_kernel": False}


def common(steps: int, gpu: bool) -> dict[str, Any]:
    """Return what both recipes share for the measurement."""
    return {
        "max_steps": steps,
        "lora_rank": 64,
        "lora_alpha": 16,
        "learning_rate": 1.0e-4,
        "bf16": gpu,
        "logging_steps": 1,
        "save_strategy": "no",
        "eval_strategy": "no",
        "report_to": "none",
        "plot_loss": False,
        "include_num_input_tokens_seen": "non_padding",
        "skip_memory_metrics": False,
    }


def base(bench: Workbench, shape: str, votes: Path) -> str:
    """Build the random base, once; return its folder's name."""
    from factory.base_model import BaseModelSize, build_base_model

    folder = bench.folder / "models" / shape
    if not folder.exists():
        battles = [battle for _, battle in VoteReader(votes, labelled=True)]
        texts = (text for b in battles for text in (*b.prompts, *b.responses_a, *b.responses_b))
        build_base_model(folder, texts, seed=1, size=BaseModelSize(**SHAPES[shape]))
    return f"models/{shape}"


def experiment(bench: Workbench, name: str, model: str, stage: str, values: dict[str, Any]) -> None:
    """Write an experiment whose recipe for `stage` has these values."""
    keys = {"model": model, "cutoff_len": 2048, "quantization_bit": 4, "swap_copies": False}
    bench.variant(name, "demo", **keys, recipes={stage: {"additional_target": None, **values}})


def train(bench: Workbench, name: str, stage: str) -> dict[str, Any]:
    """Train by the recipe; return tokens a second, peak GiB, first and last loss."""
    from common.experiment import read_yaml

    adapter = bench.folder / read_yaml(bench.folder / "factory_configs" / name / f"{stage}.yaml")["output_dir"]
    shutil.rmtree(adapter, ignore_errors=True)
    call = [sys.executable, "-m", "factory.launcher", "train", f"factory_configs/{name}/{stage}.yaml"]
    log = bench.folder / f"{name}_{stage}.log"
    with log.open("wb") as file:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(call, cwd=bench.folder, env=environment, stdout=file, stderr=subprocess.STDOUT)
    if done.returncode:
        raise SystemExit(f"{name}: the training failed; read {log}")
    points = [json.loads(line) for line in (adapter / "trainer_log.jsonl").read_text().splitlines()]
    history = json.loads((adapter / "trainer_state.json").read_text())["log_history"]
    results = json.loads((adapter / "all_results.json").read_text())
    losses = [point["loss"] for point in points if "loss" in point]
    tokens = max((entry.get("num_input_tokens_seen", 0) for entry in history), default=0)
    memory = [results[key] for key in results if key.endswith(("gpu_peaked_delta", "gpu_alloc_delta"))]
    before = [results[key] for key in results if key.endswith("before_init_mem_gpu")]
    return {
        "tokens_per_second": tokens / results["train_runtime"] if tokens else None,
        "steps_per_second": results["train_steps_per_second"],
        "peak": (sum(memory) + sum(before)) / 2**30 if memory else None,
        "first": statistics.mean(losses[:3]),
        "last": statistics.mean(losses[-5:]),
    }


def matrix_rate(gpu: bool) -> float:
    """Return the measured operations a second of a large product, 16-bit on a GPU."""
    import torch

    size, device = (8192, "cuda") if gpu else (1024, "cpu")
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    times = []
    for _ in range(12):
        started = time.perf_counter()
        a @ a
        if gpu:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return 2 * size**3 / statistics.median(times[2:])


def share(shape: str, result: dict[str, Any], rate: float, pairs: bool, model: Path) -> str:
    """Return the share of the matrix rate: 6 operations a weight and token, 8 with DPO's reference."""
    from factory.model_size import size_of

    if not result["tokens_per_second"]:
        return "-"
    sizes = size_of(str(model))
    operations = (8 if pairs else 6) * (sizes.linear + sizes.embedding)
    return f"{result['tokens_per_second'] * operations / rate:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="8b")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--stages", nargs="+", default=["sft", "dpo_reward", "rm"])
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    import torch

    gpu = torch.cuda.is_available()
    bench, votes = Workbench(arguments.work.resolve()), arguments.votes.resolve()
    model, rate = base(bench, arguments.shape, votes), matrix_rate(gpu)
    rows = []
    for stage in arguments.stages:
        pairs = stage != "sft"
        ours = {**OURS, **(PAIRS if pairs else {}), **({} if gpu else {"enable_liger_kernel": False})}
        for said, values in (("LLaMA-Factory's example", EXAMPLE), ("ours", ours)):
            name = f"{'example' if values is EXAMPLE else 'ours'}-{stage.replace('_', '-')}"
            experiment(bench, name, model, stage, {**common(arguments.steps, gpu), **values})
            bench.prepare(name, "--train", str(votes), *(["--pairs"] if pairs else []))
            result = train(bench, name, stage)
            peak = f"{result['peak']:.1f} GiB" if result["peak"] else "-"
            speed = f"{result['tokens_per_second']:,.0f}" if result["tokens_per_second"] else "-"
            used = share(arguments.shape, result, rate, stage == "dpo_reward", bench.folder / model)
            rows.append([stage, said, speed, used, peak, f"{result['first']:.3f} → {result['last']:.3f}"])
            print(" | ".join(rows[-1]), flush=True)
    headings = ["stage", "recipe", "tokens/s", "share of the matrix rate", "peak memory", "loss"]
    command = f"python benchmarks/training_speed.py --votes {votes.name} --work FOLDER --shape {arguments.shape}"
    text = f"{table(headings, rows)}\n\n{measured_on(command)}"
    print(text)
    if arguments.docs:
        put(ROOT / "docs" / "forecast.md", "training figures", text)


if __name__ == "__main__":
    main()
