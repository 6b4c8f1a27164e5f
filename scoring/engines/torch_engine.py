"""The torch engine: label logits by one prefill a prompt, the head only where the label stands and only its rows.

scoring.packed_model makes the hidden states, scoring.batches the batches.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from common.errors import ArenaError
from scoring.batches import ScoreProgress, run_batches, tell
from scoring.packed_model import Pack, Piece, Reader

if TYPE_CHECKING:
    import torch

    from scoring.judge import Judge
    from scoring.scorer import TrainedAdapter

# What damaged or foreign files of a model raise while they are loaded.
LOADING_ERRORS = (
    OSError,
    ValueError,
    RuntimeError,
    LookupError,
    TypeError,
    AttributeError,
    ArithmeticError,
    SafetensorError,
    StrictDataclassError,
)


class TorchEngine:
    """The judge in torch: its merged model in any precision, or with "adapter" its adapter on the quantised base."""

    name = "torch"

    def __init__(
        self,
        judge: Judge,
        precision: str = "auto",
        *,
        device: str | None = None,
        adapter: TrainedAdapter | None = None,
        token_budget: int | None = None,
        mode: str | None = None,
        note: Callable[[str], None] = tell,
    ):
        """Load the model; `adapter` is the one that the judge was merged from unless another is given.

        `token_budget` is that of one pass, `mode` one of reader.MODES; by default both are chosen for the device and
        the model. `note` is told what a user should know: that memory ran out, that a precision is slow here.
        """
        device = device or device_name()
        self._where, self._token_budget, self._note = str(judge.folder), token_budget, note
        if precision == "adapter":
            from scoring.scorer import adapter_of

            self.precision = precision
            model = (adapter or adapter_of(judge)).load(device)
        else:
            self.precision = ("bf16" if device.startswith("cuda") else "fp32") if precision == "auto" else precision
            if device == "cpu" and self.precision in ("bf16", "fp16") and self.precision not in cpu_half_precisions():
                note(f"this processor computes {self.precision} slower than fp32: --precision fp32 would be faster")
            model = load_model(judge.folder, device, precision=self.precision)
        self._reader = Reader(model, mode=mode)

    def label_logits(
        self,
        sequences: Sequence[Sequence[int]],
        label_ids: Sequence[int],
        *,
        progress: Callable[[ScoreProgress], None] = lambda _: None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> np.ndarray:
        """Return the labels' logits behind each sequence, [n, len(label_ids)] float64, in input order.

        Out of memory halves the token budget and goes on. Raises ArenaError that calls a row by `name(index)` where
        it does not fit alone or its logits are not finite.
        """
        logits = score_labels(
            self._reader,
            sequences,
            label_ids,
            token_budget=self._token_budget,
            progress=progress,
            name=name,
            note=self._note,
        )
        bad = np.flatnonzero(~np.isfinite(logits).all(axis=1))
        if len(bad):
            raise ArenaError(
                f"the model gave no finite score for {len(bad)} row(s), this one first: {name(bad[0])}",
                where=self._where,
                remedy="the weights are broken (a diverged training, or an overflow in 16 bit): look at the loss curve",
            )
        return logits

    def close(self) -> None:
        """Give the model's memory back."""
        import torch

        self._reader = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def cpu_half_precisions() -> set[str]:
    """Return which 16-bit types this processor multiplies itself (avx512_bf16, amx_bf16, …), by its own flags."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux: nothing is known
        return set()
    flags = {
        f for line in lines if line.lower().startswith(("flags", "features")) for f in line.split(":", 1)[1].split()
    }
    known = {"bf16": {"avx512_bf16", "amx_bf16", "bf16"}, "fp16": {"avx512_fp16", "amx_fp16", "asimdhp"}}
    return {name for name, needed in known.items() if flags & needed}


def device_name() -> str:
    """Return "cuda" where a GPU is visible, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def weight_dtype(device: str, precision: str | None = None) -> torch.dtype:
    """Return the type that weights are loaded in: 16-bit on a GPU, fp32 on a CPU unless `precision` names another."""
    import torch

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return names[precision or ("bf16" if device.startswith("cuda") else "fp32")]


def load_model(folder: Path, device: str, *, precision: str | None = None) -> Any:
    """Load a causal language model for scoring: 16-bit on a GPU, fp32 on a CPU unless `precision` names another.

    `precision` is fp32, bf16, fp16, 8bit or 4bit (the last two by bitsandbytes). Only safetensors are read and no
    code from the folder is run. Raises ArenaError if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    options: dict[str, Any] = {}
    if precision in ("8bit", "4bit"):
        from scoring.rewards import quantization

        bits, precision = int(precision[0]), None
        options["quantization_config"] = quantization(bits, "nf4", True, weight_dtype(device), device)
        options["device_map"] = {"": device}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=weight_dtype(device, precision),
            **options,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
        )
    except LOADING_ERRORS as error:
        raise ArenaError(
            f"the model cannot be loaded: {(str(error) or repr(error)).splitlines()[0]}",
            where=str(folder),
            remedy="move the folder away and merge again: python run.py sft (dpo, rm) -e EXP --until merge",
        ) from None
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        model.set_attn_implementation("eager")  # the others leave the cap out without a word
    # bitsandbytes puts quantised weights in their place itself
    return (model if options else model.to(device)).eval()


def score_labels(
    model: Any,
    sequences: Sequence[Sequence[int]],
    label_ids: Sequence[int],
    *,
    token_budget: int | None = None,
    progress: Callable[[ScoreProgress], None] = lambda _: None,
    name: Callable[[int], str] = "prompt {}".format,
    note: Callable[[str], None] = tell,
) -> np.ndarray:
    """Return the labels' logits behind each sequence, [len(sequences), len(label_ids)] float64, in input order.

    `model` is a causal model or a Reader of one. Out of memory halves the token budget and goes on; with one sequence
    a batch it is an ArenaError.
    """
    import torch

    reader = Reader.of(model)
    result = np.full((len(sequences), len(label_ids)), np.nan)
    columns = torch.tensor(list(label_ids), device=reader.device)

    def work(batch: list[int], pack: Pack) -> None:
        result[batch] = reader.label_logits(reader.states(pack), columns).double().cpu().numpy()

    groups = [(Piece(ids),) for ids in sequences]
    run_batches(reader, groups, work, token_budget=token_budget, progress=progress, name=name, note=note)
    return result
