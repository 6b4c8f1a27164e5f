"""Votes on disk: battles as the competition's table, and the data sets that are made from one."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle


def write_votes(path: Path, battles: Iterable[Battle]) -> Path:
    """Write battles and their verdicts; one without a verdict is no row of a table of votes."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "model_a", "model_b", "prompt", "response_a", "response_b", *PROBABILITY_COLUMNS])
        for battle in battles:
            texts = [json.dumps(list(each)) for each in (battle.prompts, battle.responses_a, battle.responses_b)]
            writer.writerow([battle.id, "m", "n", *texts, *(int(battle.verdict == v) for v in VERDICTS)])
    return path


def drawn(chances: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a verdict code for each row of probabilities, drawn from them: the judge that said so is perfect."""
    return (chances.cumsum(axis=1) < random.random((len(chances), 1))).sum(axis=1)


def lines(folder: Path, data_set: str) -> list[dict]:
    """Return the rows of an exported data set."""
    return [json.loads(line) for line in (folder / f"{data_set}.jsonl").read_text(encoding="ascii").splitlines()]
