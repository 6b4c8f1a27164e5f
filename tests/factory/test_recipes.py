import re
from functools import partial

import pytest
import yaml
from chain import ROOT, experiment_of
from omegaconf import OmegaConf

from common.experiment import load_experiment
from common.stages import STEPS, TRAININGS, merge_of
from factory.recipes import as_yaml, is_as_rendered, render_recipe, write_recipe

experiment = partial(experiment_of, "exp", model="org/base-4b", cutoff_len=1024)
EXPERIMENTS = sorted(path.parent.name for path in ROOT.glob("factory_configs/*/experiment.yaml"))
COMMITTED = [(name, step) for name in EXPERIMENTS for step in STEPS]
SECTIONS = {"train": ["model", "method", "dataset", "output", "train", "eval"], "export": ["model", "export"]}


def read(text: str) -> dict:
    return OmegaConf.to_container(OmegaConf.create(text))


@pytest.mark.parametrize(("name", "step"), COMMITTED)
def test_a_committed_recipe_is_what_its_template_renders_and_native(name, step):
    its = load_experiment(name, ROOT)
    text = (ROOT / its.recipe(step)).read_text(encoding="utf-8")
    assert text == render_recipe(its, step), "render it again: python run.py prepare"
    assert is_as_rendered(text)
    command = "export" if STEPS[step].merges else "train"
    assert f"llamafactory-cli {command} factory_configs/{name}/{step}.yaml\n" in text
    assert [each for each in re.findall(r"^### (\w+)$", text, re.MULTILINE) if each != "more"] == SECTIONS[command]
    assert text.endswith("\n") and not re.search(r"\n\n\n| $", text, re.MULTILINE)
    content = read(text)
    assert not content.keys() & {"overwrite_output_dir", "trust_remote_code", "val_size", "tokenized_path", "packing"}
    assert yaml.safe_load(text) == content, "as OmegaConf reads it"


def test_a_merge_fits_its_training():
    for training in TRAININGS:
        its = experiment()
        trained, merged = read(render_recipe(its, training)), read(render_recipe(its, merge_of(training)))
        assert merged["adapter_name_or_path"] == trained["output_dir"] == f"saves/base-4b/lora/exp_{training}"
        copy = "exp_sft" if training == "dpo_judge" else "base"
        assert merged["model_name_or_path"] == f"saves/base-4b/dequantised/{copy}_4bit"
        onto_base = read(render_recipe(experiment(merge_onto="base"), merge_of(training)))
        assert onto_base["model_name_or_path"] == trained["model_name_or_path"]
        assert merged["template"] == trained["template"]
        assert merged["export_dir"] == f"outputs/exp/{training}/merged" and "quantization_bit" not in merged
        assert merged.get("stage") == ("rm" if training == "rm" else None)


def test_dpo_starts_where_the_experiment_says():
    its = experiment(start_from={"dpo_judge": "sft", "dpo_reward": "base"}, revision="abc123")
    judge, reward = read(render_recipe(its, "dpo_judge")), read(render_recipe(its, "dpo_reward"))
    assert judge["model_name_or_path"] == "outputs/exp/sft/merged" and "model_revision" not in judge
    assert (reward["model_name_or_path"], reward["model_revision"]) == ("org/base-4b", "abc123")
    assert judge["dataset"] == "exp_dpo_judge_train"
    assert reward["dataset"] == read(render_recipe(its, "rm"))["dataset"] == "exp_dpo_reward_train"
    assert (judge["stage"], judge["pref_loss"], judge["pref_beta"]) == ("dpo", "sigmoid", 1.0)
    assert reward["pref_beta"] == 0.1
    assert "adapter_name_or_path" not in judge
    assert "outputs/exp/sft/merged, made by: python run.py sft" in render_recipe(its, "dpo_judge")


@pytest.mark.parametrize(
    ("step", "first"),
    [
        ("sft", {"lora_rank": 8, "do_train": True, "neftune_noise_alpha": 5.0, "use_rslora": True, "eval_delay": 2}),
        ("merge_sft", {"export_legacy_format": False, "finetuning_type": "lora", "export_size": 2}),
    ],
)
def test_first_values_stand_in_place_or_at_the_end(step, first):
    text = render_recipe(experiment(recipes={step: first}), step)
    assert read(text) | first == read(text)
    named = set(read(render_recipe(experiment(), step)))
    more = text.partition("### more\n")[2]
    assert re.findall(r"^(\w+):", more, re.MULTILINE) == [key for key in first if key not in named]
    assert "3rd place" not in "".join(re.findall(r"^lora_rank: 8.*", text, re.MULTILINE)), "a reason is for its value"


def test_thinking_and_remote_code_appear_only_when_declared():
    plain = read(render_recipe(experiment(), "sft"))
    assert not plain.keys() & {"enable_thinking", "trust_remote_code", "model_revision"}
    its = experiment(enable_thinking=False, trust_remote_code=True, merge_onto="base", revision="v1")
    told = read(render_recipe(its, "sft"))
    assert (told["enable_thinking"], told["trust_remote_code"], told["model_revision"]) == (False, True, "v1")
    assert "quantization_bit" not in read(render_recipe(experiment(quantization_bit=None), "sft"))


@pytest.mark.parametrize("text", ["no", "", "a: b", "# c", "{x}", "null", "1e5", "ünï \n \"q\" 'r'", "- a", "yes #1"])
def test_a_hostile_name_survives_the_rendering(text):
    name = text.replace("\n", "") or " "
    its = experiment(model=name, template=name, description=text)
    content = read(render_recipe(its, "sft"))
    assert (content["model_name_or_path"], content["template"]) == (name, name) and content["stage"] == "sft"


def test_small_floats_are_written_as_people_write_them():
    written = [as_yaml(x) for x in (1e-4, 5.5e-6, 0.05, 0.0, 1.0, -1e-5)]
    assert written == ["1.0e-4", "5.5e-6", "0.05", "0.0", "1.0", "-1.0e-5"]


def test_the_life_of_a_recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    its = experiment()
    path = its.recipe("sft")
    outcome = write_recipe(its, "sft")
    assert (outcome.state, outcome.diff, outcome.path) == ("written", "", its.recipe("sft"))
    first = path.read_text(encoding="utf-8")
    assert write_recipe(its, "sft").state == "unchanged"
    outcome = write_recipe(experiment(cutoff_len=512), "sft")
    assert outcome.state == "updated" and "sha256" not in outcome.diff
    assert "-cutoff_len: 1024" in outcome.diff and "+cutoff_len: 512" in outcome.diff
    edited = first.replace("learning_rate: 1.0e-4", "learning_rate: 3.0e-4")
    path.write_text(edited, encoding="utf-8")
    outcome = write_recipe(its, "sft")
    assert outcome.state == "hand-edited" and path.read_text(encoding="utf-8") == edited
    changed = [line[:15] for line in re.findall(r"^[-+][a-z].*", outcome.diff, re.MULTILINE)]
    assert changed == ["-learning_rate:", "+learning_rate:"]
    assert write_recipe(its, "sft", force=True).state == "replaced"
    assert path.read_text(encoding="utf-8") == first
    path.write_bytes(first.replace("\n", "\r\n").encode())
    assert write_recipe(its, "sft").state == "unchanged", "other line ends are no edit"
    assert [p.name for p in path.parent.iterdir()] == ["sft.yaml"]


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text + "# my note\n",
        lambda text: re.sub("sha256:....", "sha256:0000", text),
        lambda text: re.sub(r"^# Rendered.*\n", "", text, flags=re.MULTILINE),
        lambda text: "",
        lambda text: text + "# sha256:" + "0" * 64 + "\n",
    ],
)
def test_every_hand_edit_is_recognised(tmp_path, monkeypatch, edit):
    monkeypatch.chdir(tmp_path)
    its = experiment()
    write_recipe(its, "sft")
    path = its.recipe("sft")
    path.write_text(edit(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert write_recipe(its, "sft").state == "hand-edited"
