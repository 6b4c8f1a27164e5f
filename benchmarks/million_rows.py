"""Peak memory of `run.py score --input` against the number of rows.

    python benchmarks/million_rows.py [--rows 10000 100000 1000000]

Short synthetic battles and a judge of two layers with 32 hidden units and random weights, so that what grows with the
rows would show. Each size is a process of its own, called as a user calls it; its peak is what the system accounts.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from figures import ROOT, measured_on, table

from common.experiment import Experiment
from common.files import write_json
from data_prep.chat_template import ChatFrame
from data_prep.export_reader import FORMAT

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPT = "{% for turn in turns %}{{ turn.prompt }}|{{ turn.a }}|{{ turn.b }}{% endfor %}"
WORDS = ["red", "fox", "ran", "over", "old", "hills", "near", "warm", "lake", "until", "rain", "came", "again"]
KEYS = {"model": "none", "template": "qwen3_nothink", "cutoff_len": 128}


def tokenizer_of():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 10, trainer)
    return tokenizer


def frame_of(tokenizer) -> ChatFrame:
    return ChatFrame(
        template=KEYS["template"],
        prefix_ids=(),
        before="<|im_start|>user\n",
        after="<|im_end|>\n<|im_start|>assistant\n",
        suffix_ids=(),
        answer_prefix_ids=(),
        answer_before="",
        answer_after="<|im_end|>\n",
        answer_suffix_ids=(),
        label_ids=tuple(tokenizer.encode(x).ids[0] for x in "ABC"),
        answer_len=3,
        special_strings=tuple(SPECIALS),
    )


def lay_out(folder: Path) -> None:
    """Make a place with a judge that was never trained, an export's manifest and a report."""
    import numpy as np
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from scoring.calibration import FittedLink
    from scoring.judge import write_judge

    os.chdir(folder)
    experiment, tokenizer = Experiment(name="million", **KEYS), tokenizer_of()
    frame, merged = frame_of(tokenizer), experiment.merged_folder("sft")
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=512, initializer_range=0.2, **shape)).save_pretrained(merged)
    tokenizer.save(str(merged / "tokenizer.json"))
    write_judge(merged, experiment, frame, PROMPT, {"experiment": "million", "stage": "sft"})
    manifest = {"format": FORMAT, "frame": asdict(frame), "files": {}, "sources": {}, "views": []}
    write_json(experiment.data_folder / "manifest.json", manifest)
    write_json(experiment.folder / "experiment.yaml", KEYS)  # JSON is YAML
    third = {"a": 1 / 3, "b": 1 / 3, "tie": 1 / 3}
    plain = FittedLink("logits", 1, False, None, "none", None, None, 0, third, None, np.empty((0, 3)))
    write_json(experiment.output_folder("sft") / "report.json", {"calibration": plain.to_json()})


def write_rows(path: Path, rows: int) -> None:
    draw = random.Random(rows)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b"])
        for number in range(rows):
            texts = (" ".join(draw.choices(WORDS, k=draw.randint(1, 3))) for _ in range(3))
            writer.writerow([number, *(f'["{text}"]' for text in texts)])


def measured(folder: Path, rows: int) -> list[str]:
    """Score a table of so many rows; return the table's row: rows, size, seconds, rows a second, peak memory."""
    source, output = folder / f"rows{rows}.csv", folder / f"out{rows}.csv"
    write_rows(source, rows)
    size = source.stat().st_size / 2**20
    started = time.monotonic()
    call = [sys.executable, str(ROOT / "run.py"), "score", "-e", "million", "--input", source, "--output", output]
    process = subprocess.Popen(call, cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    if status:
        raise SystemExit("scoring failed")
    with output.open(encoding="utf-8") as file:
        assert sum(1 for _ in file) == rows + 1
    source.unlink()
    output.unlink()
    peak = usage.ru_maxrss / 2**10
    return [f"{rows:,}", f"{size:,.1f} MiB", f"{seconds:.0f} s", f"{rows / seconds:,.0f}", f"**{peak:,.0f} MiB**"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    arguments = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        lay_out(Path(folder))
        for rows in arguments.rows:
            found.append(measured(Path(folder), rows))
            print(" | ".join(found[-1]), flush=True)
    headings = ["rows", "table", "seconds", "rows/s", "peak memory"]
    how = measured_on(f"python benchmarks/million_rows.py --rows {' '.join(map(str, arguments.rows))}")
    print(f"{table(headings, found)}\n\n{how}")


if __name__ == "__main__":
    main()
