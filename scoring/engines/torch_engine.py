"""The torch engine: label logits by one pass a prompt, the head only where the label stands and only its rows.

scoring.packed_model makes the hidden states, scoring.packed_model the batches.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from common.errors import ArenaError, UsageError
from scoring.judge import Judge
from scoring.model_loading import BROKEN_WEIGHTS, TrainedAdapter, device_name, float_precision, load_model
from scoring.packed_model import Pack, PackedModel, Piece, run_batches


class TorchEngine:
    """The judge in torch: its merged model in any precision, or with "adapter" its adapter on the quantised base."""

    def __init__(
        self,
        judge: Judge,
        precision: str = "auto",
        *,
        device: str | None = None,
        adapter: TrainedAdapter | None = None,
        note: Callable[[str], None] = warnings.warn,
    ):
        """Load the model; `adapter` is needed for the precision "adapter".

        `note` gets what a user should know, such as that memory ran out.
        """
        device = device or device_name()
        self._where, self._note = str(judge.folder), note
        self.precision = float_precision(device) if precision == "auto" else precision
        if precision == "adapter":
            if adapter is None:
                raise UsageError("this precision needs the trained adapter", where="--precision adapter")
            model = adapter.load(device)
        else:
            model = load_model(judge.folder, device, precision=self.precision)
        self._model: PackedModel | None = PackedModel(model)

    def label_logits(
        self,
        sequences: Sequence[Sequence[int]],
        label_ids: Sequence[int],
        *,
        name: Callable[[int], str] = "prompt {}".format,
        **options: Any,
    ) -> np.ndarray:
        """Return the labels' logits behind each sequence, [n, len(label_ids)] float64, in input order.

        `options` are those of run_batches. Raises ArenaError that calls a row by `name(index)` where it does not fit
        in memory alone or its logits are not finite.
        """
        logits = score_labels(self._model, sequences, label_ids, name=name, note=self._note, **options)
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            what = f"the model gave no finite score for {len(bad)} row(s), this one first: {name(bad[0])}"
            raise ArenaError(what, where=self._where, remedy=BROKEN_WEIGHTS)
        return logits

    def close(self) -> None:
        """Free the model's memory."""
        import torch

        self._model = None
        torch.cuda.empty_cache()


def score_labels(
    model: Any, sequences: Sequence[Sequence[int]], label_ids: Sequence[int], **options: Any
) -> np.ndarray:
    """Return the labels' logits behind each sequence, [len(sequences), len(label_ids)] float64, in input order.

    `model` is a causal model or a PackedModel, `options` are those of run_batches. A row whose logits are not finite
    is returned as it is.
    """
    import torch

    packed = PackedModel.of(model)
    result = np.full((len(sequences), len(label_ids)), np.nan)
    columns = torch.tensor(list(label_ids), device=packed.device)

    def work(batch: list[int], pack: Pack) -> None:
        result[batch] = packed.label_logits(packed.states(pack), columns).double().cpu().numpy()

    run_batches(packed, [(Piece(ids),) for ids in sequences], work, **options)
    return result
