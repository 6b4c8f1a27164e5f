"""Values of a recipe that are refused: LLaMA-Factory 0.9.5 would do otherwise than they say, or notice only late.

What its own parser refuses at once is not here. A new refusal is one more row of a table below.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

REMOVE = "remove it"


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


RANGES = (
    Rule("learning_rate num_train_epochs logging_steps pref_beta", lambda v, x: x <= 0, "must be above 0"),
    Rule("per_device_train_batch_size per_device_eval_batch_size", _below(1), "must be at least 1"),
    Rule("gradient_accumulation_steps lora_rank preprocessing_num_workers", _below(1), "must be at least 1"),
    Rule("save_total_limit max_samples", _below(1), "must be at least 1"),
    Rule("warmup_steps weight_decay max_grad_norm seed dataloader_num_workers", _below(0), "must not be negative"),
    Rule("lora_dropout", lambda v, x: not 0 <= x < 1, "must lie in [0, 1)"),
    Rule("dpo_label_smoothing", lambda v, x: not 0 <= x < 0.5, "must lie in [0, 0.5)"),
)
TRAINING = (
    Rule("do_train", lambda v, x: not x, "trains nothing", "write true"),
    Rule("do_predict", _is_set, "writes texts, not probabilities", f"{REMOVE}: run.py scores"),
    Rule("finetuning_type", lambda v, x: x != "lora", "cannot be merged, which needs a LoRA adapter", "write lora"),
    Rule(
        "val_size",
        _is_set,
        "splits by row, so that copies of one prompt land on both sides, and excludes eval_dataset",
        f"{REMOVE}: valid_share of experiment.yaml splits by prompt",
    ),
    Rule("tokenized_path", _is_set, "silently overrides every other key about data once it exists", REMOVE),
    Rule("packing", lambda v, x: x and not v.neat_packing, "lets battles attend to each other", REMOVE),
    Rule("neat_packing", _is_set, "takes one token off cutoff_len and drops the rows that fill it", REMOVE),
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
        f"{REMOVE} and write start_from: {{dpo_judge: sft}} in experiment.yaml, which starts from the merged SFT judge",
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
        f"{REMOVE}, and the folder if it is not wanted",
    ),
)
MERGING = (
    Rule("quantization_bit", _is_set, "allows no merge: an adapter cannot be merged into a quantized model", REMOVE),
)
