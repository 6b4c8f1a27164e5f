"""The check of recipes before anything starts; each fault names file, key, reason and remedy.

factory/recipe_rules.py holds the values that are refused. Here are the checks that need more than a recipe's values:
experiment.yaml, installed packages, the model's weights, the devices of this machine.
"""

from __future__ import annotations

import difflib
import json
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import SafetensorError, safe_open

from common.errors import ArenaError
from common.experiment import Experiment, read_yaml
from common.llamafactory_schema import arguments, key_fault, reporters, templates, value_fault
from common.stages import Step
from data_prep.hub import cached_file
from factory.devices import Devices, devices
from factory.fingerprint import names
from factory.recipe_rules import MERGING, PACKAGES, RANGES, TRAINING, Rule
from factory.recipes import is_as_rendered, shared_values, step_of

Recipe = Mapping[str, Any]
Fault = tuple[str, str]  # key, what is wrong and the remedy

# How the fault of a recipe ends that the next `prepare` mends by itself.
OLDER = "the recipe is older than that"
_PATHS = frozenset({"model_name_or_path", "adapter_name_or_path", "dataset_dir", "output_dir", "export_dir"})
# Keys whose value may name a local folder of weights.
_WEIGHTS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a trainer writes of itself beside the weights, and what no loader of weights opens.
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
_REPORTER_PACKAGES = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio", "comet_ml")


def check_recipes(
    experiment: Experiment,
    steps: Iterable[str],
    root: Path = Path(),
    *,
    read: Mapping[str, Recipe] | None = None,
    installed: bool = True,
) -> None:
    """Raise one ArenaError that lists every fault of these steps' recipes.

    `read` holds recipes by step that the caller has read already; the others are read. Without `installed` it does not
    matter which packages this machine has.
    """
    read = read or {}
    faults = {step: check_recipe(experiment, step, root, recipe=read.get(step), installed=installed) for step in steps}
    listed = [f"  - {fault}" for of_step in faults.values() for fault in of_step]
    if not listed:
        return
    prepare = f"python run.py prepare -e {experiment.name} --train FILE"
    paths = [root / experiment.recipe(step) for step, of_step in faults.items() if of_step]
    if all(_is_as_rendered(path) for path in paths if path.is_file()):
        yaml = experiment.folder / "experiment.yaml"
        remedy = f"`{prepare}` renders these recipes again, as they have no hand edits; their values come from {yaml}"
    else:
        remedy = f"mend these keys; or render a recipe again with `{prepare} --force`, which drops its hand edits"
    raise ArenaError("\n".join([f"{len(listed)} fault(s), found before anything was started:", *listed]), remedy=remedy)


def check_recipe(
    experiment: Experiment, step: str, root: Path = Path(), *, recipe: Recipe | None = None, installed: bool = True
) -> list[str]:
    """Return every fault of one recipe as "file: key: what is wrong and the remedy", in the order of its keys."""
    its, path = step_of(step), experiment.recipe(step)
    if not (root / path).is_file():
        return [f"{path}: is missing; `python run.py prepare -e {experiment.name} --train FILE` renders it"]
    try:
        recipe = read_yaml(root / path) if recipe is None else recipe
    except ArenaError as error:
        return [f"{path}: {error.what}; {error.remedy}"]
    own = dict(_own_faults(recipe, not its.merges, installed))
    sound = {key: value for key, value in recipe.items() if key not in own}  # a wrong type is not judged further
    faults = [
        *own.items(),
        *weight_faults(sound, root),
        *_disagreements(experiment, its, recipe, sound, root),
        *_refusals((*RANGES, *(MERGING if its.merges else TRAINING)), sound),
    ]
    first = dict(reversed(faults))  # the first fault of a key says enough
    order = {key: number for number, key in enumerate(recipe)}
    return [f"{path}: {key}: {first[key]}" for key in sorted(first, key=lambda key: order.get(key, len(order)))]


def check_device(path: Path, recipe: Recipe) -> None:
    """Raise ArenaError if this machine lacks what a training recipe computes in; asks a child process only if needed.

    torch would emulate bf16 on a card before Ampere, silently and slowly, and refuse it without a GPU.
    """
    if not any(recipe.get(key) for key in ("bf16", "fp16", "pure_bf16", "use_cpu")):
        return
    if faults := [f"  - {path}: {key}: {fault}" for key, fault in device_faults(recipe, devices())]:
        raise ArenaError(
            "\n".join([f"{len(faults)} fault(s) of this recipe on this machine:", *faults]),
            remedy="mend these keys, in the recipe or for good under `recipes:` of experiment.yaml; "
            "`run.py doctor` shows what this machine has",
        )


def device_faults(recipe: Recipe, seen: Devices) -> Iterator[Fault]:
    """Yield the keys that `seen` cannot compute in; none where torch itself could not be asked."""
    if seen.failure:
        return
    if recipe.get("use_cpu") and seen.accelerator:
        yield "use_cpu", "moves no model off a GPU; remove it, and hide the GPU with CUDA_VISIBLE_DEVICES="
    old = [gpu.name for gpu in seen.gpus if not gpu.bf16]
    for key in ("bf16", "pure_bf16"):
        if recipe.get(key) and old:
            yield key, f"{old[0]} has no bf16; write {key}: false and fp16: true"
        elif recipe.get(key) and not seen.accelerator and (key == "pure_bf16" or not recipe.get("use_cpu")):
            beside = ", or use_cpu: true beside it, which pays with avx512_bf16 only" if key == "bf16" else ""
            yield key, f"there is no GPU here; write {key}: false{beside}"
    if recipe.get("fp16") and not seen.accelerator:
        yield "fp16", "there is no GPU here, and fp16 needs one; write fp16: false"


def weight_faults(recipe: Recipe, root: Path = Path()) -> Iterator[Fault]:
    """Yield what is wrong with the weights that a recipe names, as far as they are on this disk."""
    for key in _WEIGHTS:
        for name in names(recipe.get(key)):
            if (root / name).is_dir() and (pickles := _pickles(root / name)):
                yield (
                    key,
                    f"{name} holds its weights as a pickle ({', '.join(pickles[:3])}), which runs its maker's code "
                    "when it is loaded; use a model with *.safetensors, or, if you trust its maker, load it once "
                    "elsewhere with transformers and save_pretrained() it",
                )
            elif (root / name).is_file():
                yield key, f"{name} is a file; give the folder with config.json in it"
    model = recipe.get("model_name_or_path")
    if isinstance(model, str) and _is_quantized(root / model):
        yield (
            "model_name_or_path",
            f"{model} holds quantized weights, into which no adapter can be merged; use the model's 16-bit weights: "
            "quantization_bit of experiment.yaml quantizes them while training",
        )
    if isinstance(model, str) and (fault := _target_fault(recipe, model, root)):
        yield "lora_target", fault


def _pickles(folder: Path) -> list[str]:
    """Return the pickled weights of a folder; none where safetensors lie beside them, which are loaded then."""
    files = [path for path in sorted(folder.iterdir()) if path.is_file()]
    if any(path.suffix == ".safetensors" and path.name != "value_head.safetensors" for path in files):
        return []
    return [path.name for path in files if path.suffix in _PICKLES and path.name not in _NO_WEIGHTS]


def _is_quantized(folder: Path) -> bool:
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a hub id, or a folder that LLaMA-Factory will name
    return isinstance(content, dict) and bool(content.get("quantization_config"))


def _target_fault(recipe: Recipe, model: str, root: Path) -> str | None:
    """Return which names of `lora_target` match no module of the model."""
    targets = names(recipe.get("lora_target"))
    if not targets or targets == ["all"]:
        return None
    modules = _modules(str(root / model) if (root / model).is_dir() else model, recipe.get("model_revision") or "main")
    known = {*modules, "lm_head"}  # which has no tensor of its own where it shares the embedding's
    lacking = [name for name in targets if not any(each == name or each.endswith(f".{name}") for each in known)]
    if not modules or not lacking:
        return None
    ends = sorted({each.rsplit(".", 1)[-1] for each in modules if any(p.isdigit() for p in each.split("."))})
    ends = [name for name in ends if "norm" not in name]
    near = difflib.get_close_matches(lacking[0], ends, 1)
    hint = f"did you mean {near[0]}?" if near else f"its layers hold {', '.join(ends)}"
    return f"{model} has no module {', '.join(map(repr, lacking))}; {hint} (all takes every linear one)"


def _modules(model: str, revision: str) -> set[str]:
    """Return the names of the modules that have weights; none where the weights are not on this disk or damaged."""

    def find(name: str) -> Path | None:
        path = Path(model) / name if Path(model).is_dir() else cached_file(model, name, revision)
        return path if path and path.is_file() else None

    try:
        if index := find("model.safetensors.index.json"):
            tensors = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        elif whole := find("model.safetensors"):
            with safe_open(whole, framework="np") as file:
                tensors = list(file.keys())
        else:
            return set()
        return {key.rsplit(".", 1)[0] for key in tensors}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return set()


def _own_faults(recipe: Recipe, training: bool, installed: bool) -> Iterator[Fault]:
    """Yield unknown keys, wrong types, wrong choices and missing packages."""
    for key, value in recipe.items():
        fault = key_fault(key, training) or value_fault(arguments()[key], value)
        if fault := fault or _package_fault(key, value, installed):
            yield key, fault


def _package_fault(key: str, value: Any, installed: bool) -> str | None:
    """Return what is wrong with a reporter, or with a key whose package is not installed."""
    if key == "report_to":
        known = ("none", "all", *reporters())
        if unknown := [name for name in names(value) if name not in known]:
            return f"{', '.join(map(repr, unknown))} is no reporter; choices: {', '.join(known)}"
        needed = [name for name in names(value) if name in _REPORTER_PACKAGES]
    elif (key, value) == ("flash_attn", "fa2"):
        needed = ["flash_attn"]
    else:
        needed = [PACKAGES[key]] if value and key in PACKAGES else []
    absent = [name for name in needed if find_spec(name) is None] if installed else []
    if not absent:
        return None
    instead = "write tensorboard or none" if key == "report_to" else "remove the key"
    return f"needs {', '.join(absent)}, which is not installed; `python -m pip install` it, or {instead}"


def _disagreements(experiment: Experiment, step: Step, recipe: Recipe, sound: Recipe, root: Path) -> Iterator[Fault]:
    """Yield keys that say otherwise than experiment.yaml, and what the chat template needs."""
    yaml, rendered = experiment.folder / "experiment.yaml", None
    for key, expected in shared_values(experiment, step.name).items():
        if key in recipe and key not in sound:
            continue  # its type is already a fault
        given = sound.get(key, arguments()[key].default)
        if _comparable(key, given) == _comparable(key, expected):
            continue
        if rendered is None:
            rendered = _is_as_rendered(root / experiment.recipe(step.name))
        said = "is missing" if key not in recipe else f"is {given!r}"
        mend = f": {OLDER}" if rendered else "; write that here, or change the experiment"
        yield key, f"{said}, but by {yaml} it is {expected!r}{mend}"
    known, name = templates(), experiment.template
    if name not in known:
        yield "template", f"LLaMA-Factory has no chat template {name!r}; choices: {', '.join(known)}"
    elif known[name].thinks and experiment.enable_thinking is not False:
        other = f", or template: {name}_nothink" if f"{name}_nothink" in known else ""
        yield (
            "template",
            f"{name} trains on an empty thought before the label; write enable_thinking: false in {yaml}{other}",
        )


def _comparable(key: str, value: Any) -> Any:
    """Make equal what names the same thing: ./data/demo/ is data/demo, [x] is x."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return posixpath.normpath(value) if key in _PATHS and isinstance(value, str) else value


def _is_as_rendered(path: Path) -> bool:
    return is_as_rendered(path.read_bytes().decode("utf-8", errors="replace"))


def _refusals(rules: Iterable[Rule], recipe: Recipe) -> Iterator[Fault]:
    values = SimpleNamespace(**{a.name: a.default for a in arguments().values()} | dict(recipe))
    for rule in rules:
        for key in rule.keys.split():
            value = getattr(values, key)
            if rule.when(values, value):
                yield key, f"{value!r} {rule.reason}{f'; {rule.remedy}' if rule.remedy else ''}"
