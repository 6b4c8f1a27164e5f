"""LLaMA-Factory's arguments: names, types, choices and defaults, read from its source files without importing them.

Importing the dataclasses brings torch, transformers and peft along (about 14 s); parsing the same files takes a
fraction of a second. tests/factory/test_arguments.py compares every field with the imported classes.
"""

from __future__ import annotations

import ast
import difflib
import importlib.util
import math
import operator
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from common.errors import ArenaError

# What `llamafactory-cli train` parses a recipe into, in its order; `export` leaves TrainingArguments out.
GROUPS = {
    "ModelArguments": "llamafactory.hparams.model_args",
    "DataArguments": "llamafactory.hparams.data_args",
    "TrainingArguments": "llamafactory.hparams.training_args",
    "FinetuningArguments": "llamafactory.hparams.finetuning_args",
    "GeneratingArguments": "llamafactory.hparams.generating_args",
}
# Names that transformers exports lazily, and the modules that define them.
_LAZY = {("transformers", "Seq2SeqTrainingArguments"): "transformers.training_args_seq2seq"}
# Keys that hold a token, and the environment variable that serves instead.
_SECRETS = {
    "hf_hub_token": "HF_TOKEN",
    "hub_token": "HF_TOKEN",
    "push_to_hub_token": "HF_TOKEN",
    "ms_hub_token": "MODELSCOPE_API_TOKEN",
    "om_hub_token": "OPENMIND_HUB_TOKEN",
    "swanlab_api_key": "SWANLAB_API_KEY",
}
# Keys that hold one and that LLaMA-Factory reads from nowhere else.
_SECRETS_OF_FILES = ("swanlab_lark_webhook_url", "swanlab_lark_secret")
_PLAIN = frozenset({"bool", "int", "float", "str", "list", "dict"})
_ARITHMETIC = {ast.Mult: operator.mul, ast.Add: operator.add, ast.Sub: operator.sub, ast.Pow: operator.pow}
UNKNOWN = type("Unknown", (), {"__repr__": lambda self: "UNKNOWN"})()  # a default that only running code could tell


@dataclass(frozen=True)
class Argument:
    """One key of a recipe. `kinds` are YAML types (or "other"); empty `choices` means that any value may stand."""

    name: str
    group: str
    kinds: frozenset[str]
    choices: tuple[str, ...]
    optional: bool
    default: Any
    settable: bool


@dataclass
class _Source:
    """One parsed file: its classes, its imports (name → module, original name), its aliases (name → names)."""

    module: str
    classes: dict[str, ast.ClassDef] = field(default_factory=dict)
    imports: dict[str, tuple[str, str]] = field(default_factory=dict)
    aliases: dict[str, list[str]] = field(default_factory=dict)
    assigned: dict[str, ast.expr] = field(default_factory=dict)


@cache
def arguments() -> dict[str, Argument]:
    """Return every key that a training recipe may hold; raises ArenaError if LLaMA-Factory is not as expected."""
    found: dict[str, Argument] = {}
    for group, module in GROUPS.items():
        for argument in _fields(group, module, group).values():
            found.setdefault(argument.name, argument)
    return found


@cache
def templates() -> dict[str, bool]:
    """Return the chat templates by name, and whether each puts (empty) thoughts before an answer."""
    found, module = {}, "llamafactory.data.template"
    for call in ast.walk(parse_module(module)):
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "register_template":
            given = {keyword.arg: keyword.value for keyword in call.keywords}
            if isinstance(name := given.get("name"), ast.Constant):
                kind = given.get("template_class")
                found[str(name.value)] = isinstance(kind, ast.Name) and "ReasoningTemplate" in _lineage(kind.id, module)
    return found


def _lineage(name: str, module: str) -> Iterator[str]:
    """Yield the names of a class and of all its bases."""
    yield name
    if found := _find(name, module):
        for base in found[0].bases:
            yield from _lineage(ast.unparse(base), found[1])


@cache
def reporters() -> tuple[str, ...]:
    """Return the values that `report_to` knows, besides none and all."""
    table = _source("transformers.integrations.integration_utils").assigned.get("INTEGRATION_TO_CALLBACK")
    keys = table.keys if isinstance(table, ast.Dict) else []
    return tuple(str(key.value) for key in keys if isinstance(key, ast.Constant))


def key_fault(key: str, training: bool) -> str | None:
    """Return what is wrong with a key of a recipe, the nearest known key named; None if it may stand."""
    argument = arguments().get(key)
    if argument is None:
        near = difflib.get_close_matches(key, arguments(), n=1, cutoff=0.6)
        return f"LLaMA-Factory has no such key{f'; did you mean {near[0]}?' if near else ''}"
    if key in _SECRETS:
        return f"a token in a file ends up in logs and archives; remove the key and set {_SECRETS[key]} in your shell"
    if key in _SECRETS_OF_FILES:
        return "a secret in a file ends up in logs and archives; remove the key: SwanLab's site can send messages, too"
    if not argument.settable:
        return "LLaMA-Factory derives this value itself; remove the key"
    if not training and argument.group == "TrainingArguments":
        return "belongs to training; `llamafactory-cli export` rejects it, remove the key"
    return None


def value_fault(argument: Argument, value: Any) -> str | None:
    """Return what is wrong with a value's type or choice, remedy included; LLaMA-Factory itself checks neither."""
    if value is None:
        return None if argument.optional or "other" in argument.kinds else "may not be null; remove the key"
    if isinstance(value, str) and "${" in value:
        return f"{value!r}: LLaMA-Factory does not resolve interpolations; write the value"
    if argument.choices:
        return None if value in argument.choices and isinstance(value, str) else _choice_fault(argument, value)
    kind = "bool" if isinstance(value, bool) else type(value).__name__
    if "other" in argument.kinds or kind in argument.kinds or (kind == "int" and "float" in argument.kinds):
        finite = not isinstance(value, float) or math.isfinite(value)
        return None if finite else f"{value} is not a finite number"
    return f"{value!r} is of type {kind}, expected {' or '.join(sorted(argument.kinds))}{_type_remedy(argument, value)}"


# What YAML reads as a value of its own where no quotes stand around it, and what to write for anything else.
_IN_QUOTES = {
    "number": re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?"),
    "bool": re.compile(r"true|false|yes|no|on|off", re.IGNORECASE),
}
_WANTED = {"float": "a number", "int": "a whole number", "bool": "true or false"}


def _choice_fault(argument: Argument, value: Any) -> str:
    if isinstance(value, bool) and "no" in argument.choices:
        return f'{str(value).lower()} is no choice: YAML reads an unquoted no as false; write {argument.name}: "no"'
    near = difflib.get_close_matches(str(value), argument.choices, n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    return f"{value!r} is no choice; {hint}choices: {', '.join(argument.choices)}"


def _type_remedy(argument: Argument, value: Any) -> str:
    if isinstance(value, str) and argument.kinds & {"int", "float", "bool"}:
        quoted = _IN_QUOTES["bool" if "bool" in argument.kinds else "number"].fullmatch(value)
        wanted = next(words for kind, words in _WANTED.items() if kind in argument.kinds)
        return "; write it without quotes" if quoted else f"; write {wanted}"
    if isinstance(value, float) and "int" in argument.kinds and value.is_integer():
        return f"; write {int(value)}"
    if "str" in argument.kinds and isinstance(value, bool | int | float):
        return "; put it in quotes"
    if "str" in argument.kinds and isinstance(value, list):
        return "; write one string with commas"
    return ""


@cache
def _file(module: str) -> Path | None:
    """Return a module's file without importing it or its parents; None where the package is not installed."""
    top, *parts = module.split(".")
    spec = importlib.util.find_spec(top)
    if spec is None or not spec.submodule_search_locations:
        return None
    base = Path(spec.submodule_search_locations[0], *parts)
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def parse_module(module: str) -> ast.Module:
    """Return the syntax tree of an installed module without importing it; raises ArenaError if it is not installed."""
    path = _file(module)
    if path is None:
        raise ArenaError(
            f"the module {module} is not installed, so recipes cannot be checked against it", remedy="make install"
        )
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _source(module: str) -> _Source:
    source = _Source(module)
    for node in _statements(parse_module(module).body):
        if isinstance(node, ast.ClassDef):
            source.classes[node.name] = node
        elif isinstance(node, ast.ImportFrom):
            parent = ".".join(module.split(".")[: -node.level]) if node.level else ""
            origin = ".".join(part for part in (parent, node.module) if part)
            for name in node.names:
                source.imports[name.asname or name.name] = (origin, name.name)
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            source.assigned[node.targets[0].id] = node.value
            if isinstance(node.value, ast.Name):
                source.aliases.setdefault(node.targets[0].id, []).append(node.value.id)
    return source


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yield a module's statements, those under `if` and `try` included."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if isinstance(node, ast.If | ast.Try):
                yield from _statements(getattr(node, part, []))


def _find(name: str, module: str) -> tuple[ast.ClassDef, str] | None:
    """Return the class that a name stands for in a module, and the module that defines it."""
    if _file(module) is None:
        return None
    source = _source(module)
    if name in source.classes:
        return source.classes[name], module
    if name in source.imports:
        origin, original = source.imports[name]
        origin = _LAZY.get((origin, original), origin)
        return _find(original, origin) if origin.split(".")[0] in ("llamafactory", "transformers") else None
    found = (_find(alias, module) for alias in reversed(source.aliases.get(name, [])))  # `else` comes before `if`
    return next((each for each in found if each), None)


def _fields(name: str, module: str, group: str) -> dict[str, Argument]:
    """Return a dataclass's fields as `dataclasses.fields` would: bases from the last to the first, then its own."""
    found = _find(name, module)
    if found is None:
        raise ArenaError(f"{module} has no class {name}: this version is not supported", remedy="make install")
    definition, home = found
    fields: dict[str, Argument] = {}
    for base in reversed(definition.bases):
        if isinstance(base, ast.Name):
            fields.update(_fields(base.id, home, group))
    own = [node for node in definition.body if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)]
    for node in own:
        fields[node.target.id] = _argument(node, home, group)
    for key in _split_keys(definition) & fields.keys():  # a comma list that may as well be a YAML list
        fields[key] = _with_list(fields[key])
    return fields


def _split_keys(definition: ast.ClassDef) -> set[str]:
    calls = (node for node in ast.walk(definition) if isinstance(node, ast.Call) and len(node.args) == 1)
    return {
        call.args[0].attr
        for call in calls
        if isinstance(call.func, ast.Name) and call.func.id == "split_arg" and isinstance(call.args[0], ast.Attribute)
    }


def _with_list(argument: Argument) -> Argument:
    kinds = argument.kinds | {"list"}
    return Argument(**{**vars(argument), "kinds": kinds})


def _argument(node: ast.AnnAssign, module: str, group: str) -> Argument:
    kinds, choices, optional = _annotation(node.annotation, module)
    given: dict[str | None, ast.expr] = {}
    if isinstance(node.value, ast.Call):
        given = {keyword.arg: keyword.value for keyword in node.value.keywords}
        default = _default(given, module)
        metadata = given.get("metadata")
        if not choices and isinstance(metadata, ast.Dict):
            choices = _listed_choices(metadata)
    else:
        default = _value(node.value, module)
    init = given.get("init")
    settable = not (isinstance(init, ast.Constant) and init.value is False)
    return Argument(node.target.id, group, frozenset(kinds), tuple(choices), optional, default, settable)


def _annotation(node: ast.expr, module: str) -> tuple[set[str], list[str], bool]:
    """Return the YAML types, the allowed values and whether null may stand.

    Where an enum stands beside `str` (`IntervalStrategy | str`), the class turns the string into the enum, so that
    only the enum's values may stand.
    """
    if isinstance(node, ast.Constant):
        return (set(), [], True) if node.value is None else _annotation(ast.parse(node.value, mode="eval").body, module)
    if isinstance(node, ast.BinOp):
        return _union([node.left, node.right], module)
    if isinstance(node, ast.Subscript):
        head = node.value.id if isinstance(node.value, ast.Name) else ""
        inner = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        if head == "Literal":
            return {"str"}, [str(each.value) for each in inner if isinstance(each, ast.Constant)], False
        if head in ("Optional", "Union"):
            kinds, choices, optional = _union(inner, module)
            return kinds, choices, optional or head == "Optional"
        return {head.lower() if head.lower() in _PLAIN else "other"}, [], False
    if isinstance(node, ast.Name):
        if node.id in _PLAIN:
            return {node.id}, [], False
        if members := _enum(node.id, module):
            return {"str"}, [str(value) for value in members.values()], False
    return {"other"}, [], False


def _union(nodes: list[ast.expr], module: str) -> tuple[set[str], list[str], bool]:
    parts = [_annotation(node, module) for node in nodes]
    choices = [value for _, values, _ in parts for value in values]
    return set().union(*(kinds for kinds, _, _ in parts)), choices, any(optional for *_, optional in parts)


def _enum(name: str, module: str) -> dict[str, Any]:
    """Return an enum's members in its order; nothing if the name is not an enum."""
    found = _find(name, module)
    if found is None or not any("Enum" in ast.unparse(base) for base in found[0].bases):
        return {}
    pairs = (node for node in found[0].body if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant))
    return {node.targets[0].id: node.value.value for node in pairs if isinstance(node.targets[0], ast.Name)}


def _listed_choices(metadata: ast.Dict) -> list[str]:
    pairs = zip(metadata.keys, metadata.values, strict=True)
    listed = [v for k, v in pairs if isinstance(k, ast.Constant) and k.value == "choices" and isinstance(v, ast.List)]
    return [str(each.value) for node in listed for each in node.elts if isinstance(each, ast.Constant)]


def _default(given: dict[str | None, ast.expr], module: str) -> Any:
    factory = given.get("default_factory")
    if isinstance(factory, ast.Name) and factory.id in ("list", "dict"):
        return [] if factory.id == "list" else {}
    return _value(given.get("default"), module)


def _value(node: ast.expr | None, module: str) -> Any:
    """Return a literal, an arithmetic of literals or an enum's value; UNKNOWN for anything else."""
    if isinstance(node, ast.BinOp) and type(node.op) in _ARITHMETIC:
        left, right = _value(node.left, module), _value(node.right, module)
        return UNKNOWN if UNKNOWN in (left, right) else _ARITHMETIC[type(node.op)](left, right)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        return _enum(node.value.id, module).get(node.attr, UNKNOWN)
    try:
        return ast.literal_eval(node) if node is not None else UNKNOWN
    except ValueError:
        return UNKNOWN
