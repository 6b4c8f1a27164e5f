"""The data sets of an experiment, by the names that LLaMA-Factory's dataset_info.json and the recipes use."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.errors import ArenaError
from data_prep.files import read_json
from data_prep.pairs import VIEWS, View

if TYPE_CHECKING:
    from factory.experiment import Experiment


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
