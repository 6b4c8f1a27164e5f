"""The data sets of an experiment, by the names that LLaMA-Factory's dataset_info.json and the recipes use."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from data_prep.pairs import VIEWS, View

if TYPE_CHECKING:
    from factory.experiment import Experiment


def set_names(views: Collection[View]) -> list[str]:
    """Return the data sets of these views, without the experiment's name and the split."""
    return ["sft", *(f"dpo_{view}" for view in VIEWS if view in views)]


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
