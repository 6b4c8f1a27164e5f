"""Memory: the gibibytes that a training or a scoring run takes at its peak, from a stated formula.

Each part is what torch, peft and LLaMA-Factory 0.9.5 really keep; docs/forecast.md lists the formula and how near it
came where it was measured. n = tokens of the largest batch, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from factory.card import GIB
from factory.setup import Setup
from factory.shape import ModelShape

# Bytes of a 4-bit weight: half a byte, one fp32 scale for 64 weights, or with double quantisation one byte for 64
# and one fp32 for 256 of those (Dettmers et al. 2023, QLoRA, section 3).
_NF4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
# Bytes a token that one decoder layer keeps for its backward pass, in units of (hidden, attention, key-value and
# feed-forward width), by bytes of a number. In 32 bits: measured on a CPU (benchmarks/forecast_check.py). In 16 bits:
# counted (norms keep their input and its fp32 form, LoRA a copy of each input) and raised by 1.4; the same count in 32
# bits had to be raised by 1.8. Not measured.
_LAYER = {2: (50, 11, 6, 14), 4: (50, 28, 14, 28)}
# Bytes a token and entry of the vocabulary, at the worst moment: the logits, their fp32 form, log-probabilities,
# gradient (SFT: transformers' loss; DPO: policy and reference at a time; RM: logits that nobody needs).
_LOGITS = {"sft": {2: 14, 4: 16}, "dpo": {2: 18, 4: 20}, "rm": {2: 10, 4: 4}}
# Gibibytes of a process before any model: CUDA context and libraries on a GPU; Python with torch, transformers and
# LLaMA-Factory on a CPU (measured there).
PROCESS = {"cuda": 0.9, "cpu": 1.14}
# What an allocator holds beyond what is used.
_SLACK = {"cuda": 1.06, "cpu": 1.0}


@dataclass(frozen=True)
class Memory:
    """Gibibytes by part, and their sum."""

    parts: Mapping[str, float]

    @property
    def total(self) -> float:
        """The peak in GiB."""
        return sum(self.parts.values())


def training_memory(shape: ModelShape, setup: Setup, longest: int, device: str = "cuda") -> Memory:
    """Return the peak of training when a batch holds the longest row; `longest` in tokens, padded."""
    sequences = setup.batch * (1 if setup.stage == "sft" else 2)
    tokens, c = sequences * longest, setup.compute_bytes
    trained = _trained(shape, setup)
    layer = tokens * _layer_bytes(shape, c)
    kept = shape.layers * tokens * shape.hidden * c + layer if setup.checkpointing else shape.layers * layer
    # Liger's fused loss never makes the logits; LLaMA-Factory leaves it out where a stage wants to see them.
    fused = setup.liger and setup.stage == "sft"
    logits = 0 if fused else tokens * shape.vocabulary * _LOGITS[setup.stage][c]
    parts = {
        "weights": weight_bytes(shape, setup.bits, c, double=setup.double_quantization),
        "adapter, gradients, optimizer": trained * (8 + setup.optimizer_bytes),
        "activations": kept,
        "logits": logits,
        "dequantised weights": _buffer(shape, setup.bits, c),
    }
    return _memory(parts, device)


def scoring_memory(shape: ModelShape, *, bits: int | None, budget: int, longest: int, device: str = "cuda") -> Memory:
    """Return the peak of scoring a merged model with a token budget; only label positions pass through the head."""
    c = 2 if device == "cuda" else 4
    tokens = max(budget, longest)
    # One layer at a time, nothing kept: residual, norm, q, k, v, and the feed-forward's three intermediate results.
    widths = 4 * shape.hidden + 2 * shape.attention_width + 2 * shape.key_value_width + 3 * shape.feed_forward
    parts = {
        "weights": weight_bytes(shape, bits, c),
        "activations": tokens * widths * c,
        "dequantised weights": _buffer(shape, bits, c),
    }
    return _memory(parts, device)


def weight_bytes(shape: ModelShape, bits: int | None, compute_bytes: int, *, double: bool = True) -> float:
    """Return the bytes of the frozen model; embedding and head are never quantised."""
    each: dict[Any, float] = {4: _NF4[double], 8: 1.0, None: compute_bytes}
    return shape.linear * each[bits] + (shape.embedding + shape.head) * compute_bytes


def _trained(shape: ModelShape, setup: Setup) -> int:
    whole = {"embed_tokens": shape.embedding, "lm_head": shape.embedding}  # peft copies them: tied or not
    return shape.lora(setup.rank) + sum(whole.get(name, 0) for name in setup.trained_modules)


def _layer_bytes(shape: ModelShape, compute_bytes: int) -> float:
    hidden, attention, key_value, feed_forward = _LAYER[compute_bytes]
    return (
        hidden * shape.hidden
        + attention * shape.attention_width
        + key_value * shape.key_value_width
        + feed_forward * shape.feed_forward
    )


def _buffer(shape: ModelShape, bits: int | None, compute_bytes: int) -> float:
    """The largest layer's weights in the form that the product needs, beside their gradient's."""
    largest = max(i * o for i, o in shape.linear_shapes())
    return 2 * largest * compute_bytes if bits else 0.0


def _memory(parts: Mapping[str, float], device: str) -> Memory:
    gib = {name: value * _SLACK[device] / GIB for name, value in parts.items() if value}
    return Memory({**gib, "process": PROCESS[device]})
