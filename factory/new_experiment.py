"""A new experiment: experiment.yaml and all its recipes, rendered from templates/ for one model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ArenaError, UsageError
from common.experiment import Experiment, check_name, parse_experiment, read_yaml, require_project
from common.files import atomic_folder
from common.stages import STEPS
from data_prep.template_choice import choose_template
from factory.recipes import TEMPLATES, as_yaml, render_recipe

# The token budget of an experiment that is asked for without one; docs/defaults.md has its source.
CUTOFF_LEN = 2048
# Whose models on the hub open only after their licence is accepted there.
_GATING_OWNERS = ("meta-llama/", "google/gemma")
BITS = {"4": 4, "8": 8, "none": None}


@dataclass(frozen=True)
class Wish:
    """What an experiment.yaml is rendered from; without a template the model's own is looked up."""

    name: str
    model: str
    template: str | None = None
    quantization_bit: int | None = 4
    cutoff_len: int = CUTOFF_LEN
    opening: tuple[str, ...] = ()
    description: str = ""
    model_note: str = ""
    recipes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def new_experiment(wish: Wish, root: Path = Path()) -> Experiment:
    """Make factory_configs/<name>, whole or not at all, and return the experiment.

    Raises UsageError for a name that is taken or unfit, for a model or template that is not known, and outside of the
    project's folder.
    """
    check_name(wish.name)
    if not (root / "templates").is_dir():  # a checkout without an experiment still has these
        require_project(root)
    folder = root / "factory_configs" / wish.name
    taken = UsageError(
        f"{folder} is there already", remedy="choose another name, or edit its experiment.yaml and run prepare again"
    )
    if folder.exists() or folder.is_symlink():
        raise taken
    text = render_experiment(wish)
    try:
        with atomic_folder(folder, replace=False) as fresh:
            experiment = write_experiment(text, wish.name, fresh)
    except FileExistsError:
        raise taken from None
    return experiment


def write_experiment(text: str, name: str, folder: Path) -> Experiment:
    """Write experiment.yaml and every recipe of it into `folder`; raises ArenaError for faults in the text."""
    path = folder / "experiment.yaml"
    path.write_text(text, encoding="utf-8")
    experiment = parse_experiment(read_yaml(path), name, where=f"factory_configs/{name}/experiment.yaml")
    for step in STEPS:
        (folder / f"{step}.yaml").write_text(render_recipe(experiment, step), encoding="utf-8")
    return experiment


def render_experiment(wish: Wish) -> str:
    """Return the text of an experiment.yaml; raises UsageError where the model's chat template is not known."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined, TemplateError

    choice = choose_template(wish.model, wish.template)
    local = Path(wish.model).expanduser().is_dir()
    names = {
        "opening": wish.opening or _opening(wish),
        "description": wish.description or f"made by `run.py new` for {wish.model}; the first batch sizes are guesses",
        "model": str(Path(wish.model).expanduser()) if local else wish.model,
        "model_note": wish.model_note,
        "local": local,
        "gated": not local and wish.model.lower().startswith(_GATING_OWNERS),
        "template": choice.template,
        "template_note": choice.reason,
        "thinks": choice.thinks,
        "cutoff_len": wish.cutoff_len,
        "quantization_bit": wish.quantization_bit,
        "recipes": wish.recipes,
        "as_yaml": as_yaml,
    }
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # YAML, not HTML: values go through as_yaml
    )
    try:
        return environment.get_template("experiment.yaml.j2").render(names)
    except TemplateError as error:
        where = f"templates/experiment.yaml.j2 line {getattr(error, 'lineno', '?')}"
        raise ArenaError(f"fails: {error}", where=where, remedy="mend it, or restore it from git") from None


def _opening(wish: Wish) -> tuple[str, ...]:
    bits = "" if wish.quantization_bit == 4 else f" --bits {wish.quantization_bit or 'none'}"
    cutoff = "" if wish.cutoff_len == CUTOFF_LEN else f" --cutoff {wish.cutoff_len}"
    template = f" --template {wish.template}" if wish.template else ""
    return (f"Made by: python run.py new {wish.name} --model {wish.model}{template}{bits}{cutoff}",)
