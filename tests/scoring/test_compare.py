"""scoring.compare: paired differences on the same rows, and a cross-fitted blend."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from scoring import metrics
from scoring.compare import common_rows, compare, differing_settings
from scoring.links import softmax

CASE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "compare"
VERDICTS = np.array(["a", "b", "tie"])
NAMES = ("sft", "dpo")


def stages(rows: int = 1_500, seed: int = 0, noise: tuple[float, ...] = (0.5, 1.5)):
    """Return rows with a verdict, and the probabilities of judges that know it more or less well."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (rows, 3))
    truth = (softmax(logits).cumsum(axis=1) < random.random((rows, 1))).sum(axis=1)
    table = pd.DataFrame({"verdict": VERDICTS[truth], "group": np.arange(rows) // 2})
    models = {
        name: softmax(logits + random.normal(0, size, (rows, 3))) for name, size in zip(NAMES, noise, strict=True)
    }
    return table, models


def test_the_table_the_pairs_and_the_blend():
    rows, models = stages()
    found = compare(rows, models, seed=1)
    json.dumps(found, allow_nan=False)
    assert [row["name"] for row in found["table"]] == ["sft", "dpo", "blend"]
    truth = metrics.verdict_codes(rows["verdict"])
    by_name = {row["name"]: row for row in found["table"]}
    assert by_name["sft"]["log_loss"] == pytest.approx(metrics.log_loss(models["sft"], truth))
    pair = found["differences"][0]
    assert (pair["first"], pair["second"], pair["better"]) == ("sft", "dpo", "sft")
    assert pair["difference"] == pytest.approx(by_name["sft"]["log_loss"] - by_name["dpo"]["log_loss"])
    assert pair["ci95"][0] < pair["difference"] < pair["ci95"][1] < 0
    assert len(found["differences"]) == 3
    weights = found["blend"]["weights"]
    assert weights["sft"] > weights["dpo"] >= 0
    assert by_name["blend"]["log_loss"] <= by_name["sft"]["log_loss"]


def test_a_member_that_nothing_is_better_than_stands_alone():
    found = compare(*stages(300, noise=(0.0, 2.0)), seed=1)  # the first knows the truth
    assert found["blend"]["weights"] == {"sft": 1, "dpo": 0} and "sft alone" in found["blend"]["reason"]
    assert found["differences"][1]["difference"] == 0 and found["differences"][1]["better"] is None


def test_two_judges_with_independent_noise_blend_into_a_better_one():
    uniform = np.full((3_000, 3), 1 / 3)
    found = compare(*stages(3_000, noise=(1.2, 1.2)), seed=0, baselines={"uniform": uniform}, bayes=uniform)
    assert found["baselines"]["uniform"] == found["bayes"] == pytest.approx(np.log(3))
    assert found["baselines_ci95"]["uniform"] == pytest.approx([np.log(3)] * 2)
    losses = {row["name"]: row["log_loss"] for row in found["table"]}
    assert losses["blend"] < min(losses["sft"], losses["dpo"]) - 0.02
    better = {(d["first"], d["second"]): d["better"] for d in found["differences"]}
    assert better["sft", "blend"] == "blend"


@pytest.mark.skipif(not CASE.is_dir(), reason="the folder of cases is not beside this checkout")
def test_healthy_scores_of_three_stages_are_blended():
    models = {
        path.name: pd.read_csv(path / "probabilities_valid.csv").iloc[:, 1:].to_numpy() for path in CASE.iterdir()
    }
    found = compare(pd.read_parquet(CASE / "rm" / "scores_valid.parquet"), models, seed=1)
    assert found["rows"] == 148 and [row["name"] for row in found["table"]] == [*models, "blend"]


@pytest.mark.parametrize(
    ("rows", "names", "words"),
    [(40, ("sft", "dpo"), "at least 50"), (300, ("sft",), "at least two stages")],
)
def test_no_blend_says_why(rows, names, words):
    table, models = stages(rows)
    found = compare(table, {name: models[name] for name in names}, seed=0)
    assert words in found["blend"]["reason"]
    assert "blend" not in [row["name"] for row in found["table"]]


def test_rows_without_a_verdict_are_refused():
    rows, models = stages(100)
    for broken in (rows.assign(verdict=None), rows.iloc[:0]):
        with pytest.raises(ArenaError, match="no rows to compare on, or rows without a verdict"):
            compare(broken, models, seed=0)


def judged(**verdicts: str) -> pd.DataFrame:
    return pd.DataFrame({"id": list(verdicts), "verdict": list(verdicts.values()), "group": list(verdicts)})


def test_experiments_are_compared_on_the_battles_that_both_judged():
    rows, left_out = common_rows({"one": judged(x="a", y="b", z="tie"), "two": judged(z="tie", w="a", x="a")})
    assert rows["id"].tolist() == ["x", "z"] and left_out == {"one": 1, "two": 1}
    with pytest.raises(ArenaError, match="1 battles have another verdict in two than in one, the first is x"):
        common_rows({"one": judged(x="a"), "two": judged(x="b")})
    with pytest.raises(ArenaError, match="they have none in common"):
        common_rows({"one": judged(x="a"), "two": judged(y="a")})


def test_the_settings_in_which_experiments_differ_are_named(workplace, make_experiment):
    one, two = (make_experiment(name=name, cutoff_len=budget) for name, budget in (("one", 256), ("two", 512)))
    for each, rate in ((one, "1.0e-4"), (two, "2.0e-4")):
        each.folder.mkdir(parents=True)
        each.recipe("sft").write_text(f"learning_rate: {rate}\nlora_rank: 8\ncutoff_len: {each.cutoff_len}\n")
    assert differing_settings([one, two]) == {
        "experiment.yaml: cutoff_len": {"one": 256, "two": 512},
        "sft: learning_rate": {"one": 1e-4, "two": 2e-4},
    }
