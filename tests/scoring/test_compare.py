"""scoring.compare: identical rows or an error, paired differences, and a cross-fitted blend."""

import json

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from scoring import metrics
from scoring.compare import compare
from scoring.links import softmax

VERDICTS = np.array(["a", "b", "tie"])


def stages(rows: int = 1_500, seed: int = 0, noise: tuple[float, ...] = (0.5, 1.5)) -> dict[str, pd.DataFrame]:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (rows, 3))
    truth = (softmax(logits).cumsum(axis=1) < random.random((rows, 1))).sum(axis=1)
    frames = {}
    for name, size in zip(("sft", "dpo", "rm"), noise, strict=False):
        p = softmax(logits + random.normal(0, size, (rows, 3)))
        frames[name] = pd.DataFrame(p, columns=["p_a", "p_b", "p_tie"]).assign(
            id=[f"r{i}" for i in range(rows)], verdict=VERDICTS[truth], group=np.arange(rows) // 2
        )
    return frames


def test_the_table_the_pairs_and_the_blend():
    frames = stages()
    found = compare(frames, seed=1)
    json.dumps(found, allow_nan=False)
    assert [row["name"] for row in found["table"]] == ["sft", "dpo", "blend"]
    truth = metrics.verdict_codes(frames["sft"]["verdict"])
    by_name = {row["name"]: row for row in found["table"]}
    p = frames["sft"][["p_a", "p_b", "p_tie"]].to_numpy()
    assert by_name["sft"]["log_loss"] == pytest.approx(metrics.log_loss(p, truth))
    pair = found["differences"][0]
    assert (pair["first"], pair["second"], pair["better"]) == ("sft", "dpo", "sft")
    assert pair["difference"] == pytest.approx(by_name["sft"]["log_loss"] - by_name["dpo"]["log_loss"])
    assert pair["ci95"][0] < pair["difference"] < pair["ci95"][1] < 0
    assert len(found["differences"]) == 3
    weights = found["blend"]["weights"]
    assert weights["sft"] > weights["dpo"] >= 0


def test_two_judges_with_independent_noise_blend_into_a_better_one():
    uniform = np.full((3_000, 3), 1 / 3)
    found = compare(stages(3_000, noise=(1.2, 1.2)), seed=0, baselines={"uniform": uniform}, bayes=uniform)
    assert found["baselines"]["uniform"] == found["bayes"] == pytest.approx(np.log(3))
    assert found["baselines_ci95"]["uniform"] == pytest.approx([np.log(3)] * 2)
    losses = {row["name"]: row["log_loss"] for row in found["table"]}
    assert losses["blend"] < min(losses["sft"], losses["dpo"]) - 0.02
    better = {(d["first"], d["second"]): d["better"] for d in found["differences"]}
    assert better["sft", "blend"] == "blend"


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [(40, ("sft", "dpo"), "at least 50"), (300, ("sft",), "at least two stages")],
)
def test_no_blend_says_why(rows, names, words):
    frames = stages(rows)
    found = compare({name: frames[name] for name in names}, seed=0)
    assert words in found["blend"]["reason"]
    assert "blend" not in [row["name"] for row in found["table"]]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda f: f.iloc[1:], "different rows"),
        (lambda f: f.iloc[::-1], "different rows"),
        (lambda f: f.assign(verdict=f["verdict"].iloc[::-1].tolist()), "column verdict"),
        (lambda f: f.assign(group=0), "column group"),
        (lambda f: f.assign(verdict=None), "rows without a verdict"),
    ],
)
def test_stages_that_are_not_comparable_are_refused(change, words):
    frames = stages(100)
    with pytest.raises(ArenaError, match=words):
        compare({"sft": frames["sft"], "dpo": change(frames["dpo"])}, seed=0)
