"""Stages on the same rows, compared and blended; the audit of labels, and the choice of a checkpoint."""

import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chain import call, rows_of

from common.errors import ArenaError, UsageError
from common.experiment import load_experiment
from common.progress import Show
from factory.stage_context import CHOICE, StageContext
from scoring import checkpoints, metrics
from scoring.compare import common_rows, compare, differing_settings
from scoring.links import softmax
from tests.votes import drawn

CASE = Path(__file__).resolve().parents[3] / "shared" / "cases" / "compare"
VERDICTS = np.array(["a", "b", "tie"])
NAMES = ("sft", "dpo")


def stages(rows: int = 1_500, seed: int = 0, noise: tuple[float, ...] = (0.5, 1.5)):
    """Return rows with a verdict, and the probabilities of judges that know it more or less well."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, 1.5, (rows, 3))
    table = pd.DataFrame({"verdict": VERDICTS[drawn(softmax(logits), random)], "group": np.arange(rows) // 2})
    models = {n: softmax(logits + random.normal(0, size, (rows, 3))) for n, size in zip(NAMES, noise, strict=True)}
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
    assert found["blend"]["weights"] == {"sft": 1, "dpo": 0} and "only sft" in found["blend"]["reason"]
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
    models = {p.name: pd.read_csv(p / "probabilities_valid.csv").iloc[:, 1:].to_numpy() for p in CASE.iterdir()}
    found = compare(pd.read_parquet(CASE / "rm" / "scores_valid.parquet"), models, seed=1)
    assert found["rows"] == 148 and [row["name"] for row in found["table"]] == [*models, "blend"]


@pytest.mark.parametrize("rows, names, words", [(40, ("sft", "dpo"), "at least 50"), (300, ("sft",), "at least two")])
def test_no_blend_says_why(rows, names, words):
    table, models = stages(rows)
    found = compare(table, {name: models[name] for name in names}, seed=0)
    assert words in found["blend"]["reason"] and "blend" not in [row["name"] for row in found["table"]]


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
    own = {"experiment.yaml: cutoff_len": {"one": 256, "two": 512}}
    assert differing_settings([one, two], ["rm"]) == own, "recipes of other stages made none of the figures"
    assert differing_settings([one, two], ["sft"]) == {**own, "sft: learning_rate": {"one": 1e-4, "two": 2e-4}}


OUT = Path("outputs/both/ensemble")


def probabilities(path: Path) -> np.ndarray:
    return pd.read_csv(path, dtype={"id": str}).iloc[:, 1:].to_numpy()


def test_given_weights_blend_the_members_and_the_baselines(place):
    done = call("ensemble", "-e", "exam:sft", "-e", "exam:tfidf", "--name", "both", "--weights", "0.75,0.25", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["blend"]["weights"] == {"exam:sft": 0.75, "exam:tfidf": 0.25} and report["rows"] == 12
    assert [row["name"] for row in report["table"]] == ["exam:sft", "exam:tfidf", "blend"]
    assert report["log_loss"] == next(row["log_loss"] for row in report["table"] if row["name"] == "blend")
    mean = call("ensemble", "-e", "exam:sft", "-e", "exam:length", "--name", "mean", "--weights", "mean")
    assert mean.exit_code == 0 and "weight 0.500: exam:sft" in mean.output
    folders = ("exam/sft", "mean/ensemble")
    sft, other = (probabilities(Path(f"outputs/{name}/probabilities_test.csv")) for name in folders)
    found = probabilities(OUT / "submission.csv")
    assert found.shape == sft.shape == other.shape == (6, 3)
    only = call("ensemble", "-e", "exam:sft", "-e", "exam:tfidf", "--name", "one", "--weights", "1,0")
    assert only.exit_code == 0
    np.testing.assert_allclose(probabilities(Path("outputs/one/ensemble/submission.csv")), sft, atol=1e-6)
    assert call("verify", str(OUT)).exit_code == 0
    with Path("outputs/exam/sft/report.json").open("a") as file:
        file.write(" ")
    assert call("verify", str(OUT)).exit_code == 1, "a member's report changed"


def test_a_judge_teaches_what_it_was_not_trained_on(place):
    soft = "outputs/exam/sft/probabilities_valid.csv"
    done = call("prepare", "-e", "exam", "--train", "votes.csv", "--soft", soft)
    assert done.exit_code == 0 and "12 of 40 battles have a soft label" in done.output
    assert json.loads(Path("data/exam/audit.json").read_text())["soft_labels"] == 12


def test_dropped_battles_are_judged_and_not_trained_on(place):
    rows = pd.read_parquet("data/exam/rows.parquet")
    train, valid = (rows[rows["split"] == split]["id"].tolist() for split in ("train", "valid"))
    Path("drop.csv").write_text("id\n" + "\n".join(train[:3]) + "\n")
    again = ("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv", "--drop-ids", "drop.csv")
    done = call(*again)
    assert done.exit_code == 0 and "3 battles are judged and not trained on" in done.output
    names = {json.loads(line)["id"] for line in Path("data/exam/sft_train.jsonl").read_text().splitlines()}
    assert names == set(train[3:])
    place.edit_experiment("folds: 2\n")
    Path("drop.csv").write_text("id\n" + "\n".join([*train[:3], *valid[:2]]) + "\n")
    assert call(*again).exit_code == 0
    rows = pd.read_parquet("data/exam/rows.parquet").set_index("id")
    assert (rows.loc[[*train[:3], *valid[:2]]]["times"] == 0).all() and rows["split"].str.startswith("fold").sum() == 40
    Path("drop.csv").write_text("id\nnobody\n")
    assert "are no training rows" in call(*again).output


def test_the_least_likely_verdicts_come_first(place):
    done = call("audit-labels", "-e", "exam", "--rows", "5", "--json")
    found = json.loads(done.output)
    rows = rows_of(Path(found["file"]))
    own = pd.read_csv("outputs/exam/sft/probabilities_valid.csv", dtype={"id": str}).set_index("id")
    verdicts = pd.read_parquet("data/exam/rows.parquet").set_index("id")["verdict"]
    given = {i: own.loc[i].iloc[["a", "b", "tie"].index(verdicts[i])] for i in own.index}
    assert [row["id"] for row in rows] == sorted(given, key=given.get)[:5] and found["judged"] == 12
    assert float(rows[0]["p_verdict"]) == pytest.approx(min(given.values()), abs=1e-5)


class FakeScorer:
    """Losses by the checkpoint's name: the second is best on average, the last is best for one prompt of ten."""

    def __init__(self, context, rows):
        self.ids = pd.read_parquet("data/exam/rows.parquet").query("split == 'valid'")["id"].tolist()

    def losses(self, adapter: Path) -> np.ndarray:
        return np.full(len(self.ids), {"checkpoint-2": 1.0, "checkpoint-4": 0.9}.get(adapter.name, 0.95))


def test_the_best_checkpoint_is_merged_and_the_report_says_what_choosing_costs(place, monkeypatch):
    monkeypatch.setattr(checkpoints, "CheckpointScorer", FakeScorer)
    context = StageContext(load_experiment("exam"), "sft")
    for name in ("checkpoint-2", "checkpoint-4", "checkpoint-6"):
        (context.adapter / name).mkdir()
        for path in context.adapter.glob("adapter_*"):
            shutil.copy(path, context.adapter / name)
        (context.adapter / name / "trainer_state.json").write_text("{}")
    (context.adapter / "checkpoint-6" / "trainer_state.json").unlink()  # not whole
    checkpoints.choose(context, "best", Show())
    assert context.weights == context.adapter / "checkpoint-4" and not context.merged.exists()
    choice = json.loads((context.folder / CHOICE).read_text())
    assert [point["checkpoint"] for point in choice["curve"]] == ["checkpoint-2", "checkpoint-4", "last"]
    assert choice["log_loss"] == choice["cross_fitted"] == pytest.approx(0.9)
    assert f"adapter_name_or_path={context.weights.as_posix()}" in context.overrides("merge_sft")
    checkpoints.choose(context, "last", Show())
    assert context.weights == context.adapter and not (context.folder / CHOICE).exists()
    with pytest.raises(UsageError, match=r"no whole checkpoint '6'(.|\n)*2, 4"):
        checkpoints.choose(context, "6", Show())
    with pytest.raises(UsageError, match="rewards"):
        checkpoints.choose(context.other("rm"), "best", Show())
