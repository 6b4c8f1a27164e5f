"""The data sets of an experiment, by the names that LLaMA-Factory's dataset_info.json and the recipes use."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ArenaError
from common.files import read_json
from data_prep.preference_pairs import VIEWS, View

if TYPE_CHECKING:
    from common.experiment import Experiment


# A data set's name without the experiment's, in all versions.
SET = r"(?:sft|dpo_judge|dpo_reward)_(?:train|valid)"
_OF_AN_EXPORT = re.compile(rf"(?P<experiment>[^/]+)/(?P<set>{SET})(\.jsonl)?")
# What LLaMA-Factory heeds before file_name.
_ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")


def set_names(views: Collection[View]) -> list[str]:
    """Return the data sets of these views, without the experiment's name and the split."""
    return ["sft", *(f"dpo_{view}" for view in VIEWS if view in views)]


def listed_sets(path: Path) -> dict[str, Any]:
    """Return the entries of a dataset_info.json, none where the file is not there.

    Raises ArenaError for a file that cannot be read: it may hold a person's own entries, so nobody writes it anew.
    """
    try:
        entries = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise _unreadable(path, f"is not readable JSON ({error})") from None
    if not isinstance(entries, dict):
        raise _unreadable(path, "is not a JSON object of data sets by name")
    return entries


def entries_of_others(entries: Mapping[str, Any], experiment: Experiment, data: Path) -> dict[str, Any]:
    """Return the entries that an export of `experiment` leaves as they are, in a list of the folder `data`.

    These are all whose name is none of its sets: hub sets, scripts and files of a person, whether they are there by
    now or not. What exports of experiments left that are gone is no person's.
    """
    own = re.compile(rf"{re.escape(experiment.name)}_{SET}")
    return {
        name: entry for name, entry in entries.items() if not own.fullmatch(name) and not _is_left(name, entry, data)
    }


def _is_left(name: str, entry: Any, data: Path) -> bool:
    """Tell whether an entry is that of an export whose file was deleted since."""
    if not isinstance(entry, dict) or any(entry.get(key) for key in _ELSEWHERE):
        return False
    file = _OF_AN_EXPORT.fullmatch(str(entry.get("file_name")))
    if file is None or name != f"{file['experiment']}_{file['set']}":
        return False
    return not (data / file[0]).exists()


def _unreadable(path: Path, what: str) -> ArenaError:
    remedy = "mend it, or move it away where it holds no entries of your own; prepare then writes a new one"
    return ArenaError(what, where=str(path), remedy=remedy)


def dataset_entries(
    experiment: Experiment, views: Collection[View] = VIEWS, within: str = "", folders: Collection[str] = ()
) -> dict[str, Any]:
    """Return this experiment's entries of LLaMA-Factory's dataset_info.json.

    `within` is a folder prefix; `folders` are the sets, with their split, that are folders of parts.
    """
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    entries = {}
    for name in set_names(views):
        pairs = name != "sft"
        columns = {"chosen": "chosen", "rejected": "rejected"} if pairs else {}
        for split in ("train", "valid"):
            entries[f"{experiment.name}_{name}_{split}"] = {
                "file_name": f"{within}{name}_{split}{'' if f'{name}_{split}' in folders else '.jsonl'}",
                "formatting": "sharegpt",
                **({"ranking": True} if pairs else {}),
                "columns": {"messages": "conversations", **columns},
                "tags": tags,
            }
    return entries
