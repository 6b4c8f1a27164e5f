"""How fast and how exact scoring is, engine by engine, against the usual loop.

    python benchmarks/scoring_speed.py --votes FILE [FILE ...] [--rows 32] [--runs 3] [--docs]
    python benchmarks/scoring_speed.py --votes FILE [FILE ...] --modes
    python benchmarks/scoring_speed.py --votes FILE [FILE ...] --gpu

The usual loop: a Hugging Face forward pass, batches of four in file order, padded on the right to the longest with an
attention mask, full logits. Real rows are fitted to 2,048 tokens by the project's own budget with a byte-level BPE of
32,000 entries trained on the same votes; the model has a Llama shape with random weights, its head scaled so that
probabilities spread as a trained judge's do. Speeds: all ways in turn in one process, medians over the runs. Peak
memory: each way in a process of its own. The floor: the matrix products of the same shapes alone, a row at a time.
--gpu does the same with an 8B shape in bf16 and 4 bit, on rows of 2,048 tokens and on the real lengths.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from figures import ROOT, measured_on, put, table
from prepare_speed import battles_of, frame_of, train_tokenizer

from common.errors import ArenaError

CUTOFF = 2048
SHAPES = {
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    "134M": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12},
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


@dataclass(frozen=True)
class Way:
    """One way of scoring: an engine (or the usual loop), a precision, and the engine's options."""

    engine: str
    precision: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return ", ".join([self.engine, self.precision, *(f"{name} {value}" for name, value in self.options)])


USUAL = Way("usual loop", "fp32")
WAYS = [USUAL, Way("torch", "fp32"), Way("torch", "bf16")]
# Ways of batching in torch; a budget of one token is one row a pass.
MODES = [USUAL] + [
    Way("torch", precision, (("mode", mode), ("token_budget", budget)))
    for precision in ("fp32", "bf16")
    for mode, budget in (
        ("padded", 1),
        ("padded", 4096),
        ("packed", 1),
        ("packed", 4096),
        ("trimmed", 1),
        ("trimmed", 1024),
        ("trimmed", 4096),
    )
]
GPU_WAYS = [Way("usual loop", "bf16"), Way("torch", "bf16"), Way("torch", "4bit")]
Score = Callable[[list[list[int]]], np.ndarray]


def make_model(folder: Path, shape: str, device: str = "cpu") -> None:
    """Save a random model; its logits' deviation is about 2."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=4096, **SHAPES[shape])
    with torch.device(device):
        model = LlamaForCausalLM(config)
    if shape == "8B":
        model = model.to(torch.bfloat16)
    model.lm_head.weight.data *= 2 / (0.02 * config.hidden_size**0.5)
    model.save_pretrained(folder / "merged")


def make_rows(folder: Path, votes: list[Path], count: int) -> None:
    """Save the token ids of a random sample of real rows, fitted as `prepare` fits them."""
    from common.experiment import BudgetShares, Labels
    from data_prep.prompt import JudgePrompt
    from data_prep.truncation import Fitter

    battles = battles_of(votes)
    tokenizer = train_tokenizer(battles[:4000])
    tokenizer.save(str(folder / "tokenizer.json"))
    frame, prompt = frame_of(tokenizer), JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels())
    sample = [battles[i] for i in np.random.default_rng(1).permutation(len(battles))[:count]]
    fitted = Fitter(frame, tokenizer, prompt, cutoff_len=CUTOFF, shares=BudgetShares()).fit(sample, both_orders=False)
    texts = [frame.wrap(prompt.message(f.battle, f.dropped)) for f in fitted]
    rows = [frame.surround(e.ids) for e in tokenizer.encode_batch(texts, add_special_tokens=False)]
    (folder / "rows.json").write_text(json.dumps({"rows": rows, "labels": list(frame.label_ids)}), encoding="utf-8")


def open_way(folder: Path, way: Way, labels: Sequence[int]) -> Score:
    """Load a way of scoring; its function returns label logits [rows, labels]."""
    if way.engine == USUAL.engine:
        return usual_loop(folder, way.precision, labels)
    if way.options:  # several ways share one model
        from scoring.engines.torch_engine import score_labels
        from scoring.packed_model import PackedModel

        options = dict(way.options)
        packed = PackedModel(one_model(folder, way.precision), mode=options["mode"])
        return lambda rows: score_labels(packed, rows, labels, token_budget=options["token_budget"])
    from scoring.engines.protocol import open_engine

    judge = SimpleNamespace(folder=folder / "merged", frame=SimpleNamespace(label_ids=tuple(labels)))
    opened = open_engine(judge, way.engine, way.precision)
    return lambda rows: opened.label_logits(rows, labels)


@cache
def one_model(folder: Path, precision: str) -> Any:
    from scoring.model_loading import device_name, load_model

    return load_model(folder / "merged", device_name(), precision=precision)


def usual_loop(folder: Path, precision: str, labels: Sequence[int], size: int = 4) -> Score:
    import torch

    model = one_model(folder, precision)
    device = model.device

    def score(rows: list[list[int]]) -> np.ndarray:
        found = []
        for first in range(0, len(rows), size):
            batch = [torch.tensor(ids) for ids in rows[first : first + size]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True).to(device)
            lengths = torch.tensor([len(x) for x in batch], device=device)
            mask = torch.arange(ids.shape[1], device=device)[None] < lengths[:, None]
            with torch.inference_mode():
                logits = model(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits
            found.append(logits[range(len(batch)), lengths - 1][:, list(labels)].float().cpu().numpy())
        return np.concatenate(found).astype(float)

    return score


def floor_seconds(rows: list[list[int]], shape: str, precision: str) -> float:
    """Return the seconds of the layers' matrix products alone, a row at a time."""
    import torch
    from torch.nn.functional import linear

    size = SHAPES[shape]
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    hidden, inner, layers = size["hidden_size"], size["intermediate_size"], size["num_hidden_layers"]
    weights = [torch.randn(out, into, dtype=dtype) for out, into in [(hidden, hidden)] * 4 + [(inner, hidden)] * 2]
    down, seconds = torch.randn(hidden, inner, dtype=dtype), 0.0
    with torch.inference_mode():
        for warm in (True, False):
            for ids in rows[:2] if warm else rows:
                x, y = torch.randn(len(ids), hidden, dtype=dtype), torch.randn(len(ids), inner, dtype=dtype)
                started = time.perf_counter()
                for _ in range(layers):
                    for weight in weights:
                        linear(x, weight)
                    linear(y, down)
                seconds += 0.0 if warm else time.perf_counter() - started
    return seconds


def probabilities(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


def open_all(folder: Path, ways: list[Way], labels: list[int]) -> dict[Way, Score]:
    """Open the ways that are installed here; what is missing is said."""
    opened: dict[Way, Score] = {}
    for way in ways:
        try:
            opened[way] = open_way(folder, way, labels)
        except (ArenaError, ImportError) as error:
            print(f"left out: {way}: {error}", file=sys.stderr)
    return opened


def measure(folder: Path, ways: list[Way], shape: str, runs: int) -> dict[str, Any]:
    """Score all rows in every way in turn, `runs` times; return the ways' figures and the floors."""
    content = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    rows, labels = content["rows"], content["labels"]
    tokens = sum(map(len, rows))
    opened = open_all(folder, ways, labels)
    for score in opened.values():
        score(rows[:3])  # compiled, packed, pages touched
    exact = probabilities(usual_loop(folder, "fp32", labels, size=1)(rows))
    speeds: dict[Way, list[float]] = {way: [] for way in opened}
    floors: dict[str, list[float]] = {"fp32": [], "bf16": []}
    differences = {}
    for _ in range(runs):
        for way, score in opened.items():
            started = time.perf_counter()
            logits = score(rows)
            speeds[way].append(tokens / (time.perf_counter() - started))
            differences[way] = float(np.abs(probabilities(logits) - exact).max())
        for precision, found in floors.items():
            found.append(tokens / floor_seconds(rows, shape, precision))
    usual = speeds[ways[0]]
    return {
        "rows": len(rows),
        "tokens": tokens,
        "floors": {precision: statistics.median(found) for precision, found in floors.items()},
        "ways": [
            {
                "way": way,
                "speed": statistics.median(found),
                "ratio": statistics.median(a / b for a, b in zip(found, usual, strict=True)),
                "difference": differences[way],
            }
            for way, found in speeds.items()
        ],
    }


def one_peak(folder: Path, way: Way) -> None:
    """Score some rows in one way, the longest among them, and print this process's peak memory in MiB."""
    content = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    longest = sorted(content["rows"], key=len)[-8:]
    open_way(folder, way, content["labels"])(longest)
    # ru_maxrss would be that of the process that started this one
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    print(next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**10)


def peak(folder: Path, way: Way) -> float:
    call = [sys.executable, __file__, "--peak", str(folder), way.engine, way.precision]
    return float(subprocess.run(call, capture_output=True, text=True, check=True).stdout.split()[-1])


def cpu_table(found: dict[str, Any], shape: str) -> str:
    rows = []
    for item in found["ways"]:
        floor = found["floors"]["fp32" if item["way"].precision == "fp32" else "bf16"]
        rows.append(
            [
                str(item["way"]),
                f"{item['speed']:,.0f}",
                f"**{item['ratio']:.2f}**",
                f"{item['speed'] / floor:.2f}",
                f"{item['difference']:.1e}",
                f"{item['peak']:,.0f} MiB" if "peak" in item else "",
            ]
        )
    headings = ["way", "tokens/s", "against the usual loop", "share of the floor", "largest difference", "peak memory"]
    floors = ", ".join(f"{precision} {speed:,.0f}" for precision, speed in found["floors"].items())
    return (
        f"{table(headings, rows)}\n\n{found['rows']} real rows, {found['tokens']:,} tokens; a Llama shape, {shape}. "
        f"The floor (matrix products alone), tokens/s: {floors}."
    )


def on_cpu(arguments: argparse.Namespace, folder: Path) -> None:
    make_rows(folder, arguments.votes, arguments.rows)
    make_model(folder, arguments.shape)
    found = measure(folder, MODES if arguments.modes else WAYS, arguments.shape, arguments.runs)
    for item in found["ways"] if not arguments.modes else []:
        item["peak"] = peak(folder, item["way"])
    names = " ".join(path.name for path in arguments.votes)
    command = f"python benchmarks/scoring_speed.py --votes {names} --rows {arguments.rows} --runs {arguments.runs}"
    text = f"{cpu_table(found, arguments.shape)}\n\n{measured_on(command + ' --modes' * arguments.modes)}"
    print(text)
    if arguments.docs and not arguments.modes:
        put(ROOT / "docs" / "scoring.md", "scoring figures", text)


def matrix_rate() -> float:
    """Return the GPU's measured bf16 matrix rate in FLOP/s."""
    import torch

    side = 8192
    a, b = (torch.randn(side, side, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    seconds = []
    for _ in range(20):
        torch.cuda.synchronize()
        started = time.perf_counter()
        a @ b
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return 2 * side**3 / statistics.median(seconds[5:])


def on_gpu(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the table of an 8B shape: real lengths and rows of 2,048 tokens, every way in turn."""
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("--gpu needs a GPU")
    make_rows(folder, arguments.votes, arguments.rows)
    content = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    draw = np.random.default_rng(2)
    sets = {
        "real lengths": content["rows"],
        "2,048 tokens": [draw.integers(0, 32000, CUTOFF).tolist() for _ in range(max(8, arguments.rows // 4))],
    }
    make_model(folder, "8B", "cuda")
    rate, lines = matrix_rate(), []
    size = SHAPES["8B"]
    keys = size["hidden_size"] // size["num_attention_heads"] * size["num_key_value_heads"]
    weights = size["num_hidden_layers"] * (
        2 * size["hidden_size"] * (size["hidden_size"] + keys) + 3 * size["hidden_size"] * size["intermediate_size"]
    )
    opened = open_all(folder, GPU_WAYS, content["labels"])
    for name, rows in sets.items():
        tokens, speeds = sum(map(len, rows)), {way: [] for way in opened}
        for run in range(arguments.runs + 1):  # the first warms up
            for way, score in opened.items():
                torch.cuda.synchronize()
                started = time.perf_counter()
                score(rows)
                torch.cuda.synchronize()
                if run:
                    speeds[way].append(tokens / (time.perf_counter() - started))
        for way, found in speeds.items():
            speed = statistics.median(found)
            ratio = statistics.median(a / b for a, b in zip(found, speeds[GPU_WAYS[0]], strict=True))
            hours = 25_000 * 2 * tokens / len(rows) / speed / 3600
            share = 2 * weights * speed / rate
            lines.append([name, str(way), f"{speed:,.0f}", f"{ratio:.2f}", f"{share:.2f}", f"{hours:.1f}"])
    headings = ["rows", "way", "tokens/s", "against the usual loop", "share of the matrix rate", "h, 25,000 rows, TTA"]
    print(f"{table(headings, lines)}\n\nMeasured bf16 matrix rate: {rate / 1e12:,.0f} TFLOP/s.")
    print(measured_on("python benchmarks/scoring_speed.py --gpu"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", nargs="+", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--shape", choices=["134M", "tiny"], default="134M", help="tiny tries the script itself")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--modes", action="store_true", help="ways of batching in torch instead of engines")
    parser.add_argument("--gpu", action="store_true", help="an 8B shape on a GPU")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        (on_gpu if arguments.gpu else on_cpu)(arguments, Path(folder))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        one_peak(Path(sys.argv[2]), Way(sys.argv[3], sys.argv[4]))
    else:
        main()
