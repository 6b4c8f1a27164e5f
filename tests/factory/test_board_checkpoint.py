"""What LLaMA Board evaluates and exports: the real page's own arguments, and the values that a checkpoint brings."""

import json
from pathlib import Path

import pytest
import yaml
from board_page import function_named, pressed

from common.experiment import load_experiment
from common.llamafactory_schema import arguments
from factory import board_page as board_checkpoint
from factory.board import board_models, configuration
from factory.board_page import TEXT_METRICS, tab_values, text_fault

MODEL = {"top.model_name": "arena-tiny", "top.model_path": "models/arena-tiny"}


def evaluated(page, runner, values: dict) -> dict:
    """Return what a press of Evaluate's Start gives, the other elements as the page opens."""
    given = {**MODEL, "eval.output_dir": "trial", "eval.dataset": ["demo_sft_valid"], **values}
    return pressed(page, runner, "run_eval", given)


def test_an_evaluation_tells_losses_and_needs_no_other_package(page, runner):
    data = evaluated(page, runner, {"top.checkpoint_path": ["demo_sft"]})
    started = runner._parse_eval_args(data)
    assert started["do_eval"] and started["compute_accuracy"] and not started["predict_with_generate"]
    assert started["eval_dataset"] == "demo_sft_valid"
    assert started["adapter_name_or_path"] == "saves/arena-tiny/lora/demo_sft"
    assert started["trust_remote_code"] is False, "Evaluate has no box of extra arguments to say so in"
    assert started.keys() <= arguments().keys()
    assert runner._initialize(data, False, True) == ""


@pytest.mark.parametrize("there", [True, False])
def test_texts_are_generated_where_they_can_be_compared(page, runner, monkeypatch, there):
    looked_for = []
    monkeypatch.setattr(board_checkpoint, "find_spec", lambda name: looked_for.append(name) or (there or None))
    data = evaluated(page, runner, {"eval.predict": True})
    started = runner._parse_eval_args(data)
    assert started["do_predict"] and started["predict_with_generate"] and "compute_accuracy" not in started
    assert started["trust_remote_code"] is False
    told = runner._initialize(data, False, True)
    assert looked_for == list(TEXT_METRICS)
    assert told == "" if there else "pip install jieba nltk rouge-chinese" in told and "run.py score" in told


def test_training_asks_for_no_text_metrics(page, runner, monkeypatch):
    monkeypatch.setattr(board_checkpoint, "find_spec", lambda name: None)
    assert "pip install" in text_fault()
    data = pressed(page, runner, "run_train", {**MODEL, "train.dataset": ["x"], "train.output_dir": "trial"})
    assert runner._initialize(data, True, True) == ""


def test_the_package_names_are_those_that_llamafactory_asks_for():
    import llamafactory.hparams.parser as parser

    asked = Path(parser.__file__).read_text(encoding="utf-8").split("if training_args.predict_with_generate:")[1]
    assert [name for name in TEXT_METRICS if f'check_version("{name}", mandatory=True)' in asked] == list(TEXT_METRICS)


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A function that lays the settings of one of demo's stages into a checkpoint's folder, beside its data."""

    def lay(name: str, stage: str) -> dict:
        experiment = load_experiment(name)
        config = configuration(experiment, stage, board_models([experiment])[name, stage])
        monkeypatch.chdir(tmp_path)
        info = {f"{name}_sft_valid": {"file_name": "x"}, f"{name}_rm_valid": {"file_name": "x", "ranking": True}}
        info[f"{name}_dpo_judge_valid"] = {"file_name": "x", "ranking": True}
        Path("data").mkdir()
        Path("data/dataset_info.json").write_text(json.dumps(info))
        Path("llamaboard_config.yaml").write_text(yaml.safe_dump(config.values))
        return tab_values(tmp_path)

    return lay


def test_a_checkpoint_brings_its_own_validation_set_length_and_bits(page, runner, checkpoint):
    experiment = load_experiment("qwen3-4b")
    values = checkpoint("qwen3-4b", "sft")
    assert values["eval.dataset"] == ["qwen3-4b_sft_valid"] and values["eval.dataset_dir"] == "data"
    assert values["eval.cutoff_len"] == experiment.cutoff_len > 1024, "where the page would have cut the question off"
    assert values["top.quantization_bit"] == "4"
    assert json.loads(values["export.extra_args"]) == {"trust_remote_code": False}
    for key, value in values.items():
        element = runner.manager.get_elem_by_id(key)
        assert element.preprocess(value) == value, f"{key} does not take {value!r}"


def test_a_run_that_ended_after_the_page_began_brings_its_settings_too(page, runner):
    experiment, fill = load_experiment("demo"), function_named(page, "fill")
    adapter = experiment.adapter_folder("sft")
    adapter.mkdir(parents=True)  # as a training of the command line leaves it: without settings of the page's
    filled = dict(zip(fill.outputs, fill.fn("arena-tiny", "lora", [adapter.name]), strict=True))
    assert filled[runner.manager.get_elem_by_id("eval.cutoff_len")] == experiment.cutoff_len != 1024
    assert yaml.safe_load((adapter / "llamaboard_config.yaml").read_text())["train.dataset"] == ["demo_sft_train"]


@pytest.mark.parametrize(("stage", "extra"), [("rm", {"stage": "rm"}), ("dpo_judge", {})])
def test_pairs_are_not_evaluated_and_a_reward_model_keeps_its_head(page, checkpoint, stage, extra):
    values = checkpoint("demo", stage)
    assert values["eval.dataset"] == []
    assert json.loads(values["export.extra_args"]) == {"trust_remote_code": False, **extra}


@pytest.mark.parametrize("content", [None, "", "[1, 2]", "train.extra_args: '[1]'\n", "a: b: c"])
def test_a_folder_without_settings_changes_nothing_it_does_not_know(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("llamaboard_config.yaml").write_text(content)
    values = tab_values(tmp_path)
    assert values.get("eval.dataset", []) == [] and "eval.cutoff_len" not in values
