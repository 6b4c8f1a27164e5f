"""Engines: what computes a judge's label logits. Each is opened by name and answers in the same way.

torch       this project's own passes over the merged model, or over the adapter on its quantised base
llama.cpp   the judge exported to GGUF (extra: gguf)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from common.errors import ArenaError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from scoring.engines.torch_engine import ScoreProgress
    from scoring.judge import Judge

ENGINES = ("torch", "llama.cpp")
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "8bit", "4bit", "adapter")
# What an engine is made of, beyond this project's own requirements: (module, extra of the Makefile).
_EXTRAS = {"llama.cpp": ("llama_cpp", "gguf")}


class Engine(Protocol):
    """A loaded judge that can be asked."""

    name: str
    precision: str  # what it really computes in, never "auto"

    def label_logits(
        self,
        sequences: Sequence[Sequence[int]],
        label_ids: Sequence[int],
        *,
        progress: Callable[[ScoreProgress], None] = lambda _: None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> np.ndarray:
        """Return the labels' logits behind each sequence, [n, len(label_ids)] float64, in input order.

        Raises ArenaError that calls a row by `name(index)` where it has no finite logits or fits in no memory.
        """

    def close(self) -> None:
        """Give the model's memory back; the engine cannot be asked afterwards."""


def open_engine(judge: Judge, engine: str = "torch", precision: str = "auto", **options: Any) -> Engine:
    """Load a judge into an engine; `options` are those of the engine's own class.

    Raises as `require_engine` does, and ArenaError where the model cannot be loaded.
    """
    require_engine(engine, precision)
    if engine == "llama.cpp":
        from scoring.engines.llama_cpp import LlamaCppEngine

        return LlamaCppEngine(judge, precision, **options)
    from scoring.engines.torch_engine import TorchEngine

    return TorchEngine(judge, precision, **options)


def require_engine(engine: str, precision: str) -> None:
    """Raise UsageError for an unknown engine or precision, ArenaError where the engine's extra is missing; quick."""
    from importlib.util import find_spec

    if engine not in ENGINES:
        raise UsageError(f"there is no engine {engine!r}", remedy=f"choose one of: {', '.join(ENGINES)}")
    if engine != "llama.cpp" and precision not in PRECISIONS:  # a GGUF file has precisions of its own
        raise UsageError(f"there is no precision {precision!r}", remedy=f"choose one of: {', '.join(PRECISIONS)}")
    if engine in _EXTRAS and find_spec(_EXTRAS[engine][0]) is None:
        module, extra = _EXTRAS[engine]
        raise ArenaError(
            f"the engine {engine} is not installed ({module} is missing)",
            where=f"--engine {engine}",
            remedy=f"make extra-{extra}",
        )
