"""scoring.checks.merge_check: figures of the contract, a record that is kept, and a failure that says what to do."""

import io
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest

from common.errors import ArenaError
from common.experiment import load_experiment
from common.progress import Show
from factory.stage_context import StageContext
from scoring.checks.merge_check import RECORD, check_merge, compared
from scoring.judge import GOLDEN_ANSWERS, GOLDEN_PROMPTS
from tests.bad_inputs.place import lay_stage

ONE = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])


def test_the_contract_s_figures():
    other = ONE + np.array([[0.02, -0.02, 0], [0, 0, 0]])
    found = compared(ONE, other, ["a", "tie"], 0.05)
    assert found["max_abs_diff"] == pytest.approx(0.02) and found["mean_abs_diff"] == pytest.approx(0.04 / 6)
    assert found["log_loss_adapter"] == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert found["log_loss_merged"] == pytest.approx(-(math.log(0.52) + math.log(0.8)) / 2)
    assert (found["rows"], found["threshold"], found["passed"]) == (2, 0.05, True)
    assert compared(ONE, other, ["a", "tie"], 0.01)["passed"] is False
    pair = compared(np.array([[0.6], [0.9], [0.5]]), np.array([[0.6], [0.8], [0.5]]), ["b", "a", "tie"], 0.05)
    assert pair["log_loss_adapter"] == pytest.approx(-(math.log(0.4) + math.log(0.9)) / 2), "ties have no loss"
    for broken in (math.nan, math.inf):
        found = compared(ONE, np.where(ONE == 0.8, broken, ONE), ["a", None], 0.05)
        assert found["passed"] is False and found["max_abs_diff"] is None
        json.dumps(found, allow_nan=False)


@pytest.fixture
def laid_out(place):
    """A function that lays out a stage's random adapter, and a model merged from it and the base, or the base alone."""

    def lay_out(stage="sft", *, merged=True):
        experiment = load_experiment("exam")
        if stage != "sft":
            lay_stage(StageContext(experiment, stage))
        if not merged:
            shutil.copy("models/tiny/model.safetensors", experiment.merged_folder(stage))
        (experiment.output_folder(stage) / RECORD).unlink(missing_ok=True)
        return experiment

    return lay_out


def checked(experiment, stage="sft", **gate):
    """Return the record and what was shown."""
    changed = experiment.model_copy(update={"merge_gate": experiment.merge_gate.model_copy(update=gate)})
    context, stream = StageContext(changed, stage), io.StringIO()
    return check_merge(context, show=Show(stream, attended=False, interval=0)), stream.getvalue()


@pytest.mark.parametrize(("stage", "classes"), [("sft", 3), ("rm", 1)])
def test_a_true_merge_passes_and_answers_the_golden_prompts(laid_out, stage, classes):
    experiment = laid_out(stage)
    record, shown = checked(experiment, stage)
    assert shown.count("100%  of the answers") == 2, "of the adapter, of the merged model"
    assert "merged model against trained adapter: largest difference" in shown
    assert record["merge_gate"]["passed"] and record["merge_gate"]["max_abs_diff"] < 1e-4
    assert record["merge_gate"]["rows"] == 12
    effect = record["adapter_effect"]
    assert effect["mean_abs_diff"] > 1e-3 > effect["merged_mean_abs_diff"]
    golden = json.loads((experiment.merged_folder(stage) / GOLDEN_ANSWERS).read_text())["answers"]
    assert {len(answer) for answer in golden.values()} == {classes} and len(golden) == len(GOLDEN_PROMPTS)


def test_the_record_is_kept_until_an_input_changes(laid_out):
    experiment = laid_out()
    record, _ = checked(experiment, rows=5)
    path, merged = experiment.output_folder("sft") / RECORD, experiment.merged_folder("sft")
    assert json.loads(path.read_text()) == json.loads(json.dumps(record))
    assert record["merge_gate"]["rows"] == 5
    assert checked(experiment, rows=5) == (json.loads(json.dumps(record)), "")
    for damage in ((merged / GOLDEN_ANSWERS).unlink, lambda: path.write_text("{")):
        damage()
        assert "largest difference" in checked(experiment, rows=5)[1], "measured again"
    assert "largest difference" in checked(experiment, rows=6)[1]
    config = merged / "config.json"
    config.write_text(config.read_text() + "\n")
    assert "largest difference" in checked(experiment, rows=6)[1]
    adapter = experiment.adapter_folder("sft") / "adapter_model.safetensors"
    adapter.rename("kept")
    assert checked(experiment, rows=6)[0]["merge_gate"]["passed"], "an adapter that is gone contradicts no record"
    path.unlink()
    record, shown = checked(experiment, rows=6)
    assert record is None and "the adapter is not here any more" in shown


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_merge_that_lost_the_adapter_leaves_its_evidence_and_stops_every_time(laid_out, stage):
    experiment = laid_out(stage, merged=False)
    for _ in range(2):
        with pytest.raises(ArenaError, match="the merged model is not the trained adapter") as caught:
            checked(experiment, stage)
    assert "infer_dtype: float32" in caught.value.remedy
    evidence = json.loads(Path(caught.value.where).read_text())["merge_gate"]
    assert evidence["passed"] is False and evidence["threshold"] == 0.05
    nearly = evidence["max_abs_diff"] * 1.5
    record, shown = checked(experiment, stage, max_abs_diff=nearly)
    assert record["merge_gate"]["passed"] and "more than half of what is allowed" in shown
    assert "more than half" not in checked(experiment, stage, max_abs_diff=3 * nearly)[1]
