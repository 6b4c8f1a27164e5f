"""Memory: the gibibytes that a training or a scoring run takes at its peak, from a stated formula.

Each part is what torch, peft and LLaMA-Factory 0.9.5 really keep; docs/forecast.md lists the formula and how close it
came where it was measured.
"""

from __future__ import annotations

from factory.devices import GIB
from factory.fingerprint import names
from factory.workload import ModelSize, TrainConfig

# Bytes of a 4-bit weight: half a byte, one fp32 scale for 64 weights, or with double quantisation one byte for 64
# and one fp32 for 256 of those (Dettmers et al. 2023, QLoRA, section 3).
_NF4 = {False: 0.5 + 4 / 64, True: 0.5 + 1 / 64 + 4 / (64 * 256)}
# Bytes a token, in units of hidden, query, key-and-value and feed-forward width. On a GPU, 16-bit numbers: what a layer
# with LoRA keeps for its backward pass, and what that pass takes beside it; fitted to every allocation of such layers,
# counted on a CPU. On a CPU, 32 bits: what stays in the resident set, fitted to whole trainings
# (benchmarks/forecast_check.py).
_KEPT = {"cuda": (18.2, 6.3, 2.2, 8.1), "cpu": (50, 28, 14, 28)}
_WORK = {"cuda": (14.1, 0.0, 0.0, 6.0), "cpu": (0, 0, 0, 0)}
# What more is kept: by norms of queries and keys, of the same widths; by soft-capped attention, of the hidden width
# (two more norms) and of heads x length of the row, because it computes all attention scores. Those also cost, at
# their own moment, beside what is kept.
_NORMED = (0.0, 4.1, 2.1, 0.0)
_CAPPED, _SCORES, _SCORES_WORK = (8.2, 0.0, 0.0, 0.0), 8.0, 4.8
# Bytes a token and entry of the vocabulary, at the worst moment: the logits, their fp32 form, log-probabilities,
# gradient (SFT: transformers' loss; DPO: policy and reference at a time; RM: logits that nothing uses). Measured in
# the same two ways.
_LOGITS = {"cuda": {"sft": 12.7, "dpo": 20.7, "rm": 11.1}, "cpu": {"sft": 16, "dpo": 20, "rm": 4}}
# Gibibytes of a process before any model: CUDA context and libraries on a GPU; Python with torch, transformers and
# LLaMA-Factory on a CPU (measured there).
_PROCESS = {"cuda": 0.9, "cpu": 1.14}
# What an allocator holds beyond what is used.
SLACK = {"cuda": 1.06, "cpu": 1.0}


def training_memory(size: ModelSize, config: TrainConfig, longest: int, device: str = "cuda") -> dict[str, float]:
    """Return the GiB of each part when a batch holds the longest row; `longest` in tokens, padded."""
    sequences = config["per_device_train_batch_size"] * (1 if config["stage"] == "sft" else 2)
    bits, c = config["quantization_bit"], config.compute_bytes
    whole = {"embed_tokens": size.embedding, "lm_head": size.embedding}  # peft copies them, tied or not
    trained = size.lora(config["lora_rank"]) + sum(whole.get(name, 0) for name in names(config["additional_target"]))
    parts = {
        "weights": weight_bytes(size, bits, c, double=bool(config["double_quantization"])),
        "adapter, gradients, optimizer": trained * (8 + config.optimizer_bytes),
        **_activations(size, config, sequences * longest, longest, device),
        "dequantised weights": _dequantised(size, bits, c),
    }
    return _gibibytes(parts, device)


def _activations(size: ModelSize, config: TrainConfig, tokens: int, longest: int, device: str) -> dict[str, float]:
    """Return the bytes kept for the backward pass together with those of the worst moment: the logits', or a layer's.

    A GPU's allocator uses the same memory for both moments; a CPU's resident set holds both.
    """
    widths = (size.hidden, size.attention_width, size.key_value_width, size.feed_forward)

    def of(bytes_each: tuple[float, ...]) -> float:
        return sum(c * w for c, w in zip(bytes_each, widths, strict=True))

    kept, work = of(_KEPT[device]), of(_WORK[device])  # of one token
    if size.normed and device == "cuda":  # the CPU's bytes were fitted to such models
        kept += of(_NORMED)
    if size.soft_capped:
        scores = size.heads * longest
        kept, work = kept + of(_CAPPED) + _SCORES * scores, max(work, _SCORES_WORK * scores)
    kept, work = tokens * kept, tokens * work
    if device == "cuda" and config.compute_bytes == 4:  # no 16-bit numbers in the recipe
        kept, work = 2 * kept, 2 * work
    if config.checkpoints:
        kept, work = size.layers * tokens * size.hidden * config.compute_bytes, kept + work
    else:
        kept *= size.layers
    # Liger's fused loss never makes the logits; LLaMA-Factory does not use it in stages that need them.
    fused = config["enable_liger_kernel"] and config["stage"] == "sft"
    logits = 0.0 if fused else tokens * size.vocabulary * _LOGITS[device][config["stage"]]
    if device == "cpu":
        return {"activations": kept + work, "logits": logits}
    return {"activations": kept + (work if work >= logits else 0), "logits": logits if logits > work else 0}


def scoring_memory(
    size: ModelSize, *, bits: int | None, budget: int, longest: int, device: str = "cuda"
) -> dict[str, float]:
    """Return the GiB of each part of scoring with a token budget; only label positions pass through the head."""
    c = 2 if device == "cuda" else 4
    # One layer at a time, nothing kept: residual, norm, q, k, v, and the feed-forward's three intermediate results.
    widths = 4 * size.hidden + 2 * size.attention_width + 2 * size.key_value_width + 3 * size.feed_forward
    parts = {
        "weights": weight_bytes(size, bits, c),
        "activations": max(budget, longest) * widths * c,
        "dequantised weights": _dequantised(size, bits, c),
    }
    return _gibibytes(parts, device)


def weight_bytes(size: ModelSize, bits: int | None, compute_bytes: int, *, double: bool = True) -> float:
    """Return the bytes of the frozen model; embedding and head are never quantised."""
    each = {4: _NF4[double], 8: 1.0, None: compute_bytes}[bits]
    return size.linear * each + (size.embedding + size.head) * compute_bytes


def _dequantised(size: ModelSize, bits: int | None, compute_bytes: int) -> float:
    """Return the bytes of the largest layer's weights as the product needs them, beside their gradient's."""
    return 2 * max(i * o for i, o in size.linear_shapes()) * compute_bytes if bits else 0.0


def _gibibytes(parts: dict[str, float], device: str) -> dict[str, float]:
    gib = {name: value * SLACK[device] / GIB for name, value in parts.items() if value}
    return {**gib, "process": _PROCESS[device]}
