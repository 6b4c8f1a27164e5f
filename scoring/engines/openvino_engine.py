"""The OpenVINO engine: the merged model compiled for this machine's CPU, one prompt at a time.

outputs/<experiment>/<stage>/openvino/{fp32,8bit}/   the converted model and what it was made of; made once

The model is cut to what a judge needs: of the head only the labels' rows, of the last position only, and those in
fp32 outside of OpenVINO, which would round the logits themselves to 16 bits. A padding mask would leave the fastest
attention, so nothing is batched.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from common.errors import ArenaError, UsageError
from common.files import atomic_folder, write_json
from scoring.engines.gguf import source_digest, source_files
from scoring.engines.torch_engine import ScoreProgress, load_model

if TYPE_CHECKING:
    from scoring.judge import Judge

PRECISIONS = ("auto", "fp32", "bf16", "8bit")
FORMAT = 1
# OpenVINO 2026.4.1 divides by zero (and takes the process along) where it compiles bf16 for one thread a stream.
_BF16_THREADS = 2
# Several prompts side by side need each other's cores less than several threads of one prompt do.
_STREAM_THREADS = 4
_MADE_OF = "made_of.json"
_HEAD = "head.npz"


class OpenVinoEngine:
    """A judge compiled by OpenVINO; "auto" is bf16 where the processor multiplies in it, else fp32."""

    name = "openvino"

    def __init__(
        self, judge: Judge, precision: str = "auto", *, threads: int | None = None, streams: int | None = None
    ):
        """Convert the merged model, unless that was done already, and compile it."""
        threads = threads or len(os.sched_getaffinity(0))
        self.precision = _precision(precision, threads)
        self._labels, self._where = tuple(judge.frame.label_ids), str(judge.folder)
        path = converted(judge, "8bit" if self.precision == "8bit" else "fp32")
        self._head = _read_head(path.with_name(_HEAD))
        self._requests = _compile(path, self.precision, threads=threads, streams=streams)

    def label_logits(
        self,
        sequences: Sequence[Sequence[int]],
        label_ids: Sequence[int],
        *,
        progress: Callable[[ScoreProgress], None] = lambda _: None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> np.ndarray:
        """Return the labels' logits behind each sequence, [n, len(label_ids)] float64, in input order.

        `label_ids` are those of the judge. Raises ArenaError that calls a row by `name(index)` where it has no finite
        logits.
        """
        columns = self._columns(label_ids)
        result = np.full((len(sequences), len(self._labels)), np.nan)
        done, tokens, total = 0, 0, sum(map(len, sequences))

        def store(request: Any, row: int) -> None:
            nonlocal done, tokens
            result[row] = self._head(request.get_output_tensor().data[0].astype(np.float64))
            done, tokens = done + 1, tokens + len(sequences[row])
            progress(ScoreProgress(done, len(sequences), tokens, total))

        self._requests.set_callback(store)
        # Longest first: what does not fit in memory shows at once, and no long one is left for the end.
        order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
        try:
            for row in order:
                self._requests.start_async({0: np.array([sequences[row]], dtype=np.int64)}, row)
            self._requests.wait_all()
        except RuntimeError as error:
            raise ArenaError(
                f"OpenVINO stopped after {done} of {len(order)} rows: {str(error).strip().splitlines()[-1]}",
                where=name(order[min(done, len(order) - 1)]),
                remedy="free memory, lower cutoff_len and train again, or use --engine torch",
            ) from None
        bad = np.flatnonzero(~np.isfinite(result).all(axis=1))
        if len(bad):
            raise ArenaError(
                f"the model gave no finite score for {len(bad)} row(s), this one first: {name(bad[0])}",
                where=self._where,
                remedy="the weights are broken (a diverged training, or an overflow in 16 bit): look at the loss curve",
            )
        return result[:, columns]

    def _columns(self, label_ids: Sequence[int]) -> list[int]:
        unknown = set(label_ids) - set(self._labels)
        if unknown:
            raise ArenaError(
                f"the converted model answers for the judge's labels {self._labels} only, not for {sorted(unknown)}",
                where=self._where,
                remedy="ask for the judge's own label ids, or use --engine torch",
            )
        return [self._labels.index(label) for label in label_ids]

    def close(self) -> None:
        """Give the model's memory back."""
        self._requests = None


def _precision(asked: str, threads: int) -> str:
    if asked not in PRECISIONS:
        raise UsageError(f"openvino has no precision {asked!r} here", remedy=f"choose one of: {', '.join(PRECISIONS)}")
    if asked == "auto":
        return "bf16" if fast_bf16() and threads >= _BF16_THREADS else "fp32"
    if asked == "bf16" and threads < _BF16_THREADS:
        raise ArenaError(
            f"OpenVINO computes in bf16 only with {_BF16_THREADS} threads or more",
            where="--precision bf16",
            remedy="give this process more cores, or take --precision fp32",
        )
    return asked


def fast_bf16() -> bool:
    """Return whether this processor multiplies in bf16 (AVX-512 or AMX); without that bf16 is slower than fp32."""
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


def _compile(path: Path, precision: str, *, threads: int, streams: int | None) -> Any:
    import openvino

    hint = "bf16" if precision != "fp32" and fast_bf16() and threads >= _BF16_THREADS else "f32"
    options = {
        "INFERENCE_PRECISION_HINT": hint,  # 8-bit weights are spread to this type
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": streams or max(1, threads // _STREAM_THREADS),
        # Rounded activations would move probabilities more than 16 bits do.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    try:
        compiled = openvino.Core().compile_model(path, "CPU", options)
        return openvino.AsyncInferQueue(compiled)
    except RuntimeError as error:
        raise ArenaError(
            f"OpenVINO cannot compile it: {str(error).strip().splitlines()[-1]}",
            where=str(path),
            remedy="move that folder away to convert again, or use --engine torch",
        ) from None


def converted(judge: Judge, weights: str) -> Path:
    """Return the converted model of a judge, [1, length] ids → [1, labels] logits; convert it if it is not there.

    `weights` is "fp32" or "8bit". What is there is used only if it was made of these very files by this version.
    """
    folder = judge.folder.parent / "openvino" / weights
    made_of = _made_of(judge)
    try:
        if json.loads((folder / _MADE_OF).read_text(encoding="utf-8")) == made_of:
            return folder / "model.xml"
    except (OSError, ValueError):
        pass  # not there, or from an interrupted machine: made anew
    import openvino

    model = load_model(judge.folder, "cpu", precision="fp32")
    whole, head = openvino_model(model, judge.frame.label_ids, eight_bits=weights == "8bit")
    with atomic_folder(folder) as fresh:
        openvino.save_model(whole, fresh / "model.xml", compress_to_fp16=False)
        if head is not None:
            np.savez(fresh / _HEAD, **head)
        write_json(fresh / _MADE_OF, made_of)
    return folder / "model.xml"


def _made_of(judge: Judge) -> dict[str, Any]:
    import openvino

    files = source_files(judge.folder)
    return {"format": FORMAT, "openvino": openvino.__version__, "source_sha256": source_digest(files)}


def _read_head(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Return what makes label logits of the converted model's output: the head's rows, or nothing more."""
    if not path.is_file():
        return lambda logits: logits
    with np.load(path) as arrays:
        weight, bias = arrays["weight"].astype(np.float64), arrays["bias"].astype(np.float64)
    return lambda hidden: weight @ hidden + bias


def openvino_model(
    model: Any, label_ids: Sequence[int], *, eight_bits: bool = False
) -> tuple[Any, dict[str, np.ndarray] | None]:
    """Return a causal language model as an OpenVINO model of ids [1, length ≥ 2], and its head's rows for the labels.

    The output is the last hidden state [1, hidden], to be multiplied by the head's "weight" [labels, hidden] plus
    "bias" [labels]; of a family that changes its logits afterwards it is the logits [1, labels], and the head is None.
    The model's head is cut to the labels' rows, and with `eight_bits` its layers are rounded: it is used up.
    """
    import openvino
    import torch

    head = _cut_head(model, label_ids)
    apart = _is_plain(model, head)
    if eight_bits:
        _round_layers(model)

    class LastPosition(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            if apart:
                return self.model.base_model(input_ids=input_ids, use_cache=False).last_hidden_state[:, -1]
            return self.model(input_ids=input_ids, use_cache=False, logits_to_keep=1).logits[:, 0]

    with torch.no_grad(), _causal_without_mask(model):
        program = torch.export.export(
            LastPosition(),
            (torch.zeros(1, 16, dtype=torch.long),),
            dynamic_shapes=({1: torch.export.Dim.DYNAMIC},),
            strict=False,
        )
        whole = openvino.convert_model(program)
    whole.reshape([1, -1])
    if not apart:
        return whole, None
    bias = torch.zeros(len(label_ids)) if head.bias is None else head.bias
    return whole, {"weight": head.weight.detach().numpy(), "bias": bias.detach().numpy()}


def _is_plain(model: Any, head: Any) -> bool:
    """Return whether the model's logits are its head's and nothing more (no cap, no factor), tried on a few tokens."""
    import torch

    ids = torch.arange(1, 9)[None]
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.allclose(logits, head(model.base_model(input_ids=ids, use_cache=False).last_hidden_state))


def _cut_head(model: Any, label_ids: Sequence[int]) -> Any:
    """Keep of the head only the labels' rows; what a family does to logits afterwards is done to each by itself."""
    import torch

    head, rows = model.get_output_embeddings(), list(label_ids)
    small = torch.nn.Linear(head.in_features, len(rows), bias=head.bias is not None)
    with torch.no_grad():
        small.weight.copy_(head.weight[rows])
        if head.bias is not None:
            small.bias.copy_(head.bias[rows])
    model.set_output_embeddings(small)
    return small


@contextmanager
def _causal_without_mask(model: Any) -> Iterator[None]:
    """While a model is exported, let attention be causal by its own switch instead of by a mask of length × length.

    Only where every layer looks back without a limit; a family with a window keeps its masks.
    """
    import sys

    config, module = model.config, sys.modules[type(model).__module__]
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windowed = any(kind != "full_attention" for kind in kinds) or (
        getattr(config, "layer_types", None) is None and getattr(config, "sliding_window", None)
    )
    if windowed or config._attn_implementation != "sdpa" or not hasattr(module, "create_causal_mask"):
        yield
        return
    from transformers.integrations import sdpa_attention

    with (
        mock.patch.object(module, "create_causal_mask", lambda *_, **__: None),
        # OpenVINO wants as many keys as queries; it recognises and undoes the repetition.
        mock.patch.object(sdpa_attention, "use_gqa_in_sdpa", lambda *_, **__: False),
    ):
        yield


def _round_layers(model: Any) -> None:
    """Round every layer's weights to 8 bits with one scale a row, in the form that OpenVINO keeps packed."""
    import torch

    class Rounded(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear):
            super().__init__()
            scale = layer.weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127
            self.register_buffer("weight", (layer.weight / scale).round().to(torch.int8))
            self.register_buffer("scale", scale)
            self.bias = layer.bias

        def forward(self, x):
            return torch.nn.functional.linear(x, self.weight.to(torch.float32) * self.scale, self.bias)

    head = model.get_output_embeddings()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and layer is not head:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Rounded(layer).requires_grad_(False))
