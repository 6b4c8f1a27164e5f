"""What is outdated: exports of other settings than today's, and results of another export, recipe or judge.

A judge that was trained on other votes may have seen the rows of today's validation fold, and figures of other rows
say nothing beside today's baselines. What was recorded when a part began is compared with the export's manifest, and
that with experiment.yaml; no large file is hashed again, so that `status` may ask at any time.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from common.experiment import Experiment, read_yaml
from common.files import sha256_of
from common.stages import STEPS
from data_prep.export_reader import read_manifest
from factory.state import PARTS, Record, StageState, differences, listed

# The keys of experiment.yaml that the exported rows depend on; model and bits are the recipes' matter, too, which are
# compared where they are read. Those of one stage alone are no other stage's matter.
_SHAPING = (
    *("template", "enable_thinking", "cutoff_len", "labels", "budget_shares", "valid_share", "swap_copies", "seed"),
)
_SHAPING_ONE = {"dpo_judge": ("dpo_rejected",)}
_NAMED = 3  # so many files are named, the others counted


def changed_files(inputs: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the exported files among a part's recorded inputs that the export no longer holds as they were.

    Raises ArenaError where nothing is exported any more. Data sets of the user's own are not looked at.
    """
    files, changed = read_manifest(folder)["files"], []
    data = inputs.get("data")
    for name, content in data.items() if isinstance(data, dict) else ():
        path = Path(name) if "/" in name else folder / name  # scoring names them without the folder
        if isinstance(content, str) and path.is_relative_to(folder):
            name = path.relative_to(folder).as_posix()
            if content != f"sha256:{files.get(name)}":
                changed.append(name)
    return changed


def outdated_files(experiment: Experiment, stage: str, parts: tuple[str, ...] = PARTS) -> list[str]:
    """Return the exported files that changed since a stage was trained or scored, each once."""
    state = StageState(experiment.output_folder(stage))
    records = filter(None, map(state.record, parts))
    changed = (name for record in records for name in changed_files(record.inputs, experiment.data_folder))
    return list(dict.fromkeys(changed))


def require_own_votes(experiment: Experiment, stage: str, *, trained: bool = True) -> None:
    """Raise ArenaError where a stage (if it is `trained`) or the judge that it starts from has learned from another
    export than today's: validation rows may be among what it has seen."""
    start = ["sft"] if experiment.start_model(stage) != experiment.model else []
    for each in (*start, *([stage] if trained else [])):
        if changed := outdated_files(experiment, each, ("train",)):
            raise ArenaError(
                f"{each} was trained on another export than {experiment.data_folder} holds now "
                f"({_listed(changed)} changed since): its validation rows may have been trained on",
                where=str(experiment.output_folder(each)),
                remedy="prepare the earlier votes again; or train on the new ones: "
                f"python run.py {STEPS[each].asked_by} -e {experiment.name} --fresh",
            )


def changed_settings(experiment: Experiment, stage: str) -> list[str]:
    """Return one line for each setting that the exported rows of a stage depend on and that changed since `prepare`.

    Raises ArenaError where nothing is exported.
    """
    folder = experiment.data_folder
    manifest, today = read_manifest(folder), experiment.model_dump(mode="json")
    made = manifest["experiment"]
    keys = [key for key in (*_SHAPING, *_SHAPING_ONE.get(stage, ())) if key in made]
    before, now = ({key: each[key] for key in keys} for each in (made, today))
    template = Path(experiment.prompt_template)
    if template.is_file():  # what is fed is the export's own copy, so that a project may be moved without it
        before["prompt_template"] = f"sha256:{manifest['files'].get('judge_prompt.j2')}"
        now["prompt_template"] = f"sha256:{sha256_of(template)}"
    return differences(before, now)


def require_own_settings(experiment: Experiment, stage: str) -> None:
    """Raise ArenaError where experiment.yaml or the judge prompt says other rows than those that are exported."""
    if changes := changed_settings(experiment, stage):
        raise ArenaError(
            listed("was exported with other settings; since then changed:", changes),
            where=str(experiment.data_folder),
            remedy=f"undo the change (in {experiment.folder / 'experiment.yaml'}); or export anew, then train with "
            f"--fresh: {prepare_again(experiment)}",
        )


def prepare_again(experiment: Experiment) -> str:
    """Return the command that exports the same votes anew; raises ArenaError where nothing is exported."""
    sources = read_manifest(experiment.data_folder)["sources"]
    votes = " ".join(f"--{name} {shlex.quote(sources[name]['file'])}" for name in ("train", "test") if name in sources)
    return f"python run.py prepare -e {shlex.quote(experiment.name)} {votes}"


def changed_recipe(experiment: Experiment, stage: str) -> list[str]:
    """Return one line for each key of a stage's recipe, and of what starts it, that changed since its training began.

    Those that change no weights are left out; nothing is told of an adapter that `run.py` did not train.
    """
    record, path = StageState(experiment.output_folder(stage)).record("train"), experiment.recipe(stage)
    if (began := _recipe_of(record, path)) is None:
        return []
    engine = {"distributed": record.inputs.get("distributed", "auto")}
    return differences(
        {path.name: began, "experiment.yaml": engine},
        {path.name: read_yaml(path), "experiment.yaml": {"distributed": experiment.distributed}},
    )


def earlier_scores(experiment: Experiment, stage: str) -> str | None:
    """Return why the report and the tables of a stage are not of its judge as it is now, None where they are.

    A result without state.json is taken as it is: it was brought here without its books.
    """
    state = StageState(experiment.output_folder(stage))
    if not state.path.is_file():
        return None
    record = state.record("score")
    if record is not None and record.finished_at is not None:
        return None
    begun = next((f"{part} began" for part in reversed(PARTS) if state.record(part)), "nothing is finished")
    return f"{stage} was begun anew since its report was written, and its scoring did not end ({begun})"


def require_scored(experiment: Experiment, stage: str, model: Mapping[str, Any] | None = None) -> None:
    """Raise ArenaError where a stage's report is of an earlier judge; with `model` (what the scores depend on now) also
    where it is another one than was scored."""
    where, again = str(experiment.output_folder(stage)), f"python run.py {{}} -e {shlex.quote(experiment.name)}"
    if why := earlier_scores(experiment, stage):
        remedy = f"go on to a new report: {again.format(STEPS[stage].asked_by)}"
        raise ArenaError(f"{why}: its calibration and figures are of an earlier judge", where=where, remedy=remedy)
    record = StageState(experiment.output_folder(stage)).record("score")
    changes = differences(record.inputs.get("model", {}), model) if record and model is not None else []
    if changes:
        raise ArenaError(
            listed("the judge is not the one that was scored; since then changed:", changes),
            where=where,
            remedy=f"undo the change, or fit the calibration anew: {again.format('score')} --stage {stage} --fresh",
        )


def trained_recipe(experiment: Experiment, stage: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a stage's recipe as it is today, with the values of `keys` that its adapter was trained with.

    Today's are taken where `run.py` did not train the adapter.
    """
    path = experiment.recipe(stage)
    recipe = read_yaml(path)
    trained = _recipe_of(StageState(experiment.output_folder(stage)).record("train"), path)
    if trained is None:
        return recipe
    others = {key: value for key, value in recipe.items() if key not in keys}
    return {**others, **{key: trained[key] for key in keys if key in trained}}


def _recipe_of(record: Record | None, path: Path) -> dict[str, Any] | None:
    """Return the recipe that a training began with, None where `run.py` began none."""
    recipe = record.inputs.get(str(path)) if record else None
    return recipe if isinstance(recipe, dict) else None


def replaced(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """Return what a person should know of an export that took another one's place, from both manifests."""
    if before is None or _contents(before) == _contents(now):
        return None
    was, held = before["sources"]["train"]["file"], "test" in before["sources"]
    words = f"the earlier export, of {was}, is replaced"
    if held and "test" not in now["sources"]:
        words += "; it had a test set, this one has none, so that there will be no submission.csv (--test FILE)"
    if before["files"].get("sft_train.jsonl") != now["files"].get("sft_train.jsonl"):
        words += "; what was trained on it is outdated: train with --fresh"
    return words


def _contents(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: source["sha256"] for name, source in manifest["sources"].items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
