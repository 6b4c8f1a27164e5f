"""A scorer without a model: its scores are a function of the input, so any order of work must give the same."""

import io
import os
import signal
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.errors import ArenaError
from common.progress import Show
from scoring.calibration import AB_COLUMNS

LABELS = (35, 7, 599)  # not sorted: the columns keep the order that is asked for


def token_rows(count: int, seed: int = 5, longest: int = 60) -> list[list[int]]:
    """Return rows of random token ids of a vocabulary of 600."""
    random = np.random.default_rng(seed)
    return [random.integers(0, 600, random.integers(1, longest)).tolist() for _ in range(count)]


def rows(count: int, seed: int = 0):
    """Yield (facts, inputs) of rows whose lengths vary."""
    random = np.random.default_rng(seed)
    for number in range(count):
        tokens = int(random.integers(5, 60))
        facts = {"id": f"r{number}", "group": f"g{number % 7}", "verdict": None, "language": None, "turns": 1}
        facts |= {"chars_prompt": 1, "chars_a": 2, "chars_b": 3, "tokens": tokens, "cut": False}
        yield facts, {"id": f"r{number}", "prompts": [f"p{number}"], "n": number}


@dataclass
class FakeScorer:
    """Scores are made of a row's number and the order; `asked` keeps every batch in the order of the questions."""

    columns: tuple = AB_COLUMNS
    label_ids: tuple = (1, 2, 3)
    engine: str = "fake"
    precision: str = "auto"
    weights: str = "sha256:aa"
    asked: list = field(default_factory=list)
    before: object = lambda prepared: None

    def inputs(self):
        return {"model.safetensors": self.weights}

    def require_own_export(self):
        """Nothing was exported."""

    def open(self):
        self.precision = "fp32" if self.precision == "auto" else self.precision

    def close(self):
        """Nothing was opened."""

    def prepare(self, inputs, *, swapped):
        return [(row["n"], swapped) for row in inputs]

    def ask(self, prepared, *, progress, name):
        self.before(prepared)
        if (3, False) in prepared:
            self.note("out of memory: continuing with 512 tokens a batch")
        self.asked.append(prepared)
        progress(len(prepared) // 2 / len(prepared))
        progress(1.0)
        return np.array([scores_of(number, swapped) for number, swapped in prepared])


def scores_of(number: int, swapped: bool) -> list[float]:
    """Return a row's three scores; a row with a larger number is surer."""
    return [number / 100 + (0.5 if swapped else 0), 0.0, -number / 300]


@dataclass(frozen=True)
class FakeSpec:
    """What a worker is told: it may be one that dies on the row `deadly` unless the file `flag` exists."""

    deadly: int = -1
    flag: str = ""
    fault: bool = False
    engine: str = "fake"

    def scorer(self):
        scorer = FakeScorer()

        def before(prepared):
            if self.fault:
                raise ArenaError("has no finite score", where="id r7", remedy="look at the weights")
            if self.deadly in [number for number, _ in prepared] and not Path(self.flag).exists():
                Path(self.flag).touch()
                os.kill(os.getpid(), signal.SIGKILL)

        scorer.before = before
        return scorer


def quiet_show() -> Show:
    """Return a place for notes that a test can read in `stream`."""
    return Show(io.StringIO(), attended=False, interval=0.0)
