import numpy as np
import pandas as pd
import pytest

from common.battle import VERDICTS
from common.errors import ArenaError
from scoring.agreement import CONFIDENCE, Agreement, agreement_curve, write_choices
from scoring.metrics import verdict_codes
from scoring.predictions import write_probabilities
from tests.votes import drawn


def battles(rows: int, seed: int, sharpness: float = 2.0):
    """Return (probabilities, verdicts, groups): verdicts are drawn from the probabilities, so the judge is perfect."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, sharpness, (rows, 3))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return chances, np.array(VERDICTS)[drawn(chances, random)], np.arange(rows) // 2


def curve_of(chances, verdicts, groups):
    return agreement_curve(chances, verdict_codes(pd.Series(verdicts)), groups, seed=1)


def test_the_promise_is_kept_over_200_resamplings():
    chances, verdicts, _ = battles(100_000, 1)
    agrees = np.array(VERDICTS)[chances.argmax(axis=1)] == verdicts
    kept = answered = 0
    for seed in range(200):
        found = Agreement.of(curve_of(*battles(1_500, 10 + seed)), 0.9)
        yes = found.answers(chances)
        answered += yes.mean() / 200
        kept += found.threshold is None or agrees[yes].mean() >= 0.9
    assert kept / 200 >= CONFIDENCE and answered > 0.1  # abstaining from everything would keep any promise


def test_a_judge_that_knows_nothing_is_promised_nothing():
    random = np.random.default_rng(0)
    verdicts = random.choice(VERDICTS, 500)
    found = Agreement.of(curve_of(random.dirichlet([1, 1, 1], 500), verdicts, np.arange(500)), 0.9)
    assert found.threshold is None and found.coverage == 0 and not found.answers(np.eye(3)).any()
    assert found.choices(np.eye(3)) == ["abstain"] * 3


def test_copies_of_a_battle_add_no_certainty():
    chances, verdicts, groups = battles(200, 3)
    copies = curve_of(chances.repeat(20, axis=0), verdicts.repeat(20), groups.repeat(20))
    assert copies["rows"] == curve_of(chances, verdicts, groups)["rows"] == 100


def test_choices_are_written_beside_their_table(tmp_path):
    table, promise = tmp_path / "out.csv", Agreement(0.9, 0.95, 0.6, 0.5, 0.95, 0.91)
    write_probabilities(table, ["x", "y"], np.array([[0.7, 0.2, 0.1], [0.4, 0.3, 0.3]]))
    path, answered, _ = write_choices(table, promise)
    assert path.read_text() == "id,choice\nx,a\ny,abstain\n" and answered == 1
    path.write_text("mine\n")
    with pytest.raises(ArenaError, match="not an earlier output"):
        write_choices(table, promise)
