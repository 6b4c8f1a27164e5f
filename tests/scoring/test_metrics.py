"""scoring.metrics: parity with scikit-learn, definitions on hand-made rows, intervals by prompt group."""

import warnings

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import ArenaError
from scoring import metrics
from tests.votes import drawn


def simulated(rows: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    p = random.dirichlet([2, 2, 1], size=rows)
    return p, drawn(p, random)


SHAPES = st.tuples(st.integers(1, 60), st.just(3))


@settings(max_examples=40, deadline=None)
@given(hnp.arrays(np.float64, SHAPES, elements=st.floats(0, 1, allow_subnormal=False)), st.integers(0, 99))
def test_log_loss_and_accuracy_agree_with_scikit_learn(raw, seed):
    from sklearn import metrics as theirs

    truth = np.random.default_rng(seed).integers(0, 3, len(raw))
    p = (raw + 1e-9) / (raw + 1e-9).sum(axis=1, keepdims=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert metrics.log_loss(p, truth) == pytest.approx(theirs.log_loss(truth, p, labels=[0, 1, 2]), rel=1e-9)
    assert metrics.accuracy(p, truth) == pytest.approx(theirs.accuracy_score(truth, p.argmax(axis=1)))
    assert (metrics.confusion(p, truth) == theirs.confusion_matrix(truth, p.argmax(axis=1), labels=[0, 1, 2])).all()
    assert 0 <= metrics.ece(p, truth) <= 1
    for points in metrics.reliability(p, truth).values():
        assert sum(point["count"] for point in points) == len(truth)


def test_hand_made_rows():
    p = np.array([[0.5, 0.25, 0.25], [0.25, 0.5, 0.25]])
    found = metrics.per_class_log_loss(p, np.array([0, 0]))
    assert found == {"a": pytest.approx((np.log(2) + np.log(4)) / 2), "b": None, "tie": None}
    assert metrics.log_loss(np.array([[0.0, 1.0, 0.0]]), np.array([0])) == pytest.approx(-np.log(2.0**-52))
    assert metrics.ece(np.tile([0.5, 0.3, 0.2], (1000, 1)), np.array([0] * 400 + [1] * 600)) == pytest.approx(0.1)
    assert metrics.verdict_codes(["a", None, "tie", "b", float("nan")]).tolist() == [0, -1, 2, 1, -1]
    with pytest.raises(ArenaError, match="model_a"):
        metrics.verdict_codes(["a", "model_a"])


def test_the_ece_of_an_honest_judge_is_below_its_chance_level_19_times_in_20():
    below = sum(
        metrics.ece(*simulated(300, seed)) <= metrics.ece_by_chance(simulated(300, seed)[0], seed=seed, draws=200)
        for seed in range(60)
    )
    assert below >= 52
    p, truth = simulated(300, 0)
    sharp = p**3 / (p**3).sum(axis=1, keepdims=True)
    assert metrics.ece(sharp, truth) > 2 * metrics.ece_by_chance(sharp, seed=0)


def test_the_interval_covers_the_truth_about_95_times_in_100():
    random = np.random.default_rng(5)
    inside = 0
    for draw in range(200):
        effects = random.normal(size=80)
        values = np.repeat(effects, 3) + random.normal(size=240)
        low, high = metrics.GroupBootstrap(np.repeat(np.arange(80), 3), draw, draws=400).interval(values)
        inside += low < 0 < high
    assert 0.90 <= inside / 200 <= 0.99


def test_rows_of_one_prompt_do_not_count_as_independent():
    values = np.random.default_rng(0).normal(size=100).repeat(10)
    by_group, by_row, one = (
        metrics.GroupBootstrap(groups, 1).interval(values)
        for groups in (np.arange(100).repeat(10), np.arange(1000), np.zeros(1000))
    )
    assert (by_group[1] - by_group[0]) > 2.5 * (by_row[1] - by_row[0]) and one is None
    halves = np.array([1.0, 1.0, 5.0, 5.0])
    assert metrics.GroupBootstrap(np.arange(4), 0).interval(halves, np.array([0, 0, 1, 1])) == [5.0, 5.0], "a mask"


def test_position_bias_of_a_judge_that_prefers_the_first_answer():
    ab = np.array([[0.6, 0.3, 0.1], [0.5, 0.4, 0.1]])
    ba = np.array([[0.3, 0.6, 0.1], [0.5, 0.4, 0.1]])  # mapped back: shown second, A loses 0.3
    found = metrics.position_bias(ab, ba)
    assert found["mean_abs_diff"] == pytest.approx(0.15) and found["flip_rate"] == 0.5
    assert found["first_slot_advantage"] == pytest.approx(0.15)
