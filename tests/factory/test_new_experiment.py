import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from chain import call

from common.errors import ArenaError
from common.experiment import load_experiment, read_yaml
from common.stages import STEPS, TRAININGS
from factory.devices import Devices, Gpu
from factory.new_experiment import NewExperiment, new_experiment
from factory.recipe_checks import check_recipes
from factory.recipes import is_as_rendered, write_recipe

T4 = Gpu("T4", 15.0, 14.9, False)


@pytest.fixture(autouse=True)
def card(monkeypatch):
    """A machine with a GPU that has bf16, unless a test puts another in its place."""
    seen = [Devices(accelerator="cuda", gpus=(Gpu("A100", 80.0, 79.0, True),)), ""]
    monkeypatch.setattr("factory.new_experiment.devices", lambda: seen[0])
    monkeypatch.setattr("factory.new_experiment.cpu_with_bf16", lambda: seen[1])
    return seen


@pytest.mark.parametrize(
    ("seen", "cpu", "numbers", "said"),
    [
        (Devices(accelerator="cuda", gpus=(T4,)), "", {"bf16": False, "fp16": True}, "fp16: T4"),
        (Devices(accelerator="mps"), "", {}, "bf16"),
        (Devices(), "avx512_bf16", {"use_cpu": True}, "bf16 on the CPU (avx512_bf16)"),
        (Devices(), "", {"bf16": False}, "fp32: there is no GPU here"),
        (Devices(failure="torch is broken"), "amx_bf16", {"bf16": False}, "fp32: torch is broken"),
    ],
)
def test_bf16_is_written_only_where_the_machine_has_it(workplace, card, seen, cpu, numbers, said):
    card[:] = seen, cpu
    done = call("new", "mine", "--model", "Qwen/Qwen3-8B")
    assert done.exit_code == 0 and f"trains in {said}" in done.stderr, done.output
    its = load_experiment("mine")
    assert all(its.recipes.get(training, {}) == numbers for training in TRAININGS)
    recipe = read_yaml(its.recipe("rm"))
    assert {key: recipe.get(key) for key in numbers} == numbers and recipe["bf16"] is ("bf16" not in numbers)
    assert (said.split(":")[0] in its.folder.joinpath("experiment.yaml").read_text()) or not numbers


def test_it_makes_a_whole_experiment(workplace):
    result = call("new", "mine", "--model", "Qwen/Qwen3-8B", "--bits", "8", "--cutoff", "1024", "--json")
    assert result.exit_code == 0, result.output
    made = {"folder": "factory_configs/mine", "model": "Qwen/Qwen3-8B", "template": "qwen3"}
    assert json.loads(result.stdout) == made
    its = load_experiment("mine")
    assert (its.model, its.template, its.enable_thinking) == ("Qwen/Qwen3-8B", "qwen3", False)
    assert (its.quantization_bit, its.cutoff_len) == (8, 1024)
    assert sorted(p.name for p in its.folder.iterdir()) == sorted(["experiment.yaml", *(f"{s}.yaml" for s in STEPS)])
    for step in STEPS:
        assert is_as_rendered(its.recipe(step).read_text(encoding="utf-8"))
        assert write_recipe(its, step).state == "unchanged"
    check_recipes(its, STEPS)
    text = (its.folder / "experiment.yaml").read_text(encoding="utf-8")
    assert text.startswith("# Made by: python run.py new mine --model Qwen/Qwen3-8B --bits 8 --cutoff 1024\n")
    assert "gated" not in text


def test_the_defaults_are_4_bits_and_2048_tokens(workplace):
    result = call("new", "mine", "--model", "google/gemma-2-2b-it")
    assert result.exit_code == 0, result.output
    assert "template gemma2; next: python run.py prepare -e mine --train FILE" in result.output
    its = load_experiment("mine")
    assert (its.quantization_bit, its.cutoff_len) == (4, 2048)
    text = (its.folder / "experiment.yaml").read_text(encoding="utf-8")
    assert "accept its licence with your account on https://huggingface.co/google/gemma-2-2b-it" in text
    assert "HF_TOKEN" in text and "hf auth login" in text


def test_a_local_folder_is_a_model_and_says_which_templates_it_may_need(workplace, tiny_base):
    result = call("new", "local", "--model", str(tiny_base))
    assert result.exit_code == 2 and "perhaps: qwen3, qwen3_nothink" in result.output
    assert not Path("factory_configs/local").exists()
    result = call("new", "local", "--model", str(tiny_base), "--template", "qwen3_nothink", "--bits", "none")
    assert result.exit_code == 0, result.output
    its = load_experiment("local")
    assert (its.model, its.quantization_bit) == (str(tiny_base), None)
    assert "revision" not in (its.folder / "experiment.yaml").read_text(encoding="utf-8")


def test_a_failure_leaves_nothing(workplace, monkeypatch):
    monkeypatch.setattr("factory.new_experiment.render_recipe", Mock(side_effect=ArenaError("no room")))
    with pytest.raises(ArenaError, match="no room"):
        new_experiment(NewExperiment("mine", "Qwen/Qwen3-8B"))
    assert list(Path("factory_configs").iterdir()) == []


def test_a_copy_keeps_settings_and_hand_edits_under_its_own_name(workplace):
    assert call("new", "first", "--model", "Qwen/Qwen3-8B", "--cutoff", "512").exit_code == 0
    first = load_experiment("first")
    recipe = first.recipe("sft")
    recipe.write_text(recipe.read_text().replace("lora_rank: 64", "lora_rank: 7"))
    done = call("new", "second", "--from", "first")
    assert done.exit_code == 0 and "sft.yaml: with the hand edits of" in done.stderr, done.output
    assert "next: python run.py prepare -e second --train FILE" in done.stdout
    copy = load_experiment("second")
    assert (copy.model, copy.cutoff_len) == (first.model, 512)
    edited = read_yaml(copy.recipe("sft"))
    assert edited["lora_rank"] == 7 and edited["dataset"] == "second_sft_train"
    assert edited["output_dir"] == copy.adapter_folder("sft").as_posix()
    assert "/first" not in copy.recipe("rm").read_text() + copy.folder.joinpath("experiment.yaml").read_text()
    check_recipes(copy, TRAININGS)
    for wrong in (["--from", "first", "--cutoff", "64"], [], ["--from", "first", "--model", "x"], ["--from", "none"]):
        assert call("new", "third", *wrong).exit_code == 2


def test_recipes_are_rendered_without_votes(workplace):
    assert call("new", "mine", "--model", "Qwen/Qwen3-8B").exit_code == 0
    mine = load_experiment("mine")
    settings = mine.folder / "experiment.yaml"
    settings.write_text(settings.read_text().replace("cutoff_len: 2048", "cutoff_len: 300"))
    mine.recipe("rm").write_text(mine.recipe("rm").read_text() + "# by hand\n")
    done = call("render", "-e", "mine", "--json")
    states = json.loads(done.stdout)
    assert states[str(mine.recipe("sft"))] == "updated" and states[str(mine.recipe("rm"))] == "hand-edited"
    assert read_yaml(mine.recipe("sft"))["cutoff_len"] == 300 and "the votes" not in done.stderr
