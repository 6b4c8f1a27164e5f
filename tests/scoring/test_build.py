"""scoring.report.build: the contract's keys, figures that agree with each other, and flags on what is not good."""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from common.battle import PROBABILITY_COLUMNS, VERDICTS
from common.errors import ArenaError
from scoring import metrics
from scoring.calibration import calibrate
from scoring.links import SoftmaxLink, softmax
from scoring.report.build import build_report
from scoring.report.console import findings

CONTRACT = {
    *("rows", "log_loss", "log_loss_ci95", "accuracy", "ece", "per_class_log_loss", "baselines", "bayes"),
    *("position_bias", "merge_gate", "truncation", "calibration", "provenance"),
    *("stage", "experiment", "set", "beats_prior", "flags", "class_counts", "baselines_ci95", "learned_share"),
    *("reliability", "confusion", "slices", "loss_curve", "worst", "most_biased"),
}


def arena(rows: int, seed: int, *, skill: float = 1.0, tie: float = 0.0, both_orders: bool = False):
    """Return (scores, texts, truth): true logits ± noise as label logits; `tie` shifts the tie class."""
    random = np.random.default_rng(seed)
    strength = random.normal(0, 1.5, rows)
    logits = np.column_stack([strength / 2, -strength / 2, np.full(rows, -0.2 + tie)])
    chances = softmax(logits)
    codes = (chances.cumsum(axis=1) < random.random((rows, 1))).sum(axis=1)
    ids = [f"{seed}-{i}" for i in range(rows)]
    verdicts = np.array(VERDICTS)[codes]
    lengths = random.integers(1, 3_000, (rows, 3))
    scores = pd.DataFrame(
        {
            "id": ids,
            "group": [f"g{i // 2}" for i in range(rows)],
            "verdict": verdicts,
            "language": random.choice(["English", "Finnish", None], rows),
            "turns": random.integers(1, 5, rows),
            **{f"chars_{name}": lengths[:, i] for i, name in enumerate(("prompt", "a", "b"))},
            "tokens": lengths.sum(axis=1) // 4,
            "cut": lengths.sum(axis=1) > 8_000,
            **{f"ab_{name}": skill * logits[:, i] + random.normal(0, 0.2, rows) for i, name in enumerate(VERDICTS)},
        }
    )
    if both_orders:
        for i, name in enumerate(VERDICTS):
            scores[f"ba_{name}"] = skill * logits[:, i] + random.normal(0, 0.2, rows) - (0.8, -0.8, 0)[i]
    texts = pd.DataFrame(
        {
            "id": ids,
            "verdict": verdicts,
            "text_a": ["x " * n for n in random.integers(1, 9, rows)],
            "text_b": ["y " * n for n in random.integers(1, 9, rows)],
            **{name: scores[name] for name in ("turns", "chars_prompt", "chars_a", "chars_b")},
        }
    )
    truth = pd.DataFrame(chances, columns=list(PROBABILITY_COLUMNS)).assign(id=ids)
    return scores, texts, truth


def built(scores, texts, truth=None, *, train=None, **more):
    settings = {
        "experiment": "demo",
        "stage": "sft",
        "audit": {"truncation": {"train": {"rows": 3, "rows_cut": 1}}},
        "loss_curve": [{"step": 1, "loss": float("nan")}],
        "provenance": {"versions": {"torch": "2"}},
        "swap_tta": False,
        "seed": 7,
    }
    train = arena(600, 1_000)[1] if train is None else train
    return build_report(scores=scores, train_rows=train, valid_texts=texts, truth=truth, **(settings | more))


def codes_of(report):
    return {flag["code"] for flag in report["flags"]}


def test_a_good_judge_on_the_synthetic_arena():
    scores, texts, truth = arena(2_000, 1, both_orders=True)
    report, p, calibration = built(scores, texts.sample(frac=1, random_state=0), truth, swap_tta=True)
    assert set(report) >= CONTRACT
    json.dumps(report, allow_nan=False)
    codes = metrics.verdict_codes(scores["verdict"])
    assert report["rows"] == 2_000 == sum(report["class_counts"].values()) == np.sum(report["confusion"])
    assert report["log_loss"] == pytest.approx(metrics.log_loss(p, codes))
    assert report["log_loss_ci95"][0] < report["log_loss"] < report["log_loss_ci95"][1]
    assert report["beats_prior"] is True
    assert report["gain_over_prior_ci95"][0] > 0
    assert not [flag for flag in report["flags"] if flag["level"] == "red"]
    true = truth[list(PROBABILITY_COLUMNS)].to_numpy()
    assert report["bayes"] == pytest.approx(metrics.log_loss(true, codes))
    share = (report["baselines"]["prior"] - report["log_loss"]) / (report["baselines"]["prior"] - report["bayes"])
    assert report["learned_share"] == pytest.approx(share)
    assert report["learned_share_ci95"][0] < share < report["learned_share_ci95"][1]
    assert share > 0.8
    assert report["bayes_expected"] == pytest.approx(report["bayes"], abs=0.03)
    assert report["calibration"]["kept"] == calibration.used.kept
    assert report["loss_curve"] == [{"step": 1, "loss": None}]
    assert report["provenance"]["versions"] == {"torch": "2"}
    assert report["truncation"]["train"]["rows_cut"] == 1
    assert report["truncation"]["judged"]["rows_cut"] == int(scores["cut"].sum())
    weighted = sum(report["per_class_log_loss"][v] * n for v, n in report["class_counts"].items())
    assert weighted / 2_000 == pytest.approx(report["log_loss"])


def test_position_bias_and_what_tta_gains():
    scores, texts, _ = arena(2_000, 2, both_orders=True)
    report, _, _ = built(scores, texts)
    bias = report["position_bias"]
    ab, ba = (softmax(scores[[f"{order}_{v}" for v in VERDICTS]].to_numpy()) for order in ("ab", "ba"))
    assert bias["mean_abs_diff"] == pytest.approx(np.abs(ab[:, 0] - ba[:, 0]).mean())
    assert bias["first_slot_advantage"] > 0.1
    assert bias["tta_gain"] == pytest.approx(bias["log_loss_ab"] - bias["log_loss_averaged"])
    assert bias["tta_gain_ci95"][0] < bias["tta_gain"] < bias["tta_gain_ci95"][1]
    assert "position_bias" in codes_of(report)
    assert bias["final_flip_rate"] == pytest.approx(bias["flip_rate"], abs=0.05) and bias["flip_rate"] > 0.1
    moved = [row["change"] for row in report["most_biased"]]
    assert moved == sorted(moved, reverse=True)
    assert len(moved) == 20


def test_what_of_the_position_bias_is_left_in_the_final_answers():
    """Averaging takes it away where no link is kept; a link's class bias for A stays with the place."""
    scores, texts, _ = arena(40, 2, both_orders=True)  # too few rows for a link
    one, _, plain = built(scores, texts)
    both, _, averaged = built(scores, texts, swap_tta=True)
    assert plain.used.link is None and averaged.used.link is None
    assert one["position_bias"]["final_flip_rate"] == one["position_bias"]["flip_rate"] > 0.15
    assert both["position_bias"]["final_flip_rate"] == 0
    link = replace(averaged.used, link=SoftmaxLink(bias=(4 / 3, -2 / 3, -2 / 3)), kept=True)
    biased = replace(averaged, links={2: link})
    found = built(scores, texts, swap_tta=True, calibration=biased)[0]["position_bias"]["final_flip_rate"]
    p = averaged.apply(scores) * np.exp([2.0, 0, 0])
    mirrored = averaged.apply(scores)[:, [1, 0, 2]] * np.exp([2.0, 0, 0])
    left = np.mean(p.argmax(axis=1) != np.array([1, 0, 2])[mirrored.argmax(axis=1)])
    assert found == pytest.approx(left) and left > 0
    (flag,) = (flag["text"] for flag in both["flags"] if flag["code"] == "position_bias")
    assert flag.startswith(f"{both['position_bias']['flip_rate']:.0%} of its first choices change with the order")
    assert flag.endswith(", 0% in the final answer, which averages both orders.")
    rate = f"{one['position_bias']['flip_rate']:.1%}"
    (line,) = (line for line in findings(one) if line.startswith("position bias"))
    assert f"{rate} of its first choices flip, {rate} in the final answer, which has A first: swap_tta is false" in line


def test_without_both_orders_position_bias_is_null_with_a_reason():
    report, _, _ = built(*arena(300, 3)[:2])
    assert report["position_bias"] is None
    assert "swap_tta" in report["position_bias_reason"]
    assert report["most_biased"] == []
    scores, texts, _ = arena(300, 3)
    empty = scores.assign(ba_a=np.nan, ba_b=np.nan, ba_tie=np.nan)
    assert built(empty, texts)[0]["position_bias"] is None


def test_slices_cover_all_rows_and_carry_the_prior():
    scores, texts, _ = arena(1_000, 4)
    report, p, _ = built(scores, texts)
    losses = metrics.row_losses(p, metrics.verdict_codes(scores["verdict"]))
    for family, slices in report["slices"].items():
        assert sum(one["rows"] for one in slices) == 1_000, family
        mean = sum(one["rows"] * one["log_loss"] for one in slices) / 1_000
        assert mean == pytest.approx(losses.mean())
        for one in slices:
            assert one["log_loss_ci95"][0] < one["log_loss"] < one["log_loss_ci95"][1]
    assert {one["name"] for one in report["slices"]["language"]} == {"English", "Finnish", "not stated"}
    finnish = next(one for one in report["slices"]["language"] if one["name"] == "Finnish")
    assert finnish["log_loss"] == pytest.approx(losses[(scores["language"] == "Finnish").to_numpy()].mean())
    assert len(report["slices"]["length"]) == 4
    assert built(scores.assign(language=None), texts)[0]["slices"]["language"] == []


def test_the_worst_rows_come_first_with_their_probabilities():
    scores, texts, _ = arena(400, 5)
    report, p, _ = built(scores, texts)
    losses = metrics.row_losses(p, metrics.verdict_codes(scores["verdict"]))
    first = report["worst"][0]
    row = scores["id"].tolist().index(first["id"])
    assert first["log_loss"] == pytest.approx(losses.max())
    assert first["verdict"] == scores["verdict"][row]
    assert list(first["probabilities"].values()) == pytest.approx(p[row].tolist())


def test_a_judge_that_knows_nothing_is_flagged_red():
    scores, texts, _ = arena(800, 6)
    shuffled = np.random.default_rng(0).permutation(len(scores))
    columns = [f"ab_{v}" for v in VERDICTS]
    scores[columns] = scores[columns].to_numpy()[shuffled]
    report, _, _ = built(scores, texts)
    assert report["beats_prior"] is False
    red = [flag for flag in report["flags"] if flag["level"] == "red"]
    assert red[0]["code"] == "not_better_than_prior"


def test_ahead_of_the_prior_by_less_than_chance_is_red_too():
    report, _, _ = built(*arena(60, 10, skill=0.5)[:2])
    assert report["log_loss"] < report["baselines"]["prior"]
    assert report["gain_over_prior_ci95"][0] < 0 < report["gain_over_prior_ci95"][1]
    assert report["beats_prior"] is False
    assert report["flags"][0]["level"] == "red"
    assert "holds 0" in report["flags"][0]["text"]
    assert "few_rows" in codes_of(report)


def test_ahead_of_a_prior_that_is_worse_than_knowing_nothing_is_no_success():
    scores, texts, _ = arena(45, 20)
    train = arena(600, 1_000)[1]
    train = train[(train["verdict"] == "a") | (np.arange(600) < 30)]
    timid = scores.assign(ab_a=np.log(0.9), ab_b=np.log(0.05), ab_tie=np.log(0.05))
    report, _, _ = built(timid, texts, train=train.assign(verdict=["a"] * (len(train) - 2) + ["b", "tie"]))
    assert report["gain_over_prior_ci95"][0] > 0
    assert report["log_loss"] > np.log(3)
    assert report["beats_prior"] is False
    assert "worse than a third" in report["flags"][0]["text"]


def as_rewards(scores):
    rewards = scores.assign(reward_a=scores["ab_a"] * 3, reward_b=scores["ab_b"] * 3)
    return rewards.drop(columns=[f"ab_{v}" for v in VERDICTS])


def test_a_reward_model_gets_a_davidson_link():
    scores, texts, truth = arena(1_500, 8)
    report, p, _ = built(as_rewards(scores), texts, truth, stage="rm")
    assert report["calibration"]["kind"] == "Davidson link"
    assert report["calibration"]["parameters"]["tie"]["value"] == pytest.approx(np.exp(-0.2), rel=0.25)
    assert report["position_bias"] is None
    assert "alone" in report["position_bias_reason"]
    assert report["learned_share"] > 0.7
    assert np.isfinite(p).all()


def test_rewards_on_too_few_rows_are_the_prior_and_red():
    scores, texts, _ = arena(40, 9)
    report, p, _ = built(as_rewards(scores), texts, stage="rm")
    assert {"not_better_than_prior", "no_link"} <= codes_of(report)
    assert report["log_loss"] == pytest.approx(report["baselines"]["prior"])
    assert (p == p[0]).all()


def test_a_missing_class_is_said():
    scores, texts, _ = arena(300, 10)
    keep = (scores["verdict"] != "tie").to_numpy()
    report, _, _ = built(scores[keep], texts[keep])
    assert report["per_class_log_loss"]["tie"] is None
    assert {"class_missing", "calibration"} <= codes_of(report)


def test_training_on_scarce_ties_is_caught_and_corrected_by_the_target_prior():
    clean = arena(3_000, 11, tie=-3.0)
    natural = arena(1_500, 12, tie=0.6)
    train = arena(3_000, 13, tie=-3.0)[1]
    scores = clean[0]
    shown = natural[0].copy()
    shown["ab_tie"] -= 3.6  # the judge still believes that ties are rare
    counts = natural[0]["verdict"].value_counts(normalize=True)
    target = {v: float(counts[v]) for v in VERDICTS}
    fold_report, p, fitted = built(scores, clean[1], train=train, target_prior=target)
    assert fold_report["log_loss"] == pytest.approx(metrics.log_loss(p, metrics.verdict_codes(scores["verdict"])))
    estimate = fold_report["target_prior"]
    assert estimate["log_loss"] < estimate["prior"] < estimate["log_loss_uncorrected"]
    plain = calibrate(scores, seed=7)
    uncorrected, _, _ = built(shown, natural[1], train=train, calibration=plain, set_name="natural")
    corrected, found, _ = built(shown, natural[1], train=train, calibration=fitted, set_name="natural")
    assert uncorrected["log_loss"] > 1.2
    assert uncorrected["beats_prior"] is False
    assert "prior_shift" in codes_of(uncorrected)
    assert "prior_shift" not in codes_of(corrected)
    assert corrected["log_loss"] < corrected["baselines"]["prior"] < 1.0987
    assert corrected["beats_prior"] is True
    assert estimate["log_loss_ci95"][0] - 0.05 < corrected["log_loss"] < estimate["log_loss_ci95"][1] + 0.05
    assert found.sum(axis=1) == pytest.approx(np.ones(1_500))


def test_rows_without_verdict_are_not_judged_but_get_probabilities():
    scores, texts, _ = arena(400, 14)
    scores.loc[:49, "verdict"] = None
    report, p, _ = built(scores, texts)
    assert report["rows"] == 350
    assert p.shape == (400, 3)
    assert np.isfinite(p).all()


def test_the_merge_gate_is_carried_and_its_failure_is_red():
    gate = {"max_abs_diff": 0.4, "log_loss_adapter": 1.0, "log_loss_merged": 1.3, "passed": False}
    report, _, _ = built(*arena(300, 15)[:2], merge_gate=gate)
    assert report["merge_gate"] == gate
    assert ("red", "merge_gate") in {(flag["level"], flag["code"]) for flag in report["flags"]}


@pytest.mark.parametrize(("stops", "level"), [(True, "red"), (False, "amber")])
def test_a_failed_check_is_carried_and_flagged(stops, level):
    fine = {"name": "labels distinct", "passed": True, "detail": "1, 2, 3", "stops": True, "remedy": ""}
    failed = {"name": "loss not rising", "passed": False, "detail": "1 to 2", "stops": stops, "remedy": "less"}
    unknown = fine | {"name": "canaries", "passed": None}
    report, _, _ = built(*arena(300, 15)[:2], checks=[fine, failed, unknown])
    assert report["checks"] == [fine, failed, unknown]
    flags = [flag for flag in report["flags"] if flag["code"] == "check"]
    assert [(flag["level"], flag["text"]) for flag in flags] == [(level, "The check “loss not rising” failed: 1 to 2.")]
    assert findings(report)[-1] == "run checks: 1 passed, 1 failed, 1 not applicable"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s, t: (s.assign(verdict=None), t), "no row has a verdict"),
        (lambda s, t: (s.assign(id="same"), t), "occurs twice"),
        (lambda s, t: (s, t.iloc[1:]), "no text for id 16-0"),
        (lambda s, t: (s.assign(ab_a=np.nan), t), "id 16-0"),
        (lambda s, t: (s.drop(columns="ab_a"), t), "must hold either"),
    ],
)
def test_broken_input_stops_with_the_id(change, words):
    with pytest.raises(ArenaError, match=words):
        built(*change(*arena(100, 16)[:2]))


def test_truth_must_cover_the_judged_rows():
    scores, texts, truth = arena(100, 17)
    with pytest.raises(ArenaError, match="17-0"):
        built(scores, texts, truth.iloc[1:])


def test_the_same_input_gives_the_same_report():
    scores, texts, truth = arena(300, 18)
    assert built(scores, texts, truth)[0] == built(scores, texts, truth)[0]
