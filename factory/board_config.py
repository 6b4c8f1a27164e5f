"""A saved configuration of LLaMA Board: one recipe under the ids of the web page's elements.

top.model_name: arena-tiny
train.learning_rate: '3.0e-3'
train.extra_args: '{"eval_dataset": "demo_sft_valid", …}'

The page has elements for the common keys only. The others go into its JSON box of extra arguments, which LLaMA Board
lays over most of what the elements say. tests/factory/test_board_config.py builds the real page and checks that every
id exists, that every value is one its element takes, and that the arguments which the page makes are the recipe's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from common.experiment import Experiment
from common.stages import STEPS
from factory.inputs import names

STAGE_NAMES = {"sft": "Supervised Fine-Tuning", "dpo": "DPO", "rm": "Reward Modeling"}


@dataclass(frozen=True)
class _Slider:
    """A number's element with its ends, and the value that stands there when the recipe does not name the key."""

    element: str
    low: float
    high: float
    default: float
    whole: bool = True

    def takes(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.whole or value == int(value))


# Keys that LLaMA Board sets before the extra arguments, which may therefore say something else.
_SLIDERS = {
    "cutoff_len": _Slider("cutoff_len", 4, 131072, 2048),
    "per_device_train_batch_size": _Slider("batch_size", 1, 1024, 8),
    "gradient_accumulation_steps": _Slider("gradient_accumulation_steps", 1, 1024, 1),
    "logging_steps": _Slider("logging_steps", 1, 1000, 500),
    "save_steps": _Slider("save_steps", 10, 5000, 500),
    "warmup_steps": _Slider("warmup_steps", 0, 5000, 0),
    "neftune_noise_alpha": _Slider("neftune_alpha", 0, 10, 0, whole=False),
}
# Keys that it sets after them: a value that the element does not take cannot be had there.
_LATE_SLIDERS = {
    "lora_rank": _Slider("lora_rank", 1, 1024, 8),
    "lora_alpha": _Slider("lora_alpha", 1, 2048, 16),
    "lora_dropout": _Slider("lora_dropout", 0, 1, 0, whole=False),
    "loraplus_lr_ratio": _Slider("loraplus_lr_ratio", 0, 64, 0, whole=False),
    "pref_beta": _Slider("pref_beta", 0, 1, 0.1, whole=False),
    "pref_ftx": _Slider("pref_ftx", 0, 10, 0, whole=False),
}
_SWITCHES = (
    *("packing", "neat_packing", "train_on_prompt", "mask_history", "resize_vocab", "use_llama_pro"),
    *("use_rslora", "use_dora", "create_new_adapter", "enable_thinking"),
)
_TEXTS = {"learning_rate": "5.0e-5", "num_train_epochs": "3.0", "max_grad_norm": "1.0"}
_EVERY_ROW = "1000000000"  # LLaMA Board always passes max_samples
_PRECISIONS = ("pure_bf16", "bf16", "fp16")
# Keys that elements of their own answer for, or that the page makes itself.
_ELSEWHERE = frozenset(
    {
        *("stage", "do_train", "model_name_or_path", "finetuning_type", "template", "output_dir", "dataset_dir"),
        *("dataset", "quantization_bit", "quantization_method", "lora_target", "additional_target", "pref_loss"),
        *("lr_scheduler_type", "report_to", "plot_loss", "pissa_init", "pissa_convert", "max_samples"),
        *_PRECISIONS,
        *_SWITCHES,
        *_TEXTS,
        *_LATE_SLIDERS,
    }
)


@dataclass(frozen=True)
class BoardConfig:
    """The values by element id, and a sentence for each key that LLaMA Board cannot be given."""

    values: dict[str, Any]
    left_out: list[str]


def board_config(
    experiment: Experiment, stage: str, recipe: dict[str, Any], model_name: str, dataset_dir: str = "data"
) -> BoardConfig:
    """Return the saved configuration that starts `recipe` from LLaMA Board; `model_name` is the page's name for it.

    The output folder is left to the page, which draws a fresh name at each start.
    """
    extra = {key: value for key, value in recipe.items() if key not in _ELSEWHERE and key not in _SLIDERS}
    # The page would pass 16 and true.
    extra["preprocessing_num_workers"] = recipe.get("preprocessing_num_workers")
    extra["trust_remote_code"] = bool(recipe.get("trust_remote_code", False))
    numbers, left_out = _numbers(recipe, extra)
    values = {
        **_top(recipe, model_name, experiment.template),
        "train.training_stage": STAGE_NAMES[STEPS[stage].stage],
        "train.dataset_dir": dataset_dir,
        "train.dataset": names(recipe.get("dataset")),
        **{f"train.{key}": str(recipe.get(key, default)) for key, default in _TEXTS.items()},
        "train.max_samples": str(recipe.get("max_samples") or _EVERY_ROW),
        "train.compute_type": next((key for key in _PRECISIONS if recipe.get(key)), "fp32"),
        "train.lr_scheduler_type": recipe.get("lr_scheduler_type", "linear"),
        "train.val_size": 0,
        "train.report_to": _one(recipe.get("report_to", "none"), extra),
        "train.lora_target": ",".join(names(recipe.get("lora_target", "all"))),
        "train.additional_target": ",".join(names(recipe.get("additional_target"))),
        "train.pref_loss": recipe.get("pref_loss", "sigmoid"),
        "train.use_pissa": bool(recipe.get("pissa_init", False)),
        "train.ds_stage": "none",
        **{f"train.{key}": bool(recipe.get(key, key == "enable_thinking")) for key in _SWITCHES},
        **numbers,
    }
    if recipe.get("quantization_bit") and recipe.get("double_quantization") is False:
        left_out.append("double_quantization: LLaMA Board always quantizes twice")
    extra.pop("double_quantization", None)
    values["train.extra_args"] = json.dumps(extra)
    return BoardConfig(values, left_out)


def _top(recipe: dict[str, Any], model_name: str, template: str) -> dict[str, Any]:
    bits = recipe.get("quantization_bit")
    return {
        "top.model_name": model_name,
        "top.finetuning_type": recipe.get("finetuning_type", "lora"),
        "top.checkpoint_path": [],
        "top.quantization_bit": str(bits) if bits else "none",
        "top.quantization_method": recipe.get("quantization_method", "bnb"),
        "top.template": recipe.get("template") or template,
        "top.rope_scaling": "none",
        "top.booster": "auto",  # flash_attn and the like stand among the extra arguments
    }


def _numbers(recipe: dict[str, Any], extra: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the sliders' values; what a slider does not take goes to `extra` or is named as left out."""
    values, left_out = {}, []
    for key, slider in {**_SLIDERS, **_LATE_SLIDERS}.items():
        value = recipe.get(key)
        if key == "lora_alpha" and value is None:  # LLaMA-Factory's own rule
            value = 2 * (recipe.get("lora_rank") or 8)
        if key == "neftune_noise_alpha" and value is None:
            value = 0
        if slider.takes(value):
            values[f"train.{slider.element}"] = int(value) if slider.whole else value
            continue
        values[f"train.{slider.element}"] = slider.default
        if value is not None and key in _SLIDERS:
            extra[key] = value
        elif value is not None:
            left_out.append(f"{key}: {value} is not between {slider.low:g} and {slider.high:g}")
    return values, left_out


def _one(value: Any, extra: dict[str, Any]) -> str:
    """Return the only entry of a list; several go to the extra arguments."""
    entries = names(value)
    if len(entries) > 1:
        extra["report_to"] = entries
    return entries[0] if entries else "none"
