"""scoring.report.build: the contract's keys, figures that agree with each other, and flags on what is not good."""

import json

import numpy as np
import pytest
from scored_arena import CHECKS, MERGE, arena, as_rewards, built

from common.battle import PROBABILITY_COLUMNS, VERDICTS
from common.errors import ArenaError
from scoring import metrics
from scoring.links import softmax

CONTRACT = {
    *("rows", "log_loss", "log_loss_ci95", "accuracy", "ece", "per_class_log_loss", "baselines", "bayes"),
    *("position_bias", "merge_gate", "truncation", "calibration", "provenance", "checks", "target_prior"),
    *("folds", "checkpoint"),
    *("stage", "experiment", "set", "beats_prior", "flags", "class_counts", "baselines_ci95", "learned_share"),
    *("reliability", "confusion", "slices", "loss_curve", "worst", "most_biased", "train_class_counts"),
    *("gain_over_prior", "gain_over_prior_ci95", "learned_share_ci95", "ece_by_chance"),
    *("baseline_notes", "position_bias_reason", "with_baselines", "calibrations", "scoring", "agreement"),
}


def flags(report, level=None):
    return {flag["code"] for flag in report["flags"] if level in (None, flag["level"])}


def test_a_good_judge_on_the_synthetic_arena():
    scores, texts, truth = arena(2_000, 1, both_orders=True)
    report, p, calibration = built(
        scores, texts.sample(frac=1, random_state=0), truth, swap_tta=True, loss_curve=[{"step": 1, "loss": np.nan}]
    )
    assert set(report) == CONTRACT
    json.dumps(report, allow_nan=False)
    codes = metrics.verdict_codes(scores["verdict"])
    assert report["rows"] == 2_000 == sum(report["class_counts"].values()) == np.sum(report["confusion"])
    assert report["log_loss"] == pytest.approx(metrics.log_loss(p, codes))
    assert report["log_loss_ci95"][0] < report["log_loss"] < report["log_loss_ci95"][1]
    assert report["beats_prior"] is True and report["gain_over_prior_ci95"][0] > 0
    assert not flags(report, "red")
    true = truth[list(PROBABILITY_COLUMNS)].to_numpy()
    assert report["bayes"] == pytest.approx(metrics.log_loss(true, codes))
    share = (report["baselines"]["prior"] - report["log_loss"]) / (report["baselines"]["prior"] - report["bayes"])
    assert report["learned_share"] == pytest.approx(share) and share > 0.8
    assert report["learned_share_ci95"][0] < share < report["learned_share_ci95"][1]
    assert report["calibration"]["kept"] == calibration.used.kept
    assert report["loss_curve"] == [{"step": 1, "loss": None}]
    assert report["truncation"]["judged"]["rows_cut"] == int(scores["cut"].sum())
    weighted = sum(report["per_class_log_loss"][v] * n for v, n in report["class_counts"].items())
    assert weighted / 2_000 == pytest.approx(report["log_loss"])


def test_a_better_baseline_is_blended_with_the_judge():
    scores, texts, _ = arena(400, 3, skill=0.1)
    train = arena(600, 1_000)[1]
    for table in (texts, train):  # the words tell the verdict in half of the rows
        table["text_a"] = [f"{verdict if row % 2 else 'unknown'} word" for row, verdict in enumerate(table["verdict"])]
    report = built(scores, texts, train=train)[0]
    assert report["with_baselines"]["names"] == ["tfidf"]
    assert report["with_baselines"]["log_loss"] < report["baselines"]["tfidf"] < report["log_loss"]
    assert built(*arena(400, 3))[0]["with_baselines"] is None


def test_position_bias_and_what_averaging_both_orders_gains():
    scores, texts, _ = arena(2_000, 2, both_orders=True)
    report, _, _ = built(scores, texts)
    bias = report["position_bias"]
    ab, ba = (softmax(scores[[f"{order}_{v}" for v in VERDICTS]].to_numpy()) for order in ("ab", "ba"))
    assert bias["mean_abs_diff"] == pytest.approx(np.abs(ab[:, 0] - ba[:, 0]).mean())
    assert bias["first_slot_advantage"] > 0.1
    codes = metrics.verdict_codes(scores["verdict"])
    assert bias["tta_gain"] == pytest.approx(metrics.log_loss(ab, codes) - metrics.log_loss((ab + ba) / 2, codes))
    assert bias["tta_gain_ci95"][0] < bias["tta_gain"] < bias["tta_gain_ci95"][1]
    assert "position_bias" in flags(report, "amber")
    assert bias["final_flip_rate"] == pytest.approx(bias["flip_rate"], abs=0.05) and bias["flip_rate"] > 0.1
    moved = [row["change"] for row in report["most_biased"]]
    assert moved == sorted(moved, reverse=True) and len(moved) == 20


def test_slices_cover_all_rows_and_carry_the_prior():
    scores, texts, _ = arena(1_000, 4)
    report, p, _ = built(scores, texts)
    losses = metrics.row_losses(p, metrics.verdict_codes(scores["verdict"]))
    for family, slices in report["slices"].items():
        assert sum(one["rows"] for one in slices) == 1_000, family
        assert sum(one["rows"] * one["log_loss"] for one in slices) / 1_000 == pytest.approx(losses.mean())
        assert all(one["log_loss_ci95"][0] < one["log_loss"] < one["log_loss_ci95"][1] for one in slices)
    languages = {one["name"]: one for one in report["slices"]["language"]}
    assert set(languages) == {"English", "Finnish", "not stated"} and len(report["slices"]["length"]) == 4
    finnish = (scores["language"] == "Finnish").to_numpy()
    assert languages["Finnish"]["log_loss"] == pytest.approx(losses[finnish].mean())
    same = scores.assign(language=None, chars_prompt=1, chars_a=1, chars_b=1, turns=1)
    names = {family: [one["name"] for one in rows] for family, rows in built(same, texts)[0]["slices"].items()}
    assert names == {"length": ["up to 3 characters"], "turns": ["1 turn"], "language": []}
    spread = scores.assign(language=[f"language {n}" for n in np.sort(np.arange(1_000) % 12)])
    assert built(spread, texts)[0]["slices"]["language"][-1]["name"] == "other languages"


def test_the_worst_rows_come_first_with_their_probabilities():
    scores, texts, _ = arena(400, 5)
    report, p, _ = built(scores, texts)
    losses = metrics.row_losses(p, metrics.verdict_codes(scores["verdict"]))
    first = report["worst"][0]
    row = scores["id"].tolist().index(first["id"])
    assert first["log_loss"] == pytest.approx(losses.max()) and first["verdict"] == scores["verdict"][row]
    assert list(first["probabilities"].values()) == pytest.approx(p[row].tolist())


def test_ahead_of_the_prior_by_less_than_chance_is_red_too():
    report, _, _ = built(*arena(60, 10, skill=0.5)[:2])
    assert report["log_loss"] < report["baselines"]["prior"]
    assert report["gain_over_prior_ci95"][0] < 0 < report["gain_over_prior_ci95"][1]
    assert report["beats_prior"] is False
    assert "holds 0" in report["flags"][0]["text"] and report["flags"][0]["level"] == "red"
    assert "few_rows" in flags(report, "amber")


def test_rewards_on_too_few_rows_are_the_prior_and_red():
    scores, texts, _ = arena(40, 9)
    report, p, _ = built(as_rewards(scores), texts, stage="rm")
    assert {"not_better_than_prior", "no_link"} <= flags(report, "red")
    assert report["log_loss"] == pytest.approx(report["baselines"]["prior"])
    assert (p == p[0]).all()
    assert report["position_bias"] is None and "alone" in report["position_bias_reason"]
    assert "not scored" in built(scores, texts)[0]["position_bias_reason"]
    keep = (scores["verdict"] != "tie").to_numpy()
    report = built(scores[keep], texts[keep], target_prior={"a": 0.3, "b": 0.3, "tie": 0.4})[0]
    assert report["per_class_log_loss"]["tie"] is None and report["target_prior"]["log_loss"] is None


def test_a_time_limit_that_left_test_rows_in_one_order_is_told():
    for both in (0, 120):
        scoring = {"time_limit_seconds": 60.0, "rows_in_both_orders": {"valid": 300, "test": both}}
        report = built(*arena(300, 15)[:2], scoring=scoring, test_rows=120)[0]
        assert ("one_order" in flags(report)) == (not both) and report["scoring"] == scoring


def test_training_on_scarce_ties_is_caught_and_corrected_by_the_target_prior():
    train, (scores, texts, _) = arena(3_000, 13, tie=-3.0)[1], arena(1_500, 12, tie=0.6)
    timid = scores.assign(ab_tie=scores["ab_tie"] - 3.6)  # the judge still believes that ties are rare
    assert "prior_shift" in flags(built(timid, texts, train=train)[0], "amber")
    shares = scores["verdict"].value_counts(normalize=True)
    target = {v: float(shares[v]) for v in VERDICTS}
    fold, fold_texts, _ = arena(3_000, 11, tie=-3.0)
    report, p, fitted = built(fold, fold_texts, train=train, target_prior=target)
    assert "prior_shift" not in flags(report)
    assert report["log_loss"] == pytest.approx(metrics.log_loss(p, metrics.verdict_codes(fold["verdict"])))
    estimate = report["target_prior"]
    assert estimate["log_loss"] < estimate["prior"] < estimate["log_loss_uncorrected"]
    reached = metrics.log_loss(fitted.apply(timid), metrics.verdict_codes(scores["verdict"]))
    assert estimate["log_loss_ci95"][0] - 0.05 < reached < estimate["log_loss_ci95"][1] + 0.05


@pytest.mark.parametrize(("stops", "level"), [(True, "red"), (False, "amber")])
def test_checks_are_carried_and_a_failed_one_is_flagged(stops, level):
    failed = {"name": "merged model", "passed": False, "detail": "1 to 2", "stops": stops, "remedy": "less"}
    report, _, _ = built(*arena(300, 15)[:2], checks=[*CHECKS, failed])
    assert report["checks"] == [*CHECKS, failed] and report["merge_gate"] == MERGE
    (flag,) = (flag for flag in report["flags"] if flag["code"] == "check")
    assert flag["level"] == level and "merged model" in flag["text"] and "1 to 2" in flag["text"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t, truth: (s.assign(verdict=None), t), "no row has a verdict"),
        (lambda s, t, truth: (s.assign(id="same"), t), "occurs twice"),
        (lambda s, t, truth: (s, t.iloc[1:]), "no text for id '?16-0"),
        (lambda s, t, truth: (s.assign(ab_a=np.nan), t), "id 16-0"),
        (lambda s, t, truth: (s.drop(columns="ab_a"), t), "column.s. ab_a are missing"),
        (lambda s, t, truth: (s, t, truth.iloc[1:]), "16-0"),
    ],
)
def test_broken_input_stops_with_the_id(change, words):
    with pytest.raises(ArenaError, match=words):
        built(*change(*arena(100, 16)))


def test_rows_without_verdict_are_not_judged_but_get_probabilities():
    scores, texts, _ = arena(400, 14)
    scores.loc[:49, "verdict"] = None
    report, p, _ = built(scores, texts)
    assert report["rows"] == 350 and p.shape == (400, 3) and np.isfinite(p).all()
