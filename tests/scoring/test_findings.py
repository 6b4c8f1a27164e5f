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


@pytest.mark.parametrize(("averaged", "how"), [(True, "averages both orders"), (False, "swap_tta is false")])
def test_the_flips_of_the_raw_and_of_the_final_answer(report, averaged, how):
    report["position_bias"] |= {"flip_rate": 0.29, "final_flip_rate": 0.02}
    report["calibration"]["swap_tta"] = averaged
    text = said(report, "position")
    assert "29% of its first choices" in text and "2.0% in the final answer" in text and how in text


def test_the_target_prior_and_its_unknown_effect(report):
    declared = {"declared": {"a": 0.35, "b": 0.34, "tie": 0.31}, "log_loss": None, "reason": "no row of class tie"}
    report["target_prior"] = declared
    assert "Tie 31%" in said(report, "calibration") and "no row of class tie" in said(report, "calibration")
    measured = {"log_loss": 1.03, "log_loss_ci95": None, "log_loss_uncorrected": 1.5, "prior": 1.09}
    report["target_prior"] = declared | measured
    assert all(figure in said(report, "calibration") for figure in ("1.030", "1.500", "1.090"))


def test_truncation_merge_and_checks(report):
    judged = {"rows_cut": 61, "rows_cut_share": 0.049, "log_loss_cut": 1.056, "log_loss_whole": 1.008}
    report["truncation"]["judged"] = judged
    assert all(figure in said(report, "truncation") for figure in ("61", "4.9%", "1.056", "1.008"))
    assert "No judged" in said(report | {"truncation": {"judged": judged | {"rows_cut": 0}}}, "truncation")
    assert all(part in said(report, "merge") for part in ("200", "0.41", "1.0103", "saves/x"))
    assert "not compared" in said(report | {"merge_gate": None}, "merge")
    assert said(report, "checks") == "1 passed, 0 failed, 1 not applicable."
