"""A packed model: a causal language model that computes final hidden states only where they are wanted, in batches.

It packs pieces of text into one row without padding (scoring.packed_attention). Of the last layer it computes keys and
values for all tokens, everything else for the wanted tokens only. Whether a model's family allows that is tried when
the packed model is made, against the model's own plain pass. Where it does not, rows are padded on the right, which
changes nothing in a causal model. `run_batches` reads groups of pieces within a token budget, the longest first, halved
where memory runs out.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

from common.errors import ArenaError
from factory.devices import TOKEN_BUDGET
from scoring.packed_attention import NAME, Span, UnknownAttention, packed_attention

if TYPE_CHECKING:
    import torch

# How far packing may move a hidden state on the probe: the root mean square over its numbers, in standard deviations.
# Of real weights in bf16 single numbers move by .25, in either way of reading, and a state by .013.
_TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2, "int8": 1e-1}
_FAILURES = (UnknownAttention, AttributeError, TypeError, KeyError, RuntimeError, NotImplementedError)


@dataclass(frozen=True)
class Piece:
    """Token ids; the hidden states of the last `wanted` are computed; `prefix` is the index of an earlier piece.

    A prefix has no prefix itself.
    """

    ids: Sequence[int]
    wanted: int = 1
    prefix: int | None = None


@dataclass(frozen=True)
class Pack:
    """Pieces as one row: ids and positions [1, total], places of the wanted, spans of all queries and of the wanted."""

    ids: torch.Tensor
    positions: torch.Tensor
    places: torch.Tensor
    spans: tuple[Span, ...]
    wanted_spans: tuple[Span, ...]


def pack(pieces: Sequence[Piece], device: torch.device | str = "cpu") -> Pack:
    """Return the pieces as one row, one behind the other."""
    import torch

    own, positions, spans, wanted_spans, places = [], [], [], [], []
    total = wanted = 0
    for piece in pieces:
        stop = total + len(piece.ids)
        own.append(slice(total, stop))
        keys = (own[-1],) if piece.prefix is None else (own[piece.prefix], own[-1])
        before = 0 if piece.prefix is None else len(pieces[piece.prefix].ids)
        positions.append(torch.arange(before, before + len(piece.ids)))
        spans.append(Span(own[-1], keys))
        if piece.wanted:
            wanted_spans.append(Span(slice(wanted, wanted + piece.wanted), keys))
            places.append(torch.arange(stop - piece.wanted, stop))
        total, wanted = stop, wanted + piece.wanted
    ids = torch.tensor([token for piece in pieces for token in piece.ids])
    tensors = (each.to(device) for each in (ids[None], torch.cat(positions)[None], torch.cat(places)))
    return Pack(*tensors, tuple(spans), tuple(wanted_spans))


class PackedModel:
    """A causal model, possibly in PEFT's wrapper, that reads packs of pieces; the module's docstring says how."""

    def __init__(self, model: Any, *, pads: bool | None = None):
        """Try whether packing gives the model's own hidden states, unless `pads` says whether rows are padded instead.

        Raises ArenaError for a model whose body and head cannot be told apart.
        """
        from transformers import AttentionInterface
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.model = model
        self.causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self.body = self.causal.base_model  # token ids in, final hidden states out
        if self.body is self.causal:
            remedy = "choose a base model of a common decoder family (Llama, Qwen, Gemma, Mistral, Phi)"
            what = f"{type(self.causal).__name__} does not separate its body from its head"
            raise ArenaError(what, where="model", remedy=remedy)
        self._config = self.causal.config.get_text_config()
        self._output: Any = BaseModelOutputWithPast
        self._by_length = _rotates_by_length(self._config)
        AttentionInterface.register(NAME, packed_attention)
        # Layers that attend neither to everything nor to a window may pass a short probe and fail on long rows.
        kinds = set(getattr(self._config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
        self.pads = False  # else each wanted piece is read as a row with its prefix, padded to the longest
        self.pads = bool(self._by_length or kinds or not self._packs_exactly()) if pads is None else pads

    @classmethod
    def of(cls, model: Any) -> PackedModel:
        """Return the packed model of a causal model; one that is packed already is returned as it is."""
        return model if isinstance(model, cls) else cls(model)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs are expected."""
        return self.model.device

    def states(self, pack: Pack) -> torch.Tensor:
        """Return the wanted hidden states behind the last norm, [wanted in all, hidden], in the pieces' order."""
        if self.pads:
            return self._padded(pack)
        with self._attention(NAME), self._trimmed(pack):
            return self._hidden(input_ids=pack.ids, position_ids=pack.positions, spans=pack.spans)[0]

    def states_behind(self, layers: Sequence[int], pack: Pack) -> torch.Tensor:
        """Return the wanted hidden states behind these layers (1 is the first) side by side, [wanted, layers x hidden].

        No layer behind the last of them is computed.
        """
        if self.pads:
            return self._padded(pack, layers)
        with self._attention(NAME):
            hidden = self._hidden(layers, input_ids=pack.ids, position_ids=pack.positions, spans=pack.spans)
        return hidden[0, pack.places]

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, vocabulary] of hidden states [n, hidden]: the model's own forward without its body.

        So the model's own code does whatever it does behind its head (Gemma's soft-cap, a scale).
        """
        import torch

        # of the body's own output type: a model of experts reads more than the hidden states from it
        ready = self._output(last_hidden_state=states.unsqueeze(0))
        with patch.object(self.body, "forward", lambda *_, **__: ready):
            ids = torch.zeros(1, len(states), dtype=torch.long, device=states.device)
            return self.causal(input_ids=ids, use_cache=False).logits[0]

    def label_logits(self, states: torch.Tensor, label_ids: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, labels] of some tokens only, in fp32 where the head is a plain layer.

        Rounding to 16 bit behind the head would cost more digits than the whole body does.
        """
        import torch

        head = _active(self.causal.get_output_embeddings())
        if type(head) is not torch.nn.Linear or not head.weight.is_floating_point():
            return self.logits(states)[:, label_ids].float()
        rows = head.weight[label_ids].float()
        bias = None if head.bias is None else head.bias[label_ids].float()
        with patch.object(head, "forward", lambda x: torch.nn.functional.linear(x, rows, bias)):
            return self.logits(states.float())

    def _hidden(self, layers: Sequence[int] = (), /, **inputs: Any) -> torch.Tensor:
        """Return the final hidden states, or those behind some layers side by side."""
        if layers:
            return self._behind(layers, inputs)
        output = self.body(use_cache=False, **inputs)
        self._output = type(output)
        return output.last_hidden_state

    def _behind(self, layers: Sequence[int], inputs: dict[str, Any]) -> torch.Tensor:
        import torch

        kept: dict[int, torch.Tensor] = {}

        def keep(number: int, output: Any) -> None:
            kept[number] = output[0] if isinstance(output, tuple) else output
            if number == max(layers):
                raise _Found

        with ExitStack() as hooks, suppress(_Found):
            for number in set(layers):
                hook = self.body.layers[number - 1].register_forward_hook(lambda _, __, out, at=number: keep(at, out))
                hooks.callback(hook.remove)
            self.body(use_cache=False, **inputs)
        return torch.cat([kept[number] for number in layers], dim=-1)

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        kept = self._config._attn_implementation
        self._config._attn_implementation = name
        try:
            yield
        finally:
            self._config._attn_implementation = kept

    @contextmanager
    def _trimmed(self, pack: Pack) -> Iterator[None]:
        """Let the last layer compute keys and values of all tokens, and everything else of the wanted ones only."""
        layer = self.body.layers[-1]
        whole = layer.forward

        def trimmed(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
            if args:
                raise UnknownAttention(f"{type(layer).__name__} is called with positional arguments")
            options |= {"past_key_values": _KeysAndValues()}
            with suppress(_Found):
                layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)
            cos, sin = options["position_embeddings"]
            options |= {
                "position_embeddings": (cos[:, pack.places], sin[:, pack.places]),
                "position_ids": pack.positions[:, pack.places],
                "spans": pack.wanted_spans,
            }
            return whole(hidden[:, pack.places], **options)

        with patch.object(layer, "forward", trimmed):
            yield

    def _padded(self, pack: Pack, layers: Sequence[int] = ()) -> torch.Tensor:
        """Read each wanted piece with its prefix as a row of its own, with the model's own attention."""
        import torch

        rows = [torch.cat([pack.ids[0, part] for part in span.keys]) for span in pack.wanted_spans]
        # Of the attention implementations only the eager one applies a soft-cap of the scores; others drop it silently.
        capped = getattr(self._config, "attn_logit_softcapping", None) is not None
        with self._attention("eager" if capped else self._config._attn_implementation):
            if self._by_length:
                hidden = [self._hidden(layers, input_ids=row[None])[0] for row in rows]
            else:
                hidden = self._hidden(layers, input_ids=torch.nn.utils.rnn.pad_sequence(rows, batch_first=True))
        wanted = [span.queries.stop - span.queries.start for span in pack.wanted_spans]
        return torch.cat([h[len(r) - n : len(r)] for h, r, n in zip(hidden, rows, wanted, strict=True)])

    def _packs_exactly(self) -> bool:
        import torch

        tokens = torch.arange(72).mul(7919).remainder(self._config.vocab_size).tolist()
        pieces = [Piece(tokens[:23]), Piece(tokens[23:32], wanted=2, prefix=0), Piece(tokens[32:], prefix=0)]
        probe = pack(pieces, self.device)
        with torch.inference_mode():
            expected = self._padded(probe)
            # int8 finds its outliers over a whole batch, so its results are never quite those of another batch
            kind = "int8" if getattr(self.causal, "is_loaded_in_8bit", False) else str(expected.dtype)
            limit = _TOLERANCE[kind.removeprefix("torch.")] * float(expected.float().std())
            with suppress(*_FAILURES):
                moved = (self.states(probe) - expected).float().square().mean(dim=-1).sqrt()
                return float(moved.max()) <= limit
        return False


class _Found(Exception):
    """What was asked for is known: the rest need not be computed."""


class _KeysAndValues:
    """Stands in for a layer's cache: keeps what it is first given, and returns that from then on."""

    _kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kept is not None:
            return self._kept
        self._kept = key, value
        raise _Found


def _active(head: Any) -> Any:
    """Return the layer that computes: of a head that PEFT trained as a whole, the trained one while it is on."""
    if not hasattr(head, "modules_to_save"):
        return head
    on = [name for name in head.active_adapters if name in head.modules_to_save and not head.disable_adapters]
    return head.modules_to_save[on[0]] if on else head.original_module


def _rotates_by_length(config: Any) -> bool:
    """Return whether the rotary angles depend on the longest row of a batch, so that rows may not share one."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


Group = Sequence[Piece]  # pieces that share a batch, such as a prompt and its answers


def run_batches(
    model: PackedModel,
    groups: Sequence[Group],
    work: Callable[[list[int], Pack], None],
    *,
    token_budget: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
    name: Callable[[int], str] = "prompt {}".format,
    note: Callable[[str], None] = warnings.warn,
) -> None:
    """Call `work(indices, pack)` on every group once, in batches; `pack` has the groups' pieces behind one another.

    `progress` gets the share of the tokens that is done. `work` may be called again for the same indices: out of
    memory halves the token budget, reports it by `note` and continues. Raises ArenaError that calls a group by
    `name(index)` where it does not fit alone.
    """
    import torch

    budget = token_budget or TOKEN_BUDGET[model.device.type]
    sizes = [sum(len(piece.ids) for piece in group) for group in groups]
    # Longest first: a batch that does not fit in memory fails at once, not after an hour.
    order = sorted(range(len(groups)), key=lambda i: -sizes[i])
    done = tokens = 0
    while done < len(order):
        failed: list[int] = []
        for batch in _plan(model, groups, order[done:], budget):
            try:
                with torch.inference_mode():
                    work(batch, pack(_joined([groups[i] for i in batch]), model.device))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                failed = batch
                break
            done += len(batch)
            tokens += sum(sizes[i] for i in batch)
            progress(tokens / sum(sizes))
        if failed:
            # Only here, where the exception and with it the failed pass's frames are gone, can memory be freed.
            torch.cuda.empty_cache()
            if len(failed) == 1:
                raise ArenaError(
                    f"its {sizes[failed[0]]} tokens alone do not fit in memory",
                    where=name(failed[0]),
                    remedy="free memory, choose a smaller --precision, or lower cutoff_len and train again",
                )
            budget = max(1, min(budget, sum(sizes[i] for i in failed)) // 2)
            note(f"out of memory: continuing with {budget:,} tokens a batch")


def _plan(model: PackedModel, groups: Sequence[Group], order: list[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of neighbours in `order`, each within the budget or of one group."""
    batch: list[int] = []
    rows = longest = tokens = 0
    for index in order:
        group = groups[index]
        size = sum(len(piece.ids) for piece in group)
        lengths = [len(p.ids) + (0 if p.prefix is None else len(group[p.prefix].ids)) for p in group if p.wanted]
        rows, longest, tokens = rows + len(lengths), max(longest, *lengths), tokens + size
        if batch and (rows * longest if model.pads else tokens) > budget:
            yield batch
            batch, rows, longest, tokens = [], len(lengths), max(lengths), size
        batch.append(index)
    if batch:
        yield batch


def _joined(groups: Sequence[Group]) -> list[Piece]:
    """Return the pieces of all groups one behind the other, with their prefixes' new places."""
    pieces: list[Piece] = []
    for group in groups:
        first = len(pieces)
        pieces += [p if p.prefix is None else replace(p, prefix=p.prefix + first) for p in group]
    return pieces


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
