"""The llama.cpp engine: a judge's GGUF file, one prompt at a time, on whatever llama.cpp was compiled for.

It is fed token ids, never text, so its own tokenizer plays no part in a score.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np

from common.errors import ArenaError
from scoring.engines.gguf import check_gguf, export_command, find_gguf
from scoring.engines.gguf_converter import SOURCE_KEY
from scoring.engines.torch_engine import ScoreProgress

if TYPE_CHECKING:
    from scoring.judge import Judge


class LlamaCppEngine:
    """A judge as a GGUF file; `precision` is the file's quantisation."""

    name = "llama.cpp"

    def __init__(self, judge: Judge, precision: str = "auto", *, gguf: Path | None = None, threads: int | None = None):
        """Check that the file was made of this judge and load it; `gguf` names a file of one's own."""
        path = gguf or find_gguf(judge, precision)
        manifest = check_gguf(path, judge)
        if precision not in ("auto", manifest["quantization"]):
            raise ArenaError(
                f"is {manifest['quantization']}, not {precision}", where=str(path), remedy="leave --precision out"
            )
        self.precision = manifest["quantization"]
        self._judge, self._where = judge, str(path)
        self._model: Any = load_gguf(path, context=judge.cutoff_len, threads=threads)
        if self._model.metadata.get(SOURCE_KEY) != manifest["source_sha256"]:
            raise ArenaError(
                "names another source in its metadata than its manifest does",
                where=str(path),
                remedy=f"{export_command(judge)} --quantization {self.precision}",
            )

    def label_logits(
        self,
        sequences: Sequence[Sequence[int]],
        label_ids: Sequence[int],
        *,
        progress: Callable[[ScoreProgress], None] = lambda _: None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> np.ndarray:
        """Return the labels' logits behind each sequence, [n, len(label_ids)] float64, in input order.

        Raises ArenaError that calls a row by `name(index)` where it is longer than the judge's budget or has no
        finite logits.
        """
        total, tokens = sum(map(len, sequences)), 0
        result = np.full((len(sequences), len(label_ids)), np.nan)
        for row, ids in enumerate(sequences):
            result[row] = self._one(ids, label_ids, name(row))
            tokens += len(ids)
            progress(ScoreProgress(row + 1, len(sequences), tokens, total))
        return result

    def _one(self, ids: Sequence[int], label_ids: Sequence[int], name: str) -> list[float]:
        if not 0 < len(ids) <= self._judge.cutoff_len:
            raise ArenaError(
                f"its {len(ids)} tokens are not between 1 and the judge's budget of {self._judge.cutoff_len}",
                where=name,
                remedy="fit the battle with the judge's own fitter (run.py score does)",
            )
        logits = last_logits(self._model, ids)[list(label_ids)]
        if not np.isfinite(logits).all():
            raise ArenaError(
                "the model gave no finite score for it",
                where=f"{self._where}, {name}",
                remedy="a number overflowed in 16 bits: export as bf16 or q8_0; or the training diverged",
            )
        return logits.tolist()

    def close(self) -> None:
        """Give the model's memory back."""
        if self._model is not None:
            self._model.close()
        self._model = None


def load_gguf(path: Path, *, context: int, threads: int | None = None) -> Any:
    """Load a GGUF file for prompts of up to `context` tokens; raises ArenaError if llama.cpp cannot read it."""
    # Threads that wait for each other spin for a long time by themselves, which on a busy machine made two threads
    # twenty times slower than one. The library reads this when it is loaded.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    from llama_cpp import Llama

    threads = threads or len(os.sched_getaffinity(0))
    try:
        with _plain_weights():
            return Llama(
                str(path),
                n_ctx=context,
                n_batch=context,  # a prompt is one call
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=-1,  # all, where llama.cpp was compiled for a GPU
                verbose=False,
            )
    except (ValueError, RuntimeError, OSError) as error:
        raise ArenaError(
            f"llama.cpp cannot load it: {error}", where=str(path), remedy="export it again, or free memory"
        ) from None


@contextmanager
def _plain_weights() -> Iterator[None]:
    """Let llama.cpp keep a file's weights as they are, within a block.

    On a processor with AMX it packs quantised weights anew, and for narrow layers (64 inputs) then reads past them and
    takes the process along. Llama has no argument for this switch.
    """
    from llama_cpp import llama_cpp

    usual = llama_cpp.llama_model_default_params

    def plain() -> Any:
        parameters = usual()
        parameters.use_extra_bufts = False
        return parameters

    with mock.patch.object(llama_cpp, "llama_model_default_params", plain):
        yield


def last_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Return the logits [vocabulary] float64 behind one sequence; only its last position passes through the head."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), False)
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    code = llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids)))
    if code != 0:
        raise ArenaError(f"llama.cpp stopped with code {code}", remedy="free memory; an id outside the vocabulary?")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model.model))
    values = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    found = np.ctypeslib.as_array(ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), shape=(size,))
    return found.astype(np.float64)  # a copy: the next call writes there
