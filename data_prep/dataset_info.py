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
SET = r"(?:sft|dpo_judge|dpo_reward)_(?:train|valid|fold[0-9]+)"
# What LLaMA-Factory heeds before file_name.
ELSEWHERE = ("hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_TAGS = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}


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
