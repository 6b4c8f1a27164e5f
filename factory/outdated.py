"""What is outdated: results that were made from another export than the one that data/<experiment> holds now.

A judge that was trained on other votes may have seen the rows of today's validation fold, and figures of other rows
say nothing beside today's baselines. What was recorded when a part began is compared with the export's manifest; no
file is hashed again, so that `status` may ask at any time.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data_prep.dataset import read_manifest
from data_prep.errors import ArenaError
from factory.experiment import Experiment
from factory.state import PARTS, StageState
from factory.step import STEPS

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
