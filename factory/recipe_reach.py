"""What a recipe names: weights, checked as far as they are on this disk; and what it reaches beyond the project.

Uploads, trackers, hubs, addresses, files and folders elsewhere: an experiment may be a stranger's, so each must be
named on the command line, by `--allow NAME`.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from common.console import name_of
from common.errors import ArenaError
from common.experiment import Experiment
from common.files import is_in_project, read_json, read_regular
from data_prep.model_lookup import model_file
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
# Keys whose value may name a local folder of weights.
_WEIGHTS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model")
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_ADAPTERS = ("adapter_name_or_path", "ref_model_adapters", "reward_model_adapters")
# Keys of adapter_config.json that PEFT matches with every module's name: a regular expression may never end.
_PATTERNS = ("target_modules", "exclude_modules", "layers_pattern", "rank_pattern", "alpha_pattern")
_REGEX = re.compile(r"[*+{]")
_STRANGE = ("megatron_config", "layer_replication")  # import a module that is named; change the base
# What the keys of a recipe are called there.
_SHAPE = {
    "lora_rank": "r",
    "lora_target": "target_modules",
    "additional_target": "modules_to_save",
    **{key: key for key in ("lora_alpha", "lora_dropout", "use_rslora", "use_dora")},
}
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# Settings that may name a kernel of the hub: compiled code of a stranger, without trust_remote_code.
_IMPLEMENTATIONS = ("attn_implementation", "experts_implementation")
# The largest values of a config.json's keys: somebody builds as many.
_MOST = {"(layers?|experts)$": 10_000, "vocab_size$": 10_000_000}
# What transformers and PEFT load; beside any other file they take a pickle.
_SAFE = ("model.safetensors", "model.safetensors.index.json", ADAPTER_FILES[1])
# What a trainer writes of itself beside the weights, and what no loader of weights opens.
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})


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


def weight_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what is wrong with the weights that a recipe names, as far as they are on this disk."""
    for key in _WEIGHTS:
        for name in names(recipe.get(key)):
            if Path(name).is_dir() and (pickles := _pickles(Path(name))):
                yield (
                    key,
                    f"{name} holds its weights as a pickle ({', '.join(pickles[:3])}), which runs its maker's code "
                    "when it is loaded; use a model with *.safetensors, or, if you trust its maker, load it once "
                    "elsewhere with transformers and save_pretrained() it",
                )
            elif Path(name).is_file():
                yield key, f"{name} is a file; give the folder with config.json in it"
    if recipe.get("do_train"):  # a merge's adapter is its training's; it is checked once it exists
        yield from _adapter_faults(recipe)
    model = recipe.get("model_name_or_path")
    if not isinstance(model, str):
        return
    config = config_of(model, recipe.get("model_revision"))
    if odd := odd_setting(config) or odd_index(Path(model)):
        yield "model_name_or_path", f"{model}: {odd}; use another model, or remove that"
    if config.get("quantization_config"):
        yield (
            "model_name_or_path",
            f"{model} holds quantized weights, into which no adapter can be merged; use the model's 16-bit weights: "
            "quantization_bit of experiment.yaml quantizes them while training",
        )
    if (cutoff := recipe.get("cutoff_len")) and (most := _positions(config)) and cutoff > most:
        yield (
            "cutoff_len",
            f"{cutoff:,} is more than the {most:,} positions of {model}, which was taught nothing beyond them; lower "
            "cutoff_len in experiment.yaml and prepare again, or take a base with more",
        )
    if fault := _target_fault(recipe):
        yield "lora_target", fault


def adapter_config(folder: Path) -> dict[str, Any]:
    """Return an adapter's configuration, which PEFT can be given; raises ValueError for any other."""
    try:
        config = read_json(folder / ADAPTER_FILES[0])
        if config["peft_type"] != "LORA":
            raise ValueError("peft_type is not LORA")
        if not isinstance(config["base_model_name_or_path"], str):
            raise ValueError("base_model_name_or_path is no text")
        if patterns := [key for key in _PATTERNS if any(map(_REGEX.search, _texts_in(config.get(key))))]:
            raise ValueError(f"{patterns[0]} holds a regular expression; give the modules' names")
        if strange := [key for key in _STRANGE if config.get(key)]:
            raise ValueError(f"{strange[0]} must be null")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"adapter_config.json is damaged: {error}") from None
    return config


def _texts_in(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else [each for each in value or () if isinstance(each, str)]


def _adapter_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield what is wrong with the adapters that a training begins with, and keys that say otherwise than they do."""
    for key in _ADAPTERS:
        for name in names(recipe.get(key)):
            path = model_file(name, ADAPTER_FILES[0])
            try:
                config = adapter_config(path.parent) if path else {}
            except ValueError as error:
                yield key, f"{name}: {error}; take another adapter"
                continue
            for ours, its in _SHAPE.items() if key == "adapter_name_or_path" else ():
                if (given := recipe.get(ours)) and not _agree(given, config.get(its), bool(config), recipe):
                    its_own = f", where {its} is {config.get(its)!r}" if config else ""
                    what = f"does nothing beside adapter_name_or_path, whose adapter_config.json decides{its_own}"
                    yield ours, f"{given!r} {what}; remove it"


def _agree(given: Any, own: Any, known: bool, recipe: Recipe) -> bool:
    """Tell whether a recipe's value is the adapter's own; where that is not known, whether it is the usual one."""
    if given == "all":
        return not known or set(names(own)).issuperset(_layer_names(_modules(recipe)))
    if not known:
        return given == 8  # LLaMA-Factory's rank
    return set(names(given)) == set(names(own)) if isinstance(given, str | list) else given == own


def _pickles(folder: Path) -> list[str]:
    """Return the pickled weights of a folder; none where safetensors lie beside them, which are loaded then."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if any(path.name in _SAFE for path in files):
        return []
    return [path.name for path in files if path.suffix in _PICKLES and path.name not in _NO_WEIGHTS]


def odd_setting(config: Any) -> str | None:
    """Return a setting of a config.json that would run foreign code, or take for ever, when the model is loaded."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key.strip("_").startswith(_IMPLEMENTATIONS) and "/" in str(value):
            return f"config.json: {key} {value!r} fetches code from the hub"
        if key == "transformers_weights":
            return f"config.json: {key} {value!r} names other weights than the folder's"
        for most in (most for name, most in _MOST.items() if isinstance(value, int) and re.search(name, key)):
            if value > most:
                return f"config.json: {key} {value:,} is more than {most:,}"
        if nested := odd_setting(value):
            return nested
    return None


def odd_index(folder: Path) -> str | None:
    """Return a file of an index of weights that is no safetensors file of this folder; None if all are."""
    try:
        files = read_json(folder / "model.safetensors.index.json")["weight_map"].values()
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None  # whoever loads damaged weights reports them
    odd = next((file for file in files if "/" in str(file) or not str(file).endswith(".safetensors")), None)
    return None if odd is None else f"model.safetensors.index.json: {odd!r} is no safetensors file of this folder"


def config_of(model: str, revision: str | None) -> dict[str, Any]:
    """Return a model's config.json; empty if it is damaged or not on this disk, which loading the model reports."""
    path = model_file(model, "config.json", revision or "main")
    try:
        content = read_json(path) if path else {}
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _positions(config: Mapping[str, Any]) -> int | None:
    """Return how many tokens a model was made for, None where its config does not say."""
    config = {**config, **(config.get("text_config") or {})}
    most, scaling = config.get("max_position_embeddings"), config.get("rope_scaling") or config.get("rope_parameters")
    if not isinstance(most, int):
        return None
    if isinstance(scaling, dict) and "original_max_position_embeddings" not in scaling:
        return int(most * (scaling.get("factor") or 1))
    return most


def require_fit_base(experiment: Experiment) -> None:
    """Raise ArenaError where the base is on this disk and no judge can be trained on it, or not with this budget."""
    base = {"model_name_or_path": experiment.model, "model_revision": experiment.revision}
    for _, fault in weight_faults({**base, "cutoff_len": experiment.cutoff_len}):
        what, _, remedy = fault.partition("; ")
        raise ArenaError(what, where=f"{experiment.folder / 'experiment.yaml'}", remedy=remedy)


def _target_fault(recipe: Recipe) -> str | None:
    """Return which names of `lora_target` match no module of the model: PEFT leaves such a name out silently."""
    targets = names(recipe.get("lora_target"))
    if not targets or targets == ["all"]:
        return None
    modules = _modules(recipe)
    known = {*modules, "lm_head"}  # which has no tensor of its own where it shares the embedding's
    lacking = [name for name in targets if not any(each == name or each.endswith(f".{name}") for each in known)]
    if not modules or not lacking:
        return None
    model, its = recipe["model_name_or_path"], ", ".join(_layer_names(modules))
    return f"{model} has no module {', '.join(map(repr, lacking))}; its layers hold {its} (all takes every linear one)"


def _layer_names(modules: Iterable[str]) -> list[str]:
    """Return what the linear modules of a model's layers are called."""
    ends = {each.rsplit(".", 1)[-1] for each in modules if any(p.isdigit() for p in each.split("."))}
    return sorted(name for name in ends if "norm" not in name)


def _modules(recipe: Recipe) -> set[str]:
    """Return the names of the modules that have weights; none where the weights are not on this disk or damaged."""
    model, revision = str(recipe.get("model_name_or_path")), recipe.get("model_revision") or "main"
    tensors: list[str] = []
    try:
        if index := model_file(model, "model.safetensors.index.json", revision):
            tensors = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        elif whole := model_file(model, "model.safetensors", revision):
            with safe_open(whole, framework="np") as file:
                tensors = list(file.keys())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return set()  # whoever loads damaged weights reports them
    return {key.rsplit(".", 1)[0] for key in tensors}
