"""Saved configurations against the real page: ids, values, and the arguments that LLaMA Board makes of them."""

import json
import math
from pathlib import Path

import pytest
import yaml
from board_page import function_named, pressed
from omegaconf import OmegaConf

from common.experiment import load_experiment
from common.stages import TRAININGS
from factory.board import _LATE_SLIDERS, BoardModel, board_config, board_models, configuration
from factory.process import child_environment
from factory.recipes import render_recipe

ROOT_EXPERIMENTS = ("demo", "qwen3-4b")


def configured(experiment, stage):
    models = board_models([experiment])
    return configuration(experiment, stage, models[experiment.name, stage])


def elements_with(page, runner, values) -> dict:
    """Return what Start gets: every element's own value, replaced by the loaded ones as the browser sends them back."""
    data, loaded = pressed(page, runner, "run_train", values), set(map(runner.manager.get_elem_by_id, values))
    return {element: element.preprocess(value) if element in loaded else value for element, value in data.items()}


def rendered(experiment, stage) -> dict:
    return dict(OmegaConf.to_container(OmegaConf.create(render_recipe(experiment, stage))))


@pytest.mark.parametrize("stage", TRAININGS)
@pytest.mark.parametrize("name", ROOT_EXPERIMENTS)
def test_loading_and_starting_a_configuration_is_running_the_recipe(page, runner, name, stage):
    experiment = load_experiment(name)
    config = configured(experiment, stage)
    assert config.left_out == []
    load = function_named(page, "load_args")
    for key in config.values:
        assert runner.manager.get_elem_by_id(key) in load.outputs, f"{key} is no element that Load may set"
    data = elements_with(page, runner, config.values)
    model = board_models([experiment])[name, stage]
    data[runner.manager.get_elem_by_id("top.model_path")] = model.path  # what the page looks up for the model's name
    data[runner.manager.get_elem_by_id("train.output_dir")] = "trial"
    started = json.loads(json.dumps({k: v for k, v in runner._parse_train_args(data).items() if v is not None}))
    recipe = {key: value for key, value in rendered(experiment, stage).items() if value is not None}
    for key, value in recipe.items():
        if key == "output_dir":
            assert started[key] == f"{model.folder}/trial"
        elif key == "dataset_dir":
            assert started[key] == "data"
        elif isinstance(value, float):
            assert math.isclose(started[key], value), key
        else:
            assert started.get(key, False) == value, key
    own = {"max_samples", "ddp_timeout", "include_num_input_tokens_seen", "double_quantization", "flash_attn"}
    additions = {k: v for k, v in started.items() if k not in recipe and v not in (False, "", 0) and k not in own}
    unchanged = {"enable_thinking": True, "max_grad_norm": 1.0, "pref_loss": "sigmoid", "template": recipe["template"]}
    assert additions.items() <= unchanged.items(), additions


def test_a_configuration_survives_its_file(page):
    config = configured(load_experiment("demo"), "sft")
    assert yaml.safe_load(yaml.safe_dump(config.values)) == config.values


def test_what_no_element_takes_goes_to_the_extra_arguments_or_is_told(make_experiment):
    recipe = {"template": "qwen3_nothink", "stage": "dpo", "pref_beta": 2.0, "warmup_steps": 0.05, "save_steps": 3}
    recipe |= {"report_to": ["wandb", "tensorboard"], "quantization_bit": 8, "double_quantization": False}
    config = board_config(make_experiment(), "dpo_judge", recipe, "none")
    extra = json.loads(config.values["train.extra_args"])
    assert (extra["warmup_steps"], extra["save_steps"]) == (0.05, 3)
    assert extra["report_to"] == ["wandb", "tensorboard"] and config.values["train.report_to"] == "wandb"
    assert config.left_out == [
        "pref_beta: 2.0 is not between 0 and 1",
        "double_quantization: LLaMA Board always quantizes twice",
    ]
    assert config.values["top.quantization_bit"] == "8" and "pref_beta" not in extra


def test_the_page_on_watching_names_every_value_that_the_board_cannot_be_given():
    text = " ".join((Path(__file__).resolve().parents[2] / "docs" / "watching.md").read_text("utf-8").split())
    limits = {key: slider for key, slider in _LATE_SLIDERS.items() if key != "lora_dropout"}  # below 1 in any recipe
    assert len(limits) == 5
    assert all(f"`{key}` above {slider.high:g}" in text for key, slider in limits.items())


def test_every_base_has_its_own_name_and_folder(make_experiment):
    one, two = make_experiment("one", model="models/tiny"), make_experiment("two", model="other/tiny")
    three = make_experiment("three", model="models/tiny")
    models = board_models([one, two, three])
    assert models["one", "sft"] == models["three", "rm"] == BoardModel("tiny", "models/tiny", "qwen3_nothink")
    assert (
        models["two", "sft"].name == "tiny of two" and models["two", "sft"].folder.as_posix() == "saves/tinyoftwo/lora"
    )
    assert models["one", "dpo_judge"] == BoardModel("one_sft_merged", "outputs/one/sft/merged", "qwen3_nothink")
    assert models["one", "sft"].folder == one.adapter_folder("sft").parent


def test_the_page_lists_our_models_first_with_path_and_template(page, runner):
    from llamafactory.webui.common import get_model_path, get_template

    names = [value for _, value in runner.manager.get_elem_by_id("top.model_name").choices]
    assert names[:2] == ["arena-tiny", "demo_sft_merged"] and "Custom" in names
    assert (get_model_path("arena-tiny"), get_template("arena-tiny")) == ("models/arena-tiny", "qwen3_nothink")
    assert get_model_path("Qwen3-4B-Instruct-2507") == "Qwen/Qwen3-4B-Instruct-2507"


def test_a_loaded_stage_keeps_its_data_sets(page):
    targets = [event for each in page.fns.values() if each.name == "change_stage" for _, event in each.targets]
    assert targets == ["input"]


def test_code_of_a_model_is_not_trusted(runner):
    for name in ("infer.extra_args", "export.extra_args"):
        assert json.loads(runner.manager.get_elem_by_id(name).value)["trust_remote_code"] is False


def test_a_key_that_is_typed_in_reaches_the_job_and_no_file(page, runner, monkeypatch):
    monkeypatch.setenv("SWANLAB_API_KEY", "of-the-shell")
    data = elements_with(page, runner, {"train.use_swanlab": True, "train.swanlab_api_key": "typed-in-0123456789"})
    data[runner.manager.get_elem_by_id("train.dataset")] = ["x"]
    for key in ("top.model_name", "top.model_path", "train.output_dir"):
        data[runner.manager.get_elem_by_id(key)] = "trial"
    started, saved = runner._parse_train_args(data), runner._build_config_dict(data)
    assert started["use_swanlab"] and saved["train.use_swanlab"]
    assert "typed-in" not in str(started) and "typed-in" not in str(saved)
    assert child_environment()["SWANLAB_API_KEY"] == "typed-in-0123456789"
