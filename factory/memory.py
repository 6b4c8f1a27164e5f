"""Memory: the gibibytes that a training or a scoring run takes at its peak, from a stated formula.

Each part is what torch, peft and LLaMA-Factory 0.9.5 really keep; docs/forecast.md lists the formula and how near it
came where it was measured. n = tokens of the largest batch, padding included.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from factory.gpu import GIB
from factory.model_size import ModelShape
from factory.train_config import Setup

# Bytes of a 4-bit weight: half a byte, one fp32 scale for 64 weights, or with double quantisation one byte for 64
# and one fp32 for 256 of those (Dettmers et al. 2023, QLoRA, section 3).
_NF4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
# Bytes a token, in units of hidden, query, key-and-value and feed-forward width. On a GPU, 16-bit numbers: what a layer
# with LoRA keeps for its backward pass, and what that pass takes beside it (benchmarks/activation_bytes.py measures
# both). On a CPU, 32 bits: what stays in the resident set, fitted to whole trainings (benchmarks/forecast_check.py).
_KEPT = {"cuda": (18.2, 6.3, 2.2, 8.1), "cpu": (50, 28, 14, 28)}
_WORK = {"cuda": (14.1, 0.0, 0.0, 6.0), "cpu": (0, 0, 0, 0)}
# What more is kept: by norms of queries and keys, of the same widths; by soft-capped attention, of the hidden width
# (two norms more) and of heads x length of the row, for it makes the attention scores in full. Those also cost, at
# their own moment, beside what is kept.
_NORMED = (0.0, 4.1, 2.1, 0.0)
_CAPPED, _SCORES, _SCORES_WORK = (8.2, 0.0, 0.0, 0.0), 8.0, 4.8
# Bytes a token and entry of the vocabulary, at the worst moment: the logits, their fp32 form, log-probabilities,
# gradient (SFT: transformers' loss; DPO: policy and reference at a time; RM: logits that nobody needs). Measured by the
# same two scripts.
_LOGITS = {"cuda": {"sft": 12.7, "dpo": 20.7, "rm": 11.1}, "cpu": {"sft": 16, "dpo": 20, "rm": 4}}
# Gibibytes of a process before any model: CUDA context and libraries on a GPU; Python with torch, transformers and
# LLaMA-Factory on a CPU (measured there).
PROCESS = {"cuda": 0.9, "cpu": 1.14}
# What an allocator holds beyond what is used.
SLACK = {"cuda": 1.06, "cpu": 1.0}


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
    parts = {
        "weights": weight_bytes(shape, setup.bits, c, double=setup.double_quantization),
        "adapter, gradients, optimizer": trained * (8 + setup.optimizer_bytes),
        **_activations(shape, setup, tokens, longest, device),
        "dequantised weights": _buffer(shape, setup.bits, c),
    }
    return _memory(parts, device)


def _activations(shape: ModelShape, setup: Setup, tokens: int, longest: int, device: str) -> dict[str, float]:
    """Return the bytes that are kept for the backward pass with the worst moment's: the logits', or a layer's.

    A GPU's allocator gives the one's memory to the other; a CPU's resident set holds both.
    """
    kept, work = (tokens * value for value in layer_bytes(shape, longest, device))
    if device == "cuda" and setup.compute_bytes == 4:  # no 16-bit numbers in the recipe
        kept, work = 2 * kept, 2 * work
    if setup.checkpointing:
        kept, work = shape.layers * tokens * shape.hidden * setup.compute_bytes, kept + work
    else:
        kept *= shape.layers
    # Liger's fused loss never makes the logits; LLaMA-Factory leaves it out where a stage wants to see them.
    fused = setup.liger and setup.stage == "sft"
    logits = 0.0 if fused else tokens * shape.vocabulary * _LOGITS[device][setup.stage]
    if device == "cpu":
        return {"activations": kept + work, "logits": logits}
    return {"activations": kept + (work if work >= logits else 0), "logits": logits if logits > work else 0}


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


def layer_bytes(shape: ModelShape, longest: int, device: str) -> tuple[float, float]:
    """Return the bytes a token that one layer keeps, and that its backward pass takes beside them.

    `longest` is the length of the rows in tokens, `device` cuda or cpu.
    """
    widths = (shape.hidden, shape.attention_width, shape.key_value_width, shape.feed_forward)

    def of(each: tuple[float, ...]) -> float:
        return sum(c * w for c, w in zip(each, widths, strict=True))

    kept, work = of(_KEPT[device]), of(_WORK[device])
    if shape.normed and device == "cuda":  # the CPU's bytes were fitted to such models
        kept += of(_NORMED)
    if shape.soft_capped:
        scores = shape.heads * longest
        kept, work = kept + of(_CAPPED) + _SCORES * scores, max(work, _SCORES_WORK * scores)
    return kept, work


def _buffer(shape: ModelShape, bits: int | None, compute_bytes: int) -> float:
    """The largest layer's weights in the form that the product needs, beside their gradient's."""
    largest = max(i * o for i, o in shape.linear_shapes())
    return 2 * largest * compute_bytes if bits else 0.0


def _memory(parts: Mapping[str, float], device: str) -> Memory:
    gib = {name: value * SLACK[device] / GIB for name, value in parts.items() if value}
    return Memory({**gib, "process": PROCESS[device]})
