"""Attention over texts packed into one row: a text sees its own earlier tokens and those of its prefix, no others.

A pack is one row of tokens, [1, total], without padding. A piece may name an earlier piece as its prefix, as an answer
names its prompt; it then attends to the whole prefix and, causally, to itself.

scoring.packed_model registers this attention with transformers under `NAME`, so that a model's own code calls it with
its own scaling, sliding window and soft-cap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "arena_packed"
# Queries that meet their keys at a time where a mask is needed: bounds the memory of mask and scores.
_BLOCK = 256
# Arguments that some models give to their attention and that this one does not support.
_UNSUPPORTED = ("s_aux", "sinks", "position_bias")


class UnknownAttention(Exception):
    """The model's attention needs something that packed attention does not support."""


@dataclass(frozen=True)
class Span:
    """One piece: its places in the row of queries, and in the row of keys (its prefix, if any, then its own).

    The queries are the last ones of the keys' positions.
    """

    queries: slice
    keys: tuple[slice, ...]


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    spans: tuple[Span, ...] | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention's output [1, queries, heads, head size] of a pack; keys are [1, key heads, total, head size].

    Raises UnknownAttention if the model passes an argument that changes attention in an unsupported way.
    """
    import torch

    if spans is None or attention_mask is not None or any(others.get(name) is not None for name in _UNSUPPORTED):
        raise UnknownAttention(type(module).__name__)
    if not getattr(module, "is_causal", True):
        raise UnknownAttention(f"{type(module).__name__} is not causal")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeats = query.shape[1] // key.shape[1]
    if query.is_cuda and query.dtype.itemsize == 2 and softcap is None:
        return _varlen(query, key, value, spans, repeats, scaling, sliding_window), None

    def of(span: Span, x: torch.Tensor) -> torch.Tensor:
        found = x[:, :, span.keys[0]] if len(span.keys) == 1 else torch.cat([x[:, :, part] for part in span.keys], 2)
        return found.repeat_interleave(repeats, 1) if repeats > 1 else found

    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for span in spans:
        keys, values = of(span, key), of(span, value)
        found = attend(query[:, :, span.queries], keys, values, scaling, sliding_window, softcap)
        output[:, span.queries] = found.transpose(1, 2)
    return output, None


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scaling: float, window: int | None, softcap: float | None
) -> torch.Tensor:
    """Return causal attention of the last n of L positions, [1, heads, n, size]; q has n of them, k and v all L.

    A position sees itself and the `window` - 1 before it, or all before it; `softcap` bounds the scores.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    count, length = q.shape[2], k.shape[2]
    window = length if window is None else min(window, length)
    if softcap is None and count == length == window:
        return scaled_dot_product_attention(q, k, v, is_causal=count > 1, scale=scaling)
    parts, offset = [], length - count
    for first in range(0, count, _BLOCK):
        stop = min(first + _BLOCK, count)
        low, high = max(0, offset + first - window + 1), offset + stop
        part, keys, values = q[:, :, first:stop], k[:, :, low:high], v[:, :, low:high]
        ahead = torch.arange(low, high, device=q.device) - torch.arange(offset + first, high, device=q.device)[:, None]
        seen = (ahead <= 0) & (ahead > -window) if stop - first > 1 else None
        if softcap is None:
            parts.append(scaled_dot_product_attention(part, keys, values, attn_mask=seen, scale=scaling))
            continue
        scores = torch.tanh(part @ keys.transpose(2, 3) * (scaling / softcap)) * softcap
        if seen is not None:
            scores = scores.masked_fill(~seen, float("-inf"))
        parts.append(scores.softmax(-1, dtype=torch.float32).to(values.dtype) @ values)
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _varlen(query, key, value, spans, repeats: int, scaling: float, window: int | None) -> torch.Tensor:
    """Return flash attention over all pieces at once; it aligns causal masks to the end, where the queries are."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    places = [torch.cat([torch.arange(part.start, part.stop) for part in span.keys]) for span in spans]
    order = torch.cat(places).to(key.device)
    whole = len(order) == key.shape[2] and all(len(span.keys) == 1 for span in spans)

    def rows(x: torch.Tensor) -> torch.Tensor:
        x = x[0].transpose(0, 1)
        return (x if whole else x[order]).repeat_interleave(repeats, 1).contiguous()

    def starts(lengths: list[int]) -> torch.Tensor:
        return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(query.device)

    counts = [span.queries.stop - span.queries.start for span in spans]
    lengths = [len(place) for place in places]
    output = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        rows(key),
        rows(value),
        starts(counts),
        starts(lengths),
        max(counts),
        max(lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output.unsqueeze(0)
