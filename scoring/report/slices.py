"""Slices: how good a judge is on short and long battles, on one turn and several, in each language.

slice_losses(scores, losses, prior_losses, bootstrap)["turns"][0] ==
    {"name": "1 turn", "rows": 507, "log_loss": 0.8965, "log_loss_ci95": [0.8514, 0.9412], "prior": 1.0968}
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from scoring.metrics import GroupBootstrap, percentile_interval

# Languages beyond these are one slice.
LANGUAGES = 8


def slice_losses(
    table: pd.DataFrame, losses: np.ndarray, prior: np.ndarray, bootstrap: GroupBootstrap
) -> dict[str, list[dict[str, Any]]]:
    """Return the log loss of each slice that has rows, its interval, and the prior's on the same rows, by family.

    `table` one row a battle; `losses` and `prior` [rows]: what the judge and the class prior lose on each.
    """
    turns = table["turns"].to_numpy()
    by_turns = {"1 turn": turns <= 1, "2 turns": turns == 2, "3 or more turns": turns >= 3}
    families = {"length": _by_length(table), "turns": by_turns, "language": _by_language(table)}
    families = {name: {key: mask for key, mask in masks.items() if mask.any()} for name, masks in families.items()}
    masks = [mask for slices in families.values() for mask in slices.values()]
    weights = np.column_stack(masks).astype(np.float64)
    samples = iter(bootstrap.samples(np.tile(losses[:, None], len(masks)), weights).T)
    return {
        family: [
            {
                "name": name,
                "rows": int(mask.sum()),
                "log_loss": float(losses[mask].mean()),
                "log_loss_ci95": percentile_interval(next(samples), bootstrap.groups, mask),
                "prior": float(prior[mask].mean()),
            }
            for name, mask in slices.items()
        ]
        for family, slices in families.items()
    }


def _by_length(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by quarters of the characters of prompt, A and B together; equal lengths stay together."""
    total = table[["chars_prompt", "chars_a", "chars_b"]].sum(axis=1).to_numpy()
    edges = np.unique(np.quantile(total, [0.25, 0.5, 0.75]).astype(int))
    quarter = np.searchsorted(edges, total, side="left")
    names = [
        f"up to {edges[0]:,} characters",
        *(f"{low + 1:,} to {high:,} characters" for low, high in pairwise(edges)),
        f"over {edges[-1]:,} characters",
    ]
    return {name: quarter == place for place, name in enumerate(names)}


def _by_language(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by the stated language, the most frequent ones first; empty where no row states one."""
    if "language" not in table or table["language"].isna().all():
        return {}
    names = table["language"].astype("string").fillna("")
    common = names[names != ""].value_counts().index[:LANGUAGES].tolist()
    return {
        **{name: (names == name).to_numpy(bool) for name in common},
        "other languages": ~names.isin([*common, ""]).to_numpy(bool),
        "not stated": (names == "").to_numpy(bool),
    }
