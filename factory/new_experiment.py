"""A new experiment: experiment.yaml and all its recipes, rendered from templates/ for one model."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ArenaError, UsageError
from common.experiment import Experiment, check_name, load_experiment, parse_experiment, read_yaml, require_project
from common.files import atomic_folder
from common.progress import Show
from common.stages import STEPS, TRAININGS
from data_prep.model_lookup import Choice, choose_template
from factory.devices import Devices, cpu_with_bf16, devices
from factory.recipes import as_yaml, is_as_rendered, render_recipe, render_template, shared_values
from factory.stage_context import StageContext, prepare_again

# The token budget of an experiment that is asked for without one; docs/experiment.md has its source.
CUTOFF_LEN = 2048
# Owners whose models on the hub open only after their licence is accepted there.
_GATING_OWNERS = ("meta-llama/", "google/gemma")
BITS = {"4": 4, "8": 8, "none": None}


@dataclass(frozen=True)
class NewExperiment:
    """What an experiment.yaml is rendered from; without a template the model's own is looked up."""

    name: str
    model: str
    template: str | None = None
    quantization_bit: int | None = 4
    cutoff_len: int = CUTOFF_LEN


def new_experiment(wanted: NewExperiment, *, show: Show | None = None) -> Experiment:
    """Make factory_configs/<name>, whole or not at all, and return the experiment; `show` reports what was chosen.

    Raises UsageError for a name that exists or is unfit, for an unknown model or template, and outside of the project's
    folder.
    """
    _refuse_existing(wanted.name)
    if not Path("templates").is_dir():  # a checkout without an experiment still has these
        require_project()
    choice = choose_template(wanted.model, wanted.template)
    numbers, why = numbers_for(devices(), cpu_with_bf16())
    experiment = _make(wanted.name, render_experiment(wanted, choice, numbers, why), render_recipe)
    if show:
        show.note(f"template {choice.template}: {choice.reason}")
        show.note(f"trains in {why}")
    return experiment


def copied_experiment(name: str, source: str, *, show: Show) -> tuple[Experiment, str]:
    """Make a copy of another experiment, hand edits of its recipes included; return it and the command to prepare it.

    Its votes are not copied: the command names those that the other was prepared with.
    """
    _refuse_existing(name)
    its = load_experiment(source)
    mentions = re.compile(rf"(?<=-e ){re.escape(source)}(?![\w.-])|(?<=run\.py new ){re.escape(source)}(?![\w.-])")
    text = mentions.sub(name, (its.folder / "experiment.yaml").read_text(encoding="utf-8-sig"))

    def recipe(own: Experiment, step: str) -> str:
        path, fresh = its.recipe(step), render_recipe(own, step)
        if not path.is_file() or is_as_rendered(edited := path.read_text(encoding="utf-8", errors="replace")):
            return fresh
        show.note(f"{own.recipe(step)}: with the hand edits of {path}")
        before, after = (shared_values(each, step, each.written_fold) for each in (its, own))
        for key in [key for key, value in after.items() if value != before[key]]:
            edited = re.sub(rf"(?m)^{key}: .*?(?=  #|$)", lambda _, key=key: f"{key}: {as_yaml(after[key])}", edited)
        for old, new in ((its.folder, own.folder), (its.data_folder, own.data_folder)):
            edited = re.sub(rf"{re.escape(old.as_posix())}(?![\w.-])", new.as_posix(), edited)
        return mentions.sub(name, edited)

    made = _make(name, text, recipe)
    try:
        return made, prepare_again(StageContext(its, "sft").manifest, name)
    except ArenaError:  # never prepared
        return made, f"python run.py prepare -e {name} --train FILE"


def _refuse_existing(name: str, taken: bool = False) -> None:
    check_name(name)
    folder = Path("factory_configs", name)
    if taken or folder.exists() or folder.is_symlink():
        remedy = "choose another name, or edit its experiment.yaml and run prepare again"
        raise UsageError(f"{folder} exists already", remedy=remedy)


def _make(name: str, text: str, recipe: Callable[[Experiment, str], str]) -> Experiment:
    folder = Path("factory_configs", name)
    try:
        with atomic_folder(folder, replace=False) as fresh:
            path = fresh / "experiment.yaml"
            path.write_text(text, encoding="utf-8")
            experiment = parse_experiment(read_yaml(path), name, where=str(folder / "experiment.yaml"))
            for step in STEPS:
                (fresh / f"{step}.yaml").write_text(recipe(experiment, step), encoding="utf-8")
    except FileExistsError:
        _refuse_existing(name, taken=True)
    return experiment


def numbers_for(seen: Devices, cpu: str) -> tuple[dict[str, Any], str]:
    """Return the recipe keys for the numbers that this machine computes in, beside bf16: true, and what that is."""
    old = [gpu.name for gpu in seen.gpus if not gpu.bf16]
    if old:
        return {"bf16": False, "fp16": True}, f"fp16: {old[0]} has no bf16"
    if seen.accelerator:
        return {}, "bf16"
    if cpu and not seen.failure:
        return {"use_cpu": True}, f"bf16 on the CPU ({cpu}): there is no GPU here"
    return {"bf16": False}, f"fp32: {seen.failure or 'there is no GPU here, and the CPU has no bf16'}"


def render_experiment(
    wanted: NewExperiment, choice: Choice | None = None, numbers: dict[str, Any] | None = None, why: str = ""
) -> str:
    """Return the text of an experiment.yaml; raises UsageError where the model's chat template is not known.

    `numbers` are the recipe keys that this machine needs to be others than the templates', and `why`.
    """
    choice = choice or choose_template(wanted.model, wanted.template)
    local = Path(wanted.model).expanduser().is_dir()
    options = f" --template {wanted.template}" if wanted.template else ""
    if wanted.quantization_bit != 4:
        options += f" --bits {wanted.quantization_bit or 'none'}"
    if wanted.cutoff_len != CUTOFF_LEN:
        options += f" --cutoff {wanted.cutoff_len}"
    values = {
        "command": f"python run.py new {wanted.name} --model {wanted.model}{options}",
        "description": f"made by `run.py new` for {wanted.model}; the first batch sizes are guesses",
        "model": str(Path(wanted.model).expanduser()) if local else wanted.model,
        "local": local,
        "gated": not local and wanted.model.lower().startswith(_GATING_OWNERS),
        "template": choice.template,
        "template_note": choice.reason,
        "thinks": choice.thinks,
        "cutoff_len": wanted.cutoff_len,
        "quantization_bit": wanted.quantization_bit,
        "numbers": ", ".join(f"{key}: {as_yaml(value)}" for key, value in (numbers or {}).items()),
        "why": why,
        "trainings": TRAININGS,
        "as_yaml": as_yaml,
    }
    return render_template("experiment.yaml.j2", values)
