"""A training set-up: the values of one rendered recipe that memory and hours depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.experiment import read_yaml
from common.llamafactory_schema import arguments
from factory.inputs import names

if TYPE_CHECKING:
    from common.experiment import Experiment

# Bytes that an optimizer keeps for each trained weight, by the start of its name; Adam's two moments in fp32 else.
_OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.1, "sgd": 0}
_KEYS = (
    "stage",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "disable_gradient_checkpointing",
    "quantization_bit",
    "double_quantization",
    "lora_rank",
    "additional_target",
    "num_train_epochs",
    "max_steps",
    "enable_liger_kernel",
    "pref_loss",
    "bf16",
    "fp16",
    "optim",
    "eval_strategy",
    "eval_steps",
    "train_sampling_strategy",
    "ref_model",
    "max_samples",
)


@dataclass(frozen=True)
class Setup:
    """What one optimizer step does, on one device."""

    stage: str  # LLaMA-Factory's: sft, dpo, rm
    batch: int
    accumulation: int
    eval_batch: int
    checkpointing: bool
    bits: int | None
    double_quantization: bool
    rank: int
    trained_modules: tuple[str, ...]  # embeddings and head, trained whole
    epochs: float
    max_steps: int
    liger: bool
    reference: bool  # DPO reads each batch once more without the adapter
    compute_bytes: int  # of one number: 2 with bf16 or fp16, 4 without
    optimizer_bytes: float
    evaluations: float  # passes over the validation rows
    grouped: bool  # batches of like lengths
    max_samples: int | None = None  # rows that are read of each set, the first ones

    def changed(self, **values: Any) -> Setup:
        """Return the set-up with values replaced."""
        return replace(self, **values)


def setup_of(experiment: Experiment, stage: str) -> Setup:
    """Read a stage's recipe, LLaMA-Factory's defaults where it is silent; raises ArenaError if it is missing."""
    recipe = read_yaml(experiment.recipe(stage))
    known = arguments()
    v = {key: recipe.get(key, known[key].default if key in known else None) for key in _KEYS}
    half = bool(v["bf16"] or v["fp16"])
    return Setup(
        stage=v["stage"],
        batch=v["per_device_train_batch_size"],
        accumulation=v["gradient_accumulation_steps"],
        eval_batch=v["per_device_eval_batch_size"],
        checkpointing=not v["disable_gradient_checkpointing"],
        bits=v["quantization_bit"],
        double_quantization=bool(v["double_quantization"]),
        rank=v["lora_rank"],
        trained_modules=tuple(names(v["additional_target"])),
        epochs=float(v["num_train_epochs"]),
        max_steps=int(v["max_steps"]),
        liger=bool(v["enable_liger_kernel"]),
        reference=v["stage"] == "dpo" and v["pref_loss"] == "sigmoid",
        compute_bytes=2 if half else 4,
        optimizer_bytes=_OPTIMIZER_BYTES.get(str(v["optim"]), 8),
        evaluations=_evaluations(v),
        grouped=v["train_sampling_strategy"] == "group_by_length",
        max_samples=v["max_samples"],
    )


def _evaluations(v: dict[str, Any]) -> float:
    """Return how many times the validation rows are read; steps given as a number are counted as a quarter each."""
    if v["eval_strategy"] == "epoch":
        return float(v["num_train_epochs"])
    if v["eval_strategy"] != "steps":
        return 0.0
    share = v["eval_steps"]
    return 1 / share if isinstance(share, float) and 0 < share < 1 else 4.0
