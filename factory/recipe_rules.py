"""Values of a recipe that are refused: LLaMA-Factory 0.9.5 would refuse them late, ignore them, or do otherwise.

LLaMA-Factory validates neither choices nor types of a YAML file, and several combinations train something else than
they say. A new refusal is one more row of a table below.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from factory.fingerprint import names

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


def _zero_stage(config: Any) -> int | None:
    """Return the ZeRO stage of a DeepSpeed configuration, None where it has none or cannot be read."""
    if isinstance(config, str):
        try:
            config = json.loads(Path(config).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None  # LLaMA-Factory names the file that it cannot read
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    return zero.get("stage") if isinstance(zero, dict) else None


def _has_reference(v: SimpleNamespace) -> bool:
    return v.stage == "dpo" and v.pref_loss not in ("orpo", "simpo")


RANGES = (
    Rule("learning_rate num_train_epochs logging_steps pref_beta", lambda v, x: x <= 0, "must be above 0"),
    Rule("per_device_train_batch_size per_device_eval_batch_size", _below(1), "must be at least 1"),
    Rule("gradient_accumulation_steps lora_rank preprocessing_num_workers", _below(1), "must be at least 1"),
    Rule("save_total_limit max_samples", _below(1), "must be at least 1"),
    Rule("warmup_steps weight_decay max_grad_norm seed dataloader_num_workers", _below(0), "must not be negative"),
    Rule("lora_dropout", lambda v, x: not 0 <= x < 1, "must lie in [0, 1)"),
)
TRAINING = (
    Rule("do_train", lambda v, x: not x, "trains nothing", "write true"),
    Rule("do_predict predict_with_generate", _is_set, "writes texts, not probabilities", f"{REMOVE}: run.py scores"),
    Rule("finetuning_type", lambda v, x: x != "lora", "cannot be merged, which needs a LoRA adapter", "write lora"),
    Rule("infer_backend", lambda v, x: x != "huggingface", "cannot train", REMOVE),
    # data
    Rule(
        "val_size",
        _is_set,
        "splits by row, so that copies of one prompt land on both sides, and excludes eval_dataset",
        f"{REMOVE}: valid_share of experiment.yaml splits by prompt",
    ),
    Rule("tokenized_path", _is_set, "silently overrides every other key about data once it exists", REMOVE),
    Rule("packing", lambda v, x: x and not v.neat_packing, "lets battles attend to each other", REMOVE),
    Rule("neat_packing", _is_set, "takes one token off cutoff_len and drops the rows that fill it", REMOVE),
    Rule("train_on_prompt mask_history", lambda v, x: x and v.stage != "sft", "is for sft only", REMOVE),
    Rule("streaming", lambda v, x: x and v.max_steps <= 0, "needs a number of steps", "write max_steps above 0"),
    Rule(
        "streaming",
        lambda v, x: x and v.dataloader_num_workers < 1,
        "streams nothing: LLaMA-Factory shares a local file out among the loader's processes",
        "write dataloader_num_workers of 1 or more",
    ),
    Rule("max_samples", lambda v, x: x is not None and v.streaming, "does not go with streaming", REMOVE),
    # quantization
    Rule("resize_vocab", lambda v, x: x and v.quantization_bit, "cannot grow a quantized model's embeddings", REMOVE),
    Rule(
        "use_dora", lambda v, x: x and v.quantization_bit, "is always refused on a quantized model", "take use_rslora"
    ),
    Rule(
        "pissa_init",
        lambda v, x: x and (v.quantization_bit or _has_reference(v)),
        "is refused on a quantized model and beside a DPO reference",
        REMOVE,
    ),
    Rule("fp8", lambda v, x: x and v.quantization_bit, "is not compatible with quantization_bit", REMOVE),
    Rule("quantization_type", lambda v, x: v.quantization_bit == 8 and x != "nf4", "is for 4 bits only", REMOVE),
    Rule("quantization_device_map", lambda v, x: x == "auto", "is for inference only", REMOVE),
    Rule("ref_model_quantization_bit", lambda v, x: x not in (None, 4, 8), "is refused", "choices: 4, 8, null"),
    Rule(
        "deepspeed",
        lambda v, x: v.quantization_bit == 8 and _zero_stage(x) == 3,
        "is ZeRO-3, which takes 4 bits or none, not 8",
        "change quantization_bit of experiment.yaml, or take ZeRO-2",
    ),
    Rule(
        "fsdp",
        lambda v, x: x and v.quantization_bit == 8,
        "takes 4 bits or none, not 8",
        "change quantization_bit of experiment.yaml",
    ),
    # numbers
    Rule("fp16", lambda v, x: x and v.bf16, "and bf16: true exclude each other", "set one of them to false"),
    Rule("pure_bf16", lambda v, x: x and v.fp16, "and fp16: true exclude each other", "remove one"),
    Rule("pure_bf16", lambda v, x: x and _zero_stage(v.deepspeed) == 3, "is incompatible with ZeRO-3", REMOVE),
    Rule("flash_attn", lambda v, x: x == "fa3", "is not implemented in LLaMA-Factory", "write fa2, sdpa or auto"),
    # adapters
    Rule("use_galore use_apollo use_badam", _is_set, "does not go with a LoRA adapter", REMOVE),
    Rule(
        "adapter_name_or_path",
        lambda v, x: v.quantization_bit and len(names(x)) > 1,
        "are several adapters on a quantized model, which takes one",
        "merge them first",
    ),
    Rule(
        "adapter_name_or_path",
        lambda v, x: v.stage == "dpo" and x and not (v.ref_model and v.ref_model_adapters),
        "under dpo has silently the base model as its reference",
        f"{REMOVE} and write start_from: {{dpo_judge: sft}} in experiment.yaml, which starts from the merged SFT judge",
    ),
    Rule(
        "create_new_adapter",
        lambda v, x: x and v.quantization_bit and v.adapter_name_or_path,
        "is refused on a quantized model",
        "merge the first adapter and start from the merge",
    ),
    # losses
    Rule(
        "pref_loss",
        lambda v, x: v.stage == "dpo" and x in ("hinge", "kto_pair"),
        "is refused: LLaMA-Factory 0.9.5 silently trains plain sigmoid for it",
        "choices: sigmoid, orpo, simpo",
    ),
    Rule(
        "pref_loss",
        lambda v, x: v.stage == "dpo" and x == "ipo",
        "is refused: LLaMA-Factory 0.9.5 silently trains sigmoid on length-averaged log-probabilities for it",
        "choices: sigmoid, orpo, simpo",
    ),
    Rule("dpo_label_smoothing", lambda v, x: x and v.pref_loss != "sigmoid", "is for pref_loss: sigmoid only", REMOVE),
    Rule(
        "dpo_label_smoothing", lambda v, x: not 0 <= x < 0.5, "must lie in [0, 0.5)", "at half nothing can be learned"
    ),
    # output
    Rule(
        "overwrite_output_dir",
        _is_set,
        "leaves old checkpoints in place, and a checkpoint in output_dir is resumed without being asked",
        f"{REMOVE}, and the folder if it is not wanted",
    ),
    Rule(
        "load_best_model_at_end",
        lambda v, x: x and v.save_strategy not in ("best", v.eval_strategy),
        "needs eval_strategy and save_strategy to be equal",
        "write the same value for both",
    ),
    Rule("load_best_model_at_end", lambda v, x: x and v.stage == "rm", "is not supported for a reward model", REMOVE),
    Rule(
        "report_to",
        lambda v, x: "swanlab" in names(x) and not v.use_swanlab,
        "ends at the first step: the reporter of transformers does not work with SwanLab 0.8 or newer",
        "write none and use_swanlab: true, which is LLaMA-Factory's own",
    ),
)
MERGING = (
    Rule("quantization_bit", _is_set, "allows no merge: an adapter cannot be merged into a quantized model", REMOVE),
    Rule(
        "export_quantization_bit",
        _is_set,
        "is not possible here: LLaMA-Factory merges or quantizes",
        f"{REMOVE} and quantize the merged model",
    ),
    Rule("finetuning_type", lambda v, x: x != "lora", "cannot be merged, only a LoRA adapter can", REMOVE),
)
# Keys that need a package which is not in the lock: LLaMA-Factory says so late, or goes on without it.
PACKAGES = {
    "enable_liger_kernel": "liger_kernel",
    "use_unsloth": "unsloth",
    "use_adam_mini": "adam_mini",
    "use_swanlab": "swanlab",
    "mixture_of_depths": "MoD",
}
