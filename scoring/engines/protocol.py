"""Engines compute a judge's label logits. Each is opened by name and called in the same way.

torch       this project's own passes over the merged model, or over the adapter on its quantised base
llama.cpp   the judge exported to GGUF (extra: gguf)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import ArenaError, UsageError
from scoring.engines.llama_cpp import LlamaCppEngine
from scoring.engines.torch_engine import TorchEngine

if TYPE_CHECKING:
    import numpy as np

    from scoring.judge import Judge

ENGINES = {"torch": TorchEngine, "llama.cpp": LlamaCppEngine}
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "8bit", "4bit", "adapter")


class Engine(Protocol):
    """A loaded judge."""

    name: str
    precision: str  # what it really computes in, never "auto"

    def label_logits(
        self,
        sequences: Sequence[Sequence[int]],
        label_ids: Sequence[int],
        *,
        progress: Callable[[float], None] = lambda _: None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> np.ndarray:
        """Return the labels' logits behind each sequence, [n, len(label_ids)] float64, in input order.

        `progress` gets the share of the tokens that is done. Raises ArenaError that calls a row by `name(index)` where
        it has no finite logits or does not fit in memory.
        """

    def close(self) -> None:
        """Free the model's memory; the engine cannot be used afterwards."""


def open_engine(judge: Judge, engine: str = "torch", precision: str = "auto", **options: Any) -> Engine:
    """Load a judge into an engine; `options` are those of the engine's own class.

    Raises as `require_engine` does, and ArenaError where the model cannot be loaded.
    """
    require_engine(engine, precision)
    return ENGINES[engine](judge, precision, **options)


def require_engine(engine: str, precision: str) -> None:
    """Raise UsageError for an unknown engine or precision, ArenaError where the engine's extra is missing; quick."""
    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}", remedy=f"choose one of: {', '.join(ENGINES)}")
    if engine == "llama.cpp":  # its precisions are those of the GGUF files
        if find_spec("llama_cpp") is None:
            raise ArenaError("llama-cpp-python is not installed", where="--engine llama.cpp", remedy="make extra-gguf")
    elif precision not in PRECISIONS:
        raise UsageError(f"there is no precision {precision!r}", remedy=f"choose one of: {', '.join(PRECISIONS)}")
