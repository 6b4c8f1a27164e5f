"""A recipe: one native LLaMA-Factory YAML file, rendered from templates/ once and then the user's to edit.

Its header carries the SHA-256 of all its other lines, so that a hand edit is recognised: an edited recipe is kept,
an unedited one follows its template and experiment.yaml.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from common.errors import ArenaError, UsageError
from common.experiment import Experiment
from common.files import atomic_file
from common.llamafactory_schema import Argument, arguments, key_fault, value_fault
from common.stages import STEPS, Step

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
State = Literal["written", "unchanged", "updated", "hand-edited", "replaced"]

# What a template can raise beside Jinja's own errors: it may be of another encoding, too deep, or compute nonsense.
_TEMPLATES_ERRORS = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, RecursionError, SyntaxError)
_SEAL = re.compile(r"^# .*\bsha256:([0-9a-f]{64})\b.*\n?", re.MULTILINE)
_PLAIN_STRING = re.compile(r"[A-Za-z][A-Za-z0-9_./@,-]*")
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}
# The section to which a key goes that a template does not name, by the dataclass that owns it.
_SECTIONS = {
    "ModelArguments": "model",
    "FinetuningArguments": "method",
    "DataArguments": "dataset",
    "TrainingArguments": "train",
    "GeneratingArguments": "eval",
}


@dataclass(frozen=True)
class RecipeOutcome:
    """What became of a recipe; `diff` leads from the file that was there to what the template renders."""

    path: Path
    state: State
    diff: str = ""


def step_of(name: str) -> Step:
    """Return a step by its name; raises UsageError that lists the names."""
    if name not in STEPS:
        raise UsageError(f"there is no step {name!r}", remedy=f"choose one of: {', '.join(STEPS)}")
    return STEPS[name]


def shared_values(experiment: Experiment, step: str) -> dict[str, Any]:
    """Return the keys of a recipe that follow from experiment.yaml, with the values that they must have.

    Paths are relative to the repository root. A key that LLaMA-Factory would ignore or refuse in this step is not
    among them.
    """
    its = step_of(step)
    start = experiment.merge_model(its.trains) if its.merges else experiment.start_model(its.trains)
    values: dict[str, Any] = {
        "model_name_or_path": start,
        "trust_remote_code": experiment.trust_remote_code,
        "template": experiment.template,
    }
    if start == experiment.model:  # a folder that we made has no revisions
        values["model_revision"] = experiment.revision
    if its.merges:
        return values | {
            "stage": "rm" if its.stage == "rm" else "sft",  # only rm matters here: it copies the value head
            "adapter_name_or_path": experiment.adapter_folder(its.merges).as_posix(),
            "export_dir": experiment.merged_folder(its.merges).as_posix(),
        }
    return values | {
        "stage": its.stage,
        "quantization_bit": experiment.quantization_bit,
        "quantization_method": "bnb",
        "cutoff_len": experiment.cutoff_len,
        "enable_thinking": True if experiment.enable_thinking is None else experiment.enable_thinking,
        "dataset_dir": experiment.data_folder.as_posix(),
        "dataset": f"{experiment.name}_{its.data}_train",
        "eval_dataset": f"{experiment.name}_{its.data}_valid",
        "output_dir": experiment.adapter_folder(step).as_posix(),
    }


def render_recipe(experiment: Experiment, step: str, templates: Path = TEMPLATES) -> str:
    """Return the text of a recipe, header and seal included.

    `experiment.recipes[step]` replaces values in their place; keys that the template does not name are appended to
    the section of their dataclass. Raises ArenaError for a key that is unknown, of a wrong value or experiment.yaml's
    own, and for a faulty template.
    """
    its = step_of(step)
    first = experiment.recipes.get(step, {})
    shared = shared_values(experiment, step)
    _refuse_first_values(experiment, _first_value_faults(its, first, shared))
    sheet = _Sheet(first, shared)
    body = _render(experiment, its, sheet, templates)
    if extra := first.keys() - sheet.named:  # the first pass has told which keys the template names
        body = _render(experiment, its, _Sheet(first, shared, extra), templates)
    return _sealed(body, its)


def check_first_values(experiment: Experiment) -> None:
    """Raise one ArenaError that lists every fault of `experiment.recipes`, of all steps together."""
    faults = [
        fault
        for name, first in experiment.recipes.items()
        for fault in _first_value_faults(step_of(name), first, shared_values(experiment, name))
    ]
    _refuse_first_values(experiment, faults)


def write_recipe(
    experiment: Experiment, step: str, force: bool = False, root: Path = Path(), templates: Path = TEMPLATES
) -> RecipeOutcome:
    """Write a recipe under `root` unless a hand edit would be lost; `force` replaces it all the same.

    Raises ArenaError if the recipe cannot be rendered; the file that is there is then left as it is.
    """
    path = experiment.recipe(step)
    target = root / path
    fresh = render_recipe(experiment, step, templates)
    if not target.exists():
        _write(target, fresh)
        return RecipeOutcome(path, "written")
    current = _normal(target.read_bytes().decode("utf-8", errors="replace"))
    if current == fresh:
        return RecipeOutcome(path, "unchanged")
    diff = _diff(current, fresh, path)
    edited = not is_as_rendered(current)
    if edited and not force:
        return RecipeOutcome(path, "hand-edited", diff)
    _write(target, fresh)
    return RecipeOutcome(path, "replaced" if edited else "updated", diff)


def is_as_rendered(text: str) -> bool:
    """Tell whether a recipe's text is what was once rendered: its seal matches all its other lines."""
    text = _normal(text)
    seals = _SEAL.findall(text)
    return len(seals) == 1 and seals[0] == _digest(_unsealed(text))


@dataclass
class _Sheet:
    """The values that a template places, and a record of the keys that it names."""

    first: Mapping[str, Any]
    shared: Mapping[str, Any]
    extra: set[str] = field(default_factory=set)
    named: set[str] = field(default_factory=set)
    placed: set[str] = field(default_factory=set)

    def key(self, name: str, default: Any, why: str = "", note: str = "") -> str:
        """`name: value  # why; note`; `why` speaks for the template's value, so another value goes without it."""
        self.named.add(name)
        value = self.first.get(name, default)
        comment = "; ".join(part for part in (why if value == default else "", note) if part)
        return f"{name}: {as_yaml(value)}{f'  # {comment}' if comment else ''}"

    def from_experiment(self, name: str) -> str:
        """`name: value` for a key that all stages share; raises ArenaError for any other."""
        if name not in self.shared:
            raise ArenaError(
                f"a recipe template asks for shared({name!r}), which experiment.yaml does not rule",
                where="templates",
                remedy=f"choose one of: {', '.join(self.shared)}; or write key({name!r}, value)",
            )
        return f"{name}: {as_yaml(self.shared[name])}"

    def rest(self, *sections: str) -> str:
        """Lines for the first values that belong to these sections and that the template does not name."""
        known = arguments()
        keys = [key for key in self.first if key in self.extra and _section(known[key]) in sections]
        self.placed.update(keys)
        return "".join(f"{key}: {as_yaml(self.first[key])}\n" for key in keys)


def _section(argument: Argument) -> str:
    if argument.name.startswith("export_"):
        return "export"
    if argument.name.startswith(("eval_", "per_device_eval_")):
        return "eval"
    return _SECTIONS[argument.group]


def as_yaml(value: Any, *, in_list: bool = False) -> str:
    """Return one line of YAML that PyYAML and OmegaConf read alike: 1.0e-4 for a small float, "no" quoted."""
    if isinstance(value, str):
        plain = _PLAIN_STRING.fullmatch(value) and value.lower() not in _YAML_WORDS and not (in_list and "," in value)
        return value if plain else "".join(map(_printable, json.dumps(value, ensure_ascii=False)))
    if isinstance(value, float) and value and (abs(value) < 1e-2 or abs(value) >= 1e16):
        mantissa, exponent = f"{Decimal(repr(value)).normalize():e}".split("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}e{exponent}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(as_yaml(each, in_list=True) for each in value)}]"
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _printable(character: str) -> str:
    """Escape what YAML refuses in a file or takes for a line break, and JSON leaves as it is."""
    if character.isprintable():
        return character
    return f"\\u{ord(character):04x}" if ord(character) < 0x10000 else f"\\U{ord(character):08x}"


def _first_value_faults(step: Step, first: Mapping[str, Any], shared: Mapping[str, Any]) -> list[str]:
    faults = []
    for key, value in first.items():
        if key in shared:
            fault = "follows from experiment.yaml's own keys and names; change it there, for all stages at once"
        else:
            fault = key_fault(key, training=not step.merges) or value_fault(arguments()[key], value)
        if fault:
            faults.append(f"  - recipes.{step.name}.{key}: {fault}")
    return faults


def _refuse_first_values(experiment: Experiment, faults: list[str]) -> None:
    if faults:
        raise ArenaError(
            "\n".join([f"{len(faults)} fault(s) in the first values of a recipe:", *faults]),
            where=str(experiment.folder / "experiment.yaml"),
            remedy="mend or remove these keys",
        )


def _render(experiment: Experiment, step: Step, sheet: _Sheet, templates: Path) -> str:
    from jinja2 import FileSystemLoader, StrictUndefined, TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(templates),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # YAML, not HTML: values go through as_yaml
    )
    names = {
        "experiment": experiment,
        "description": " ".join(experiment.description.split()),
        "step": step,
        "path": experiment.recipe(step.name).as_posix(),
        "merged": experiment.merged_folder(step.trains).as_posix(),
        "from_sft": experiment.start_model(step.trains) != experiment.model,
        "dequantised": experiment.merges_dequantised,
        "key": sheet.key,
        "shared": sheet.from_experiment,
        "rest": sheet.rest,
    }
    try:
        text = environment.get_template(step.template).render(names)
    except (TemplateError, *_TEMPLATES_ERRORS) as error:
        line = getattr(error, "lineno", None)
        where = f"{templates.name}/{getattr(error, 'name', None) or step.template}{f' line {line}' if line else ''}"
        raise ArenaError(
            f"the recipe template fails: {error}", where=where, remedy="mend the template, or restore it from git"
        ) from None
    _check_keys(text, sheet, f"{templates.name}/{step.template}")
    return text


def _check_keys(text: str, sheet: _Sheet, where: str) -> None:
    """Raise ArenaError if a template lost a first value or wrote a key twice."""
    if lost := sorted(sheet.extra - sheet.placed):
        raise ArenaError(
            f"has no place for the first value(s) of: {', '.join(lost)}",
            where=where,
            remedy="give each section of the template a {{ rest(…) }}",
        )
    written = Counter(re.findall(r"^(\w+):", text, re.MULTILINE))
    if twice := sorted(key for key, times in written.items() if times > 1):
        raise ArenaError(
            f"writes twice: {', '.join(twice)}",
            where=where,
            remedy="let the template write these keys by {{ key(name, value) }}, which `recipes:` may replace",
        )


def _sealed(body: str, step: Step) -> str:
    """Put the seal under the comment that opens a recipe."""
    body = _normal(body)
    lines = body.splitlines(keepends=True)
    top = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    seal = f"# Rendered from templates/{step.template}; an edited recipe is kept as it is. sha256:{_digest(body)}\n"
    return "".join([*lines[:top], seal, *lines[top:]])


def _unsealed(text: str) -> str:
    return _SEAL.sub("", text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _normal(text: str) -> str:
    """Undo what editors and git do to line ends: that is no edit."""
    return text.replace("\r\n", "\n")


def _diff(current: str, fresh: str, path: Path) -> str:
    old, new = (_unsealed(text).splitlines(keepends=True) for text in (current, fresh))
    names = (f"{path.as_posix()} (as it is)", f"{path.as_posix()} (as it would be rendered)")
    lines = difflib.unified_diff(old, new, *names, n=2)
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)


def _write(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text)
