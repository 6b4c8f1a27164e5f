"""Slices: kinds of battles on which a judge may be better or worse; each is a mask over a table of scores."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

# Languages beyond these are one slice.
LANGUAGES = 8


def row_slices(table: pd.DataFrame) -> dict[str, dict[str, np.ndarray]]:
    """Return masks [rows] by family (length, turns, language) and name; every row is in one slice of a family.

    Empty slices are left out, and languages where no row states one.
    """
    return {"length": _by_length(table), "turns": _by_turns(table), "language": _by_language(table)}


def _by_length(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by quarters of the characters of prompt, A and B together; equal lengths stay together."""
    total = table[["chars_prompt", "chars_a", "chars_b"]].sum(axis=1).to_numpy()
    edges = np.unique(np.quantile(total, [0.25, 0.5, 0.75])).astype(int)
    place = np.searchsorted(edges, total, side="left")
    names = [f"up to {edges[0]:,} characters"]
    names += [f"{low + 1:,} to {high:,} characters" for low, high in pairwise(edges)]
    names.append(f"over {edges[-1]:,} characters")
    return _present({name: place == index for index, name in enumerate(names)})


def _by_turns(table: pd.DataFrame) -> dict[str, np.ndarray]:
    turns = table["turns"].to_numpy()
    return _present({"1 turn": turns <= 1, "2 turns": turns == 2, "3 or more turns": turns >= 3})


def _by_language(table: pd.DataFrame) -> dict[str, np.ndarray]:
    """Split by the stated language, the most frequent ones first; empty where no row states one."""
    stated = table["language"].dropna().astype(str) if "language" in table else None
    if stated is None or stated.empty:
        return {}
    names = table["language"].astype("string").fillna("").to_numpy(dtype=object)
    common = stated.value_counts().index[:LANGUAGES].tolist()
    slices = {name: names == name for name in common}
    slices["other languages"] = ~np.isin(names, [*common, ""])
    slices["not stated"] = names == ""
    return _present(slices)


def _present(slices: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: mask for name, mask in slices.items() if mask.any()}
