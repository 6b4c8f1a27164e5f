"""A card: memory, matrix rate and number formats of a GPU that people train on, from its maker's data sheet."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from factory.model_size import ModelShape

GIB = 2**30
# Tokens of one forward pass in scoring. A GPU wants many to be busy. A CPU is busy with one row, and what does not fit
# into its caches costs time: see "Ways of batching" in docs/scoring.md.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True)
class Card:
    """`memory` in GiB as the driver shows it; `rate` in dense 16-bit TFLOP/s with fp32 accumulation."""

    name: str
    memory: float
    rate: float
    bf16: bool = True


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("T4", 14.6, 65, bf16=False),
        Card("RTX-3060-6GB", 5.8, 40),
        Card("RTX-3090", 23.7, 71),
        Card("RTX-4090", 23.6, 165),
        Card("A100-40GB", 39.4, 312),
        Card("A100-80GB", 79.2, 312),
        Card("H100", 79.1, 989),
        Card("H200", 139.8, 989),
    )
}


_TOKENS = 512  # a batch of the size that a CPU trains on
_REPEATS, _LEAST = 5, 0.25  # calls and seconds, at least
# Larger products are as fast a weight, and would make the probe a matter of minutes.
_LARGEST = 2048


@dataclass(frozen=True)
class Probe:
    """`rate`: fp32 operations a second of the model's own products; `dequantise`: nf4 weights a second, 0 unasked."""

    rate: float
    dequantise: float = 0.0


def probe_cpu(shape: ModelShape, *, nf4: bool) -> Probe:
    """Measure the feed-forward product of `shape`, and with `nf4` what making its weights whole again costs."""
    import torch

    x = torch.randn(_TOKENS, min(shape.hidden, _LARGEST))
    weight = torch.randn(min(shape.feed_forward, _LARGEST), x.shape[1])
    seconds = _seconds(lambda: torch.nn.functional.linear(x, weight))
    rate = 2.0 * _TOKENS * weight.numel() / seconds
    return Probe(rate, weight.numel() / _seconds(_dequantise(weight)) if nf4 else 0.0)


def _dequantise(weight):
    from bitsandbytes import functional

    packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    return lambda: functional.dequantize_4bit(packed, state)


def _seconds(call) -> float:
    """Return the median seconds of a call, over enough calls that a small product's first ones do not count.

    Threads that wake up, or other work of the machine, make those a hundred times slower.
    """
    call()
    times: list[float] = []
    while len(times) < _REPEATS or sum(times) < _LEAST:
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return median(times)
