"""Attention over packed pieces: no piece sees another's tokens, except those of its own prefix.

A pack is one row of tokens, [1, total]: pieces behind one another, without padding. A piece may name an earlier one
as its prefix, as an answer does its prompt; then it attends to the whole prefix and, causally, to itself.

Registered in transformers under `NAME`, so that a model's own code calls it with its own scaling, sliding window and
soft-cap.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

NAME = "arena_packed"
# Queries that meet their keys at a time where a mask is needed: bounds the mask and the scores.
_BLOCK = 256
# What a model may hand to its attention and this one does not compute.
_UNKNOWN = ("s_aux", "sinks", "position_bias")


class UnknownAttention(Exception):
    """The model's attention needs something that packed attention does not do."""


@dataclass(frozen=True)
class Span:
    """One piece's queries and keys: queries [first, stop) of the query row; keys `prefix` and then `own`.

    The queries are the last ones of the keys' positions.
    """

    first: int
    stop: int
    own: tuple[int, int]
    prefix: tuple[int, int] = (0, 0)


def register() -> None:
    """Make packed attention known to transformers; no mask is made for it."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, packed_attention)


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
    """Return attention's output [1, queries, heads, head size] of a packed row; keys are [1, key heads, total, size].

    Raises UnknownAttention if the model asks for what this one does not compute.
    """
    if spans is None or attention_mask is not None or any(others.get(x) is not None for x in _UNKNOWN):
        raise UnknownAttention(type(module).__name__)
    if not getattr(module, "is_causal", True):
        raise UnknownAttention(f"{type(module).__name__} is not causal")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    repeats = query.shape[1] // key.shape[1]
    if query.is_cuda and query.dtype.itemsize == 2 and softcap is None:
        return _varlen(query, key, value, spans, repeats, scaling, sliding_window), None
    output = query.new_empty(1, query.shape[2], query.shape[1], value.shape[-1])
    for span in spans:
        q = query[:, :, span.first : span.stop]
        k, v = (_keys(x, span).repeat_interleave(repeats, 1) if repeats > 1 else _keys(x, span) for x in (key, value))
        output[:, span.first : span.stop] = attend(q, k, v, scaling, sliding_window, softcap).transpose(1, 2)
    return output, None


def _keys(x: torch.Tensor, span: Span) -> torch.Tensor:
    own = x[:, :, slice(*span.own)]
    return own if span.prefix[0] == span.prefix[1] else _joined(x[:, :, slice(*span.prefix)], own)


def _joined(*parts: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat(parts, 2)


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
        else:
            parts.append(_capped(part, keys, values, scaling, softcap, seen))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


def _capped(q, k, v, scaling: float, softcap: float, seen: torch.Tensor | None) -> torch.Tensor:
    import torch

    scores = torch.tanh(q @ k.transpose(2, 3) * (scaling / softcap)) * softcap
    if seen is not None:
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def _varlen(query, key, value, spans, repeats: int, scaling: float, window: int | None) -> torch.Tensor:
    """Flash attention over all pieces at once; its causal masks are aligned to the end, as pieces' queries are."""
    import torch
    from torch.nn.attention.varlen import varlen_attn

    places = [torch.cat([torch.arange(*span.prefix), torch.arange(*span.own)]) for span in spans]
    order = torch.cat(places).to(key.device)
    whole = len(order) == key.shape[2] and all(span.prefix[0] == span.prefix[1] for span in spans)

    def rows(x: torch.Tensor) -> torch.Tensor:
        x = x[0].transpose(0, 1)
        return (x if whole else x[order]).repeat_interleave(repeats, 1).contiguous()

    counts, lengths = [span.stop - span.first for span in spans], [len(place) for place in places]
    output = varlen_attn(
        query[0].transpose(0, 1).contiguous(),
        rows(key),
        rows(value),
        _cumulative(counts, query.device),
        _cumulative(lengths, query.device),
        max(counts),
        max(lengths),
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
    )
    return output.unsqueeze(0)


def _cumulative(lengths: list[int], device: torch.device) -> torch.Tensor:
    import torch

    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)
