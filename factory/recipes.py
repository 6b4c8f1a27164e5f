"""A recipe: one native LLaMA-Factory YAML file, rendered from templates/ once and then the user's to edit.

Its header carries the SHA-256 of all its other lines, so that a hand edit is recognised: an edited recipe is kept,
an unedited one follows its template and experiment.yaml. A value is that of the edited recipe, else of `recipes:` in
experiment.yaml, else of the template.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from jinja2 import FileSystemLoader, StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from common.errors import ArenaError
from common.experiment import Experiment
from common.files import atomic_file, read_regular
from common.llamafactory_schema import arguments, key_fault, value_fault
from common.stages import STEPS, Fold
from data_prep.prompt import TEMPLATE_ERRORS

TEMPLATES = Path(__file__).resolve().parent.parent / "templates"
State = Literal["written", "unchanged", "updated", "hand-edited", "replaced"]

_LARGEST = 1 << 20  # bytes of a recipe
_HASH_LINE = re.compile(r"^# .*\bsha256:([0-9a-f]{64})\b.*\n?", re.MULTILINE)
_PLAIN_STRING = re.compile(r"[A-Za-z][A-Za-z0-9_./@,-]*")
_YAML_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null"}


@dataclass(frozen=True)
class RecipeOutcome:
    """What became of a recipe; `diff` leads from the file that was there to what the template renders."""

    path: Path
    state: State
    diff: str = ""


def fold_overrides(experiment: Experiment, step: str, fold: Fold) -> dict[str, Any]:
    """Return the keys of a recipe, with their values, by which a fold differs from what is written."""
    written = shared_values(experiment, step, experiment.written_fold)
    return {key: value for key, value in shared_values(experiment, step, fold).items() if written.get(key) != value}


def shared_values(experiment: Experiment, step: str, fold: Fold) -> dict[str, Any]:
    """Return the keys of a recipe that follow from experiment.yaml, with the values that they must have.

    Paths are relative to the repository root. A key that LLaMA-Factory would ignore or refuse in this step is left out.
    """
    its = STEPS[step]
    start = (experiment.merge_model if its.merges else experiment.start_model)(its.trains, fold)
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
            "adapter_name_or_path": experiment.adapter_folder(its.merges, fold).as_posix(),
            "export_dir": experiment.merged_folder(its.merges, fold).as_posix(),
        }
    train, valid = (
        ",".join(f"{experiment.name}_{its.data}_{part}" for part in experiment.parts(split, fold))
        for split in ("train", "valid")
    )
    # `full` trains on every vote and leaves none to be evaluated on.
    judged = {"eval_dataset": None, "eval_strategy": "no"} if fold == "full" else {"eval_dataset": valid}
    if experiment.orders_together:
        judged["disable_shuffling"] = True
    if experiment.epochs_as_rows > 1:
        judged["num_train_epochs"] = 1.0
    return values | {
        "stage": its.stage,
        "quantization_bit": experiment.quantization_bit,
        "quantization_method": "bnb",
        "cutoff_len": experiment.cutoff_len,
        "enable_thinking": True if experiment.enable_thinking is None else experiment.enable_thinking,
        "dataset_dir": experiment.data_folder.as_posix(),
        "dataset": train,
        **judged,
        "output_dir": experiment.adapter_folder(step, fold).as_posix(),
    }


def check_first_values(experiment: Experiment, steps: Iterable[str] = tuple(STEPS)) -> None:
    """Raise one ArenaError that lists every fault of `experiment.recipes` in these steps."""
    faults = []
    for step in steps:
        shared = shared_values(experiment, step, experiment.written_fold)
        for key, value in experiment.recipes.get(step, {}).items():
            if key in shared:
                fault = "follows from experiment.yaml's own keys and names; change it there, for all stages at once"
            else:
                fault = key_fault(key, not STEPS[step].merges) or value_fault(arguments()[key], value)
            if fault:
                faults.append(f"  - recipes.{step}.{key}: {fault}")
    if faults:
        raise ArenaError(
            "\n".join([f"{len(faults)} fault(s) in the first values of a recipe:", *faults]),
            where=str(experiment.folder / "experiment.yaml"),
            remedy="fix or remove these keys",
        )


def render_recipe(experiment: Experiment, step: str, templates: Path = TEMPLATES) -> str:
    """Return the text of a recipe, header and hash included.

    `experiment.recipes[step]` replaces values in their place; keys that the template does not name follow at the end.
    Raises ArenaError for a key that is unknown, of a wrong value or experiment.yaml's own, and for a faulty template.
    """
    own = experiment.written_fold
    its, first, shared = STEPS[step], experiment.recipes.get(step, {}), shared_values(experiment, step, own)
    check_first_values(experiment, [step])
    named = set()

    def key(name: str, default: Any, why: str = "", note: str = "") -> str:
        """`name: value  # why; note`; `why` speaks for the template's value, so another value goes without it."""
        named.add(name)
        value = first.get(name, default)
        comment = "; ".join(part for part in (why if value == default else "", note) if part)
        return f"{name}: {as_yaml(value)}{f'  # {comment}' if comment else ''}"

    values = {
        "experiment": experiment,
        "description": " ".join(experiment.description.split()),
        "step": its,
        "path": experiment.recipe(step).as_posix(),
        "fold": own,
        "merged": experiment.merged_folder(its.trains, own).as_posix(),
        "from_sft": experiment.start_model(its.trains) != experiment.model,
        "dequantised": experiment.merges_dequantised,
        "key": key,
        "shared": lambda name: f"{name}: {as_yaml(shared[name])}",
    }
    text = _normal(render_template(its.template, values, templates))
    if unnamed := [f"{name}: {as_yaml(value)}\n" for name, value in first.items() if name not in named]:
        text += f"\n### more\n{''.join(unnamed)}"
    if twice := [name for name, times in Counter(re.findall(r"^(\w+):", text, re.MULTILINE)).items() if times > 1]:
        where, remedy = f"{templates.name}/{its.template}", "let it write them once, by {{ key(name, value) }}"
        raise ArenaError(f"writes twice: {', '.join(twice)}", where=where, remedy=remedy)
    lines = text.splitlines(keepends=True)
    top = next((number for number, line in enumerate(lines) if not line.startswith("#")), len(lines))
    line = f"# Rendered from templates/{its.template}; an edited recipe is kept as it is. sha256:{_digest(text)}\n"
    return "".join([*lines[:top], line, *lines[top:]])


def render_template(name: str, values: Mapping[str, Any], folder: Path = TEMPLATES) -> str:
    """Render a template of YAML; raises ArenaError with file and line of what is wrong in it."""
    environment = ImmutableSandboxedEnvironment(
        loader=FileSystemLoader(folder),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # YAML, not HTML: values go through as_yaml
    )
    try:
        return environment.get_template(name).render(values)
    except TEMPLATE_ERRORS as error:
        line = getattr(error, "lineno", None)
        raise ArenaError(
            f"the template fails: {error}",
            where=f"{folder.name}/{getattr(error, 'name', None) or name}{f' line {line}' if line else ''}",
            remedy="fix the template, or restore it from git",
        ) from None


def write_recipe(experiment: Experiment, step: str, force: bool = False, templates: Path = TEMPLATES) -> RecipeOutcome:
    """Write a recipe unless a hand edit would be lost; `force` replaces it all the same.

    Raises ArenaError if the recipe cannot be rendered; the file that is there stays as it is.
    """
    path = experiment.recipe(step)
    fresh = render_recipe(experiment, step, templates)
    current = _normal(read_regular(path, _LARGEST).decode("utf-8", "replace")) if path.exists() else None
    if current == fresh:
        return RecipeOutcome(path, "unchanged")
    edited = current is not None and not is_as_rendered(current)
    diff = "" if current is None else _diff(current, fresh, path.as_posix())
    if edited and not force:
        return RecipeOutcome(path, "hand-edited", diff)
    with atomic_file(path) as file:
        file.write(fresh)
    return RecipeOutcome(path, "written" if current is None else "replaced" if edited else "updated", diff)


def is_as_rendered(text: str) -> bool:
    """Tell whether a recipe's text is what was once rendered: its hash matches all its other lines."""
    text = _normal(text)
    hashes = _HASH_LINE.findall(text)
    return len(hashes) == 1 and hashes[0] == _digest(_HASH_LINE.sub("", text))


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


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _normal(text: str) -> str:
    """Undo what editors and git do to line ends: that is no edit."""
    return text.replace("\r\n", "\n")


def _diff(current: str, fresh: str, path: str) -> str:
    old, new = (_HASH_LINE.sub("", text).splitlines(keepends=True) for text in (current, fresh))
    lines = difflib.unified_diff(old, new, f"{path} (as it is)", f"{path} (as it would be rendered)", n=2)
    return "".join(line if line.endswith("\n") else f"{line}\n" for line in lines)
