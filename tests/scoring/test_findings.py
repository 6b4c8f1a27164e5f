"""What a report says: a number has one form, and sentences say no more than the figures do."""

from __future__ import annotations

import math

import pytest
from scored_arena import arena, built

from scoring.report import findings as formatting
from scoring.report.findings import findings, headline


@pytest.mark.parametrize(
    ("write", "texts"),
    [
        (formatting.number, {0.95123: "0.951", -0.0001: "0.000", -1.5: "−1.500", None: "–", math.inf: "–"}),
        (formatting.signed, {0.01: "+0.010", -0.01: "−0.010", 0.0001: "0.000", None: "–"}),
        (formatting.percent, {0.071: "7.1%", 0.62: "62%", 0: "0%", 1: "100%", -0.2: "−20%", 0.0996: "10%", None: "–"}),
        (formatting.points, {0.17: "17", 0.041: "4.1", 0.0012: "0.12", 3.9e-7: "less than 0.01", 0.0: "0", None: "–"}),
        (formatting.count, {57477: "57,477", 0.5: "0.5", math.nan: "–"}),
        (formatting.interval, {(0.93, 0.97): "0.930 to 0.970", None: "–"}),
        (formatting.shares, {(0.7, 0.2, None): "70% / 20% / –"}),
    ],
)
def test_a_number_has_one_form(write, texts):
    assert {value: write(value) for value in texts} == texts


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
