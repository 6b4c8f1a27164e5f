"""The table of raw scores: what the judge said of each battle, before any link makes probabilities of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from data_prep.battle import SWAPPED_ORDER, VERDICTS, Battle
from data_prep.budget import in_chunks
from data_prep.dataset import read_battles, read_rows
from data_prep.errors import ArenaError
from data_prep.files import atomic_file
from data_prep.folds import prompt_group
from data_prep.readers import VoteReader
from scoring.engine import score_labels
from scoring.judge import Judge

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 512
COLUMNS = ("id", "group", "verdict", "language", "turns", "chars_prompt", "chars_a", "chars_b", "tokens", "cut")


def score_split(judge: Judge, model: Any, data: Path, split: str, *, tta: bool, progress: Callable) -> pd.DataFrame:
    """Score one split of an exported data folder; one row a battle, in the order of the input."""
    rows = read_rows(data, split)
    return _with_logits(rows[list(COLUMNS)], read_battles(data, split), judge, model, tta=tta, progress=progress)


def score_file(judge: Judge, model: Any, path: Path, *, tta: bool, progress: Callable) -> pd.DataFrame:
    """Score any table of battles, fitted as the judge's training rows were; bad rows stop it, each one named."""
    import pandas as pd

    fitter = judge.fitter()
    rows, fed = [], []
    for chunk in in_chunks(battles_to_score(path), _CHUNK):
        for battle, fitted in zip(chunk, fitter.fit(chunk, both_orders=tta), strict=True):
            fed.append((fitted.battle, fitted.dropped))
            rows.append(describe(battle, tokens=fitted.tokens, cut=fitted.cut))
    return _with_logits(pd.DataFrame(rows, columns=list(COLUMNS)), fed, judge, model, tta=tta, progress=progress)


def battles_to_score(path: Path) -> Iterator[Battle]:
    """Yield the battles of a table; at its end raises ArenaError if a row could not be read: each needs its answer."""
    reader = VoteReader(path, labelled=False)
    yield from (battle for _, battle in reader)
    if reader.rejected:
        first = reader.rejected[0]
        raise ArenaError(
            f"{len(reader.rejected)} row(s) cannot be scored; the first: {first.reason}",
            where=f"{path} row {first.row}",
            remedy="mend or remove these rows: every row needs its own probabilities",
        )


def describe(battle: Battle, *, tokens: int, cut: bool) -> dict[str, Any]:
    """Return one row of `COLUMNS` for a battle as it was before it was fitted."""
    return {
        "id": battle.id,
        "group": prompt_group(battle),
        "verdict": battle.verdict,
        "language": battle.language,
        "turns": battle.turns,
        "chars_prompt": sum(map(len, battle.prompts)),
        "chars_a": sum(map(len, battle.responses_a)),
        "chars_b": sum(map(len, battle.responses_b)),
        "tokens": tokens,
        "cut": cut,
    }


def _with_logits(rows: pd.DataFrame, fitted, judge: Judge, model: Any, *, tta: bool, progress) -> pd.DataFrame:
    sequences = judge.sequences(fitted)
    if tta:
        sequences += judge.sequences(fitted, swapped=True)
    logits = score_labels(model, sequences, judge.frame.label_ids, progress=progress)
    bad = np.flatnonzero(~np.isfinite(logits).all(axis=1)) % max(len(rows), 1)
    if len(bad):
        raise ArenaError(
            f"the model gave no finite score for {len(bad)} row(s), the first with id {rows['id'].iloc[bad[0]]}",
            where=str(judge.folder),
            remedy="the weights are broken (a diverged training, or an overflow in 16 bit): look at the loss curve",
        )
    table = rows.copy()
    for i, verdict in enumerate(VERDICTS):
        table[f"ab_{verdict}"] = logits[: len(rows), i]
        table[f"ba_{verdict}"] = logits[len(rows) :, SWAPPED_ORDER[i]] if tta else np.nan
    return table


def write_scores(path: Path, scores: pd.DataFrame) -> None:
    """Write the table as parquet, whole or not at all."""
    with atomic_file(path, "wb") as file:
        scores.to_parquet(file, index=False)
