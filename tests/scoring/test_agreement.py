import numpy as np
import pandas as pd
import pytest

from common.battle import VERDICTS
from common.errors import ArenaError
from scoring.agreement import CONFIDENCE, fit_agreement


def battles(rows: int, seed: int, sharpness: float = 2.0):
    """Return (probabilities, verdicts, groups): verdicts are drawn from the probabilities, so the judge is perfect."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, sharpness, (rows, 3))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    codes = (chances.cumsum(axis=1) < random.random((rows, 1))).sum(axis=1)
    return chances, pd.Series(np.array(VERDICTS)[codes]), pd.Series([f"g{i // 2}" for i in range(rows)])


def test_the_promise_is_kept_over_200_resamplings():
    chances, verdicts, _ = battles(100_000, 1)
    agrees = np.array(VERDICTS)[chances.argmax(axis=1)] == verdicts.to_numpy()
    kept = answered = 0
    for seed in range(200):
        found = fit_agreement(*battles(1_500, 10 + seed), 0.9, seed=seed)
        yes = found.answers(chances)
        answered += yes.mean() / 200
        kept += found.threshold is None or agrees[yes].mean() >= 0.9
    assert kept / 200 >= CONFIDENCE and answered > 0.1  # abstaining from everything would keep any promise


def test_a_judge_that_knows_nothing_is_promised_nothing():
    random = np.random.default_rng(0)
    verdicts = pd.Series(random.choice(VERDICTS, 500))
    found = fit_agreement(random.dirichlet([1, 1, 1], 500), verdicts, pd.Series(range(500)), 0.9, seed=1)
    assert found.threshold is None and found.coverage == 0 and not found.answers(np.eye(3)).any()
    assert found.choices(np.eye(3)) == ["abstain"] * 3


def test_copies_of_a_battle_add_no_certainty():
    chances, verdicts, groups = battles(200, 3)
    often = [each.repeat(20) for each in (verdicts, groups)]
    once = fit_agreement(chances, verdicts, groups, 0.8, seed=1)
    assert fit_agreement(chances.repeat(20, axis=0), *often, 0.8, seed=1).rows == once.rows == 100


def test_without_verdicts_nothing_is_promised():
    with pytest.raises(ArenaError, match="verdict"):
        fit_agreement(np.full((3, 3), 1 / 3), pd.Series([None] * 3), pd.Series(list("abc")), 0.9, seed=1)
