"""A promise about the first choice: it agrees with people in at least a given share of the battles that are answered.

The judge answers a battle where its largest probability reaches a threshold, and abstains from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

from common.battle import VERDICTS
from common.errors import ArenaError, UsageError
from common.files import atomic_file, csv_line, read_json
from common.progress import Show
from data_prep.export_reader import readable
from factory.stage_context import StageContext
from scoring.predictions import REPORT, read_table

CONFIDENCE = 0.95  # how sure the promise is, over the draw of the battles that it is fitted on
COVERAGES = tuple(share / 10 for share in range(1, 11))  # the shares of answered battles that are tried
ABSTAIN = "abstain"
_HEADER = b"id,choice\n"


@dataclass(frozen=True)
class Agreement:
    """The promise of one target; `threshold` is None where no share of the battles can be promised."""

    target: float
    confidence: float
    threshold: float | None
    coverage: float
    agreement: float | None
    bound: float | None

    @classmethod
    def of(cls, curve: Mapping[str, Any], target: float) -> Agreement:
        """Return the largest share of battles of a report's `agreement` whose bound reaches the target."""
        reached = [point for point in curve["curve"] if point["bound"] >= target]
        best = max(reached, key=lambda point: point["coverage"], default=None)
        kept = {key: best and best[key] for key in ("threshold", "agreement", "bound")}
        return cls(target, curve["confidence"], coverage=best["coverage"] if best else 0.0, **kept)

    def answers(self, probabilities: np.ndarray) -> np.ndarray:
        """Return for probabilities [rows, 3] whether each battle is answered."""
        if self.threshold is None:
            return np.zeros(len(probabilities), dtype=bool)
        return probabilities.max(axis=1) >= self.threshold

    def choices(self, probabilities: np.ndarray) -> list[str]:
        """Return the first choice of each battle: a, b, tie or abstain."""
        first = probabilities.argmax(axis=1)
        return [VERDICTS[i] if yes else ABSTAIN for i, yes in zip(first, self.answers(probabilities), strict=True)]

    def in_words(self) -> str:
        """Return as a sentence what is promised, if anything."""
        wanted = f"agreement with people of {self.target:.0%} (at {self.confidence:.0%} confidence)"
        if self.threshold is None:
            return f"{wanted}: cannot be promised for any share of the battles; the judge abstains from all"
        return (
            f"{wanted}: answer where the largest probability is at least {self.threshold:.4f}, which is "
            f"{self.coverage:.0%} of the battles; there {self.agreement:.1%} agreed, at least {self.bound:.1%}"
        )


def agreement_curve(probabilities: np.ndarray, truth: np.ndarray, groups: np.ndarray, seed: int) -> dict[str, Any]:
    """Return how often the first choice agrees with people on the surest battles, as report.json keeps it.

    `probabilities` [rows, 3] must not have been fitted on their own row; `truth` [rows] are class codes. One battle of
    each prompt group, drawn by `seed`, counts, so that the counted battles are independent. `bound` is the lower one of
    Clopper and Pearson (1934); the error of 1 - CONFIDENCE is split evenly among the shares of COVERAGES, so that all
    bounds hold together (Bonferroni; Angelopoulos et al. 2021, "Learn then Test", section 2).
    """
    table = pd.DataFrame({"p": probabilities.max(axis=1), "right": probabilities.argmax(axis=1) == truth})
    drawn = table.assign(group=groups).sample(frac=1, random_state=seed).drop_duplicates("group")
    sure, agrees = drawn["p"].to_numpy(), drawn["right"].to_numpy()
    error, curve = (1 - CONFIDENCE) / len(COVERAGES), []
    for coverage in COVERAGES:
        threshold = float(np.quantile(sure, 1 - coverage, method="lower"))
        answered = sure >= threshold
        rows, right = int(answered.sum()), int(agrees[answered].sum())
        bound = float(beta.ppf(error, right, rows - right + 1)) if right else 0.0
        point = {"threshold": threshold, "coverage": rows / len(drawn), "rows": rows}
        curve.append({**point, "agreement": right / rows, "bound": bound})
    return {"confidence": CONFIDENCE, "rows": len(drawn), "curve": curve}


def note_choices(context: StageContext, table: Path, target: float, show: Show) -> None:
    """Write the choices for a table of probabilities of a scored stage, and say what is promised of them."""
    agreement = stage_agreement(context, target)
    show.note(f"{context.name}: {agreement.in_words()}")
    if table.is_file():
        path, answered, rows = write_choices(table, agreement)
        show.note(f"{context.name}: {answered:,} of {rows:,} battles answered: {path}")


def stage_agreement(context: StageContext, target: float) -> Agreement:
    """Return the promise that a scored stage's report allows; raises UsageError or ArenaError where it allows none."""
    if context.scoring_inputs["target_prior"]:
        raise UsageError(
            "the promise holds for battles like those of the validation fold, and target_prior says that others come",
            where="--agree",
            remedy="remove target_prior from experiment.yaml and score again",
        )
    path = context.reported.folder / REPORT
    with readable(path, context.command):
        return Agreement.of(read_json(path)["agreement"], target)


def write_choices(
    table: Path, agreement: Agreement, judged: tuple[list[str], np.ndarray] | None = None
) -> tuple[Path, int, int]:
    """Write each row's first choice, or "abstain", beside a table of probabilities; return (path, answered, rows).

    `judged` are ids and probabilities [rows, 3] that are not the table's own: those of the first judge of a cascade.
    Raises ArenaError where a file of that name is not an earlier output.
    """
    path = table.with_name(f"{table.stem}_choices.csv")
    if path.exists() and path.read_bytes()[: len(_HEADER)] != _HEADER:
        raise ArenaError("exists and is not an earlier output", where=str(path), remedy="move it away")
    ids, probabilities = judged or read_table(table)
    choices = agreement.choices(probabilities)
    with atomic_file(path) as file:
        file.writelines(map(csv_line, [("id", "choice"), *zip(ids, choices, strict=True)]))
    return path, len(choices) - choices.count(ABSTAIN), len(choices)
