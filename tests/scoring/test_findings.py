"""The sentences: they say no more than the figures do."""

import pytest
from scored_arena import arena, built

from scoring.report.findings import findings, headline


@pytest.fixture(scope="module")
def made() -> dict:
    scores, texts, truth = arena(400, 3, both_orders=True)
    return built(scores, texts, truth)[0]


@pytest.fixture
def report(made) -> dict:
    return {key: dict(value) if isinstance(value, dict) else value for key, value in made.items()}


def said(report: dict, section: str) -> str:
    return " ".join(findings(report)[section])


def test_the_headline_claims_no_more_than_was_shown(report):
    assert "beats the class prior by" in headline(report) and "of what could be learned" in headline(report)
    assert "of what could be learned" not in headline(report | {"learned_share": None})
    assert "not shown to be better" in headline(report | {"beats_prior": False})


def test_a_gain_of_averaging_that_is_chance_is_called_so(report):
    report["position_bias"] |= {"tta_gain": 0.002, "tta_gain_ci95": [-0.001, 0.005]}
    assert "lowers the log loss by 0.002 (within chance)" in said(report, "position")
    report["position_bias"] |= {"tta_gain": -0.033, "tta_gain_ci95": [-0.056, -0.007]}
    assert "raises the log loss by 0.033." in said(report, "position")
