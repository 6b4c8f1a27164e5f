"""scoring.calibration: what is kept, what is refused, every stated fallback, and one link for each number of orders."""

import json

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from scoring import metrics
from scoring.calibration import AB_COLUMNS, BA_COLUMNS, Calibration, calibrate
from scoring.links import softmax
from tests.votes import drawn

VERDICTS = np.array(["a", "b", "tie"])
AB, BA = list(AB_COLUMNS), list(BA_COLUMNS)
TARGET = {"a": 0.35, "b": 0.35, "tie": 0.30}


def table_of(truth: np.ndarray, **columns) -> pd.DataFrame:
    rows = len(truth)
    facts = {"id": [f"r{i}" for i in range(rows)], "group": np.arange(rows) // 2, "verdict": VERDICTS[truth]}
    return pd.DataFrame(facts | columns)


def logit_table(rows=1_200, seed=0, *, temperature=1.0, bias=(0.0, 0.0, 0.0)) -> pd.DataFrame:
    """Label logits whose true probabilities are softmax(logits / temperature + bias)."""
    logits = np.random.default_rng(seed).normal(0, 1.5, (rows, 3))
    truth = drawn(softmax(logits / temperature + np.array(bias)), np.random.default_rng(seed + 1))
    return table_of(truth, **dict(zip(AB, logits.T, strict=True)))


def reward_table(rows=1_200, seed=0, *, scale=1.2) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    rewards, lengths = random.normal(0, 1, (rows, 2)), random.integers(1, 2_000, (rows, 2))
    s = scale * (rewards[:, 0] - rewards[:, 1]) + 0.3
    chances = softmax(np.column_stack([s / 2, -s / 2, np.full(rows, np.log(0.7))]))
    truth = drawn(chances, np.random.default_rng(seed + 1))
    names = ("reward_a", "reward_b", "chars_a", "chars_b")
    return table_of(truth, **dict(zip(names, [*(rewards * 1e-3).T, *lengths.T], strict=True)))


def two_orders(seed=0, rows=600) -> pd.DataFrame:
    """Logits in both orders that are far too sharp, and that lean to the first answer."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 3, rows)
    made = table_of(truth)
    for columns, shift in ((AB, 2.0), (BA, -2.0)):
        made[columns] = random.normal(0, 6, (rows, 3)) + 4 * np.eye(3)[truth] + np.array([shift, 0, 0])
    return made


def fitted(table, **more):
    return calibrate(table, seed=1, **more).used


def loss(p, table):
    return metrics.log_loss(p, metrics.verdict_codes(table["verdict"]))


def plain(table):
    return softmax(table[AB].to_numpy())


def test_an_overconfident_judge_is_calibrated_and_the_test_set_gains():
    table = logit_table(temperature=3.0, bias=(0.4, -0.4, 0.0))
    made = fitted(table)
    assert made.kept and "kept temperature and class bias" in made.reason
    assert made.log_loss_cross_fitted < made.log_loss_before - 0.1
    assert made.link.temperature == pytest.approx(3.0, rel=0.25)
    assert loss(made.probabilities, table) == pytest.approx(made.log_loss_cross_fitted), "what is cross-fitted judges"
    assert not np.allclose(made.probabilities, made.apply(table), atol=1e-6)
    fresh = logit_table(seed=77, temperature=3.0, bias=(0.4, -0.4, 0.0))
    assert loss(made.apply(fresh), fresh) < loss(plain(fresh), fresh) - 0.1


def test_an_honest_judge_keeps_its_softmax():
    assert sum(not fitted(logit_table(seed=seed)).kept for seed in range(0, 20, 2)) >= 5
    table = logit_table(seed=0)
    made = fitted(table)
    assert not made.kept and made.link is None and "plain softmax" in made.reason
    assert made.apply(table) == pytest.approx(plain(table))


def test_rewards_become_probabilities_that_beat_the_prior():
    made, fresh = fitted(reward_table()), reward_table(seed=50)
    assert made.kept and made.log_loss_cross_fitted < made.log_loss_before - 0.05
    assert made.link.scale * 1e-3 == pytest.approx(1.2, abs=3 * made.link.errors["scale"] * 1e-3)
    assert loss(made.apply(fresh), fresh) < made.log_loss_before - 0.05


@pytest.mark.parametrize("kind", ["logits", "rewards"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.iloc[:49].assign(group=range(49)), "only 49 validation rows"),
        (lambda t: t[t["verdict"] != "b"], "no row of class b"),
        (lambda t: t.assign(group="same"), "share one prompt"),
    ],
)
def test_what_fits_no_link_says_so_and_falls_back(kind, change, words):
    table = change(logit_table() if kind == "logits" else reward_table())
    made = fitted(table, train_prior={"a": 0.5, "b": 0.3, "tie": 0.2})
    assert not made.kept and words in made.reason
    expected = plain(table) if kind == "logits" else np.tile([0.5, 0.3, 0.2], (len(table), 1))
    assert made.apply(table) == pytest.approx(expected)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e200])
@pytest.mark.parametrize(("make", "column"), [(logit_table, "ab_b"), (reward_table, "reward_a")])
def test_broken_scores_stop_with_their_ids(make, column, value):
    table = make()
    table.loc[[3, 8], column] = value
    with pytest.raises(ArenaError, match=r"2 row.*id r3, r8"):
        calibrate(table, seed=1)


def test_a_target_prior_corrects_what_is_applied_and_not_what_is_judged():
    table = logit_table(4_000, temperature=2.0, bias=(1.0, 1.0, -2.0))  # ties are scarce here
    made, uncorrected = fitted(table, target_prior=TARGET), fitted(table)
    assert made.probabilities == pytest.approx(uncorrected.probabilities)
    assert made.apply(table)[:, 2].mean() > 4 * uncorrected.apply(table)[:, 2].mean()
    counts = {"a": 350, "b": 350, "tie": 300}
    balanced = pd.concat([table[table.verdict == v].sample(n, random_state=0, replace=True) for v, n in counts.items()])
    before, after = (loss(each.apply(balanced), balanced) for each in (uncorrected, made))
    assert after < before - 0.1 and after < 1.0965, "the prior's own log loss there"


@pytest.mark.parametrize("swap_tta", [True, False])
def test_rows_go_through_the_link_for_the_number_of_their_orders(swap_tta):
    made, fresh = calibrate(two_orders(), seed=1, swap_tta=swap_tta), two_orders(1)
    assert made.used is made.links[2 if swap_tta else 1]
    assert made.links[1].kept and made.links[2].kept and made.links[1].link != made.links[2].link
    np.testing.assert_array_equal(made.apply(fresh), made.links[2].apply(fresh))
    alone = fresh.assign(**dict.fromkeys(BA, np.nan))
    np.testing.assert_array_equal(made.apply(alone), made.links[1].apply(fresh))


def test_both_orders_are_averaged_by_their_probabilities():
    table = two_orders().iloc[:40]  # too few for a link
    mean = (plain(table) + softmax(table[BA].to_numpy())) / 2
    assert fitted(table, swap_tta=True).apply(table) == pytest.approx(mean)
    with pytest.raises(ArenaError, match="swapped order was not scored"):
        calibrate(logit_table(), seed=1, swap_tta=True)
    table.loc[4, "ba_tie"] = np.nan
    with pytest.raises(ArenaError, match="id r4"):
        calibrate(table, seed=1)


@pytest.mark.parametrize(
    ("table", "swap_tta"),
    [(logit_table(20), False), (reward_table(), False), (two_orders(), False), (two_orders(), True)],
)
def test_a_saved_calibration_gives_the_same_probabilities(table, swap_tta):
    made = calibrate(table, seed=1, target_prior=TARGET, swap_tta=swap_tta)
    again = Calibration.from_json(json.loads(json.dumps(made.to_json(), allow_nan=False)))
    assert again.links.keys() == made.links.keys() and again.orders == made.orders
    np.testing.assert_array_equal(again.apply(table), made.apply(table))


def test_a_report_that_lacks_a_link_or_a_value_is_refused():
    report = {"calibration": calibrate(two_orders(), seed=1, swap_tta=True).to_json()["calibration"]}
    found, table = Calibration.from_json(report), two_orders(2)
    found.apply(table)
    table[BA] = np.nan
    with pytest.raises(ArenaError, match=r"no calibration for rows with this number of orders(.|\n)*--fresh"):
        found.apply(table)
    with pytest.raises(ArenaError, match="score the stage again"):
        Calibration.from_json({"calibration": {"kept": True}})
