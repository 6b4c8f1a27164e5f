"""LLaMA Board's folder: configurations, runs and models, and what stays of the user's."""

import json
import os

import pytest
import yaml

from common.errors import ArenaError
from common.experiment import read_yaml
from factory.board import BoardModel, board_config, board_models, configs_newest_first, lay_out
from factory.fingerprint import model_files
from factory.recipes import write_recipe
from factory.stage_context import StageContext
from factory.state import StageState


def trained(experiment, stage="sft"):
    adapter, output = experiment.adapter_folder(stage), experiment.output_folder(stage)
    adapter.mkdir(parents=True)
    output.mkdir(parents=True)
    bar = " 10%|█         | 4/40 [00:01<00:10,  3.5it/s]"
    (output / "train.log").write_text(f"\x1b[32m***** Running training *****\x1b[0m\n{bar}\n{{'loss': 1.0}}")
    return adapter


def test_the_folder_holds_what_the_page_reads(exam, workplace):
    adapter, judge = trained(exam), trained(exam, "dpo_judge")
    exam.data_folder.mkdir(parents=True)
    (exam.data_folder / "manifest.json").write_text("{}")
    (workplace / "llamaboard_config").mkdir()
    (workplace / "llamaboard_config" / "mine.yaml").write_text("a: 1\n")
    configs, notes = lay_out()
    assert not exam.adapter_folder("rm").exists(), "nothing is published where nothing was trained"
    assert [path.name for path in configs] == [f"exam_{s}.yaml" for s in ("sft", "dpo_judge", "dpo_reward", "rm")]
    (workplace / "llamaboard_config" / "demo_sft.yaml").touch()
    os.utime(workplace / "llamaboard_config" / "demo_sft.yaml", (1, 1))
    write_recipe(exam, "rm")
    listed = configs_newest_first()
    assert listed[:2] == ["demo_sft.yaml", "mine.yaml"], "the demo's, then the newest"
    lay_out()
    assert configs_newest_first()[1] == "exam_rm.yaml"
    assert notes == []
    assert yaml.safe_load(configs[0].read_text())["train.dataset"] == ["exam_sft_train"]
    assert (workplace / "llamaboard_config" / "mine.yaml").read_text() == "a: 1\n"
    assert yaml.safe_load((adapter / "llamaboard_config.yaml").read_text())["top.model_name"] == "tiny"
    assert (adapter / "running_log.txt").read_text() == "***** Running training *****\n{'loss': 1.0}\n"
    assert "running_log.txt" not in model_files(adapter), "no part of the adapter: what was merged from it stays merged"
    link = workplace / "saves" / "exam_sft_merged" / "lora" / judge.name
    assert link.is_symlink() and link.resolve() == judge.resolve(), "offered on the base that it was trained on"
    user = workplace / "llamaboard_cache" / "user_config.yaml"
    assert yaml.safe_load(user.read_text())["last_model"] == "tiny"
    (adapter / "llamaboard_config.yaml").write_text("top.model_name: own\n")
    user.write_text("lang: zh\n")
    lay_out()
    assert (adapter / "llamaboard_config.yaml").read_text() == "top.model_name: own\n"
    assert user.read_text() == "lang: zh\n"


@pytest.mark.parametrize(("content", "words"), [("a: [\n", ""), ("template:", "template"), ("lora_rank: x", "rank")])
def test_a_faulty_experiment_or_recipe_is_named_and_the_others_are_there(exam, workplace, content, words):
    broken = workplace / "factory_configs" / "broken"
    broken.mkdir()
    (broken / "experiment.yaml").write_text("modle: x\n")
    write_recipe(exam, "rm")
    recipe, key = exam.recipe("rm"), content.split(":")[0]
    kept = [line for line in recipe.read_text().splitlines() if not line.startswith((f"{key}:", "lora_alpha:"))]
    recipe.write_text("\n".join([*kept, content] if content != "template:" else kept))
    configs, notes = lay_out()
    assert [path.stem for path in configs] == ["exam_sft", "exam_dpo_judge", "exam_dpo_reward"]
    assert any("experiment broken is left out" in note for note in notes)
    (note,) = (note for note in notes if note.startswith("exam rm"))
    assert "factory_configs/exam/rm.yaml" in note and words in note


def test_a_run_is_shown_with_the_recipe_that_it_began_with(exam, workplace):
    settings, today = trained(exam) / "llamaboard_config.yaml", workplace / "llamaboard_config" / "exam_sft.yaml"
    write_recipe(exam, "sft")
    recipe = read_yaml(exam.recipe("sft"))
    for length in (1234, 999):  # the second: another run in the same folder
        started = {str(exam.recipe("sft")): {**recipe, "cutoff_len": length}}
        StageState(exam.output_folder("sft")).begin("train", started)
        lay_out()
        assert yaml.safe_load(settings.read_text())["train.cutoff_len"] == length
        assert yaml.safe_load(today.read_text())["train.cutoff_len"] == recipe["cutoff_len"] == 512
    (exam.output_folder("sft") / "state.json").write_text("{")
    assert any("the run of exam sft is left out" in note for note in lay_out()[1])


def test_what_no_element_takes_is_an_extra_argument_or_refused(make_experiment):
    recipe = {"template": "qwen3_nothink", "stage": "dpo", "warmup_steps": 0.05, "save_steps": 3}
    recipe |= {"report_to": ["wandb", "tensorboard"], "quantization_bit": 8}
    context = StageContext(make_experiment(), "dpo_judge")
    values = board_config(context, recipe, "none")
    extra = json.loads(values["train.extra_args"])
    assert (extra["warmup_steps"], extra["save_steps"]) == (0.05, 3)
    assert extra["report_to"] == ["wandb", "tensorboard"] and values["train.report_to"] == "wandb"
    assert values["top.quantization_bit"] == "8" and yaml.safe_load(yaml.safe_dump(values)) == values
    for key, value in {"pref_beta": 2.0, "double_quantization": False}.items():
        with pytest.raises(ArenaError, match=f"{key}: "):
            board_config(context, recipe | {key: value}, "none")


def test_every_base_has_its_own_name_and_folder(make_experiment):
    one, two = make_experiment("one", model="models/tiny"), make_experiment("two", model="other/tiny")
    models = board_models([one, two, make_experiment("three", model="models/tiny")])
    assert models["one", "sft"] == models["three", "rm"] == BoardModel("tiny", "models/tiny", "qwen3_nothink")
    assert models["one", "sft"].folder == one.adapter_folder("sft").parent
    assert models["two", "sft"].name == "tiny of two"
    assert models["two", "sft"].folder.as_posix() == "saves/tinyoftwo/lora"
    assert models["one", "dpo_judge"] == BoardModel("one_sft_merged", "outputs/one/sft/merged", "qwen3_nothink")
