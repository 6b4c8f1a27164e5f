"""Ensembles, the audit of labels and the choice of a checkpoint, in the miniature place."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner

import run
from common.errors import UsageError
from common.experiment import load_experiment
from common.progress import Show
from factory.stage_context import CHOICE, StageContext
from scoring import checkpoints

OUT = Path("outputs/both/ensemble")


def call(*arguments: str):
    return CliRunner().invoke(run.cli, arguments)


def probabilities(path: Path) -> np.ndarray:
    return pd.read_csv(path, dtype={"id": str}).iloc[:, 1:].to_numpy()


@pytest.fixture
def other(place):
    """A second experiment with the same votes and judge, whose validation rows are other ones: seed 8."""
    shutil.copytree("factory_configs/exam", "factory_configs/other")
    place.edit_experiment("seed: 8\n", "other")
    assert call("prepare", "-e", "other", "--train", "votes.csv", "--test", "test.csv", "--pairs").exit_code == 0
    return place


def test_given_weights_blend_the_members_and_the_baselines(place):
    done = call("ensemble", "-e", "exam:sft", "-e", "exam:tfidf", "--name", "both", "--weights", "0.75,0.25", "--json")
    assert done.exit_code == 0, done.output
    report = json.loads(done.output)
    assert report["blend"]["weights"] == {"exam:sft": 0.75, "exam:tfidf": 0.25} and report["rows"] == 12
    assert [row["name"] for row in report["table"]] == ["exam:sft", "exam:tfidf", "blend"]
    assert report["log_loss"] == next(row["log_loss"] for row in report["table"] if row["name"] == "blend")
    mean = call("ensemble", "-e", "exam:sft", "-e", "exam:length", "--name", "mean", "--weights", "mean")
    assert mean.exit_code == 0 and "weight 0.500: exam:sft" in mean.output
    sft, other = (
        probabilities(Path(f"outputs/{name}/probabilities_test.csv")) for name in ("exam/sft", "mean/ensemble")
    )
    found = probabilities(OUT / "submission.csv")
    assert found.shape == sft.shape == other.shape == (6, 3)
    only = call("ensemble", "-e", "exam:sft", "-e", "exam:tfidf", "--name", "one", "--weights", "1,0")
    assert only.exit_code == 0
    np.testing.assert_allclose(probabilities(Path("outputs/one/ensemble/submission.csv")), sft, atol=1e-6)
    assert call("verify", str(OUT)).exit_code == 0
    with Path("outputs/exam/sft/report.json").open("a") as file:
        file.write(" ")
    assert call("verify", str(OUT)).exit_code == 1, "a member's report changed"


def test_only_battles_that_all_members_judged_count(other):
    held = {
        name: set(pd.read_parquet(f"data/{name}/rows.parquet").query("split == 'valid'")["id"])
        for name in ("exam", "other")
    }
    common = held["exam"] & held["other"]
    done = call("ensemble", "-e", "exam:sft", "-e", "other:length", "--name", "both", "--weights", "mean", "--json")
    if not common:
        assert "none in common" in done.output
        return
    report = json.loads(done.output)
    assert report["rows"] == len(common)
    assert report["left_out"] == {"exam:sft": 12 - len(common), "other:length": len(held["other"]) - len(common)}


def test_a_judge_teaches_what_it_was_not_trained_on(place):
    soft = "outputs/exam/sft/probabilities_valid.csv"
    assert call("prepare", "-e", "exam", "--train", "votes.csv", "--soft", soft).exit_code == 0


def test_dropped_battles_are_judged_and_not_trained_on(place):
    rows = pd.read_parquet("data/exam/rows.parquet")
    train, valid = (rows[rows["split"] == split]["id"].tolist() for split in ("train", "valid"))
    Path("drop.csv").write_text("id\n" + "\n".join(train[:3]) + "\n")
    again = ("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv", "--drop-ids", "drop.csv")
    assert call(*again).exit_code == 0
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
    rows = list(csv.DictReader(Path(found["file"]).read_text().splitlines()))
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
    with pytest.raises(UsageError, match="no whole checkpoint '6'") as caught:
        checkpoints.choose(context, "6", Show())
    assert "2, 4" in caught.value.remedy
    with pytest.raises(UsageError, match="rewards"):
        checkpoints.choose(context.other("rm"), "best", Show())
