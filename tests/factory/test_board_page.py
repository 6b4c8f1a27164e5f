"""LLaMA Board's real page, built as `run.py board` builds it but not served: what it starts, shows and trusts."""

import json
import math
import sys
from contextvars import ContextVar
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.experiment import load_experiment
from common.stages import TRAININGS
from factory.board import board_models, configuration, recipe_started, stage_of
from factory.board_page import Job, Trust, build
from factory.process import child_environment
from factory.recipes import render_recipe
from factory.stage_context import StageContext

ROOT = Path(__file__).resolve().parents[2]
CHATTY = """#!/bin/sh
head -c 500000 /dev/zero | tr '\\0' 'x' >&2
echo; echo "called: $*"; env
echo ' the last word' >&2
exit 3
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The page with the committed experiments, in whose folder the tests then are."""
    folder = tmp_path_factory.mktemp("page")
    for name in ("factory_configs", "templates"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield build()


def function_named(page, name):
    return next(each for each in page.fns.values() if each.name == name)


@pytest.fixture(scope="module")
def runner(page):
    """LLaMA-Factory's own runner behind the page: it makes arguments of what the elements hold."""
    return function_named(page, "load_args").fn.__self__


def pressed(page, runner, button: str, values: dict) -> dict:
    """Return what a button's function gets: every element's own value, replaced by those given by id."""
    chosen = {runner.manager.get_elem_by_id(key): value for key, value in values.items()}
    inputs = function_named(page, button).inputs
    assert chosen.keys() <= set(inputs)
    return {element: chosen.get(element, element.value) for element in inputs}


@pytest.mark.parametrize("stage", TRAININGS)
@pytest.mark.parametrize("name", ["demo", "qwen3-4b"])
def test_loading_and_starting_a_configuration_is_running_the_recipe(page, runner, name, stage):
    from llamafactory.webui.common import _clean_cmd

    experiment = load_experiment(name)
    model = board_models([experiment])[name, stage]
    values = configuration(StageContext(experiment, stage), model)
    loaded = {runner.manager.get_elem_by_id(key) for key in values}
    assert loaded <= set(function_named(page, "load_args").outputs), "elements that Load may set"
    data = {
        element: element.preprocess(value) if element in loaded else value  # as the browser sends it back
        for element, value in pressed(page, runner, "run_train", values).items()
    }
    data[runner.manager.get_elem_by_id("top.model_path")] = model.path  # what the page looks up for the model's name
    data[runner.manager.get_elem_by_id("train.output_dir")] = "trial"
    started = json.loads(json.dumps({k: v for k, v in runner._parse_train_args(data).items() if v is not None}))
    rendered = OmegaConf.to_container(OmegaConf.create(render_recipe(experiment, stage)))
    recipe = {key: value for key, value in rendered.items() if value is not None}
    for key, value in (recipe | {"output_dir": f"{model.folder}/trial", "dataset_dir": "data"}).items():
        if isinstance(value, float):
            assert math.isclose(started[key], value), key
        else:
            assert started.get(key, False) == value, key
    own = {"max_samples", "ddp_timeout", "include_num_input_tokens_seen", "double_quantization", "flash_attn"}
    additions = {k: v for k, v in started.items() if k not in recipe and v not in (False, "", 0) and k not in own}
    unchanged = {"enable_thinking": True, "max_grad_norm": 1.0, "pref_loss": "sigmoid", "template": recipe["template"]}
    assert additions.items() <= unchanged.items(), additions
    context = stage_of(_clean_cmd(started))  # as it is written into training_args.yaml
    assert (context.experiment.name, context.name) == (name, stage)
    assert recipe_started(context, _clean_cmd(started)) == rendered
    other = {"learning_rate": 0.1, "seed": 7}
    assert recipe_started(context, _clean_cmd(started | other)) == rendered | other


def test_the_page_lists_our_models_first_with_path_and_template(page, runner):
    from llamafactory.webui.common import get_model_path, get_template

    names = [value for _, value in runner.manager.get_elem_by_id("top.model_name").choices]
    assert names[:2] == ["arena-tiny", "demo_sft_merged"] and "Custom" in names
    assert (get_model_path("arena-tiny"), get_template("arena-tiny")) == ("models/arena-tiny", "qwen3_nothink")
    assert get_model_path("Qwen3-4B-Instruct-2507") == "Qwen/Qwen3-4B-Instruct-2507"


def test_no_tab_trusts_code_of_a_model(page, runner):
    for name in ("train.extra_args", "infer.extra_args", "export.extra_args"):
        assert json.loads(runner.manager.get_elem_by_id(name).value)["trust_remote_code"] is False
    model = {"top.model_name": "arena-tiny", "top.model_path": "models/arena-tiny"}
    names = {**model, "train.dataset": ["x"], "train.output_dir": "trial"}
    assert runner._parse_train_args(pressed(page, runner, "run_train", names))["trust_remote_code"] is False
    names = {**model, "eval.dataset": ["demo_sft_valid"], "eval.output_dir": "trial"}
    assert runner._parse_eval_args(pressed(page, runner, "run_eval", names))["trust_remote_code"] is False


@pytest.mark.parametrize("said", [True, "true", 1])
def test_code_of_a_model_is_refused_unless_an_experiment_trusts_it(page, runner, said):
    from gradio import Error
    from llamafactory.chat import chat_model
    from llamafactory.webui.components import export

    names = {"top.model_name": "arena-tiny", "top.model_path": "evil", "train.output_dir": "trial"}
    names |= {"train.dataset": ["x"], "train.extra_args": json.dumps({"trust_remote_code": said})}
    arguments = {"model_name_or_path": "evil", "template": "default", "trust_remote_code": said}
    for job in (
        lambda: runner._parse_train_args(pressed(page, runner, "run_train", names)),
        lambda: chat_model.ChatModel(arguments),
        lambda: export.export_model(arguments | {"export_dir": "x"}),
    ):
        with pytest.raises(Error, match="trust_remote_code is refused"):
            job()
    assert Trust({"evil"}).check(arguments) == arguments


def test_a_key_that_is_typed_in_reaches_the_job_and_no_file(page, runner, monkeypatch):
    monkeypatch.setenv("SWANLAB_API_KEY", "of-the-shell")
    names = {"train.use_swanlab": True, "train.swanlab_api_key": "typed-in-0123456789", "train.dataset": ["x"]}
    names |= dict.fromkeys(("top.model_name", "top.model_path", "train.output_dir"), "trial")
    data = pressed(page, runner, "run_train", names)
    started, saved = runner._parse_train_args(data), runner._build_config_dict(data)
    assert started["use_swanlab"] and saved["train.use_swanlab"]
    assert "typed-in" not in str(started) and "typed-in" not in str(saved)
    assert child_environment()["SWANLAB_API_KEY"] == "typed-in-0123456789"


def test_a_run_that_began_after_the_page_is_shown_with_settings_log_and_chart(page, runner):
    experiment, check = load_experiment("demo"), function_named(page, "check_output_dir")
    adapter, log = experiment.adapter_folder("sft"), experiment.output_folder("sft") / "train.log"
    adapter.mkdir(parents=True)  # as a training of the command line leaves it: without settings of the page's
    log.parent.mkdir(parents=True)
    log.write_text("***** Running training *****\n")
    line = {"current_steps": 3, "total_steps": 6, "loss": 1.0, "percentage": 50}
    (adapter / "trainer_log.jsonl").write_text(json.dumps(line | {"elapsed_time": "1", "remaining_time": "1"}) + "\n")
    shown = check.fn("en", "arena-tiny", "lora", adapter.name)
    assert shown.keys() <= set(check.outputs)
    by_id = {name: shown[runner.manager.get_elem_by_id(f"train.{name}")] for name in ("output_box", "cutoff_len")}
    assert "***** Running training *****" in by_id["output_box"] and by_id["cutoff_len"] == experiment.cutoff_len
    assert shown[runner.manager.get_elem_by_id("train.progress_bar")].constructor_args["value"] == 50
    assert shown[runner.manager.get_elem_by_id("train.loss_viewer")].constructor_args["value"] is not None


def test_an_adapter_is_offered_on_the_base_that_it_was_trained_on_only(page, monkeypatch):
    from gradio.context import LocalContext

    experiment, list_checkpoints = load_experiment("demo"), function_named(page, "list_checkpoints").fn
    for name in (experiment.adapter_folder("sft").name, experiment.adapter_folder("dpo_judge").name, "of_the_page"):
        folder = Path("saves/arena-tiny/lora", name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_model.safetensors").touch()
    merged = Path("saves/demo_sft_merged/lora")
    merged.mkdir(parents=True)
    (merged / "demo_dpo_judge").symlink_to(Path("saves/arena-tiny/lora/demo_dpo_judge").resolve())
    monkeypatch.setattr(LocalContext, "in_event_listener", ContextVar("now", default=True))  # as when the page asks
    offered = {name: list_checkpoints(name, "lora").constructor_args for name in ("arena-tiny", "demo_sft_merged")}
    assert offered["arena-tiny"]["choices"] == ["demo_sft", "of_the_page"] and offered["arena-tiny"]["multiselect"]
    assert offered["demo_sft_merged"]["choices"] == ["demo_dpo_judge"]


def test_a_job_is_our_launcher_and_ends_although_nobody_reads_what_it_prints(tmp_path, monkeypatch):
    """It gets LLaMA Board's own variables, and nothing else of the shell that could change the training."""
    chatty = tmp_path / "chatty"
    chatty.write_text(CHATTY)
    chatty.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(chatty))
    board = {"LLAMABOARD_ENABLED": "1", "LLAMABOARD_WORKDIR": str(tmp_path), "FORCE_TORCHRUN": "1", "USE_V1": "1"}
    monkeypatch.setenv("USE_V1", "1")
    job = Job(["llamafactory-cli", "train", "x.yaml"], env=board, stderr=-1, text=True)
    assert job.wait(20) == 3
    out, said = job.communicate(timeout=1)
    assert out is None and said.rstrip().endswith("the last word")
    assert "called: -P -m factory.launcher train x.yaml" in said
    assert "LLAMABOARD_ENABLED=1" in said and "FORCE_TORCHRUN=1" in said and "USE_V1" not in said
    assert (tmp_path / "board_job.log").stat().st_size > 500_000
