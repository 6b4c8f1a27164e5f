"""Label logits from a merged model: one prefill a prompt, the head only where the label stands.

Sequences are padded on the right and no attention mask is given: in a causal model no real token ever looks at a
later one, so the padding changes nothing, and the attention stays on its fastest path. The hidden state of each
sequence's true last token alone goes through the head.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from data_prep.errors import ArenaError

if TYPE_CHECKING:
    import torch

    from scoring.adapters import TrainedAdapter
    from scoring.judge import Judge

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
# Tokens in one forward pass, padding included. On a CPU larger batches gain nothing and cost memory.
TOKEN_BUDGET = {"cpu": 4096, "cuda": 32768}


@dataclass
class ScoreProgress:
    """How far scoring is: prompts done and all, tokens done and all."""

    rows: int
    total_rows: int
    tokens: int
    total_tokens: int


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
    ):
        """Load the model; `adapter` is the one that the judge was merged from unless another is given."""
        device = device or device_name()
        self._where, self._token_budget = str(judge.folder), token_budget
        if precision == "adapter":
            from scoring.adapters import adapter_of

            self.precision = precision
            self._model = (adapter or adapter_of(judge)).load(device)
            return
        self.precision = ("bf16" if device.startswith("cuda") else "fp32") if precision == "auto" else precision
        self._model = load_model(judge.folder, device, precision=self.precision)

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
            self._model, sequences, label_ids, token_budget=self._token_budget, progress=progress, name=name
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

        self._model = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


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
) -> np.ndarray:
    """Return the labels' logits behind each sequence, [len(sequences), len(label_ids)] float64, in input order.

    Out of GPU memory halves the token budget and goes on; with one sequence a batch it is an ArenaError.
    """
    import torch

    result = np.full((len(sequences), len(label_ids)), np.nan)
    columns = torch.tensor(list(label_ids), device=model.device)
    lengths = torch.tensor([len(ids) for ids in sequences])
    with _last_token_only(model) as last:

        def work(batch: list[int], ids: torch.Tensor) -> None:
            last.index = (lengths[batch] - 1).to(model.device)
            logits = model(input_ids=ids, use_cache=False).logits[:, 0]
            result[batch] = logits[:, columns].double().cpu().numpy()

        run_batches(sequences, work, device=model.device, token_budget=token_budget, progress=progress, name=name)
    return result


def run_batches(
    sequences: Sequence[Sequence[int]],
    work: Callable[[list[int], torch.Tensor], None],
    *,
    device: torch.device,
    token_budget: int | None = None,
    progress: Callable[[ScoreProgress], None] = lambda _: None,
    name: Callable[[int], str] = "prompt {}".format,
) -> None:
    """Call `work(indices, ids)` on every sequence once, in batches; `ids` is [batch, longest], padded on the right.

    `work` may be called again for the same indices: out of GPU memory halves the token budget and goes on; with one
    sequence a batch it is an ArenaError, which calls the sequence by `name(index)`.
    """
    import torch

    budget = token_budget or TOKEN_BUDGET[device.type]
    total = sum(map(len, sequences))
    # Longest first: a batch that does not fit in memory shows at once, not after an hour.
    order = sorted(range(len(sequences)), key=lambda i: -len(sequences[i]))
    done = tokens = 0
    while done < len(order):
        # As many as fit in the budget when padded to the first, the longest.
        batch = order[done : done + max(1, budget // len(sequences[order[done]]))]
        try:
            with torch.inference_mode():
                work(batch, _padded([sequences[i] for i in batch]).to(device))
            fits = True
        except torch.OutOfMemoryError:
            fits = False
        if not fits:
            # Only here, where the exception and with it the failed pass's frames are gone, can memory be given back.
            torch.cuda.empty_cache()
            budget = _smaller_budget(budget, batch, sequences, name)
            continue
        done += len(batch)
        tokens += sum(len(sequences[i]) for i in batch)
        progress(ScoreProgress(done, len(order), tokens, total))


def _smaller_budget(budget: int, batch: list[int], sequences: Sequence[Sequence[int]], name: Callable) -> int:
    if len(batch) == 1:
        raise ArenaError(
            f"its {len(sequences[batch[0]])} tokens alone do not fit in the GPU's memory",
            where=name(batch[0]),
            remedy="free GPU memory, or lower cutoff_len and train again",
        )
    return max(1, min(budget, len(batch) * len(sequences[batch[0]])) // 2)


def _padded(batch: Sequence[Sequence[int]]) -> torch.Tensor:
    import torch

    padded = torch.zeros(len(batch), max(map(len, batch)), dtype=torch.long)
    for row, ids in zip(padded, batch, strict=True):
        row[: len(ids)] = torch.tensor(ids)
    return padded


class _LastToken:
    """A hook on the head: of [batch, length, hidden] only each row's last true token goes on."""

    index: torch.Tensor

    def __call__(self, module: Any, inputs: tuple) -> tuple:
        (hidden,) = inputs
        return (hidden[range(len(hidden)), self.index].unsqueeze(1),)


@contextmanager
def _last_token_only(model: Any) -> Iterator[_LastToken]:
    """Keep the hook on the model's head for the time of a block."""
    hook = _LastToken()
    handle = model.get_output_embeddings().register_forward_pre_hook(hook)
    try:
        yield hook
    finally:
        handle.remove()
