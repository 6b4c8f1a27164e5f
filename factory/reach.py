"""What a recipe reaches beyond the project: uploads, trackers, hubs, addresses, files and folders elsewhere.

An experiment may be a stranger's, so each must be named on the command line, by `--allow NAME`.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.console import name_of
from common.files import is_in_project, read_regular
from factory.fingerprint import names

Recipe = Mapping[str, Any]
Fault = tuple[str, str]  # key, what is wrong and the remedy

# Reporters that only write files into the run's folder.
_LOCAL_REPORTERS = ("none", "tensorboard")
_FILES = ("deepspeed", "fsdp_config", "accelerator_config")
_FOLDERS = (
    *("logging_dir", "media_dir", "offload_folder", "profiler_output_dir", "swanlab_logdir", "tokenized_path"),
    *("kt_weight_path", "kt_expert_checkpoint_path"),
)
# Keys that may name a model or an adapter beside the experiment's own.
_MODELS = ("adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model", "reward_model_adapters")
# What Ray may be started with. Others, such as runtime_env, install packages and run code.
_RAY = ("address", "num_cpus", "num_gpus", "object_store_memory", "include_dashboard", "ignore_reinit_error")
_LARGEST = 1 << 18  # bytes of an engine's file
_ELSEWHERE = "lies outside of the project"
_TRACKER = "is a tracker, which gets the recipe and the losses"
_UPLOAD = "is a place on a hub, to which the model is uploaded"
_CLUSTER = "is a cluster that is connected to"


def reach_faults(recipe: Recipe, model: str, allowed: Collection[str] = ()) -> Iterator[Fault]:
    """Yield each key of a recipe that reaches what `allowed` does not name; `model` is the experiment's own."""
    for key, name, what in [*_uploads(recipe), *_places(recipe, model), *_engine(recipe)]:
        if not name:
            yield key, what
        elif not str(name).isprintable():
            yield key, f"{name_of(name)} holds control characters"
        elif name not in allowed:
            yield key, f"{name} {what}; if that is what you want: --allow {shlex.quote(name)}"


def _uploads(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield (key, place, what it is) for uploads and trackers; without a place it cannot be allowed."""
    trackers = {name: "report_to" for name in names(recipe.get("report_to")) if name not in _LOCAL_REPORTERS}
    if recipe.get("use_swanlab") and recipe.get("swanlab_mode") != "local":
        trackers["swanlab"] = "use_swanlab"
    for name, key in trackers.items():
        everyone = "all reports to every tracker that is installed: name those that you want"
        yield key, "" if name == "all" else name, everyone if name == "all" else _TRACKER
    if recipe.get("push_to_hub"):
        name = recipe.get("hub_model_id") or ""
        yield "push_to_hub", name, _UPLOAD if name else "uploads: write hub_model_id, the place"
    places = {"export_hub_model_id": _UPLOAD, "master_addr": _CLUSTER}
    places |= {"trackio_space_id": _UPLOAD} if "trackio" in trackers else {}
    yield from ((key, recipe[key], what) for key, what in places.items() if recipe.get(key))


def _places(recipe: Recipe, model: str) -> Iterator[tuple[str, str, str]]:
    """Yield the models, files and folders that are not the project's."""
    for key in (*_MODELS, *_FOLDERS, *_FILES):
        for name in names(recipe.get(key)) if isinstance(recipe.get(key), str | list) else ():
            if key in _MODELS and name != model and not Path(name).is_dir():
                yield key, name, "is no folder here, so that LLaMA-Factory fetches it from the hub"
            elif name != model and not name.startswith("{") and not is_in_project(name):
                yield key, name, _ELSEWHERE


def _engine(recipe: Recipe) -> Iterator[tuple[str, str, str]]:
    """Yield what the settings of DeepSpeed, FSDP, accelerate and Ray reach."""
    for key in (*_FILES, "ray_init_kwargs"):
        try:
            settings = _settings(recipe.get(key))
        except (OSError, ValueError) as error:
            yield key, "", f"is not readable JSON: {error}"
            continue
        if key == "ray_init_kwargs":
            if strange := sorted(settings.keys() - set(_RAY)):
                yield key, "", f"may not hold {', '.join(strange)}; it may hold {', '.join(_RAY)}"
            if address := settings.get("address"):
                yield key, str(address), _CLUSTER
        for text in _texts(settings):
            if (text.startswith(("/", "~")) or ".." in Path(text).parts) and not is_in_project(text):
                yield key, text, _ELSEWHERE
        for tracker in ("wandb", "comet"):
            if isinstance(each := settings.get(tracker), dict) and each.get("enabled"):
                yield key, tracker, _TRACKER


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)


def _settings(value: Any) -> dict[str, Any]:
    """Return settings that a recipe holds itself, as JSON text, or names the file of."""
    if isinstance(value, str):
        value = json.loads(value if value.lstrip().startswith("{") else read_regular(Path(value), _LARGEST).decode())
    return value if isinstance(value, dict) else {}
