"""Devices of a forecast: GPUs by their makers' data sheets, and this machine's CPU as measured now."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from common.errors import UsageError
from factory.devices import devices

GIB = 2**30
# Tokens of one forward pass in scoring. A GPU wants many to be busy. A CPU is busy with one row, and what does not fit
# into its caches costs time: of 1, 1,024 and 4,096 tokens on two cores, 1,024 were the fastest in fp32.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 32768}

# Shares of the matrix rate that training and scoring reach on a GPU, derived from public runs (of QLoRA the mean of
# four); docs/forecast.md has the derivation. Not measured by this project.
_TRAINING_SHARE, _SCORING_SHARE = 0.33, 0.21
# Seconds from the command to the first step with a large model on a GPU: assumed, not measured.
CARD_START = 60.0
# What a CPU adds to its products, measured on two cores with benchmarks/forecast_check.py.
_CPU_SHARE = 0.55  # of the probe's rate, in a whole training step
_CPU_LAYER_CALL = 0.9e-3  # seconds that calling one layer costs, however small it is
CPU_START = 12.0  # seconds from the command to the first step


@dataclass(frozen=True)
class Device:
    """Memory in GiB as the driver shows it, rates in floating-point operations a second."""

    kind: str  # cuda or cpu
    memory: float
    training_rate: float
    scoring_rate: float
    dequantise: float = float("inf")  # nf4 weights a second
    layer_call: float = 0.0  # seconds
    start: float = CARD_START
    bf16: bool = True


def _card(memory: float, tflops: float, bf16: bool = True) -> Device:
    """Return a GPU; `tflops` are dense 16-bit ones with fp32 accumulation."""
    rate = tflops * 1e12
    return Device("cuda", memory, rate * _TRAINING_SHARE, rate * _SCORING_SHARE, bf16=bf16)


CARDS = {
    "T4": _card(14.6, 65, bf16=False),
    "RTX-3060-6GB": _card(5.8, 40),
    "RTX-4060-8GB": _card(7.6, 30),
    "RTX-3060-12GB": _card(11.7, 26),
    "RTX-4060-Ti-16GB": _card(15.6, 44),
    "RTX-3090": _card(23.7, 71),
    "RTX-4090": _card(23.6, 165),
    "A100-40GB": _card(39.4, 312),
    "A100-80GB": _card(79.2, 312),
    "H100": _card(79.1, 989),
    "H200": _card(139.8, 989),
}

# A card of which only the memory is known is taken to be as fast as this one.
_UNKNOWN = "RTX-3060-12GB"


def card_named(text: str) -> str:
    """Return the card of `CARDS` that a person means: t4, "RTX 4090", 4090; raises UsageError for any other name."""
    short = _plain(text)
    found = [name for name in CARDS if _plain(name) == short] or [name for name in CARDS if short in _plain(name)]
    if len(found) == 1 and short:
        return found[0]
    what = f"{text!r} may be {' or '.join(found)}" if len(found) > 1 and short else f"there is no card {text}"
    raise UsageError(what, remedy=f"choose from: {', '.join((*CARDS, 'cpu'))}; or --gpu-memory GB")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|laptop|tesla|gpu|[^a-z0-9]", "", name.lower())


def card_of(memory_gib: float, name: str = "", bf16: bool = True) -> Device:
    """Return a GPU of this memory, at the rate of the card in `CARDS` that its name means, else of a slow one."""
    known = [each for each in CARDS if _plain(each.rsplit("-", 1)[0] if each.endswith("GB") else each) == _plain(name)]
    return replace(CARDS[known[0] if known else _UNKNOWN], memory=memory_gib, bf16=bf16)


def may_have_gpu() -> bool:
    """Tell whether this machine shows a GPU, without the seconds that importing torch takes."""
    return any(each for name in ("nvidia[0-9]*", "kfd", "dxg") for each in Path("/dev").glob(name))


def own_card() -> dict[str, Device]:
    """Return this machine's first GPU by its name; nothing where it has none."""
    if not may_have_gpu():
        return {}
    return {f"this {gpu.name}": card_of(gpu.memory_gib, gpu.name, gpu.bf16) for gpu in devices().gpus[:1]}


_TOKENS = 512  # a batch of the size that a CPU trains on
# Products of larger matrices reach the same rate, and would make the probe a matter of minutes.
_LARGEST = 2048


def this_cpu(hidden: int, feed_forward: int, *, nf4: bool) -> Device:
    """Return this machine's CPU, measured for a second: fp32 products of a feed-forward layer, nf4 dequantised."""
    import torch
    from torch.utils.benchmark import Timer

    def seconds(call: Callable[[], Any]) -> float:
        # Threads that wake up make a small product's first calls a hundred times slower: hence the median.
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.25).median

    x = torch.randn(_TOKENS, min(hidden, _LARGEST))
    weight = torch.randn(min(feed_forward, _LARGEST), x.shape[1])
    rate = 2.0 * _TOKENS * weight.numel() / seconds(lambda: torch.nn.functional.linear(x, weight)) * _CPU_SHARE
    dequantise = float("inf")
    if nf4:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        dequantise = weight.numel() / seconds(lambda: functional.dequantize_4bit(packed, state))
    memory = psutil.virtual_memory().total / GIB
    return Device("cpu", memory, rate, rate, dequantise, _CPU_LAYER_CALL, CPU_START)
