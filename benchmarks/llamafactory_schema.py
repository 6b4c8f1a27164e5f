"""Write common/llamafactory_schema.json from the installed LLaMA-Factory: arguments, reporters, templates, models.

    python benchmarks/llamafactory_schema.py          # after another release of LLaMA-Factory was installed
    python benchmarks/llamafactory_schema.py --check  # exit code 1 where the file is not what would be written

The product reads that file because importing LLaMA-Factory brings torch and transformers along (about 14 s).
"""

import dataclasses
import enum
import inspect
import json
import os
import re
import sys
import types
import typing
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from llamafactory import hparams
from llamafactory.data.template import TEMPLATES, ReasoningTemplate, Template
from llamafactory.extras import constants
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

FILE = Path(__file__).resolve().parent.parent / "common/llamafactory_schema.json"
# What `llamafactory-cli train` parses a recipe into, in its order; `export` leaves TrainingArguments out.
GROUPS = [getattr(hparams, f"{name}Arguments") for name in ("Model", "Data", "Training", "Finetuning", "Generating")]
YAML_TYPES = (bool, int, float, str, list, dict)
# What makes LLaMA-Factory take a model for a chat model. It compares with the capital letter only, and so forgets
# microsoft/Phi-4-mini-instruct, which it calls Phi-4-3.8B-instruct; we compare in lower case.
CHAT_MODELS = ("-chat", "-distill", "-instruct", "-thinking")


def annotation(hint: Any) -> tuple[set[str], list[str], bool]:
    """Return a type hint's YAML types, the values that it allows, and whether null is one.

    Where an enum stands beside `str` (`IntervalStrategy | str`), the class turns the string into the enum, so that
    only the enum's values are allowed.
    """
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    parts, kinds, choices = typing.get_args(hint) if union else (hint,), set(), []
    for part in parts:
        kind = typing.get_origin(part) or part
        if kind is typing.Literal:
            choices += typing.get_args(part)
        elif isinstance(kind, type) and issubclass(kind, enum.Enum):
            choices += [each.value for each in kind]
        elif kind is not type(None):
            kinds.add(kind.__name__ if kind in YAML_TYPES else "other")
    return kinds | ({"str"} if choices else set()), choices, type(None) in parts


def arguments() -> dict[str, Any]:
    """Return every field of the dataclasses that `llamafactory-cli train` parses; the first class of a name owns it."""
    found: dict[str, Any] = {}
    for group in GROUPS:
        hints, source = typing.get_type_hints(group), "".join(map(inspect.getsource, group.__mro__[:-1]))
        comma_lists = re.findall(r"split_arg\(self\.(\w+)\)", source)
        for field in dataclasses.fields(group):
            kinds, choices, optional = annotation(hints[field.name])
            made = field.default_factory is not dataclasses.MISSING
            default = field.default_factory() if made else field.default
            entry = {
                "group": group.__name__,
                "kinds": sorted(kinds | {"list"} if field.name in comma_lists else kinds),
                "choices": choices or list(field.metadata.get("choices", [])),
                "optional": optional,
                "default": default.value if isinstance(default, enum.Enum) else default,
                "settable": field.init,
            }
            found.setdefault(field.name, entry)
    return found


def template(its: Template) -> dict[str, Any]:
    """Return whether a chat template thinks, and its tokens.

    `tokens` are those that stand alone in a formatter, or are stop words: LLaMA-Factory adds these to a tokenizer that
    lacks them. Other texts, such as [INST], are any tokenizer's; how a text begins and ends is the tokenizer's choice.
    """
    slots = [*its.format_prefix.slots, *its.format_user.slots, *its.format_assistant.slots]
    tokens = [slot["token"] for slot in slots if isinstance(slot, dict)]
    tokens += [word for word in its.stop_words if any(word in slot for slot in slots if isinstance(slot, str))]
    if its.replace_eos and ({"eos_token"} in slots or its.efficient_eos):
        tokens.append(its.stop_words[0])
    return {"thinks": isinstance(its, ReasoningTemplate), "tokens": list(dict.fromkeys(tokens))}


def models() -> dict[str, Any]:
    """Return LLaMA-Factory's models by lower-case hub id: [id, name, template, multimodal].

    The template is null for a base model, which was never taught a chat. The registry forgets which template a group
    of models came with, so the registrations run once more with a function that keeps it.
    """
    found: dict[str, Any] = {}

    def register(models: dict[str, dict[str, str]], template: str | None = None, multimodal: bool = False) -> None:
        for name, ids in models.items():
            chats = any(part in name.lower() for part in CHAT_MODELS) or multimodal
            for each in ids.values():
                found.setdefault(each.lower(), [each, name, template if chats else None, multimodal])

    _, calls = inspect.getsource(constants).split("\nregister_model_group(", 1)
    exec(f"register_model_group({calls}", {**vars(constants), "register_model_group": register})
    return found


def schema() -> str:
    """Return the file's text: JSON with one entry a line."""
    head = {
        "llamafactory": version("llamafactory"),
        "arguments": arguments(),
        "reporters": list(INTEGRATION_TO_CALLBACK),
    }
    sections = head | {"templates": {name: template(its) for name, its in TEMPLATES.items()}, "models": models()}

    def lines(content: dict, dump: Callable[[Any], str]) -> str:
        return "{\n" + ",\n".join(f"{json.dumps(key)}: {dump(value)}" for key, value in content.items()) + "\n}"

    return lines(sections, lambda of: lines(of, json.dumps) if isinstance(of, dict) else json.dumps(of)) + "\n"


if __name__ == "__main__":
    if os.environ.get("USE_MCA"):
        sys.exit("unset USE_MCA: it replaces LLaMA-Factory's TrainingArguments")
    if "--check" in sys.argv:
        sys.exit(0 if FILE.read_text(encoding="utf-8") == schema() else f"{FILE.name} is not what this script writes")
    FILE.write_text(schema(), encoding="utf-8")
