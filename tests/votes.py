"""Verdicts that are drawn from probabilities, and the rows of exported data sets."""

import json
from pathlib import Path

import numpy as np


def drawn(chances: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return a verdict code for each row of probabilities, drawn from them: the judge that said so is perfect."""
    return (chances.cumsum(axis=1) < random.random((len(chances), 1))).sum(axis=1)


def lines(folder: Path, data_set: str) -> list[dict]:
    """Return the rows of an exported data set."""
    return [json.loads(line) for line in (folder / f"{data_set}.jsonl").read_text(encoding="ascii").splitlines()]
