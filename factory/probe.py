"""A probe: how fast this machine's CPU multiplies matrices, measured in a second, for a forecast of its own hours."""

from __future__ import annotations

import time
from dataclasses import dataclass
from statistics import median

from factory.model_size import ModelShape

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
