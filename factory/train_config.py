"""A training set-up: the values of one rendered recipe that memory and hours depend on."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from common.experiment import read_yaml
from common.llamafactory_schema import arguments
from factory.state import names

if TYPE_CHECKING:
    from common.experiment import Experiment
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import ArenaError
from common.stages import STEPS
from data_prep.export_reader import how_to_export, readable, require_pairs

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


# LLaMA-Factory's collators pad the longest sequence of a batch to a multiple of this.
_MULTIPLE = 8


@dataclass(frozen=True)
class Workload:
    """Token lengths; a training row is one sequence of SFT or the two of a preference pair.

    train, valid: [rows, sequences a row]; scored: [sequences] that scoring reads, both orders or both responses.
    """

    train: np.ndarray
    valid: np.ndarray
    scored: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest training sequence, padded as LLaMA-Factory pads it."""
        return _up(int(self.train.max()))

    def first(self, rows: int | None) -> Workload:
        """Return what is left where LLaMA-Factory's `max_samples` takes the first rows of each set; all are scored."""
        return self if rows is None else Workload(self.train[:rows], self.valid[:rows], self.scored)

    def padded_tokens(self, rows: np.ndarray, batch: int, *, grouped: bool, seed: int = 0) -> int:
        """Return the tokens of one pass over `rows`, padding included; `grouped`: batches of like lengths."""
        longest = rows.max(axis=1)
        order = np.argsort(longest) if grouped else np.random.default_rng(seed).permutation(len(rows))
        starts = np.arange(0, len(rows), batch)
        heights = np.minimum(batch, len(rows) - starts)
        widths = -(-np.maximum.reduceat(longest[order], starts) // _MULTIPLE) * _MULTIPLE
        return int((heights * widths).sum()) * rows.shape[1]


def workload_of(experiment: Experiment, stage: str) -> Workload:
    """Return the work of one stage (sft, dpo_judge, dpo_reward, rm); raises ArenaError where nothing was exported."""
    data = experiment.data_folder
    rows = _read(data / "rows.parquet", ["split", "verdict", "tokens"], experiment)
    own, split, verdict = rows["tokens"], rows["split"], rows["verdict"]
    train, valid, test = (split == name for name in ("train", "valid", "test"))
    orders = 2 if experiment.swap_tta else 1
    if STEPS[stage].data == "dpo_reward":
        table = _read(require_pairs(data), ["tokens_a", "tokens_b"], experiment)
        pairs = np.column_stack([table["tokens_a"], table["tokens_b"]])
        decided = verdict != "tie"
        return Workload(pairs[train & decided], pairs[valid & decided], pairs[valid | test].ravel())
    copies = 2 if experiment.swap_copies else 1
    wrong = 2 if experiment.dpo_rejected == "each" else 1
    repeated, wide = (copies, 1) if stage == "sft" else (copies * wrong, 2)
    scored = np.concatenate([np.repeat(own[valid], 2), np.repeat(own[test], orders)])
    judged = own[valid] if stage == "sft" else np.repeat(own[valid], wrong)
    return Workload(_wide(np.repeat(own[train], repeated), wide), _wide(judged, wide), scored)


def _wide(lengths: np.ndarray, sequences: int) -> np.ndarray:
    """A judge's pair is the same prompt twice, each with one label of the same length."""
    return np.repeat(lengths[:, None], sequences, axis=1)


def _read(path: Path, columns: list[str], experiment: Experiment) -> dict[str, np.ndarray]:
    from pyarrow.parquet import read_table

    if not path.is_file():
        raise ArenaError(
            "there is no exported data, and its lengths are what a forecast is made of",
            where=str(path.parent),
            remedy=how_to_export(path.parent),
        )
    with readable(path):
        table = read_table(path, columns=columns)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in columns}


def _up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE
