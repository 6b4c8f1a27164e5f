"""What a report says: a number has one form, and sentences say no more than the figures do."""

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


def test_the_headline_claims_no_more_than_was_shown():
    report = built(*arena(400, 3, both_orders=True))[0]
    assert "beats the class prior by" in headline(report) and "of what could be learned" in headline(report)
    assert "of what could be learned" not in headline(report | {"learned_share": None})
    assert "not shown to be better" in headline(report | {"beats_prior": False})
    for gain, interval, words in (
        (0.002, [-0.001, 0.005], "lowers the log loss by 0.002 (within chance)"),
        (-0.033, [-0.056, -0.007], "raises the log loss by 0.033."),
    ):
        report["position_bias"] |= {"tta_gain": gain, "tta_gain_ci95": interval}
        assert words in " ".join(findings(report)["position"])
