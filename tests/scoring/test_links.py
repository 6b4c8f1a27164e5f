"""scoring.links: gradients, recovery of known parameters, and data on which a naive fit overflows."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import ArenaError
from scoring import links
from tests.votes import drawn

# Denormal, ordinary and nearly overflowing numbers in one array.
SCORES = st.floats(-1e6, 1e6) | st.floats(-1e-300, 1e-300) | st.floats(-1e150, 1e150)


def davidson_data(rows: int, seed: int, *, unit: float = 1.0, true=(1.3, 0.3, 0.2, 0.8)):
    """Return (reward difference, log-length difference, verdict codes) of a known Davidson model."""
    random = np.random.default_rng(seed)
    scale, position, length, tie = true
    difference, lengths = random.standard_t(5, rows), random.normal(0, 0.7, rows)
    s = scale * difference + position + length * lengths / lengths.std()
    p = links.softmax(np.column_stack([s / 2, -s / 2, np.full(rows, np.log(tie))]))
    return difference * unit, lengths, drawn(p, np.random.default_rng(seed + 1))


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("unit", [1e-4, 1.0, 1e6])
def test_davidson_recovers_its_parameters_within_three_standard_errors(seed, unit):
    link = links.DavidsonLink.fit(*davidson_data(4_000, seed, unit=unit))
    assert abs(link.scale * unit - 1.3) < 3 * link.errors["scale"] * unit
    assert abs(link.position_bias - 0.3) < 3 * link.errors["position_bias"]
    assert abs(link.length - 0.2) < 3 * link.errors["length"]
    assert abs(np.log(link.tie) - np.log(0.8)) < 3 * link.errors["log_tie"]


def test_one_exploded_reward_does_not_rule_the_fit():
    difference, lengths, truth = davidson_data(3_000, 4)
    clean = links.DavidsonLink.fit(difference, lengths, truth)
    difference[truth.tolist().index(1)] = 1e30
    assert links.DavidsonLink.fit(difference, lengths, truth).scale == pytest.approx(clean.scale, rel=0.25)


def test_gradient_and_hessian_agree_with_finite_differences():
    from scipy.optimize import approx_fprime

    random = np.random.default_rng(0)
    design, truth, at = random.normal(size=(40, 3, 4)), random.integers(0, 3, 40), random.normal(size=4)
    _, gradient, hessian = links.penalised_loss(at, design, truth)
    numeric = approx_fprime(at, lambda x: links.penalised_loss(x, design, truth)[0], 1e-7)
    assert gradient == pytest.approx(numeric, abs=1e-3)
    numeric = approx_fprime(at, lambda x: links.penalised_loss(x, design, truth)[1], 1e-7)
    assert hessian == pytest.approx(numeric, abs=1e-3)


@pytest.mark.parametrize("seed, scale, apart", [(7, 0.4, 0.05), (108, 0.4, 0.05), (99, 0.1, 0.05), (56, 0.2, 0.2)])
def test_a_fit_goes_on_where_the_optimiser_stops_early(seed, scale, apart):
    """Two columns are nearly alike, as those of two weak stages: one start of L-BFGS-B ends short of the optimum."""
    random = np.random.default_rng(seed)
    truth, shared = random.choice(3, 118, p=[0.37, 0.34, 0.29]), random.normal(0, scale, 118)
    columns = [links.log_softmax(random.normal(0, 1.2, (118, 3)))]
    for tie in (0.8, 0.82):
        s = shared + random.normal(0, scale * apart, 118)
        columns.append(links.log_softmax(np.column_stack([s / 2, -s / 2, np.full(118, np.log(tie))])))
    design = np.stack(columns, axis=2)
    found, _ = links.fit_conditional_logit(design, truth, np.zeros(3))
    _, gradient, _ = links.penalised_loss(found, design, truth)
    assert (found >= 0).all()
    assert np.abs(gradient[found > 0]).max(initial=0) < 1e-4 and (gradient[found == 0] > -1e-4).all()


@pytest.mark.parametrize("seed", range(3))
def test_softmax_recovers_temperature_and_bias(seed):
    logits = np.random.default_rng(seed).normal(0, 3, (6_000, 3)) + 50
    p = links.softmax(logits / 2.5 + np.array([0.2, -0.5, 0.3]))
    link = links.SoftmaxLink.fit(logits, drawn(p, np.random.default_rng(seed + 9)))
    assert abs(link.inverse_temperature - 0.4) < 3 * link.errors["inverse_temperature"]
    for name, value, found in zip("abt", (0.2, -0.5, 0.3), link.bias, strict=True):
        assert abs(found - value) < 3 * link.errors["bias_tie" if name == "t" else f"bias_{name}"]
    assert sum(link.bias) == pytest.approx(0)
    assert link.temperature == pytest.approx(1 / link.inverse_temperature)


def test_scores_that_point_the_wrong_way_get_slope_zero_and_never_a_negative_one():
    difference, lengths, truth = davidson_data(2_000, 0)
    link = links.DavidsonLink.fit(-difference, lengths, truth)
    assert link.scale == 0
    logits = np.eye(3)[truth] * -3.0
    soft = links.SoftmaxLink.fit(logits, truth)
    assert soft.inverse_temperature == 0 and soft.temperature is None
    shares = np.bincount(truth) / len(truth)
    assert soft.probabilities(logits)[0] == pytest.approx(shares, abs=1e-3)  # nothing is left but the class prior


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float64, (60, 3), elements=SCORES),
    st.just(0.0) | st.floats(-10, 10),
    hnp.arrays(np.int64, 60, elements=st.integers(0, 2)),
)
def test_any_scores_and_verdicts_give_proper_probabilities(scores, length, truth):
    for kind, inputs in ((links.SoftmaxLink, (scores,)), (links.DavidsonLink, (scores[:, 0], np.full(60, length)))):
        link = kind.fit(*inputs, truth)
        p = link.probabilities(*inputs)
        assert np.isfinite(p).all() and (p >= 0).all() and p.sum(axis=1) == pytest.approx(np.ones(60))
        assert np.isfinite(list(link.errors.values())).all()
        assert links.link_from_json(json.loads(json.dumps(link.to_json(), allow_nan=False))) == link


@pytest.mark.parametrize("value", [{"kind": "probit"}, {}, {"kind": "softmax"}, {"kind": "davidson", "scale": 1.0}])
def test_a_broken_saved_link_is_refused(value):
    with pytest.raises(ArenaError, match="score again"):
        links.link_from_json(value)
