"""A promise about the first choice: it agrees with people in at least a given share of the battles that are answered.

The judge answers a battle where its largest probability reaches a threshold, and abstains from the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import beta

from common.battle import VERDICTS
from common.errors import ArenaError, UsageError
from data_prep.export_reader import readable
from factory.stage_context import StageContext
from scoring.metrics import verdict_codes
from scoring.predictions import read_probabilities

CONFIDENCE = 0.95  # how sure the promise is, over the draw of the battles that it is fitted on
COVERAGES = tuple(share / 10 for share in range(1, 11))  # the shares of answered battles that are tried
ABSTAIN = "abstain"


@dataclass(frozen=True)
class Agreement:
    """The promise and what it rests on; `threshold` is None where no share of the battles can be promised.

    `curve`: of each share of answered battles that was tried, its threshold, rows, agreement and the bound below it.
    """

    target: float
    confidence: float
    threshold: float | None
    coverage: float
    agreement: float | None
    bound: float | None
    rows: int
    curve: tuple[Mapping[str, float], ...]

    def answers(self, probabilities: np.ndarray) -> np.ndarray:
        """Return for probabilities [rows, 3] whether each battle is answered."""
        if self.threshold is None:
            return np.zeros(len(probabilities), dtype=bool)
        return probabilities.max(axis=1) >= self.threshold

    def choices(self, probabilities: np.ndarray) -> list[str]:
        """Return the first choice of each battle: a, b, tie or abstain."""
        first = probabilities.argmax(axis=1)
        return [VERDICTS[i] if yes else ABSTAIN for i, yes in zip(first, self.answers(probabilities), strict=True)]

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values, as report.json keeps it under `agreement`."""
        return {**asdict(self), "curve": [dict(point) for point in self.curve]}

    def in_words(self) -> str:
        """Return the promise, or that there is none, as a sentence."""
        wanted = f"agreement with people of {self.target:.0%} (at {self.confidence:.0%} confidence)"
        if self.threshold is None:
            return f"{wanted}: cannot be promised for any share of the battles; the judge abstains from all"
        return (
            f"{wanted}: answer where the largest probability is at least {self.threshold:.4f}, which is "
            f"{self.coverage:.0%} of the battles; there {self.agreement:.1%} agreed, at least {self.bound:.1%}"
        )


def fit_agreement(
    probabilities: np.ndarray, verdicts: pd.Series, groups: pd.Series, target: float, *, seed: int
) -> Agreement:
    """Return the largest tried share of battles whose first choice agrees with people at least `target` of the time.

    `probabilities` [rows, 3] must not have been fitted on their own row. One battle of each prompt group, drawn by
    `seed`, counts, so that the counted battles are independent. A share is promised where the lower bound of Clopper
    and Pearson (1934) on its agreement reaches the target; the error of 1 - CONFIDENCE is split evenly among the shares
    (Bonferroni; Angelopoulos et al. 2021, "Learn then Test", section 2). Raises ArenaError without a labelled row.
    """
    truth = verdict_codes(verdicts)
    table = pd.DataFrame({"p": probabilities.max(axis=1), "first": probabilities.argmax(axis=1), "truth": truth})
    table = table.assign(group=groups.to_numpy())[truth >= 0]  # rows without a verdict say nothing
    if table.empty:
        what = "an agreement with people can only be fitted on battles with a verdict, and there is none"
        raise ArenaError(what, where="--agree", remedy="prepare with votes whose validation fold has verdicts")
    drawn = table.sample(frac=1, random_state=seed).drop_duplicates("group")
    confidence, agrees = drawn["p"].to_numpy(), (drawn["first"] == drawn["truth"]).to_numpy()
    share, curve = (1 - CONFIDENCE) / len(COVERAGES), []
    for coverage in COVERAGES:
        threshold = float(np.quantile(confidence, 1 - coverage, method="lower"))
        answered = confidence >= threshold
        right, rows = int(agrees[answered].sum()), int(answered.sum())
        bound = float(beta.ppf(share, right, rows - right + 1)) if right else 0.0
        point = {"threshold": threshold, "coverage": rows / len(drawn), "rows": rows}
        curve.append({**point, "agreement": right / rows, "bound": bound})
    kept = max((point for point in curve if point["bound"] >= target), key=lambda p: p["coverage"], default=None)
    return Agreement(
        target=target,
        confidence=CONFIDENCE,
        threshold=kept and kept["threshold"],
        coverage=kept["coverage"] if kept else 0.0,
        agreement=kept and kept["agreement"],
        bound=kept and kept["bound"],
        rows=len(drawn),
        curve=tuple(curve),
    )


def stage_agreement(context: StageContext, target: float) -> Agreement:
    """Return the promise that a scored stage's validation fold allows; raises ArenaError if the stage has no scores."""
    if context.scoring_inputs["target_prior"]:
        raise UsageError(
            "the promise holds for battles like those of the validation fold, and target_prior says that others come",
            where="--agree",
            remedy="remove target_prior from experiment.yaml and score again",
        )
    path = context.folder / "scores_valid.parquet"
    with readable(path, context.command):
        rows = pd.read_parquet(path, columns=["id", "verdict", "group"])
    probabilities = read_probabilities(context.folder / "probabilities_valid.csv", rows["id"])
    return fit_agreement(probabilities, rows["verdict"], rows["group"], target, seed=context.experiment.seed)
