"""Devices of a forecast: GPUs by their makers' data sheets, and this machine's CPU as measured now."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

import psutil

GIB = 2**30
# Tokens of one forward pass in scoring. A GPU wants many to be busy. A CPU is busy with one row, and what does not fit
# into its caches costs time: of 1, 1,024 and 4,096 tokens on two cores, 1,024 were the fastest in fp32.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 32768}

# Shares of the matrix rate that training and scoring reach on a GPU, derived from two public runs of this
# competition; docs/forecast.md has the derivation. Not measured by this project.
_TRAINING_SHARE, _SCORING_SHARE = 0.30, 0.21
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
    "RTX-3090": _card(23.7, 71),
    "RTX-4090": _card(23.6, 165),
    "A100-40GB": _card(39.4, 312),
    "A100-80GB": _card(79.2, 312),
    "H100": _card(79.1, 989),
    "H200": _card(139.8, 989),
}

_TOKENS = 512  # a batch of the size that a CPU trains on
_REPEATS, _LEAST = 5, 0.25  # calls and seconds, at least
# Products of larger matrices reach the same rate, and would make the probe a matter of minutes.
_LARGEST = 2048


def this_cpu(hidden: int, feed_forward: int, *, nf4: bool) -> Device:
    """Return this machine's CPU, measured for a second with the products of a model of these widths."""
    rate, dequantise = probe_cpu(hidden, feed_forward, nf4=nf4)
    rate *= _CPU_SHARE
    memory = psutil.virtual_memory().total / GIB
    return Device("cpu", memory, rate, rate, dequantise, _CPU_LAYER_CALL, CPU_START)


def probe_cpu(hidden: int, feed_forward: int, *, nf4: bool) -> tuple[float, float]:
    """Return fp32 operations a second of a feed-forward product, and nf4 weights dequantised a second (or infinity)."""
    import torch

    x = torch.randn(_TOKENS, min(hidden, _LARGEST))
    weight = torch.randn(min(feed_forward, _LARGEST), x.shape[1])
    rate = 2.0 * _TOKENS * weight.numel() / median_seconds(lambda: torch.nn.functional.linear(x, weight))
    if not nf4:
        return rate, float("inf")
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return rate, weight.numel() / median_seconds(lambda: functional.dequantize_4bit(packed, state))


def median_seconds(call, clock=time.perf_counter) -> float:
    """Return the median seconds of a call, over a quarter of a second of calls at least.

    Threads that wake up make a small product's first calls a hundred times slower.
    """
    call()
    times: list[float] = []
    while len(times) < _REPEATS or sum(times) < _LEAST:
        started = clock()
        call()
        times.append(clock() - started)
    return median(times)
