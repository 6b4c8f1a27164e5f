"""Weights that may be loaded: safetensors only, as a pickle file runs whatever code its maker put in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from factory.inputs import names

# Keys of a recipe whose value may name a local folder of weights.
_KEYS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a trainer writes of itself beside the weights, and what no loader of weights opens.
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})


def refuse_pickles(recipe: Mapping[str, Any]) -> None:
    """Raise ArenaError where a local folder that a recipe names holds its weights as pickles."""
    for key in _KEYS:
        for name in names(recipe.get(key)):
            if Path(name).is_dir():
                _check(Path(name), key)
            elif Path(name).is_file():
                raise ArenaError("is a file", where=f"{key} {name}", remedy="give the folder with config.json in it")


def _check(folder: Path, key: str) -> None:
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if any(path.suffix == ".safetensors" and path.name != "value_head.safetensors" for path in files):
        return
    pickles = [path.name for path in files if path.suffix in _PICKLES and path.name not in _NO_WEIGHTS]
    if pickles:
        raise ArenaError(
            f"holds its weights as a pickle ({', '.join(pickles[:3])}), which runs its maker's code when it is loaded",
            where=f"{key} {folder}",
            remedy="use a model with *.safetensors; if you trust its maker, load it once elsewhere with transformers "
            "and save_pretrained() it, which writes safetensors",
        )
