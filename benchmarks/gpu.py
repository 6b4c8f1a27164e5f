"""What only a GPU can show, in one run of at most nine minutes: training, scoring, packed attention, the forecast.

    python benchmarks/gpu.py --votes FILE --work FOLDER [--minutes 9] [--write]
    python benchmarks/gpu.py --votes FILE --work FOLDER --tiny      # every part on a tiny shape, without a GPU

The base has Qwen3-8B's shape, random weights made on the card (speed and memory do not depend on their values) and a
tokenizer of the votes: nothing is downloaded. Each part runs in a process of its own, in the seconds that `PARTS` gives
it, and leaves FOLDER/results/PART.json; what is there is not run again, so that an interrupted run goes on.

example, ours  SFT in 4 bits by LLaMA-Factory's example recipe and by ours: the same rows in a step, adapter and seed.
               Ours may choose batches of like lengths, the batch that fits, liger. Tokens are those of the texts,
               without padding; peak memory is what the trainer's tracker saw, and the forecast without the process.
scoring        the usual loop in bf16 (benchmarks/scoring_speed.py), ours in bf16 and 4 bits: real lengths, 2,048 tokens
parity         label probabilities of both loops against fp32, a row at a time
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from argparse import Namespace
from typing import Any

import numpy as np
from figures import options, publish, table
from scoring_speed import CUTOFF, VOCABULARY, WAYS, make_rows, one_model, open_way, ratio, rows_of, speeds, usual_loop
from workbench import Workbench, battles_of, matrix_rate, texts_of, write_votes

from common.experiment import load_experiment
from common.files import read_json, write_json
from factory.workload import size_of
from scoring.links import softmax

SHAPE = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}
SHAPE |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
MODEL = "models/shape"
# What differs in speed from LLaMA-Factory's examples/train_qlora recipe for bitsandbytes.
EXAMPLE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "train_sampling_strategy": "random"}
EXAMPLE |= {"enable_liger_kernel": False}
OURS = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2}
OURS |= {"train_sampling_strategy": "group_by_length", "enable_liger_kernel": True}
COMMON = {"disable_gradient_checkpointing": False, "lora_rank": 64, "lora_alpha": 16, "learning_rate": 1.0e-4}
COMMON |= {"additional_target": None, "logging_steps": 1, "plot_loss": False, "save_strategy": "no"}
COMMON |= {"include_num_input_tokens_seen": "non_padding", "skip_memory_metrics": False}
COMMON |= {"report_to": "none", "adam_epsilon": 1e-8}
TRAINING = ["recipe", "tokens/s", "against the example", "share of the matrix rate", "loss", "seconds (forecast)"]
TRAINING += ["peak GiB (forecast)"]
SCORING = ["rows", "way", "tokens/s", "against the usual loop", "share of the matrix rate"]
SCORING += ["largest difference to fp32"]


def make_model(bench: Workbench, asked: Namespace) -> dict[str, Any]:
    """Save the base, with logits that spread as a trained judge's do, and the real rows that are scored."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    battles = battles_of(*asked.votes)
    write_votes(bench.folder / "votes.csv", battles)
    make_rows(bench.folder, asked.votes, 8 if asked.tiny else 32)
    folder = bench.folder / bench.base("shape", texts_of(battles[:1500]), vocabulary=VOCABULARY)
    config = AutoConfig.from_pretrained(folder)
    config.update({"vocab_size": VOCABULARY} if asked.tiny else {**SHAPE, "dtype": "bfloat16"})
    torch.set_default_dtype(torch.float32 if asked.tiny else torch.bfloat16)
    with torch.device("cpu" if asked.tiny else "cuda"):
        model = AutoModelForCausalLM.from_config(config)
    model.lm_head.weight.data *= 2 / (config.initializer_range * config.hidden_size**0.5)
    model.save_pretrained(folder)
    (bench.folder / "merged").unlink(missing_ok=True)
    (bench.folder / "merged").symlink_to(folder, target_is_directory=True)
    return {"parameters": model.num_parameters()}


def train(bench: Workbench, asked: Namespace) -> dict[str, Any]:
    """Train by one of the recipes; return its figures beside those of the forecast."""
    name, gpu = asked.part, not asked.tiny
    recipe = {**COMMON, **(EXAMPLE if name == "example" else OURS), "max_steps": asked.steps, "bf16": gpu}
    recipe["enable_liger_kernel"] &= gpu
    keys = {"model": MODEL, "cutoff_len": CUTOFF if gpu else 512, "quantization_bit": 4, "swap_copies": False}
    bench.variant(name, "--train", "votes.csv", **keys, recipes={"sft": recipe})
    rate, (formula, seconds, peak) = matrix_rate(gpu), bench.trained(name, "sft", None if gpu else "cpu")
    adapter = load_experiment(name).adapter_folder("sft")
    history, results = read_json(adapter / "trainer_state.json")["log_history"], read_json(adapter / "all_results.json")
    losses = [entry["loss"] for entry in history if "loss" in entry]
    speed = max(entry.get("num_input_tokens_seen", 0) for entry in history) / results["train_runtime"]
    if gpu:
        ends = ("gpu_peaked_delta", "gpu_alloc_delta", "before_init_mem_gpu")
        peak = sum(value for key, value in results.items() if key.endswith(ends)) / 2**30
    size = size_of(MODEL)
    return {
        "speed": speed,
        "share": 6 * speed * (size.linear + size.embedding) / rate,
        "loss": [statistics.mean(losses[:3]), statistics.mean(losses[-3:])],
        "seconds": [seconds, 3600 * formula["training_hours"]],
        "peak": [peak, formula["memory"] - (formula["memory_parts"]["process"] if gpu else 0)],
    }


def score(bench: Workbench, asked: Namespace) -> list[list[Any]]:
    """Return rows, way, tokens a second, its ratio to the usual loop's and its share of the matrix rate."""
    sets, rate, size = {"real lengths": rows_of(bench.folder)[0]}, matrix_rate(not asked.tiny), size_of(MODEL)
    if not asked.tiny:
        sets["2,048 tokens"] = np.random.default_rng(2).integers(0, VOCABULARY, (8, CUTOFF)).tolist()
    opened, found = {way: open_way(bench.folder, way) for way in ways(asked)}, []
    for name, rows in sets.items():
        measured, _ = speeds(opened, rows, runs=3)
        for way, each in measured.items():
            speed = statistics.median(each)
            found.append([name, way, speed, ratio(measured, way), 2 * size.linear * speed / rate])
    return found


def parity(bench: Workbench, asked: Namespace) -> dict[str, float]:
    """Return each way's largest difference of a probability from fp32, a row at a time."""
    rows, labels = rows_of(bench.folder)
    exact = softmax(usual_loop(one_model(bench.folder, "fp32"), labels, size=1)(rows))
    return {way: float(abs(softmax(open_way(bench.folder, way)(rows)) - exact).max()) for way in ways(asked)}


def ways(asked: Namespace) -> tuple[str, ...]:
    """Return the ways of scoring, the usual loop first."""
    return WAYS if asked.tiny else ("usual loop, bf16", "torch, bf16", "torch, 4bit")


# Each part and the seconds that an H200 should need.
PARTS = {"model": (make_model, 80), "example": (train, 170), "ours": (train, 120), "scoring": (score, 100)}
PARTS |= {"parity": (parity, 60)}


def run_parts(bench: Workbench, asked: Namespace) -> dict[str, Any]:
    """Run what has no result yet while there is time; return all results that there are."""
    end = time.monotonic() + 60 * asked.minutes
    for name, (_, seconds) in PARTS.items():
        path, left = bench.folder / "results" / f"{name}.json", end - time.monotonic()
        if path.is_file():
            continue
        if left < seconds:
            print(f"{name}: no time left; start again", file=sys.stderr)
            break
        part = subprocess.Popen([sys.executable, __file__, *sys.argv[1:], "--part", name], start_new_session=True)
        try:
            part.wait(left if asked.tiny else min(left, 3 * seconds))
        except subprocess.TimeoutExpired:
            os.killpg(part.pid, signal.SIGKILL)  # its trainer, too
            part.wait()
        if part.returncode:
            print(f"{name}: exit code {part.returncode}", file=sys.stderr)
            if name == "model":
                break
    return {path.stem: read_json(path) for path in (bench.folder / "results").glob("*.json")}


def main() -> None:
    parser = options(__doc__, "votes", "work", minutes=9.0, steps=12)
    parser.add_argument("--tiny", action="store_true", help="try the script on a CPU")
    parser.add_argument("--part", choices=PARTS, help="what the script calls itself with")
    asked = parser.parse_args()
    if asked.tiny and asked.write:
        parser.error("--tiny only tries the script on a CPU: --write needs a run on a GPU")
    bench = Workbench(asked.work)
    os.chdir(bench.folder)
    if asked.part:
        (bench.folder / "results").mkdir(exist_ok=True)
        write_json(bench.folder / "results" / f"{asked.part}.json", PARTS[asked.part][0](bench, asked))
        return
    found, trained = run_parts(bench, asked), []
    for name, title in (("example", "LLaMA-Factory's example"), ("ours", "ours")):
        if its := found.get(name):
            against = f"**{its['speed'] / found['example']['speed']:.2f}**" if "example" in found else ""
            pairs = {"loss": "{:.3f} → {:.3f}", "seconds": "{:.0f} ({:.0f})", "peak": "{:.1f} ({:.1f})"}
            shown = (form.format(*its[key]) for key, form in pairs.items())
            trained.append([title, f"{its['speed']:,.0f}", against, f"{its['share']:.2f}", *shown])
    apart, lines = found.get("parity", {}), []
    for rows, way, speed, against, share in found.get("scoring", []):
        parity = f"{apart[way]:.1e}" if way in apart else ""
        lines.append([rows, way, f"{speed:,.0f}", f"**{against:.2f}**", f"{share:.2f}", parity])
    publish("training figures", table(TRAINING, trained), asked.write)
    publish("gpu scoring figures", table(SCORING, lines), asked.write)
    if missing := [name for name in PARTS if name not in found]:
        raise SystemExit(f"not run: {', '.join(missing)}; start again")


if __name__ == "__main__":
    main()
