"""A reader: hidden states of a causal model where they are wanted, and nowhere else.

It packs pieces of text into one row without padding (scoring.packed_attention) and, in the last layer, computes
beyond keys and values only what is wanted. Whether a model's family allows that is tried when the reader is made,
against the model's own plain pass; where it does not, rows are
padded on the right, which in a causal model changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import ArenaError
from scoring import packed_attention as attention
from scoring.packed_attention import Span, UnknownAttention

if TYPE_CHECKING:
    import torch

MODES = ("trimmed", "packed", "padded")
# The largest difference of hidden states, in their standard deviations, that packing may make on the probe.
_TOLERANCE = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 2e-1, "int8": 2e-1}
_PROBE = ((23, 1), (9, 2), (40, 1))  # pieces (tokens, wanted); the second and third have the first as their prefix


@dataclass(frozen=True)
class Piece:
    """Token ids, of which the hidden states of the last `wanted` are asked for; `prefix` is an earlier piece's index.

    A prefix has no prefix itself.
    """

    ids: Sequence[int]
    wanted: int = 1
    prefix: int | None = None


@dataclass(frozen=True)
class Pack:
    """Pieces as one row: ids and positions [1, total], spans of all queries and of the wanted ones, their places."""

    ids: torch.Tensor
    positions: torch.Tensor
    spans: tuple[Span, ...]
    wanted_spans: tuple[Span, ...]
    places: torch.Tensor

    def to(self, device: torch.device) -> Pack:
        """Return it on a device; the copy is made while earlier work there goes on."""
        if device.type == "cpu":
            return self
        ids, positions, places = (
            x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)
            for x in (self.ids, self.positions, self.places)
        )
        return Pack(ids, positions, self.spans, self.wanted_spans, places)


def pack(pieces: Sequence[Piece]) -> Pack:
    """Put pieces behind one another."""
    import torch

    starts, positions, spans, wanted_spans, places = [], [], [], [], []
    total = wanted = 0
    for piece in pieces:
        stop = total + len(piece.ids)
        prefix = (0, 0)
        if piece.prefix is not None:
            prefix = (starts[piece.prefix], starts[piece.prefix] + len(pieces[piece.prefix].ids))
        before = prefix[1] - prefix[0]
        positions.append(torch.arange(before, before + len(piece.ids)))
        spans.append(Span(total, stop, (total, stop), prefix))
        if piece.wanted:
            wanted_spans.append(Span(wanted, wanted + piece.wanted, (total, stop), prefix))
            places.append(torch.arange(stop - piece.wanted, stop))
        starts.append(total)
        total, wanted = stop, wanted + piece.wanted
    ids = torch.tensor([token for piece in pieces for token in piece.ids])
    return Pack(ids[None], torch.cat(positions)[None], tuple(spans), tuple(wanted_spans), torch.cat(places))


class Reader:
    """A model that is asked for hidden states; see the module's words."""

    def __init__(self, model: Any, *, mode: str | None = None):
        """Find the fastest of `MODES` that gives the model's own hidden states, unless `mode` names one."""
        from transformers.modeling_outputs import BaseModelOutputWithPast

        self.model, self.causal, self.body = model, causal_of(model), body_of(model)
        self._config = self.causal.config.get_text_config()
        self._output: Any = BaseModelOutputWithPast
        self._by_length = _rotates_by_length(self._config)
        attention.register()
        self.mode = mode or ("padded" if self._by_length or _is_chunked(self._config) else self._fastest())

    @classmethod
    def of(cls, model: Any) -> Reader:
        """Return the reader of a model; one that is a reader already is returned as it is."""
        return model if isinstance(model, cls) else cls(model)

    @property
    def device(self) -> torch.device:
        """Where the model's inputs are expected."""
        return self.model.device

    @property
    def pads(self) -> bool:
        """Whether each wanted piece is read as a row with its prefix, and rows are padded to the longest."""
        return self.mode == "padded"

    def states(self, pack: Pack) -> torch.Tensor:
        """Return the wanted hidden states behind the last norm, [wanted in all, hidden], in the pieces' order."""
        if self.pads:
            return self._padded(pack)
        with self._attention(attention.NAME), self._trimmed(pack) if self.mode == "trimmed" else _as_it_is():
            hidden = self._hidden(input_ids=pack.ids, position_ids=pack.positions, spans=pack.spans)[0]
        return hidden if self.mode == "trimmed" else hidden[pack.places]

    def _hidden(self, **inputs: Any) -> torch.Tensor:
        output = self.body(use_cache=False, **inputs)
        self._output = type(output)
        return output.last_hidden_state

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """Return the logits [n, vocabulary] of hidden states [n, hidden]: the model's own forward, its body left out.

        So whatever a model does behind its head (Gemma's soft-cap, a scale) is done by its own code.
        """
        import torch

        # of the body's own kind, for a model of experts looks for more than hidden states in it
        ready = self._output(last_hidden_state=states.unsqueeze(0))
        with _replaced(self.body, "forward", lambda *_, **__: ready):
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
        with _replaced(head, "forward", lambda x: torch.nn.functional.linear(x, rows, bias)):
            return self.logits(states.float())

    @contextmanager
    def _attention(self, name: str) -> Iterator[None]:
        kept = self._config._attn_implementation
        self._config._attn_implementation = name
        try:
            yield
        finally:
            self._config._attn_implementation = kept

    def _own_attention(self) -> Any:
        """The model's own, and the eager one for soft-capped scores: others leave the cap out without a word."""
        capped = getattr(self._config, "attn_logit_softcapping", None) is not None
        return self._attention("eager" if capped else self._config._attn_implementation)

    @contextmanager
    def _trimmed(self, pack: Pack) -> Iterator[None]:
        """Let the last layer make keys and values of all tokens, and everything else of the wanted ones only."""
        layer = self.body.layers[-1]
        whole = layer.forward

        def trimmed(hidden: torch.Tensor, *args: Any, **options: Any) -> Any:
            if args:
                raise UnknownAttention(f"{type(layer).__name__} is not called by names")
            found = _KeysAndValues()
            options |= {"past_key_values": found}
            with suppress(_Found):
                layer.self_attn(hidden_states=layer.input_layernorm(hidden), **options)
            cos, sin = options["position_embeddings"]
            options |= {
                "position_embeddings": (cos[:, pack.places], sin[:, pack.places]),
                "position_ids": pack.positions[:, pack.places],
                "spans": pack.wanted_spans,
            }
            return whole(hidden[:, pack.places], **options)

        with _replaced(layer, "forward", trimmed):
            yield

    def _padded(self, pack: Pack) -> torch.Tensor:
        """Read each wanted piece with its prefix as a row of its own."""
        import torch

        rows = [
            torch.cat([pack.ids[0, slice(*span.prefix)], pack.ids[0, slice(*span.own)]]) for span in pack.wanted_spans
        ]
        with self._own_attention():
            if self._by_length:
                hidden = [self._hidden(input_ids=row[None])[0] for row in rows]
            else:
                ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
                hidden = self._hidden(input_ids=ids)
        wanted = [span.stop - span.first for span in pack.wanted_spans]
        return torch.cat([h[len(r) - n : len(r)] for h, r, n in zip(hidden, rows, wanted, strict=True)])

    def _fastest(self) -> str:
        import torch

        vocabulary = self._config.vocab_size
        tokens = torch.arange(sum(n for n, _ in _PROBE)).mul(7919).remainder(vocabulary).split([n for n, _ in _PROBE])
        pieces = [
            Piece(ids.tolist(), wanted, None if i == 0 else 0)
            for i, (ids, (_, wanted)) in enumerate(zip(tokens, _PROBE, strict=True))
        ]
        probe = pack(pieces).to(self.device)
        with torch.inference_mode():
            expected = self._padded(probe)
            # int8 finds its outliers over a whole batch, so its results are never quite those of another batch
            kind = "int8" if getattr(self.causal, "is_loaded_in_8bit", False) else str(expected.dtype)
            limit = _TOLERANCE[kind.removeprefix("torch.")] * float(expected.float().std())
            for self.mode in MODES[:-1]:
                try:
                    found = self.states(probe)
                except (UnknownAttention, AttributeError, TypeError, KeyError, RuntimeError, NotImplementedError):
                    continue
                if float((found - expected).abs().max()) <= limit:
                    return self.mode
        return MODES[-1]


class _Found(Exception):
    """The keys and values are known: the attention itself is not needed."""


class _KeysAndValues:
    """Stands in for a layer's cache: keeps what it is first given, and gives that back from then on."""

    def __init__(self) -> None:
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(self, key: torch.Tensor, value: torch.Tensor, *_: Any, **__: Any) -> tuple[torch.Tensor, torch.Tensor]:
        if self._kept is not None:
            return self._kept
        self._kept = key, value
        raise _Found


@contextmanager
def _replaced(module: Any, name: str, stand_in: Any) -> Iterator[None]:
    """Put another method in a module's place; a quantised or dispatched module may carry its own already."""
    kept = module.__dict__.get(name)
    setattr(module, name, stand_in)
    try:
        yield
    finally:
        delattr(module, name)
        if kept is not None:
            setattr(module, name, kept)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _active(head: Any) -> Any:
    """Return the layer that computes: of a head that PEFT trained as a whole, the trained one while it is on."""
    kept = getattr(head, "modules_to_save", None)
    if kept is None:
        return head
    names = head.active_adapters
    on = not head.disable_adapters and names and names[0] in kept
    return kept[names[0]] if on else head.original_module


def _rotates_by_length(config: Any) -> bool:
    """Whether positions are turned by angles that depend on the longest row of a batch: then none may share one."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return any(kind.get("rope_type") in ("dynamic", "longrope") for kind in kinds)


def _is_chunked(config: Any) -> bool:
    """Whether some layers attend in another way than to everything or to a window, which a short probe cannot show."""
    return bool(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})


def causal_of(model: Any) -> Any:
    """Return the model itself, taken out of PEFT's wrapper where it is in one."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def body_of(model: Any) -> Any:
    """Return the model without its head: token ids in, final hidden states out."""
    causal = causal_of(model)
    if causal.base_model is causal:
        raise ArenaError(
            f"{type(causal).__name__} does not tell its body from its head",
            where="model",
            remedy="choose a base model of a common decoder family (Llama, Qwen, Gemma, Mistral, Phi)",
        )
    return causal.base_model
