"""The check of recipes before anything starts; each fault names file, key, reason and remedy.

Refused is what LLaMA-Factory 0.9.5 would do otherwise than the recipe says, or notice only late: what its own parser
refuses at once is left to it. A new refusal of a value is one more row of a table below.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from common.errors import ArenaError
from common.experiment import Experiment, read_yaml
from common.llamafactory_schema import arguments, key_fault, reporters, templates, value_fault
from common.stages import STEPS, Step
from factory.devices import Devices, devices
from factory.fingerprint import names
from factory.recipe_reach import Fault, Recipe, reach_faults, weight_faults
from factory.recipes import shared_values

_PATHS = frozenset({"model_name_or_path", "adapter_name_or_path", "dataset_dir", "output_dir", "export_dir"})
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
    Rule(
        "preprocessing_num_workers dataloader_num_workers", lambda v, x: x and x > 1024, "are more processes than fit"
    ),
    Rule("save_total_limit max_samples", _below(1), "must be at least 1"),
    Rule("warmup_steps weight_decay max_grad_norm seed dataloader_num_workers", _below(0), "must not be negative"),
    Rule("lora_dropout", lambda v, x: not 0 <= x < 1, "must lie in [0, 1)"),
    Rule("dpo_label_smoothing", lambda v, x: not 0 <= x < 0.5, "must lie in [0, 0.5)"),
)
_TRAINING = (
    Rule("do_train", lambda v, x: not x, "trains nothing", "write true"),
    Rule("finetuning_type", lambda v, x: x != "lora", "cannot be merged, which needs a LoRA adapter", "write lora"),
    Rule("packing", lambda v, x: x and not v.neat_packing, "lets battles attend to each other", _REMOVE),
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
        "makes DPO silently take the base model as its reference",
        f"{_REMOVE} and write start_from: {{dpo_judge: sft}} in experiment.yaml: the merged SFT judge",
    ),
    Rule(
        "adapter_name_or_path",
        lambda v, x: len(names(x)) > 1,
        "are several adapters; the merge would hold only the last",
        "merge all but that one, and write the result as `model` of experiment.yaml",
    ),
    Rule("max_steps", lambda v, x: x < 1 and x != -1, "limits nothing: all epochs are trained", _REMOVE),
    Rule(
        "early_stopping_steps",
        lambda v, x: x and not ((v.metric_for_best_model or v.load_best_model_at_end) and v.eval_strategy != "no"),
        "stops nothing, and the training fails at its first step",
        "write load_best_model_at_end: true (rm: metric_for_best_model: eval_loss), eval_strategy: steps, and "
        "save_steps as eval_steps",
    ),
    Rule(
        "pref_loss",
        lambda v, x: v.stage == "dpo" and x in ("hinge", "kto_pair", "ipo"),
        "is refused: LLaMA-Factory 0.9.5 silently trains plain sigmoid for it (for ipo on averaged log-probabilities)",
        "choices: sigmoid, orpo, simpo",
    ),
)
# Keys (patterns) that are refused whatever their value: most change the trained model or its prompts, which merge and
# scoring would not notice.
_NEVER = {
    "do_predict|predict_with_generate": "writes texts, not probabilities: run.py scores",
    "val_size": "splits by row, so that copies of one prompt land on both sides; valid_share does not",
    "tokenized_path": "silently overrides every other key about data once it exists",
    "neat_packing": "takes one token off cutoff_len and drops the rows that fill it",
    "overwrite_output_dir": "leaves old checkpoints in place, and the last one is resumed without being asked",
    "export_quantization_bit": "writes quantized weights, which run.py cannot score",
    "default_system": "is a system message that scoring does not send; write it into the judge prompt instead",
    "split_special_tokens": "trains on the chat template's tokens in pieces, scoring reads them whole",
    "(add|new)_(special_)?tokens.*|resize_vocab": "changes the vocabulary, so that the adapter fits no base and no "
    "prompt; `labels` of experiment.yaml takes any words that are one token each",
    "rope_scaling": "stretches the positions in training alone; lower cutoff_len, or take a base with more positions",
    "shift_attn|mixture_of_depths": "changes the model in training alone",
    "train_from_scratch": "trains on random weights; merge and scoring take the base's own",
    "cache_dir": "is where training alone looks for the base; set HF_HOME in your shell instead",
    "pissa_init": "changes the base that the adapter belongs to, merge and scoring do not",
    "create_new_adapter": "trains a second adapter, and the merge holds that one alone",
    "resume_from_checkpoint": "trains nothing where that has more steps; --resume takes the last whole checkpoint",
}
_REWARD = (
    Rule(
        "ref_model",
        lambda v, x: x and v.pref_loss == "sigmoid" and (x != v.model_name_or_path or v.ref_model_adapters),
        "is another reference than the one that scoring subtracts: model_name_or_path",
        _REMOVE,
    ),
)
_MERGING = (
    Rule("quantization_bit", _is_set, "allows no merge: an adapter cannot be merged into a quantized model", _REMOVE),
)


# Keys (patterns of their names) that LLaMA-Factory silently ignores without the key (or its value) after the colon.
_NEEDS = {
    "freeze_(trainable|extra)_.*": "use_llama_pro",
    "oft_.*|module_dropout": "finetuning_type: oft",
    "(galore|apollo|badam)_.*|use_(galore|apollo|badam|hyper_parallel)|hyper_.*": "finetuning_type: full",
    "simpo_gamma": "pref_loss: simpo",
    "pref_.*|dpo_.*|ld_alpha|simpo_gamma|ref_model.*": "stage: dpo",
    "ref_model_.*": "ref_model",
    "kto_.*": "stage: kto",
    "ppo_.*|reward_model.*": "stage: ppo",
    "use_(dft|asft|eaft)_loss|compute_accuracy|label_smoothing_factor": "stage: sft",
    "(image|video|audio)_.*|use_audio.*|crop_.*|freeze_(vision|multi|lang).*": "images",
    "(vllm|sglang)_.*|infer_backend|generation_.*|eval_num_beams|sortish_sampler": "generation",
    "export_.*|infer_dtype": "a merge",
    "interleave_probs|mix_strategy": "data sets of your own",
    "quantization_type|double_quantization": "quantization_bit",
    "hub_(?!private).*": "push_to_hub",
    "trackio_.*": "report_to",
    "swanlab_.*": "use_swanlab",
    "kt_.*": "use_kt",
    "profile.*": "enable_torch_profiler",
    "loraplus_lr_embedding": "loraplus_lr_ratio",
    "pissa_.*": "pissa_init",
    "asft_alpha": "use_asft_loss",
    "eaft_alpha": "use_eaft_loss",
    "fp8_.*": "fp8",
    "fsdp_config": "fsdp",
    "liger_kernel_config": "use_liger_kernel",
    "buffer_size": "streaming",
}


def check_recipes(
    experiment: Experiment,
    steps: Iterable[str],
    *,
    read: Mapping[str, Recipe] | None = None,
    allowed: Collection[str] = (),
) -> None:
    """Raise one ArenaError that lists every fault of these steps' recipes.

    `read` holds recipes by step that the caller has read already; the others are read. `allowed` names what they may
    reach beyond the project.
    """
    read = read or {}
    faults = {step: check_recipe(experiment, step, recipe=read.get(step), allowed=allowed) for step in steps}
    listed = [f"  - {fault}" for of_step in faults.values() for fault in of_step]
    if listed:
        prepare = f"python run.py prepare -e {experiment.name} --train FILE"
        raise ArenaError(
            "\n".join([f"{len(listed)} fault(s), found before anything was started:", *listed]),
            remedy=f"fix these keys; or render the recipes again from {experiment.folder / 'experiment.yaml'}: "
            f"`{prepare}`, with --force for a recipe with hand edits, which drops them",
        )


def check_recipe(
    experiment: Experiment, step: str, *, recipe: Recipe | None = None, allowed: Collection[str] = ()
) -> list[str]:
    """Return every fault of one recipe as "file: key: what is wrong and the remedy", in the order of its keys."""
    its, path = STEPS[step], experiment.recipe(step)
    if recipe is None and not path.exists():
        return [f"{path}: is missing; `python run.py prepare -e {experiment.name} --train FILE` renders it"]
    try:
        recipe = read_yaml(path) if recipe is None else recipe
    except ArenaError as error:
        return [f"{path}: {error.what}; {error.remedy}"]
    own = dict(_own_faults(recipe, not its.merges))
    sound = {key: value for key, value in recipe.items() if key not in own}  # a wrong type is not judged further
    shared = shared_values(experiment, step, experiment.written_fold)
    further = {key: value for key, value in sound.items() if key not in shared}
    faults = [
        *_never(recipe),  # first: of another type they are as wrong
        *own.items(),
        *weight_faults(sound),
        *_disagreements(experiment, its, recipe, sound),
        *_refusals((*_RANGES, *(_MERGING if its.merges else _TRAINING)), sound),
        *_refusals(_REWARD if step == "dpo_reward" else (), sound),
        *(() if its.merges else _idle_faults(sound)),
        *reach_faults(further, experiment.model, allowed),
    ]
    first = dict(reversed(faults))  # the first fault of a key says enough
    order = {key: number for number, key in enumerate(recipe)}
    return [f"{path}: {key}: {first[key]}" for key in sorted(first, key=lambda key: order.get(key, len(order)))]


def check_device(path: Path, recipe: Recipe) -> None:
    """Raise ArenaError if this machine lacks what a training recipe needs: a package, or a device with bf16."""
    faults = [*package_faults(recipe), *hub_faults(recipe)]
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


def hub_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the base where a variable of the shell lets LLaMA-Factory alone take it from another hub."""
    switches = [
        name for name in ("USE_MODELSCOPE_HUB", "USE_OPENMIND_HUB") if os.environ.get(name, "0") not in ("", "0")
    ]
    if switches and not Path(str(recipe.get("model_name_or_path"))).is_dir():
        yield (
            "model_name_or_path",
            f"{switches[0]} is set: training would take the base from another hub than scoring does; unset it, or "
            "download the model and write its folder as model of experiment.yaml",
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
    for key, expected in shared_values(experiment, step.name, experiment.written_fold).items():
        if key in recipe and key not in sound:
            continue  # its type is already a fault
        given = sound.get(key, arguments()[key].default)
        if _comparable(key, given) == _comparable(key, expected):
            continue
        said = "is missing" if key not in recipe else f"is {given!r}"
        yield key, f"{said}, but by {yaml} it is {expected!r}; write that here, or change the experiment"
    together = recipe.get("per_device_train_batch_size", 8), recipe.get("gradient_accumulation_steps", 1)
    if experiment.orders_together and not step.merges and together[0] * together[1] % 2:
        yield (
            "per_device_train_batch_size",
            "an odd number of rows a step parts a battle's two orders; write an even one",
        )
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


def _values(recipe: Recipe) -> SimpleNamespace:
    return SimpleNamespace(**{a.name: a.default for a in arguments().values()} | dict(recipe))


def _never(recipe: Recipe) -> Iterator[Fault]:
    for key, value in recipe.items():
        if value and (why := next((why for keys, why in _NEVER.items() if re.fullmatch(keys, key)), None)):
            yield key, f"{value!r} {why}; {_REMOVE}"


def _idle_faults(recipe: Recipe) -> Iterator[Fault]:
    """Yield the keys of a training recipe that do nothing, where they differ from LLaMA-Factory's defaults."""
    values = _values(recipe)
    for key, value in recipe.items():
        needed = [needed for keys, needed in _NEEDS.items() if re.fullmatch(keys, key)]
        if arguments()[key].group == "GeneratingArguments":
            needed = ["generation"]
        if value != arguments()[key].default and (lacks := [each for each in needed if not _has(values, each)]):
            yield key, f"{value!r} does nothing without {lacks[0]}; {_REMOVE}"


def _has(values: SimpleNamespace, needed: str) -> bool:
    key, _, wanted = needed.partition(": ")
    return getattr(values, key, None) == wanted if wanted else bool(getattr(values, key, None))


def _refusals(rules: Iterable[Rule], recipe: Recipe) -> Iterator[Fault]:
    values = _values(recipe)
    for rule in rules:
        for key in rule.keys.split():
            value = getattr(values, key)
            if rule.when(values, value):
                yield key, f"{value!r} {rule.reason}{f'; {rule.remedy}' if rule.remedy else ''}"
