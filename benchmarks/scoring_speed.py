"""How fast and how exact scoring is, engine by engine, against the usual loop.

    python benchmarks/scoring_speed.py --votes FILE [FILE ...] [--rows 32] [--runs 3] [--write]

The usual loop: a Hugging Face forward pass, batches of four in file order, padded on the right to the longest with an
attention mask, full logits. Real rows are fitted to 2,048 tokens by the project's own budget with a byte-level BPE of
32,000 entries trained on the same votes; the model has a Llama shape with random weights, its head scaled so that
probabilities spread as a trained judge's do. Speeds: all ways in turn in one process, medians over the runs. Peak
memory: each way in a fresh process. benchmarks/gpu.py measures an 8B shape on a GPU.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from figures import ROOT, options, publish, row, table
from workbench import alone, battles_of, frame_of, texts_of, train_tokenizer

from common.experiment import Labels
from data_prep.prompt import JudgePrompt
from data_prep.truncation import Fitter
from scoring.engines import open_engine
from scoring.links import softmax
from scoring.model_loading import device_name, load_model

CUTOFF, VOCABULARY = 2048, 32_000
KEYS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
SHAPES = {"tiny": (64, 128, 2, 4, 4), "134M": (768, 2048, 12, 12, 12)}
HEADINGS = ["way", "tokens/s", "against the usual loop", "largest difference", "peak memory"]
Score = Callable[[list[list[int]]], np.ndarray]
# An engine, or the usual loop, in a precision.
WAYS = ("usual loop, fp32", "torch, fp32", "torch, bf16")


def make_model(folder: Path, shape: str) -> None:
    """Save a random model; its logits' deviation is about 2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(zip(KEYS, SHAPES[shape], strict=True))
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, max_position_embeddings=4096, **sizes))
    model.lm_head.weight.data *= 2 / (0.02 * model.config.hidden_size**0.5)
    model.save_pretrained(folder / "merged")


def make_rows(folder: Path, votes: list[Path], count: int) -> None:
    """Save the token ids of a random sample of real rows, fitted as `prepare` fits them."""
    battles = battles_of(*votes)
    tokenizer = train_tokenizer(texts_of(battles[:4000]), VOCABULARY)
    frame, prompt = frame_of(tokenizer), JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels())
    sample = [battles[i] for i in np.random.default_rng(1).permutation(len(battles))[:count]]
    fitted = Fitter(frame, tokenizer, prompt, cutoff_len=CUTOFF, prompt_share=0.2).fit(sample, both_orders=False)
    texts = [frame.wrap(prompt.message(f.battle, f.dropped)) for f in fitted]
    rows = [frame.surround(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    (folder / "rows.json").write_text(json.dumps({"rows": rows, "labels": list(frame.label_ids)}), encoding="utf-8")


def rows_of(folder: Path) -> tuple[list[list[int]], list[int]]:
    """Return the saved rows and the labels' token ids."""
    content = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    return content["rows"], content["labels"]


def open_way(folder: Path, way: str) -> Score:
    """Load a way of scoring; its function returns label logits [rows, labels]."""
    (_, labels), (engine, precision) = rows_of(folder), way.split(", ")
    if engine == "usual loop":
        return usual_loop(one_model(folder, precision), labels)
    judge = SimpleNamespace(folder=folder / "merged", frame=SimpleNamespace(label_ids=tuple(labels)))
    opened = open_engine(judge, engine, precision)
    return lambda rows: opened.label_logits(rows, labels)


@cache
def one_model(folder: Path, precision: str) -> Any:
    return load_model(folder / "merged", device_name(), precision=precision)


def usual_loop(model: Any, labels: Sequence[int], size: int = 4) -> Score:
    """Return the function that scores as most do."""
    import torch

    def score(rows: list[list[int]]) -> np.ndarray:
        found = []
        for first in range(0, len(rows), size):
            batch = [torch.tensor(ids) for ids in rows[first : first + size]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(model.device)
            lengths = torch.tensor([len(x) for x in batch], device=model.device)
            mask = torch.arange(ids.shape[1], device=model.device)[None] < lengths[:, None]
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            found.append(logits[range(len(batch)), lengths - 1][:, list(labels)].float().cpu().numpy())
        return np.concatenate(found).astype(float)

    return score


def speeds(opened: dict[str, Score], rows: list[list[int]], runs: int) -> tuple[dict[str, list[float]], dict]:
    """Score all rows in every way in turn; return each way's tokens a second of every run, and its logits."""
    found, logits = {way: [] for way in opened}, {}
    for score in opened.values():
        score(rows[:3] if device_name() == "cpu" else rows)  # compiled, packed, memory touched
    for _ in range(runs):
        for way, score in opened.items():
            started = time.perf_counter()
            logits[way] = score(rows)  # an array in main memory: a GPU's work is over then
            found[way].append(sum(map(len, rows)) / (time.perf_counter() - started))
    return found, logits


def ratio(found: dict[str, list[float]], way: str) -> float:
    """Return the median of a way's speed over that of the usual loop, which is the first way."""
    return statistics.median(a / b for a, b in zip(found[way], next(iter(found.values())), strict=True))


def one_peak(folder: Path, way: str) -> None:
    """Score some rows in one way, the longest among them."""
    open_way(folder, way)(sorted(rows_of(folder)[0], key=len)[-8:])


def main() -> None:
    parser = options(__doc__, "votes", rows=32, runs=3)
    parser.add_argument("--shape", choices=SHAPES, default="134M", help="tiny tries the script itself")
    asked, lines = parser.parse_args(), []
    with tempfile.TemporaryDirectory() as name:
        make_rows(folder := Path(name), asked.votes, asked.rows)
        make_model(folder, asked.shape)
        opened, (rows, labels) = {way: open_way(folder, way) for way in WAYS}, rows_of(folder)
        exact = softmax(usual_loop(one_model(folder, "fp32"), labels, size=1)(rows))
        found, logits = speeds(opened, rows, asked.runs)
        for way, each in found.items():
            speed, apart = statistics.median(each), np.abs(softmax(logits[way]) - exact).max()
            peak = f"{1024 * alone(one_peak, folder, way)[1]:,.0f} MiB"
            lines.append(row(way, f"{speed:,.0f}", f"**{ratio(found, way):.2f}**", f"{apart:.1e}", peak))
    text = f"{len(rows)} real rows, {sum(map(len, rows)):,} tokens; a Llama shape, {asked.shape}."
    publish("scoring figures", f"{table(HEADINGS, lines)}\n\n{text}", asked.write)


if __name__ == "__main__":
    main()
