"""The modules that a recipe's lora_target names, compared with those of the model, where it is on this disk.

PEFT says what it did not find when the model is loaded, and nothing of a name beside others that it did find.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from data_prep.hub import cached_file
from factory.inputs import names

_INDEX, _WHOLE = "model.safetensors.index.json", "model.safetensors"
_TIED = "lm_head"  # no tensor of its own where it shares the embedding's


def target_fault(recipe: Mapping[str, Any], root: Path = Path()) -> str | None:
    """Return which names of `lora_target` no module has, None where all have one or the weights are not at hand."""
    targets, model = names(recipe.get("lora_target")), recipe.get("model_name_or_path")
    if not targets or targets == ["all"] or not isinstance(model, str):
        return None
    modules = _modules(str(root / model) if (root / model).is_dir() else model, recipe.get("model_revision") or "main")
    if not modules:
        return None
    known = {*modules, _TIED}
    lacking = [name for name in targets if not any(each == name or each.endswith(f".{name}") for each in known)]
    if not lacking:
        return None
    ends = sorted({each.rsplit(".", 1)[-1] for each in modules if any(p.isdigit() for p in each.split("."))})
    ends = [name for name in ends if "norm" not in name]
    near = difflib.get_close_matches(lacking[0], ends, 1)
    hint = f"did you mean {near[0]}?" if near else f"its layers hold {', '.join(ends)}"
    return f"{model} has no module {', '.join(map(repr, lacking))}; {hint} (all takes every linear one)"


@cache
def _modules(model: str, revision: str) -> frozenset[str]:
    """Return the names of the modules that have weights of their own; none where these are not on this disk."""
    try:
        return frozenset(key.rsplit(".", 1)[0] for key in _tensors(model, revision))
    except (OSError, ValueError, KeyError, AttributeError, SafetensorError):
        return frozenset()  # damaged weights are told by whoever loads them


def _tensors(model: str, revision: str) -> Iterator[str]:
    if index := _file(model, _INDEX, revision):
        yield from json.loads(index.read_text(encoding="utf-8"))["weight_map"]
    elif whole := _file(model, _WHOLE, revision):
        with safe_open(whole, framework="np") as file:
            yield from file.keys()


def _file(model: str, name: str, revision: str) -> Path | None:
    """Return a file of a local folder, or of a hub's model that an earlier download left on this disk."""
    if Path(model).is_dir():
        found = Path(model) / name
        return found if found.is_file() else None
    return cached_file(model, name, revision)
