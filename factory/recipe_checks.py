"""The check of recipes before anything starts; each fault names file, key, reason and remedy.

Refused is what LLaMA-Factory 0.9.5 would do otherwise than the recipe says, or notice only late: what its own parser
refuses at once is left to it. A new refusal of a value is one more row of a table below.
"""

from __future__ import annotations

import json
import posixpath
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from common.errors import ArenaError
from common.experiment import Experiment, read_yaml
from common.llamafactory_schema import arguments, key_fault, reporters, templates, value_fault
from common.stages import STEPS, Step
from data_prep.hub import cached_file
from factory.devices import Devices, devices
from factory.fingerprint import names
from factory.recipes import shared_values

Recipe = Mapping[str, Any]
Fault = tuple[str, str]  # key, what is wrong and the remedy

_PATHS = frozenset({"model_name_or_path", "adapter_name_or_path", "dataset_dir", "output_dir", "export_dir"})
# Keys whose value may name a local folder of weights.
_WEIGHTS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "reward_model")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# What a trainer writes of itself beside the weights, and what no loader of weights opens.
_NO_WEIGHTS = frozenset({"training_args.bin", "optimizer.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"})
_REPORTER_PACKAGES = ("tensorboard", "wandb", "mlflow", "swanlab", "trackio", "comet_ml")
_REMOVE = "remove it"


class Rule(NamedTuple):
    """Refuses each of `keys` (separated by spaces) for which `when(v, x)` holds: `x` is the key's own value, `v` has
    the values of all keys, LLaMA-Factory's defaults included. `reason` continues the value: "'fa3' is not …".
    """

    keys: str
    when: Callable[[SimpleNamespace, Any], Any]
    reason: str
    remedy: str = ""


def _is_set(v: SimpleNamespace, x: Any) -> bool:
    return bool(x)


def _below(limit: float) -> Callable[[SimpleNamespace, Any], bool]:
    return lambda v, x: x is not None and x < limit


_RANGES = (
    Rule("learning_rate num_train_epochs logging_steps pref_beta", lambda v, x: x <= 0, "must be above 0"),
    Rule("per_device_train_batch_size per_device_eval_batch_size", _below(1), "must be at least 1"),
    Rule("gradient_accumulation_steps lora_rank preprocessing_num_workers", _below(1), "must be at least 1"),
    Rule("save_total_limit max_samples", _below(1), "must be at least 1"),
    Rule("warmup_steps weight_decay max_grad_norm seed dataloader_num_workers", _below(0), "must not be negative"),
    Rule("lora_dropout", lambda v, x: not 0 <= x < 1, "must lie in [0, 1)"),
    Rule("dpo_label_smoothing", lambda v, x: not 0 <= x < 0.5, "must lie in [0, 0.5)"),
)
_TRAINING = (
    Rule("do_train", lambda v, x: not x, "trains nothing", "write true"),
    Rule("do_predict", _is_set, "writes texts, not probabilities", f"{_REMOVE}: run.py scores"),
    Rule("finetuning_type", lambda v, x: x != "lora", "cannot be merged, which needs a LoRA adapter", "write lora"),
    Rule(
        "val_size",
        _is_set,
        "splits by row, so that copies of one prompt land on both sides, and excludes eval_dataset",
        f"{_REMOVE}: valid_share of experiment.yaml splits by prompt",
    ),
    Rule("tokenized_path", _is_set, "silently overrides every other key about data once it exists", _REMOVE),
    Rule("packing", lambda v, x: x and not v.neat_packing, "lets battles attend to each other", _REMOVE),
    Rule("neat_packing", _is_set, "takes one token off cutoff_len and drops the rows that fill it", _REMOVE),
    Rule(
        "streaming",
        lambda v, x: x and v.dataloader_num_workers < 1,
        "streams nothing: LLaMA-Factory shares a local file out among the loader's processes",
        "write dataloader_num_workers of 1 or more",
    ),
    Rule("use_dora", lambda v, x: x and v.quantization_bit, "is refused on a quantized model", "take use_rslora"),
    Rule("flash_attn", lambda v, x: x == "fa3", "is not implemented in LLaMA-Factory", "write fa2, sdpa or auto"),
    Rule(
        "adapter_name_or_path",
        lambda v, x: v.stage == "dpo" and x and not (v.ref_model and v.ref_model_adapters),
        "under dpo has silently the base model as its reference",
        f"{_REMOVE} and write start_from: {{dpo_judge: sft}} in experiment.yaml: the merged SFT judge",
    ),
    Rule(
        "pref_loss",
        lambda v, x: v.stage == "dpo" and x in ("hinge", "kto_pair", "ipo"),
        "is refused: LLaMA-Factory 0.9.5 silently trains plain sigmoid for it (for ipo on averaged log-probabilities)",
        "choices: sigmoid, orpo, simpo",
    ),
    Rule(
        "overwrite_output_dir",
        _is_set,
        "leaves old checkpoints in place, and a checkpoint in output_dir is resumed without being asked",
        f"{_REMOVE}, and the folder if it is not wanted",
    ),
)
_MERGING = (
    Rule("quantization_bit", _is_set, "allows no merge: an adapter cannot be merged into a quantized model", _REMOVE),
)


def check_recipes(
    experiment: Experiment, steps: Iterable[str], root: Path = Path(), *, read: Mapping[str, Recipe] | None = None
) -> None:
    """Raise one ArenaError that lists every fault of these steps' recipes.

    `read` holds recipes by step that the caller has read already; the others are read.
    """
    read = read or {}
    faults = {step: check_recipe(experiment, step, root, recipe=read.get(step)) for step in steps}
    listed = [f"  - {fault}" for of_step in faults.values() for fault in of_step]
    if listed:
        prepare = f"python run.py prepare -e {experiment.name} --train FILE"
        raise ArenaError(
            "\n".join([f"{len(listed)} fault(s), found before anything was started:", *listed]),
            remedy=f"fix these keys; or render the recipes again from {experiment.folder / 'experiment.yaml'}: "
            f"`{prepare}`, with --force for a recipe with hand edits, which drops them",
        )


def check_recipe(experiment: Experiment, step: str, root: Path = Path(), *, recipe: Recipe | None = None) -> list[str]:
    """Return every fault of one recipe as "file: key: what is wrong and the remedy", in the order of its keys."""
    its, path = STEPS[step], experiment.recipe(step)
    if not (root / path).is_file():
        return [f"{path}: is missing; `python run.py prepare -e {experiment.name} --train FILE` renders it"]
    try:
        recipe = read_yaml(root / path) if recipe is None else recipe
    except ArenaError as error:
        return [f"{path}: {error.what}; {error.remedy}"]
    own = dict(_own_faults(recipe, not its.merges))
    sound = {key: value for key, value in recipe.items() if key not in own}  # a wrong type is not judged further
    faults = [
        *own.items(),
        *weight_faults(sound, root),
        *_disagreements(experiment, its, recipe, sound),
        *_refusals((*_RANGES, *(_MERGING if its.merges else _TRAINING)), sound),
    ]
    first = dict(reversed(faults))  # the first fault of a key says enough
    order = {key: number for number, key in enumerate(recipe)}
    return [f"{path}: {key}: {first[key]}" for key in sorted(first, key=lambda key: order.get(key, len(order)))]


def check_device(path: Path, recipe: Recipe) -> None:
    """Raise ArenaError if this machine lacks what a training recipe needs: a package, or a device with bf16."""
    faults = list(package_faults(recipe))
    if recipe.get("bf16") or recipe.get("pure_bf16"):  # else no child process is asked
        faults += device_faults(recipe, devices())
    if faults:
        listed = [f"  - {path}: {key}: {fault}" for key, fault in faults]
        raise ArenaError(
            "\n".join([f"{len(faults)} fault(s) of this recipe on this machine:", *listed]),
            remedy="fix these keys, in the recipe or for good under `recipes:` of experiment.yaml; "
            "`run.py doctor` shows what this machine has",
        )


def package_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the keys that need a package without which LLaMA-Factory ends late, or goes on in another way."""
    needed = {"report_to": [name for name in names(recipe.get("report_to")) if name in _REPORTER_PACKAGES]}
    needed["flash_attn"] = ["flash_attn"] if recipe.get("flash_attn") == "fa2" else []
    for key, packages in needed.items():
        if absent := [name for name in packages if find_spec(name) is None]:
            yield (
                key,
                f"needs {', '.join(absent)}, which is not installed: `python -m pip install` it, or change the key",
            )


def device_faults(recipe: Recipe, seen: Devices) -> Iterator[Fault]:
    """Yield the keys that `seen` cannot compute in; none where torch itself could not be asked."""
    # torch would emulate bf16 on a card before Ampere, silently and slowly
    old = [gpu.name for gpu in seen.gpus if not gpu.bf16]
    for key in ("bf16", "pure_bf16"):
        if recipe.get(key) and old:
            yield key, f"{old[0]} has no bf16; write {key}: false and fp16: true"
        elif recipe.get(key) and not (seen.accelerator or seen.failure or recipe.get("use_cpu")):
            yield key, f"there is no GPU here; write {key}: false, or use_cpu: true beside it (fast with avx512_bf16)"


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
    """Return which names of `lora_target` match no module of the model: PEFT leaves such a name out silently."""
    targets = names(recipe.get("lora_target"))
    if not targets or targets == ["all"]:
        return None
    modules = _modules(str(root / model) if (root / model).is_dir() else model, recipe.get("model_revision") or "main")
    known = {*modules, "lm_head"}  # which has no tensor of its own where it shares the embedding's
    lacking = [name for name in targets if not any(each == name or each.endswith(f".{name}") for each in known)]
    if not modules or not lacking:
        return None
    ends = {each.rsplit(".", 1)[-1] for each in modules if any(p.isdigit() for p in each.split("."))}
    its = ", ".join(sorted(name for name in ends if "norm" not in name))
    return f"{model} has no module {', '.join(map(repr, lacking))}; its layers hold {its} (all takes every linear one)"


def _modules(model: str, revision: str) -> set[str]:
    """Return the names of the modules that have weights; none where the weights are not on this disk or damaged."""

    def find(name: str) -> Path | None:
        path = Path(model) / name if Path(model).is_dir() else cached_file(model, name, revision)
        return path if path and path.is_file() else None

    tensors: list[str] = []
    try:
        if index := find("model.safetensors.index.json"):
            tensors = list(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        elif whole := find("model.safetensors"):
            with safe_open(whole, framework="np") as file:
                tensors = list(file.keys())
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError):
        return set()  # whoever loads damaged weights reports them
    return {key.rsplit(".", 1)[0] for key in tensors}


def _own_faults(recipe: Recipe, training: bool) -> Iterator[Fault]:
    """Yield unknown keys, wrong types and wrong choices."""
    for key, value in recipe.items():
        if fault := key_fault(key, training) or value_fault(arguments()[key], value):
            yield key, fault
    known = ("none", "all", *reporters())
    if unknown := [name for name in names(recipe.get("report_to")) if name not in known]:
        yield "report_to", f"{', '.join(map(repr, unknown))} is no reporter; choices: {', '.join(known)}"


def _disagreements(experiment: Experiment, step: Step, recipe: Recipe, sound: Recipe) -> Iterator[Fault]:
    """Yield keys that say otherwise than experiment.yaml, and what the chat template needs."""
    yaml = experiment.folder / "experiment.yaml"
    for key, expected in shared_values(experiment, step.name).items():
        if key in recipe and key not in sound:
            continue  # its type is already a fault
        given = sound.get(key, arguments()[key].default)
        if _comparable(key, given) == _comparable(key, expected):
            continue
        said = "is missing" if key not in recipe else f"is {given!r}"
        yield key, f"{said}, but by {yaml} it is {expected!r}; write that here, or change the experiment"
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


def _refusals(rules: Iterable[Rule], recipe: Recipe) -> Iterator[Fault]:
    values = SimpleNamespace(**{a.name: a.default for a in arguments().values()} | dict(recipe))
    for rule in rules:
        for key in rule.keys.split():
            value = getattr(values, key)
            if rule.when(values, value):
                yield key, f"{value!r} {rule.reason}{f'; {rule.remedy}' if rule.remedy else ''}"
