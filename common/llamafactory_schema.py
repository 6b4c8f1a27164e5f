"""What LLaMA-Factory knows: arguments of a recipe, reporters, chat templates and models, without importing it.

`benchmarks/llamafactory_schema.py` writes llamafactory_schema.json from the release that requirements.lock pins.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from common.errors import ArenaError

_FILE = Path(__file__).with_suffix(".json")
# Keys that hold a secret, and the environment variable that serves instead; None where LLaMA-Factory reads no other.
_SECRETS = {
    "hf_hub_token": "HF_TOKEN",
    "hub_token": "HF_TOKEN",
    "push_to_hub_token": "HF_TOKEN",
    "ms_hub_token": "MODELSCOPE_API_TOKEN",
    "om_hub_token": "OPENMIND_HUB_TOKEN",
    "swanlab_api_key": "SWANLAB_API_KEY",
    "swanlab_lark_webhook_url": None,
    "swanlab_lark_secret": None,
}
# Keys of earlier releases, and of the trainers below LLaMA-Factory, with what they are called today.
_RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "group_by_length": "train_sampling_strategy: group_by_length",
    "new_special_tokens": "add_special_tokens",
    "max_source_length": "cutoff_len",
    "max_seq_length": "cutoff_len",
    "dpo_beta": "pref_beta",
    "dpo_ftx": "pref_ftx",
    "checkpoint_dir": "adapter_name_or_path",
    "load_in_4bit": "quantization_bit: 4",
    "no_cuda": "use_cpu",
}
# What a merge reads besides the arguments of the model.
_MERGE_READS = ("template", "stage", "finetuning_type")
_LARGEST_WHOLE = 2**63 - 1
# What YAML reads as a value of its own unless it is quoted, and what to write for anything else.
_UNQUOTED = {
    "bool": re.compile(r"true|false|yes|no|on|off", re.IGNORECASE),
    "float": re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    "int": re.compile(r"[+-]?\d+"),
}
_WANTED = {"bool": "true or false", "float": "a number", "int": "a whole number"}


@dataclass(frozen=True)
class Argument:
    """One key of a recipe. `kinds` are YAML types (or "other"); with empty `choices` any value is allowed."""

    name: str
    group: str
    kinds: frozenset[str]
    choices: tuple[str, ...]
    optional: bool
    default: Any
    settable: bool


@dataclass(frozen=True)
class ChatTemplate:
    """Whether a chat template puts (empty) thoughts before an answer, and the special tokens that it needs."""

    thinks: bool
    tokens: list[str]


@dataclass(frozen=True)
class KnownModel:
    """A model of LLaMA-Factory's table: its id on a hub and its name there; a base model has no template."""

    id: str
    name: str
    template: str | None
    multimodal: bool


@cache
def _schema() -> dict[str, Any]:
    """Return the generated file; raises ArenaError if another release of LLaMA-Factory is installed, or none."""
    try:
        installed = version("llamafactory")
    except PackageNotFoundError:
        installed = "not installed"
    schema = json.loads(_FILE.read_text(encoding="utf-8"))
    if installed != schema["llamafactory"]:
        raise ArenaError(
            f"recipes are checked against LLaMA-Factory {schema['llamafactory']}, but the package llamafactory is "
            f"{installed if installed == 'not installed' else f'of release {installed}'}",
            remedy="make install",
        )
    return schema


@cache
def arguments() -> dict[str, Argument]:
    """Return every key that a training recipe may hold, by name."""
    return {
        name: Argument(name, **{**its, "kinds": frozenset(its["kinds"]), "choices": tuple(its["choices"])})
        for name, its in _schema()["arguments"].items()
    }


def reporters() -> tuple[str, ...]:
    """Return the values that `report_to` knows, besides none and all."""
    return tuple(_schema()["reporters"])


@cache
def templates() -> dict[str, ChatTemplate]:
    """Return the chat templates by name."""
    return {name: ChatTemplate(**its) for name, its in _schema()["templates"].items()}


@cache
def known_models() -> dict[str, KnownModel]:
    """Return the models of LLaMA-Factory's table by lower-case hub id (Hugging Face, ModelScope, …)."""
    return {id: KnownModel(*its) for id, its in _schema()["models"].items()}


def key_fault(key: str, training: bool) -> str | None:
    """Return what is wrong with a key of a recipe, with the nearest known key; None for a valid one."""
    argument = arguments().get(key)
    if argument is None:
        if key in _RENAMED:
            return f"is called {_RENAMED[key]} today: write that"
        near = difflib.get_close_matches(key, arguments(), n=1, cutoff=0.6)
        return f"LLaMA-Factory has no such key{f'; did you mean {near[0]}?' if near else ''}"
    if key in _SECRETS:
        instead = f" and set {_SECRETS[key]} in your shell" if _SECRETS[key] else ""
        return f"a secret in a file ends up in logs and archives; remove the key{instead}"
    if not argument.settable:
        return "LLaMA-Factory derives this value itself; remove the key"
    if not training and argument.group == "TrainingArguments":
        return "belongs to training; `llamafactory-cli export` rejects it, remove the key"
    if not training and argument.group != "ModelArguments" and key not in _MERGE_READS:
        return "does nothing in a merge, remove the key"
    return None


def value_fault(argument: Argument, value: Any) -> str | None:
    """Return what is wrong with a value's type or choice, and the remedy; LLaMA-Factory itself checks neither."""
    if value is None:
        return None if argument.optional or "other" in argument.kinds else "may not be null; remove the key"
    if isinstance(value, str) and "${" in value:
        return f"{value!r}: LLaMA-Factory does not resolve interpolations; write the value"
    if argument.choices:
        return None if isinstance(value, str) and value in argument.choices else _choice_fault(argument, value)
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value} is not a finite number"
    if isinstance(value, int) and abs(value) > _LARGEST_WHOLE:
        return f"{str(value)[:9]}… has {len(str(abs(value)))} digits: write a smaller number"
    kind = type(value).__name__
    if "other" in argument.kinds or kind in argument.kinds or (kind == "int" and "float" in argument.kinds):
        return None
    return f"{value!r} is of type {kind}, expected {' or '.join(sorted(argument.kinds))}{_type_remedy(argument, value)}"


def _choice_fault(argument: Argument, value: Any) -> str:
    if isinstance(value, bool) and "no" in argument.choices:
        return f'{str(value).lower()} is no choice: YAML reads an unquoted no as false; write {argument.name}: "no"'
    near = difflib.get_close_matches(str(value), argument.choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{value!r} is no choice; {hint}choices: {', '.join(argument.choices)}"


def _type_remedy(argument: Argument, value: Any) -> str:
    wanted = next((kind for kind in _UNQUOTED if kind in argument.kinds), None)
    if isinstance(value, str) and wanted:
        return "; write it without quotes" if _UNQUOTED[wanted].fullmatch(value) else f"; write {_WANTED[wanted]}"
    if isinstance(value, float) and "int" in argument.kinds and value.is_integer():
        return f"; write {int(value)}"
    if "str" in argument.kinds and isinstance(value, list):
        return "; write one string with commas"
    return "; put it in quotes" if "str" in argument.kinds and isinstance(value, bool | int | float) else ""
