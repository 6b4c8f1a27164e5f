"""scoring.checks.merge_check: figures of the contract, a record that is kept, and a failure that says what to do."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from common.errors import ArenaError
from common.files import only_run
from common.progress import Show
from data_prep.preference_pairs import PairFitter
from scoring.checks import merge_check as merge_gate
from scoring.checks.merge_check import RECORD, compared, gate
from scoring.judge import BATTLES, CANARIES, write_judge
from scoring.rewards import VALUE_HEAD
from tests.scoring.test_rewards import trained_adapter

ONE = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])


def test_the_contract_s_figures():
    other = ONE + np.array([[0.02, -0.02, 0], [0, 0, 0]])
    found = compared(ONE, other, ["a", "tie"], 0.05)
    assert found["max_abs_diff"] == pytest.approx(0.02)
    assert found["mean_abs_diff"] == pytest.approx(0.04 / 6)
    assert found["log_loss_adapter"] == pytest.approx(-(math.log(0.5) + math.log(0.8)) / 2)
    assert found["log_loss_merged"] == pytest.approx(-(math.log(0.52) + math.log(0.8)) / 2)
    assert (found["rows"], found["threshold"], found["passed"]) == (2, 0.05, True)
    assert compared(ONE, other, ["a", "tie"], 0.01)["passed"] is False


def test_rewards_are_compared_as_p_of_a_and_ties_have_no_loss():
    found = compared(np.array([[0.6], [0.9], [0.5]]), np.array([[0.6], [0.8], [0.5]]), ["b", "a", "tie"], 0.05)
    assert found["max_abs_diff"] == pytest.approx(0.1)
    assert found["log_loss_adapter"] == pytest.approx(-(math.log(0.4) + math.log(0.9)) / 2)
    assert compared(np.array([[0.6]]), np.array([[0.6]]), ["tie"], 0.05)["log_loss_merged"] is None


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_no_number_passes_no_gate_and_stays_json(broken):
    found = compared(ONE, np.where(ONE == 0.8, broken, ONE), ["a", None], 0.05)
    assert found["passed"] is False and found["max_abs_diff"] is None
    json.dumps(found, allow_nan=False)


@pytest.fixture
def its(tmp_path, monkeypatch, make_experiment):
    """An experiment with files in place of adapter, merged model and data; a stand-in measures and counts."""
    monkeypatch.chdir(tmp_path)
    experiment = make_experiment()
    for folder in (experiment.adapter_folder("sft"), experiment.merged_folder("sft"), experiment.data_folder):
        folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (experiment.adapter_folder("sft") / name).write_text("1")
    for name in ("model.safetensors", "config.json", CANARIES):
        (experiment.merged_folder("sft") / name).write_text("1")
    (experiment.data_folder / "battles.parquet").write_text("1")
    experiment.folder.mkdir(parents=True)
    experiment.recipe("sft").write_text("model_name_or_path: models/tiny\n")
    calls = []

    def measure(experiment, stage, tell):
        calls.append(stage)
        moved = ONE + np.array([[0.03, -0.03, 0], [0, 0, 0]])
        return {"merge_gate": compared(ONE, moved, ["a", "b"], experiment.merge_gate.max_abs_diff)}

    monkeypatch.setattr(merge_gate, "_measure", measure)
    return experiment, calls


def asked(experiment, stage="sft"):
    stream = io.StringIO()
    return gate(experiment, stage, show=Show(stream, attended=False, interval=0)), stream.getvalue()


def test_the_record_is_kept_until_an_input_changes(its):
    experiment, calls = its
    record, shown = asked(experiment)
    assert "merged model against trained adapter: largest difference 3 percentage points on 2 battles" in shown
    assert json.loads((experiment.output_folder("sft") / RECORD).read_text()) == json.loads(json.dumps(record))
    assert asked(experiment) == (json.loads(json.dumps(record)), "")
    assert calls == ["sft"]
    (experiment.merged_folder("sft") / "model.safetensors").write_text("2")
    asked(experiment)
    (experiment.merged_folder("sft") / CANARIES).unlink()
    asked(experiment)
    (experiment.output_folder("sft") / RECORD).write_text("{")
    asked(experiment)
    assert len(calls) == 4


def test_a_failure_leaves_its_evidence_and_stops_every_time(its):
    experiment, calls = its
    strict = experiment.model_copy(
        update={"merge_gate": experiment.merge_gate.model_copy(update={"max_abs_diff": 0.01})}
    )
    for _ in range(2):
        with pytest.raises(ArenaError, match="the merged model is not the trained adapter") as caught:
            asked(strict)
    assert calls == ["sft"]
    assert "infer_dtype: float32" in caught.value.remedy
    evidence = json.loads(Path(caught.value.where).read_text())["merge_gate"]
    assert evidence["passed"] is False and evidence["threshold"] == 0.01
    with pytest.raises(ArenaError) as caught:
        asked(strict.model_copy(update={"merge_onto": "base"}))
    assert "merge_onto: dequantised" in caught.value.remedy


def test_nothing_merged_is_scored_for_implicit_rewards(its):
    assert asked(its[0], "dpo_reward") == (None, "") and not its[1]


def test_an_adapter_that_is_gone_leaves_the_record_or_a_note(its):
    experiment, calls = its
    (experiment.adapter_folder("sft") / "adapter_model.safetensors").rename("kept")
    record, shown = asked(experiment)
    assert record is None and "the adapter is not here any more" in shown and not calls
    Path("kept").rename(experiment.adapter_folder("sft") / "adapter_model.safetensors")
    record, _ = asked(experiment)
    (experiment.adapter_folder("sft") / "adapter_model.safetensors").unlink()
    assert asked(experiment)[0] == json.loads(json.dumps(record))
    assert len(calls) == 1


def test_the_battles_are_drawn_by_the_seed_and_keep_their_order(make_experiment):
    few = make_experiment(merge_gate={"rows": 5})
    drawn = merge_gate._drawn(list(range(100)), few)
    assert drawn == sorted(drawn) and len(set(drawn)) == 5
    assert drawn == merge_gate._drawn(list(range(100)), few)
    assert drawn != merge_gate._drawn(list(range(100)), make_experiment(merge_gate={"rows": 5}, seed=1))
    assert merge_gate._drawn([1, 2], few) == [1, 2]


@pytest.fixture
def real(workplace, make_experiment, tiny_model, small_tokenizer, small_frame, judge_prompt, monkeypatch):
    """A function that lays out a random base, an adapter with weights and a model merged from both, or the base."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    experiment = make_experiment(model="models/tiny", cutoff_len=400, quantization_bit=None)
    tiny_model("qwen3", seed=3).save_pretrained("models/tiny")
    monkeypatch.setattr(merge_gate, "read_battles", lambda *_: [(battle, 0) for battle in BATTLES * 3])

    def laid_out(stage, *, merged=True):
        adapter = experiment.adapter_folder(stage)
        trained_adapter(Path("models/tiny"), adapter)
        model = AutoModelForCausalLM.from_pretrained("models/tiny")
        if merged:
            model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
        folder = experiment.merged_folder(stage)
        model.save_pretrained(folder)
        small_tokenizer.save(str(folder / "tokenizer.json"))
        write_judge(folder, experiment, small_frame, judge_prompt.source, {"experiment": "exam", "stage": stage})
        fitter = PairFitter(small_frame, small_tokenizer, cutoff_len=400, shares=experiment.budget_shares)
        pairs = [fitted.pair for fitted in fitter.fit(BATTLES * 3)]
        monkeypatch.setattr(merge_gate, "read_pairs", lambda *_: pairs)
        weight = np.linspace(-1, 1, model.config.hidden_size, dtype=np.float32)[None]
        tensors = {"v_head.summary.weight": weight, "v_head.summary.bias": np.zeros(1, np.float32)}
        save_file(tensors, folder / VALUE_HEAD)
        (experiment.data_folder / "battles.parquet").parent.mkdir(parents=True, exist_ok=True)
        (experiment.data_folder / "battles.parquet").write_text("1")
        experiment.folder.mkdir(parents=True, exist_ok=True)
        recipe = f"model_name_or_path: models/tiny\noutput_dir: {adapter.as_posix()}\n"
        experiment.recipe(stage).write_text(recipe)
        return experiment

    return laid_out


@pytest.mark.parametrize(("stage", "classes"), [("sft", 3), ("rm", 1)])
def test_a_true_merge_passes_and_its_canaries_are_sealed(real, stage, classes):
    experiment = real(stage)
    record, said = asked(experiment, stage)
    assert said.count(f"{stage}: merge gate: 100%  of the answers") == 2, "of the adapter, of the merged model"
    assert record["merge_gate"]["passed"] and record["merge_gate"]["max_abs_diff"] < 1e-4
    effect = record["adapter_effect"]
    assert effect["mean_abs_diff"] > 1e-3 > effect["merged_mean_abs_diff"]
    sealed = json.loads((experiment.merged_folder(stage) / CANARIES).read_text())["answers"]
    assert {len(answer) for answer in sealed.values()} == {classes} and len(sealed) == len(BATTLES)


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_a_merge_that_lost_the_adapter_fails(real, stage):
    with pytest.raises(ArenaError, match="the merged model is not the trained adapter"):
        asked(real(stage, merged=False), stage)


def test_a_second_run_is_refused_while_the_gate_measures(workplace, make_experiment):
    experiment = make_experiment()
    with only_run(experiment.output_folder("sft")), pytest.raises(ArenaError, match="another run is at work here"):
        gate(experiment, "sft", show=Show())
