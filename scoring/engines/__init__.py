"""Engines compute a judge's label logits: one is opened by name, asked by `label_logits`, and closed.

torch       this project's own passes over the merged model, or over the adapter on its quantised base
llama.cpp   the judge exported to GGUF (extra: gguf)

An open engine's `precision` is what it really computes in, never "auto".
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from common.errors import ArenaError, UsageError
from scoring.engines.llama_cpp import LlamaCppEngine
from scoring.engines.torch_engine import TorchEngine
from scoring.judge import Judge

ENGINES = {"torch": TorchEngine, "llama.cpp": LlamaCppEngine}
Engine = TorchEngine | LlamaCppEngine
PRECISIONS = ("auto", "fp32", "bf16", "fp16", "8bit", "4bit", "adapter")


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
