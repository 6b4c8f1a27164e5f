"""Canaries: a few fixed battles whose answers a judge carries with it, so that another machine can be held to them.

canaries.json in a merged folder  {"precision": "fp32", "answers": {"sum": [0.31, 0.4, 0.29], …}}

Written once, right behind the merge, by the model as PyTorch computes it; compared whenever a judge is opened to
score. Other kernels, another precision or another engine move the answers a little; other weights move them a lot.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.battle import Battle
from common.errors import ArenaError
from common.files import write_json
from data_prep.pair_budget import PairFitter
from data_prep.preference_pairs import pair_sequences
from scoring.rewards import Triple

if TYPE_CHECKING:
    from scoring.judge import Judge

CANARIES = "canaries.json"
FORMAT = 1
# Short enough for any budget, unlike each other, and frozen: a change makes every sealed judge's answers stale.
BATTLES = (
    Battle("sum", ("What is 2 + 2?",), ("4",), ("5",)),
    Battle("code", ("Reverse a list in Python.",), ("items[::-1]",), ("def reverse(x): pass",)),
    Battle("polite", ("Thank you!",), ("You are welcome! Anything else?",), ("ok",)),
    Battle("german", ("Wie heißt die Hauptstadt von Österreich?",), ("Wien",), ("Graz natürlich.",)),
    Battle("japanese", ("日本の首都は？",), ("東京です。",), ("わかりません。",)),
    Battle("long", ("List three colours.",), ("Red, green and blue. " * 6,), ("Red",)),
    Battle("same", ("Say hi.",), ("hi",), ("hi",)),
    Battle("emoji", ("Describe a cat.",), ("🐈 A small carnivore.",), ("It barks.",)),
)
# How far a probability may move from its sealed value, by the coarser of the two precisions. Measured on trained tiny
# judges: fp32 on other kernels 1e-5, 16 bits 2e-2, 8 bits 8e-2, 4 bits 6e-2; the limits leave room for larger models.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.05, "fp16": 0.05, "f16": 0.05, "8bit": 0.15, "q8_0": 0.15}
COARSEST = 0.25


def label_canaries(judge: Judge) -> list[list[int]]:
    """Return the canaries as label prompts, fitted as any battle is."""
    return judge.sequences([(fitted.battle, fitted.dropped) for fitted in judge.fit(BATTLES)])


def reward_canaries(judge: Judge) -> list[Triple]:
    """Return the canaries as pairs of responses behind the user's prompt."""
    fitter = PairFitter(judge.frame, judge.tokenizer, cutoff_len=judge.cutoff_len, shares=judge.shares)
    return pair_sequences(judge.frame, judge.tokenizer, [fitted.pair for fitted in fitter.fit(BATTLES)])


def seal_canaries(judge: Judge, answers: np.ndarray, precision: str) -> None:
    """Write the judge's answers to the canaries, [n, classes], into its folder; raises ArenaError if one is NaN."""
    if not np.isfinite(answers).all():
        raise ArenaError(
            "the merged model gives no finite answer to the canaries",
            where=str(judge.folder),
            remedy="the weights are broken (a diverged training, or an overflow in 16 bit): look at the loss curve",
        )
    content = {battle.id: row.tolist() for battle, row in zip(BATTLES, answers, strict=True)}
    write_json(judge.folder / CANARIES, {"format": FORMAT, "precision": precision, "answers": content})


def canary_limit(folder: Path, precision: str) -> float | None:
    """Return how far answers in this precision may lie from those sealed in a judge's folder; None without any.

    Raises ArenaError if the sealed file is damaged.
    """
    sealed = _sealed(folder)
    if sealed is None:
        return None
    return max(TOLERANCE.get(name, COARSEST) for name in (sealed["precision"], precision))


def require_canaries(folder: Path, precision: str, answer: Callable[[], np.ndarray]) -> None:
    """Raise ArenaError unless a loaded model answers the canaries, [n, classes], as it did when it was sealed."""
    sealed, limit = _sealed(folder), canary_limit(folder, precision)
    if sealed is None or limit is None:
        return
    expected = np.array([sealed["answers"][battle.id] for battle in BATTLES], dtype=np.float64)
    distance = float(np.abs(expected - answer()).max())
    if not distance <= limit:  # NaN is not within anything
        raise ArenaError(
            f"this model does not answer as it did when it was merged: the canary battles' probabilities "
            f"moved by up to {distance:.2g} ({sealed['precision']} then, {precision} now), allowed {limit}",
            where=str(folder / CANARIES),
            remedy="the weights, the engine or its kernels are others: copy the folder again, or merge again; "
            "--precision fp32 shows whether it is the precision",
        )


def _sealed(folder: Path) -> dict[str, Any] | None:
    path = folder / CANARIES
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        shapes = {len(content["answers"][battle.id]) for battle in BATTLES}
        if content["format"] != FORMAT or len(shapes) != 1 or not isinstance(content["precision"], str):
            raise ValueError("not what this version writes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        remedy = "move the folder away and merge again"
        raise ArenaError(f"is damaged: {error}", where=str(path), remedy=remedy) from None
    return content
