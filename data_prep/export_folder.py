"""What an export owns: its data sets, by the names of LLaMA-Factory's dataset_info.json, and the files of its folder.

An export replaces its folder as a whole, so it stops where a file there is not its own:

check_overwrite(Path("data/demo"), ["votes.csv", None])    # ArenaError: holds 1 file(s) that no export wrote: notes.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from common.experiment import Experiment
from common.files import is_within, read_json
from data_prep.export_reader import MANIFEST
from data_prep.preference_pairs import VIEWS, View

# A data set's name without the experiment's, in all versions.
SET = r"(?:sft|dpo_judge|dpo_reward)_(?:train|valid|fold[0-9]+)"
# What LLaMA-Factory heeds before file_name.
ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
# What exports of all versions wrote, for a manifest that is damaged or names nothing.
_WRITTEN = re.compile(
    rf"{SET}\.jsonl|(battles|pairs|rows)\.parquet|(dataset_info|audit|manifest)\.json"
    r"|judge_prompt\.j2|truth\.csv"
)
# What file managers leave in every folder that is opened.
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_NAMED = 5


def set_names(views: Collection[View]) -> list[str]:
    """Return the data sets of these views, without the experiment's name and the split."""
    return ["sft", *(f"dpo_{view}" for view in VIEWS if view in views)]


def dataset_entries(experiment: Experiment, views: Collection[View] = VIEWS, within: str = "") -> dict[str, Any]:
    """Return this experiment's entries of LLaMA-Factory's dataset_info.json; `within` is the folder of the files."""
    entries = {}
    for name in (f"{name}_{part}" for name in set_names(views) for part in experiment.labelled_parts):
        pairs = name.startswith("dpo_")
        columns = {"chosen": "chosen", "rejected": "rejected"} if pairs else {}
        entries[f"{experiment.name}_{name}"] = {
            "file_name": f"{within}{name}.jsonl",
            "formatting": "sharegpt",
            **({"ranking": True} if pairs else {}),
            "columns": {"messages": "conversations", **columns},
            "tags": _TAGS,
        }
    return entries


def listed_sets(path: Path) -> dict[str, Any]:
    """Return the entries of a dataset_info.json, none where there is no such file.

    Raises ArenaError for a file that cannot be read: it may hold a person's own entries, so it is not overwritten.
    """
    try:
        entries = read_json(path)
        if not isinstance(entries, dict):
            raise ValueError("not an object of data sets by name")
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ArenaError(
            f"is not readable JSON ({error})",
            where=str(path),
            remedy="fix it, or move it away where it holds no entries of your own; prepare then writes a new one",
        ) from None
    return entries


def entries_of_others(entries: Mapping[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Return the entries of a list that an export of `experiment` must keep: all but this experiment's own."""
    own = re.compile(rf"{re.escape(experiment.name)}_{SET}")
    return {name: entry for name, entry in entries.items() if not own.fullmatch(name)}


def check_overwrite(
    folder: Path,
    inputs: Iterable[str | Path | None] = (),
    own: Callable[[str], object] | None = None,
    maker: str = "export",
) -> None:
    """Raise ArenaError where replacing a folder would delete one of the `inputs` or a file that `maker` did not write.

    `own` tells, by its path in the folder, whether `maker` wrote a file; without it the export's manifest tells.
    """
    for given in inputs:
        if given is not None and not str(given).startswith("hf://") and is_within(given, folder):
            raise ArenaError(
                f"lies in {folder}, and an export replaces this folder as a whole",
                where=str(given),
                remedy=f"move it to a place outside of {folder} and give its new path; nothing was changed",
            )
    if folder.exists() and not folder.is_dir():
        raise ArenaError(f"is a file, where the {maker} makes a folder", where=str(folder), remedy="move it away")
    own = own or _exported(folder)
    if foreign := sorted(name for name in _files(folder) if not own(name) and Path(name).name not in _LITTER):
        named = ", ".join(foreign[:_NAMED]) + (", …" if len(foreign) > _NAMED else "")
        raise ArenaError(
            f"holds {len(foreign)} file(s) that no {maker} wrote, and the {maker} replaces this folder as a whole: "
            f"{named}",
            where=str(folder),
            remedy=f"move what you want to keep to a place outside of {folder}, delete the rest, and give the same "
            "command again; nothing was changed",
        )


def _files(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, links to folders included, as paths in it."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*names, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def _exported(folder: Path) -> Callable[[str], object]:
    """Return the test whether an export wrote a file: its manifest names it.

    Where a manifest cannot be read, an export's usual names count; without one, or with another program's, no name.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return lambda _: False
    except (OSError, ValueError):
        return _WRITTEN.fullmatch
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        return lambda _: False
    files = manifest.get("files")
    return {*files, MANIFEST}.__contains__ if isinstance(files, dict) else _WRITTEN.fullmatch
