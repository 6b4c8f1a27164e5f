"""scoring.calibration: what is kept, what is refused, and every stated degradation."""

import json

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from scoring import metrics
from scoring.calibration import calibrate, calibration_from_json, grouped_parts, kind_of, raw_scores
from scoring.links import softmax

VERDICTS = np.array(["a", "b", "tie"])


def drawn(p, seed):
    return (p.cumsum(axis=1) < np.random.default_rng(seed).random((len(p), 1))).sum(axis=1)


def logit_table(rows=1_200, seed=0, *, temperature=1.0, bias=(0.0, 0.0, 0.0)) -> pd.DataFrame:
    """Label logits whose true probabilities are softmax(logits / temperature + bias)."""
    logits = np.random.default_rng(seed).normal(0, 1.5, (rows, 3))
    truth = drawn(softmax(logits / temperature + np.array(bias)), seed + 1)
    table = pd.DataFrame(logits, columns=["ab_a", "ab_b", "ab_tie"])
    return table.assign(id=[f"r{i}" for i in range(rows)], group=np.arange(rows) // 2, verdict=VERDICTS[truth])


def reward_table(rows=1_200, seed=0, *, scale=1.2) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rewards, lengths = random.normal(0, 1, (rows, 2)), random.integers(1, 2_000, (rows, 2))
    s = scale * (rewards[:, 0] - rewards[:, 1]) + 0.3
    truth = drawn(softmax(np.column_stack([s / 2, -s / 2, np.full(rows, np.log(0.7))])), seed + 1)
    return pd.DataFrame(
        {
            "id": [f"r{i}" for i in range(rows)],
            "group": np.arange(rows) // 2,
            "verdict": VERDICTS[truth],
            "reward_a": rewards[:, 0] * 1e-3,
            "reward_b": rewards[:, 1] * 1e-3,
            "chars_a": lengths[:, 0],
            "chars_b": lengths[:, 1],
        }
    )


def calibrated(table, kind="logits", **more):
    return calibrate(table, kind, groups=table["group"], verdicts=table["verdict"], seed=1, **more)


def codes(table):
    return metrics.verdict_codes(table["verdict"])


def test_an_overconfident_judge_is_calibrated_and_the_test_set_gains():
    made = calibrated(logit_table(temperature=3.0, bias=(0.4, -0.4, 0.0)))
    assert made.kept
    assert made.log_loss_cross_fitted < made.log_loss_before - 0.1
    assert made.link.temperature == pytest.approx(3.0, rel=0.25)
    assert "kept temperature and class bias" in made.reason
    fresh = logit_table(seed=77, temperature=3.0, bias=(0.4, -0.4, 0.0))
    plain = softmax(fresh[["ab_a", "ab_b", "ab_tie"]].to_numpy())
    assert metrics.log_loss(made.apply(fresh), codes(fresh)) < metrics.log_loss(plain, codes(fresh)) - 0.1


def test_an_honest_judge_keeps_its_softmax():
    outcomes = [calibrated(logit_table(seed=seed)) for seed in range(0, 20, 2)]
    left = [made for made in outcomes if not made.kept]
    assert len(left) >= 5
    table = logit_table(seed=0)
    made = calibrated(table)
    assert not made.kept and made.link is None
    assert "the plain softmax stays" in made.reason
    assert made.apply(table) == pytest.approx(softmax(table[["ab_a", "ab_b", "ab_tie"]].to_numpy()))


def test_the_judged_probabilities_are_cross_fitted_and_not_the_final_link_s():
    table = logit_table(temperature=3.0)
    made = calibrated(table)
    assert metrics.log_loss(made.probabilities, codes(table)) == pytest.approx(made.log_loss_cross_fitted)
    assert not np.allclose(made.probabilities, made.apply(table), atol=1e-6)


def test_parts_never_share_a_prompt_and_cover_every_row_once():
    groups = np.random.default_rng(0).integers(0, 40, 300)
    seen = []
    for fit, judge in grouped_parts(groups, seed=0):
        assert not set(groups[fit]) & set(groups[judge])
        seen += judge.tolist()
    assert sorted(seen) == list(range(300))


def test_rewards_become_probabilities_that_beat_the_prior():
    made = calibrated(reward_table(), "rewards")
    assert made.kept
    assert made.log_loss_cross_fitted < made.log_loss_before - 0.05
    assert made.link.scale * 1e-3 == pytest.approx(1.2, abs=3 * made.link.errors["scale"] * 1e-3)
    fresh = reward_table(seed=50)
    assert metrics.log_loss(made.apply(fresh), codes(fresh)) < made.log_loss_before - 0.05


def test_rewards_that_say_nothing_fall_back_to_the_prior_in_words():
    table = reward_table()
    table[["reward_a", "reward_b"]] = np.random.default_rng(9).normal(size=(len(table), 2))
    table["verdict"] = np.random.default_rng(3).permutation(table["verdict"])
    made = calibrated(table, "rewards")
    assert made.kept or "class prior stays" in made.reason
    assert made.reason.endswith(
        f"against {made.log_loss_before:.4f} of a class prior fitted in the same way, on the other parts of the fold"
    )
    assert abs(made.log_loss_cross_fitted - made.log_loss_before) < 0.01


@pytest.mark.parametrize("kind", ["logits", "rewards"])
def test_fewer_than_fifty_rows_are_not_calibrated_and_say_so(kind):
    table = (logit_table(49) if kind == "logits" else reward_table(49)).assign(group=np.arange(49))
    prior = {"a": 0.5, "b": 0.3, "tie": 0.2}
    made = calibrated(table, kind, train_prior=prior)
    assert not made.kept
    assert "only 49 validation rows" in made.reason
    if kind == "rewards":
        assert "every row gets the class prior" in made.reason
        assert made.apply(table) == pytest.approx(np.tile([0.5, 0.3, 0.2], (49, 1)))
    else:
        assert made.apply(table) == pytest.approx(softmax(table[["ab_a", "ab_b", "ab_tie"]].to_numpy()))


@pytest.mark.parametrize("kind", ["logits", "rewards"])
def test_a_missing_class_is_not_calibrated_and_say_so(kind):
    table = logit_table() if kind == "logits" else reward_table()
    made = calibrated(table[table["verdict"] != "b"], kind)
    assert not made.kept
    assert "no row of class b" in made.reason


def test_rewards_without_any_tie_still_get_a_link_with_a_small_tie_share():
    table = reward_table()
    made = calibrated(table[table["verdict"] != "tie"], "rewards")
    assert made.kept
    assert "no tie was seen" in made.reason
    assert 0 < made.apply(table)[:, 2].mean() < 0.01


def test_equal_scores_everywhere_are_a_stated_degradation():
    made = calibrated(reward_table().assign(reward_a=3.0, reward_b=3.0), "rewards")
    assert not made.kept
    assert "same score for all its sides" in made.reason
    made = calibrated(logit_table().assign(ab_a=1.0, ab_b=1.0, ab_tie=1.0))
    assert not made.kept


def test_one_prompt_cannot_be_cross_fitted():
    assert "share one prompt" in calibrated(logit_table().assign(group="same")).reason


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
def test_broken_logits_stop_with_their_ids(value):
    table = logit_table()
    table.loc[[3, 8], "ab_b"] = value
    with pytest.raises(ArenaError, match=r"2 row.*id r3, r8"):
        calibrated(table)


def test_rewards_that_overflow_stop_with_their_ids():
    table = reward_table()
    table.loc[5, ["reward_a", "reward_b"]] = [1.7e308, -1.7e308]
    with pytest.raises(ArenaError, match="overflow: id r5"):
        calibrated(table, "rewards")


def test_huge_but_finite_rewards_work():
    table = reward_table()
    table[["reward_a", "reward_b"]] *= 1e300
    made = calibrated(table, "rewards")
    assert made.kept
    assert np.isfinite(made.apply(table)).all()


def test_averaging_both_orders_is_the_mean_of_their_probabilities():
    table = logit_table(seed=0)
    ba = pd.DataFrame(np.random.default_rng(5).normal(size=(len(table), 3)), columns=["ba_a", "ba_b", "ba_tie"])
    both = table.join(ba)
    mean = (softmax(both[["ab_a", "ab_b", "ab_tie"]].to_numpy()) + softmax(ba.to_numpy())) / 2
    assert softmax(raw_scores(both, "logits", swap_tta=True).inputs[0]) == pytest.approx(mean)
    with pytest.raises(ArenaError, match="swapped order was not scored"):
        calibrated(table, swap_tta=True)
    both.loc[4, "ba_tie"] = np.nan
    with pytest.raises(ArenaError, match="id r4"):
        calibrated(both, swap_tta=True)


def test_rows_without_a_verdict_fit_nothing_but_get_probabilities():
    table = logit_table(temperature=3.0)
    table.loc[:99, "verdict"] = None
    made = calibrated(table)
    assert made.rows == len(table) - 100
    assert made.probabilities[:100] == pytest.approx(made.apply(table)[:100])


def test_a_target_prior_corrects_what_is_applied_and_not_what_is_judged():
    table = logit_table(4_000, temperature=2.0, bias=(1.0, 1.0, -2.0))  # ties are scarce here
    target = {"a": 0.35, "b": 0.35, "tie": 0.30}
    made, plain = calibrated(table, target_prior=target), calibrated(table)
    assert made.probabilities == pytest.approx(plain.probabilities)
    assert made.uncorrected(table) == pytest.approx(plain.apply(table))
    assert made.apply(table)[:, 2].mean() > 4 * plain.apply(table)[:, 2].mean()
    balanced = pd.concat([table[table.verdict == v].sample(n, random_state=0, replace=True) for v, n in
                          (("a", 350), ("b", 350), ("tie", 300))])  # fmt: skip
    before, after = (metrics.log_loss(c.apply(balanced), codes(balanced)) for c in (plain, made))
    assert after < before - 0.1
    assert after < 1.0965  # the prior's own log loss there


def test_a_judge_that_never_saw_a_tie_is_corrected_by_what_it_predicts_and_not_by_what_it_saw():
    table = logit_table(3_000, bias=(0.0, 0.0, -3.0))
    table["ab_tie"] -= 3.0  # it gives ties about 2%
    table = table[table["verdict"] != "tie"]
    train_prior = {"a": 0.49995, "b": 0.49995, "tie": 0.0001}
    made = calibrated(table, train_prior=train_prior, target_prior={"a": 0.35, "b": 0.35, "tie": 0.30})
    assert not made.kept
    assert 0.15 < made.apply(table)[:, 2].mean() < 0.45


def test_a_saved_calibration_gives_the_same_probabilities():
    for table, kind in (
        (logit_table(temperature=3.0), "logits"),
        (reward_table(), "rewards"),
        (logit_table(20), "logits"),
    ):
        made = calibrated(table, kind, target_prior={"a": 0.4, "b": 0.4, "tie": 0.2})
        again = calibration_from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
        assert again.apply(table) == pytest.approx(made.apply(table), abs=1e-12)
    with pytest.raises(ArenaError, match="score the stage again"):
        calibration_from_json({"kept": True})


def test_the_kind_is_read_from_the_columns():
    assert kind_of(logit_table(3)) == "logits"
    assert kind_of(reward_table(3)) == "rewards"
    with pytest.raises(ArenaError, match="must hold either"):
        kind_of(pd.DataFrame({"id": [1]}))
