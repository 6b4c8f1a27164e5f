"""The wording: numbers as text, and sentences that say no more than the figures do."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoring.report import formatting as words


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.95123, "0.951"), (-0.0001, "0.000"), (-1.5, "−1.500"), (None, "–"), (math.nan, "–"), (True, "–"), ("x", "–")],
)
def test_number(value, text):
    assert words.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.071, "7.1%"), (0.62, "62%"), (0, "0%"), (1, "100%"), (-0.2, "−20%"), (0.0996, "10%"), (math.inf, "–")],
)
def test_percent(value, text):
    assert words.percent(value) == text


def test_other_formats():
    assert words.signed(0.01) == "+0.010"
    assert words.signed(-0.01) == "−0.010"
    assert words.signed(0.0001) == "0.000"
    assert words.interval([0.97, 0.93]) == "0.930 to 0.970"
    assert words.interval([0.97]) == "–"
    assert words.count(57477) == "57,477"
    assert words.count(0.5) == "0.5"
    assert words.plain({"a_b": [1, None, True]}) == "a b 1, –, yes"


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), st.lists) | st.integers())
def test_any_value_has_a_text(value):
    for write in (words.number, words.percent, words.count, words.interval, words.signed, words.plain):
        assert isinstance(write(value), str)


def test_position_bias_whose_gain_is_chance_says_so():
    bias = {"mean_abs_diff": 0.05, "flip_rate": 0.1, "tta_gain": 0.002, "tta_gain_ci95": [-0.001, 0.005]}
    text = " ".join(words.position_bias(bias))
    assert "moves by 5.0 percentage points" in text
    assert "changes the log loss by −0.002: within chance (95% interval −0.005 to +0.001)" in text
    final = " ".join(words.position_bias({"flip_rate": 0.29, "final_flip_rate": 0.02}, averaged=True))
    assert final.endswith("the first choice itself changes, 2.0% in the final answer, which averages both orders.")
    worse = {"tta_gain": -0.033, "tta_gain_ci95": [-0.056, -0.007]}
    assert words.position_bias(worse) == [
        "Averaging both orders raises the log loss by 0.033 (95% interval 0.007 to 0.056)."
    ]
    assert "raises the log loss by 0.002" in " ".join(words.position_bias({"tta_gain": -0.002}))
    assert words.position_bias(None, "the order cannot matter") == ["Not measured: the order cannot matter."]


def test_calibration_that_was_not_kept_or_not_possible():
    losses = {"log_loss_before": 1.01, "log_loss_cross_fitted": 1.02}
    kept_out = words.calibration({"kept": False, "kind": "logits", "reason": "", **losses})
    assert kept_out[0].startswith(
        "Not kept: temperature and class bias. It would take the log loss from 1.010 to 1.020"
    )
    reason = "not calibrated: only 12 validation rows have a verdict"
    assert words.calibration({"kept": False, "kind": "logits", "reason": reason})[1] == f"Reason: {reason}."
    rewards = words.calibration({"kept": True, "kind": "rewards", **losses, "link": {"kind": "davidson", "tie": 0.8}})
    assert "from 1.010 (a class prior, fitted in the same way) to 1.020" in rewards[0]
    assert len(rewards) == 1


@pytest.mark.parametrize(
    ("said", "happened", "end"),
    [(0.6, 0.5, "overconfident by 10 percentage points."), (0.5, 0.6, "too timid by 10 percentage points.")],
)
def test_reliability_names_the_fault(said, happened, end):
    assert words.reliability([{"confidence": said, "frequency": happened, "count": 5}]).endswith(end)


def test_honest_reliability_and_none():
    assert words.reliability([{"confidence": 0.5, "frequency": 0.51, "count": 5}]).endswith("mean what they say.")
    assert words.reliability([]).startswith("Not measured")


def test_target_prior_and_its_unknown_effect():
    found = {"declared": {"a": 0.35, "b": 0.34, "tie": 0.31}, "log_loss": None, "reason": "no judged row of class tie"}
    assert words.target_prior(found)[-1] == "Its effect is not known: no judged row of class tie."
    found |= {"log_loss": 1.03, "log_loss_uncorrected": 1.5, "prior": 1.09}
    assert "the corrected log loss is 1.030; uncorrected it is 1.500" in words.target_prior(found)[-1]


@pytest.mark.parametrize(
    ("share", "said"),
    [(0.17, "17"), (0.041, "4.1"), (0.0012, "0.12"), (3.9e-7, "less than 0.01"), (0.0, "0"), (1.0, "100"), (None, "–")],
)
def test_points_are_never_in_powers_of_ten(share, said):
    assert words.points(share) == said
