"""The check of recipes before anything starts: what LLaMA-Factory would refuse late, ignore, or do otherwise.

LLaMA-Factory 0.9.5 validates neither Literal values nor types of a YAML file, and several combinations train
something else than they say. Each rule here gives the key, the reason and the remedy.
"""

from __future__ import annotations

import difflib
import json
import os
import posixpath
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from common.console import printable
from common.errors import ArenaError
from common.experiment import Experiment, read_yaml
from common.llamafactory_schema import arguments, key_fault, reporters, templates, value_fault
from common.stages import Step
from data_prep.hub import cached_file
from factory.process import child_environment
from factory.recipes import is_as_rendered, shared_values, step_of
from factory.state import names

if TYPE_CHECKING:
    from factory.devices import Devices

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


_PATIENCE = 60  # seconds for a tracker to say whether we are logged in
_SWANLAB_RAISES = (0, 8)  # from here on get_run() raises without a run, where transformers expects None


@dataclass(frozen=True)
class _Tracker:
    """A tracker with an account: its own question whether there is one, when it needs none, and the ways out."""

    asks: str
    mode: str
    without_account: tuple[str, ...]
    remedy: str


_TRACKERS = {
    "wandb": _Tracker(
        "import wandb; wandb.login()",
        "WANDB_MODE",
        ("offline", "dryrun", "disabled"),
        "set WANDB_API_KEY or call `wandb login`; or WANDB_MODE=offline, and `wandb sync` later; or report_to: none",
    ),
    "swanlab": _Tracker(
        "import swanlab; swanlab.login()",
        "SWANLAB_MODE",
        ("offline", "local", "disabled"),
        "set SWANLAB_API_KEY or call `swanlab login`; or swanlab_mode: local beside use_swanlab: true; or remove it",
    ),
}


def require_accounts(recipe: Mapping[str, Any], recipe_path: Path, given: Mapping[str, str] = os.environ) -> None:
    """Raise ArenaError if a tracker that this recipe reports to would ask for an account; it is asked in a child."""
    for name in accounts_needed(recipe, given):
        if said := _refusal(_TRACKERS[name].asks):
            raise ArenaError(
                f"{name} lets nobody in, so that the run would end at its first step:\n  {said}",
                where=str(recipe_path),
                remedy=_TRACKERS[name].remedy,
            )


def accounts_needed(recipe: Mapping[str, Any], given: Mapping[str, str]) -> Iterator[str]:
    """Yield the trackers that this recipe reports to over the network, as the environment `given` says.

    LLaMA-Factory passes swanlab_mode on, which SWANLAB_MODE then does not change.
    """
    reports = names(recipe.get("report_to"))
    for name, tracker in _TRACKERS.items():
        if name == "swanlab" and recipe.get("use_swanlab"):
            needed = recipe.get("swanlab_mode", "cloud") == "cloud"
        elif name in reports or ("all" in reports and find_spec(name) is not None):
            needed = given.get(tracker.mode, "").lower() not in tracker.without_account
        else:
            needed = False
        if needed:
            yield name


def swanlab_fails(recipe: Mapping[str, Any]) -> bool:
    """Return whether report_to reaches SwanLab by transformers' own reporter, which its newer releases break."""
    if recipe.get("use_swanlab") or not {"swanlab", "all"} & set(names(recipe.get("report_to"))):
        return False
    try:
        numbers = version("swanlab").split(".")[:2]
        return tuple(int(number) for number in numbers) >= _SWANLAB_RAISES
    except (PackageNotFoundError, ValueError):
        return False


def _refusal(question: str) -> str:
    """Return the last line of what a tracker says when it lets nobody in, empty where it does."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", question],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_PATIENCE} seconds"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return printable(lines[-1]) if lines else f"it ended with exit code {done.returncode}"


Fault = tuple[str, str]  # key, what is wrong and the remedy

_PATHS = frozenset({"model_name_or_path", "adapter_name_or_path", "dataset_dir", "output_dir", "export_dir"})
# The keys of a recipe that experiment.yaml has, too, if by another name; others follow from a recipe's own name.
_OF_EXPERIMENT = frozenset(
    {
        "model_name_or_path",
        "model_revision",
        "trust_remote_code",
        "template",
        "enable_thinking",
        "cutoff_len",
        "quantization_bit",
    }
)
_REFUSED_LOSSES = {
    "hinge": "LLaMA-Factory 0.9.5 silently trains plain sigmoid for it",
    "kto_pair": "LLaMA-Factory 0.9.5 silently trains plain sigmoid for it",
    "ipo": "LLaMA-Factory 0.9.5 silently trains sigmoid on length-averaged log-probabilities for it",
}
# How the fault of a recipe ends that the next `prepare` mends by itself.
OLDER = "the recipe is older than that"
_RESUMES = "a checkpoint in output_dir is resumed without being asked"


@dataclass(frozen=True)
class _Rule:
    """A combination that is refused. `applies` sees a recipe's values, defaults of LLaMA-Factory included."""

    key: str
    applies: Callable[[Mapping[str, Any]], Any]
    why: str


def _strategies_differ(v: Mapping[str, Any]) -> bool:
    best = v["load_best_model_at_end"] and v["save_strategy"] != "best"
    return bool(best and v["eval_strategy"] != v["save_strategy"])


def _has_reference(v: Mapping[str, Any]) -> bool:
    return bool(v["stage"] == "dpo" and v["pref_loss"] not in ("orpo", "simpo"))


def _zero_stage(config: Any) -> int | None:
    """Return the ZeRO stage of a DeepSpeed configuration, None where there is none or it cannot be read."""
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # LLaMA-Factory names the file that it cannot read
    stage = config.get("zero_optimization", {}).get("stage") if isinstance(config, dict) else None
    return stage if isinstance(stage, int) else None


def _base_is_reference(v: Mapping[str, Any]) -> bool:
    explicit = v["ref_model"] and v["ref_model_adapters"]
    return bool(v["stage"] == "dpo" and v["adapter_name_or_path"] and not explicit)


_TRAIN_RULES = (
    _Rule("do_train", lambda v: not v["do_train"], "must be true, else nothing is trained"),
    _Rule("do_predict", lambda v: v["do_predict"], "writes texts, not probabilities; remove it: run.py score scores"),
    _Rule(
        "predict_with_generate",
        lambda v: v["predict_with_generate"],
        "evaluates generated texts, which says nothing about probabilities; remove it",
    ),
    _Rule(
        "finetuning_type",
        lambda v: v["finetuning_type"] != "lora",
        "the merge needs a LoRA adapter; write lora",
    ),
    _Rule(
        "val_size",
        lambda v: v["val_size"],
        "splits by row, so that copies of one prompt land on both sides, and excludes eval_dataset; remove it: "
        "valid_share of experiment.yaml splits by prompt",
    ),
    _Rule(
        "tokenized_path",
        lambda v: v["tokenized_path"],
        "once it exists it silently overrides every other key about data; remove it",
    ),
    _Rule(
        "overwrite_output_dir",
        lambda v: v["overwrite_output_dir"],
        f"leaves old checkpoints in place, and {_RESUMES}; remove it, and the folder if it is not wanted",
    ),
    _Rule(
        "packing",
        lambda v: v["packing"] and not v["neat_packing"],
        "lets battles attend to each other, and drops rows that fill cutoff_len; remove it",
    ),
    _Rule(
        "neat_packing",
        lambda v: v["neat_packing"],
        "takes one token off cutoff_len, so that rows which fill it are dropped; remove it",
    ),
    _Rule(
        "resize_vocab",
        lambda v: v["quantization_bit"] and v["resize_vocab"],
        "a quantized model's embeddings cannot grow; remove it, or quantization_bit of experiment.yaml",
    ),
    _Rule(
        "use_dora",
        lambda v: v["quantization_bit"] and v["use_dora"],
        "LLaMA-Factory 0.9.5 always refuses DoRA on a quantized model; use_rslora works",
    ),
    _Rule(
        "pissa_init",
        lambda v: v["pissa_init"] and (v["quantization_bit"] or _has_reference(v)),
        "is refused on a quantized model and beside a DPO reference; remove it",
    ),
    _Rule(
        "adapter_name_or_path",
        lambda v: v["quantization_bit"] and len(names(v["adapter_name_or_path"])) > 1,
        "are several adapters on a quantized model, which takes one; merge them first",
    ),
    _Rule(
        "quantization_type",
        lambda v: v["quantization_bit"] == 8 and v["quantization_type"] != "nf4",
        "is for 4 bits only, 8 ignore it; remove it",
    ),
    _Rule(
        "deepspeed",
        lambda v: v["quantization_bit"] == 8 and _zero_stage(v["deepspeed"]) == 3,
        "is ZeRO-3, which takes 4 bits or none, not 8; change quantization_bit of experiment.yaml, or take ZeRO-2",
    ),
    _Rule(
        "fsdp",
        lambda v: v["quantization_bit"] == 8 and v["fsdp"],
        "takes 4 bits or none, not 8; change quantization_bit of experiment.yaml",
    ),
    _Rule(
        "ref_model_quantization_bit",
        lambda v: v["ref_model_quantization_bit"] not in (None, 4, 8),
        "is refused; choices: 4, 8, null",
    ),
    *(
        _Rule(key, lambda v, key=key: v[key], "does not go with a LoRA adapter; remove it")
        for key in ("use_galore", "use_apollo", "use_badam")
    ),
    *(
        _Rule(
            key,
            lambda v, key=key: v[key] and v["stage"] != "sft",
            "is for sft only; LLaMA-Factory refuses it; remove it",
        )
        for key in ("train_on_prompt", "mask_history")
    ),
    _Rule(
        "flash_attn",
        lambda v: v["flash_attn"] == "fa3",
        "is not implemented in LLaMA-Factory 0.9.5; write fa2, sdpa or auto",
    ),
    _Rule(
        "infer_backend",
        lambda v: v["infer_backend"] != "huggingface",
        "cannot train; remove it",
    ),
    _Rule("pure_bf16", lambda v: v["pure_bf16"] and v["fp16"], "and fp16 exclude each other; remove one"),
    _Rule(
        "pure_bf16",
        lambda v: v["pure_bf16"] and _zero_stage(v["deepspeed"]) == 3,
        "is incompatible with ZeRO-3; remove it: bf16 trains in mixed precision",
    ),
    _Rule(
        "create_new_adapter",
        lambda v: v["quantization_bit"] and v["adapter_name_or_path"] and v["create_new_adapter"],
        "is refused on a quantized model; merge the first adapter and start from the merge",
    ),
    _Rule(
        "quantization_device_map",
        lambda v: v["quantization_device_map"] == "auto",
        "is for inference only; remove it",
    ),
    _Rule("fp16", lambda v: v["fp16"] and v["bf16"], "at most one of fp16 and bf16 may be true"),
    _Rule("fp8", lambda v: v["fp8"] and v["quantization_bit"], "is not compatible with quantization_bit"),
    _Rule(
        "pref_loss",
        lambda v: v["stage"] == "dpo" and v["pref_loss"] in _REFUSED_LOSSES,
        "is refused; choices: sigmoid, orpo, simpo",
    ),
    _Rule(
        "dpo_label_smoothing",
        lambda v: v["dpo_label_smoothing"] and v["pref_loss"] != "sigmoid",
        "is for pref_loss: sigmoid only",
    ),
    _Rule(
        "dpo_label_smoothing",
        lambda v: not 0 <= v["dpo_label_smoothing"] < 0.5,
        "must lie in [0, 0.5): at half the votes wrong there is nothing to learn",
    ),
    _Rule(
        "adapter_name_or_path",
        _base_is_reference,
        "under dpo an adapter's reference is silently the base model; remove it and write "
        "start_from: {dpo_judge: sft} in experiment.yaml, which starts from the merged SFT judge",
    ),
    _Rule("load_best_model_at_end", _strategies_differ, "needs eval_strategy and save_strategy to be equal"),
    _Rule(
        "load_best_model_at_end",
        lambda v: v["stage"] == "rm" and v["load_best_model_at_end"],
        "is not supported for a reward model; remove it",
    ),
    _Rule(
        "max_steps",
        lambda v: v["streaming"] and v["max_steps"] <= 0,
        "streaming needs max_steps",
    ),
    _Rule(
        "dataloader_num_workers",
        lambda v: v["streaming"] and v["dataloader_num_workers"] < 1,
        "streams nothing at all: LLaMA-Factory shares a local file out among the loader's processes; write 1 or more",
    ),
    _Rule(
        "max_samples",
        lambda v: v["streaming"] and v["max_samples"] is not None,
        "is incompatible with streaming",
    ),
    _Rule(
        "report_to",
        swanlab_fails,
        "ends at the first step: the reporter of transformers does not go with SwanLab 0.8 or newer; write none and "
        "use_swanlab: true, which is LLaMA-Factory's own, or install swanlab<0.8",
    ),
)
_MERGE_RULES = (
    _Rule(
        "quantization_bit",
        lambda v: v["quantization_bit"],
        "an adapter cannot be merged into a quantized model; remove it",
    ),
    _Rule(
        "export_quantization_bit",
        lambda v: v["export_quantization_bit"],
        "LLaMA-Factory merges or quantizes, not both; remove it and quantize the merged model",
    ),
    _Rule(
        "finetuning_type",
        lambda v: v["finetuning_type"] != "lora",
        "only a LoRA adapter is merged; remove it",
    ),
)
# Keys that need a package which is not in the lock: LLaMA-Factory says so late, or goes on without it.
_NEEDS = {
    "enable_liger_kernel": "liger_kernel",
    "use_unsloth": "unsloth",
    "use_adam_mini": "adam_mini",
    "use_swanlab": "swanlab",
    "mixture_of_depths": "MoD",
}
_POSITIVE = ("learning_rate", "num_train_epochs", "logging_steps", "pref_beta")
_AT_LEAST_ONE = (
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "lora_rank",
    "preprocessing_num_workers",
    "save_total_limit",
    "max_samples",
)
_NOT_NEGATIVE = ("warmup_steps", "weight_decay", "max_grad_norm", "seed", "dataloader_num_workers")


def check_recipes(experiment: Experiment, steps: Iterable[str], root: Path = Path(), *, installed: bool = True) -> None:
    """Raise one ArenaError that lists every fault of these steps' recipes, each with file, key and remedy.

    Without `installed` it does not matter which packages this machine has.
    """
    by_step = {step: check_recipe(experiment, step, root, installed=installed) for step in steps}
    if faults := [fault for of_step in by_step.values() for fault in of_step]:
        raise ArenaError(
            "\n".join([f"{len(faults)} fault(s), found before anything was started:", *(f"  - {f}" for f in faults)]),
            remedy=_remedy(experiment, [root / experiment.recipe(step) for step, told in by_step.items() if told]),
        )


def _remedy(experiment: Experiment, recipes: Sequence[Path]) -> str:
    """Say what mends faulty recipes: those without hand edits follow experiment.yaml at the next `prepare`."""
    prepare = f"python run.py prepare -e {experiment.name} --train FILE"
    if all(_is_rendered(path) for path in recipes if path.is_file()):
        yaml = experiment.folder / "experiment.yaml"
        return f"`{prepare}` renders recipes without hand edits anew, as these are; their values come from {yaml}"
    these = "these keys" if all(_is_readable(path) for path in recipes if path.is_file()) else "these files"
    return f"mend {these}; or render a recipe anew with `{prepare} --force`, which drops its hand edits"


def _is_readable(path: Path) -> bool:
    try:
        return bool(read_yaml(path))
    except ArenaError:
        return False


def check_recipe(experiment: Experiment, step: str, root: Path = Path(), *, installed: bool = True) -> list[str]:
    """Return every fault of one recipe as "file: key: what is wrong and the remedy"; nothing is changed."""
    its, path = step_of(step), experiment.recipe(step)
    if not (root / path).is_file():
        return [f"{path}: is missing; `python run.py prepare -e {experiment.name} --train FILE` renders it"]
    try:
        content = read_yaml(root / path)
    except ArenaError as error:
        return [f"{path}: {error.what}; {error.remedy}"]
    rendered = _is_rendered(root / path)
    faults = list(_faults(experiment, its, content, rendered, installed))
    if not its.merges and "lora_target" not in dict(faults) and (fault := target_fault(content, root)):
        faults.append(("lora_target", fault))
    return [f"{path}: {key}: {fault}" for key, fault in faults]


def _is_rendered(path: Path) -> bool:
    """Tell whether a recipe is without hand edits."""
    return is_as_rendered(path.read_bytes().decode("utf-8", errors="replace"))


def _faults(
    experiment: Experiment, step: Step, content: Mapping[str, Any], rendered: bool, installed: bool
) -> list[Fault]:
    """Return all faults in the order of the recipe's keys; a key of a wrong type is not judged further."""
    own = list(_own_faults(content, not step.merges, installed))
    sound = {key: value for key, value in content.items() if key not in {fault[0] for fault in own}}
    values = {a.name: a.default for a in arguments().values()} | sound
    faults = [*own, *_disagreements(experiment, step, content, sound, rendered), *_refusals(step, values, sound)]
    order = {key: number for number, key in enumerate(content)}
    unique = {key: (key, text) for key, text in reversed(faults)}  # the first fault of a key says enough
    return sorted(unique.values(), key=lambda fault: order.get(fault[0], len(order)))


def check_device(experiment: Experiment, step: str, root: Path = Path()) -> None:
    """Raise ArenaError if this machine lacks what a training recipe computes in; asks a child process only if needed.

    torch would emulate bf16 on a card before Ampere, without a word and slowly, and refuse it without a GPU.
    """
    recipe = read_yaml(root / experiment.recipe(step))
    if not any(recipe.get(key) for key in ("bf16", "fp16", "pure_bf16", "use_cpu")):
        return
    if faults := [f"  - {experiment.recipe(step)}: {key}: {fault}" for key, fault in device_faults(recipe, _seen())]:
        raise ArenaError(
            "\n".join([f"{len(faults)} fault(s) of this recipe on this machine:", *faults]),
            remedy="mend these keys, in the recipe or for good under `recipes:` of experiment.yaml; "
            "`run.py doctor` shows what this machine has",
        )


@cache
def _seen() -> Devices:
    from factory.devices import devices

    return devices()


def device_faults(recipe: Mapping[str, Any], seen: Devices) -> Iterator[Fault]:
    """Yield the keys that `seen` cannot compute in; nothing where torch itself could not be asked."""
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


def _own_faults(content: Mapping[str, Any], training: bool, installed: bool) -> Iterator[Fault]:
    """Yield unknown keys, wrong types, wrong choices and numbers out of range."""
    for key, value in content.items():
        fault = key_fault(key, training) or value_fault(arguments()[key], value) or _range_fault(key, value)
        if key == "report_to" and installed and not fault:
            fault = _reporter_fault(value)
        if value and installed and not fault:
            fault = _package_fault(key, value)
        if fault:
            yield key, fault


def _range_fault(key: str, value: Any) -> str | None:
    if not isinstance(value, int | float):
        return None
    if key in _POSITIVE and value <= 0:
        return f"{value} must be above 0"
    if key in _AT_LEAST_ONE and value < 1:
        return f"{value} must be at least 1"
    if key in _NOT_NEGATIVE and value < 0:
        return f"{value} must not be negative"
    return f"{value} must lie in [0, 1)" if key == "lora_dropout" and not 0 <= value < 1 else None


def _reporter_fault(value: str | list[str] | None) -> str | None:
    names = value if isinstance(value, list) else [value or "none"]
    known = ("none", "all", *reporters())
    if unknown := [name for name in names if name not in known]:
        return f"{', '.join(map(repr, unknown))} is no reporter; choices: {', '.join(known)}"
    absent = [name for name in names if name in ("tensorboard", "wandb", "mlflow", "swanlab", "trackio", "comet_ml")]
    if absent := [name for name in absent if find_spec(name) is None]:
        install = f"python -m pip install {' '.join(absent)}"
        return f"{', '.join(absent)} is not installed; {install}, or write tensorboard or none"
    return None


def _package_fault(key: str, value: Any) -> str | None:
    package = "flash_attn" if (key, value) == ("flash_attn", "fa2") else _NEEDS.get(key)
    if package is None or find_spec(package) is not None:
        return None
    return f"needs the package {package}, which is not installed; install it, or remove the key"


def _disagreements(
    experiment: Experiment, step: Step, content: Mapping[str, Any], sound: Mapping[str, Any], rendered: bool
) -> Iterator[Fault]:
    """Yield keys that say otherwise than experiment.yaml, and what the chat template needs."""
    yaml = experiment.folder / "experiment.yaml"
    mend = f": {OLDER}" if rendered else "; write that here, or change it in that file"
    for key, expected in shared_values(experiment, step.name).items():
        if key in content and key not in sound:
            continue  # its type is already a fault
        given = sound.get(key, arguments()[key].default)
        if _comparable(key, given) != _comparable(key, expected):
            said = "is missing" if key not in content else f"is {given!r}"
            if key in _OF_EXPERIMENT or rendered:
                yield key, f"{said}, but by {yaml} it is {expected!r}{mend}"
            else:
                yield key, f"{said}, but for {step.name} of {experiment.name} it is {expected!r}; write that here"
    if _is_quantized(experiment.model):
        yield (
            "model_name_or_path",
            f"{experiment.model} holds quantized weights, into which no adapter can be merged; take the model's 16-bit "
            "weights: quantization_bit of experiment.yaml quantizes them while training",
        )
    known = templates()
    if experiment.template not in known:
        yield "template", f"LLaMA-Factory has no chat template {experiment.template!r}; choices: {', '.join(known)}"
    elif known[experiment.template].thinks and experiment.enable_thinking is not False:
        yield (
            "template",
            f"{experiment.template} trains on an empty thought before the label; write enable_thinking: false in "
            f"experiment.yaml{_nothink(experiment.template)}",
        )


def _is_quantized(model: str) -> bool:
    try:
        content = json.loads((Path(model) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False  # a hub id, or a folder that LLaMA-Factory will name
    return isinstance(content, dict) and bool(content.get("quantization_config"))


def _nothink(template: str) -> str:
    return f", or template: {template}_nothink" if f"{template}_nothink" in templates() else ""


def _comparable(key: str, value: Any) -> Any:
    """Make equal what names the same thing: ./data/demo/ is data/demo, [x] is x."""
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return posixpath.normpath(value) if key in _PATHS and isinstance(value, str) else value


def _refusals(step: Step, values: Mapping[str, Any], sound: Mapping[str, Any]) -> Iterator[Fault]:
    for rule in _MERGE_RULES if step.merges else _TRAIN_RULES:
        if rule.applies(values):
            reason = _REFUSED_LOSSES.get(values[rule.key]) if rule.key == "pref_loss" else None
            yield rule.key, f"{values[rule.key]!r} {rule.why}{f' ({reason})' if reason else ''}"
