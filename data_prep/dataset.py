"""Reading an exported data folder back: its rows, its fitted texts, its manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.battle import Battle
from data_prep.errors import ArenaError
from data_prep.flatten import Pair

if TYPE_CHECKING:
    import pandas as pd

SPLITS = ("train", "valid", "test")
# Of the manifest and the files that it names.
FORMAT = 2


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a data folder's manifest; raises ArenaError if nothing was exported there or it is damaged."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArenaError(
            "there is no exported data",
            where=str(folder),
            remedy=f"python run.py prepare -e {folder.name} --train FILE",
        ) from None
    except ValueError:
        raise ArenaError("is damaged", where=str(path), remedy="run prepare again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArenaError("was exported by another version", where=str(folder), remedy="run prepare again")
    return manifest


def read_rows(folder: Path, split: str) -> pd.DataFrame:
    """Return rows.parquet's rows of one split, in the order of the input, one row a battle."""
    import pandas as pd

    rows = pd.read_parquet(folder / "rows.parquet")
    return rows[rows["split"] == split].reset_index(drop=True)


def read_battles(folder: Path, split: str) -> list[tuple[Battle, int]]:
    """Return the fitted battles of one split with the number of turns dropped from each, in the input's order."""
    from pyarrow.parquet import read_table

    rows = read_table(folder / "rows.parquet", columns=["split", "verdict", "language", "dropped"]).to_pylist()
    texts = read_table(folder / "battles.parquet").to_pylist()
    return [
        (
            Battle(
                text["id"],
                tuple(text["prompts"]),
                tuple(text["responses_a"]),
                tuple(text["responses_b"]),
                row["verdict"],
                row["language"],
            ),
            row["dropped"],
        )
        for row, text in zip(rows, texts, strict=True)
        if row["split"] == split
    ]


def truth_of(folder: Path) -> pd.DataFrame | None:
    """Return the known probabilities of a synthetic arena's battles (id and `PROBABILITY_COLUMNS`), or None."""
    import pandas as pd

    path = folder / "truth.csv"
    return pd.read_csv(path, dtype={"id": str}) if path.is_file() else None


def read_pairs(folder: Path, split: str) -> list[Pair]:
    """Return the fitted pairs of one split, ties included, in the order of `read_rows`.

    Raises ArenaError where the reward view was not exported.
    """
    from pyarrow.parquet import read_table

    path = require_pairs(folder)
    splits = read_table(folder / "rows.parquet", columns=["split"])["split"].to_pylist()
    texts = read_table(path, columns=["id", "prompt", "response_a", "response_b"]).to_pylist()
    return [Pair(**text) for own, text in zip(splits, texts, strict=True) if own == split]


def require_pairs(folder: Path) -> Path:
    """Return the path of pairs.parquet; raises ArenaError where the reward view was not exported."""
    path = folder / "pairs.parquet"
    if not path.is_file():
        raise ArenaError(
            "the reward view (pairs of responses) was not exported",
            where=str(folder),
            remedy=f"python run.py prepare -e {folder.name} --train FILE --pairs",
        )
    return path
