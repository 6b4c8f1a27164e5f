"""The committed experiments for known models: what `run.py new` writes, sized for the card that each names."""

import re

import pytest
from chain import ROOT
from omegaconf import OmegaConf

from common.experiment import load_experiment, read_yaml
from common.llamafactory_schema import known_models
from common.stages import STEPS, TRAININGS
from factory.memory import training_memory
from factory.new_experiment import NewExperiment, render_experiment
from factory.recipe_checks import check_recipes
from factory.recipes import render_recipe
from factory.stage_context import StageContext
from factory.workload import TrainConfig, size_of

PAGE = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| `")]
MADE_HERE = ("demo", "smollm2-135m")  # their base models come from no hub
NAMES = sorted({path.parent.name for path in ROOT.glob("factory_configs/*/experiment.yaml")} - {*MADE_HERE})


def test_the_page_lists_each_preset_as_it_is():
    assert sorted(row[0].split("`")[1] for row in ROWS) == NAMES
    for name, model, template, card, download, licence in ROWS:
        its = load_experiment(name.split("`")[1], ROOT)
        text = (ROOT / its.folder / "experiment.yaml").read_text(encoding="utf-8")
        assert (model, template.split("`")[1]) == (f"`{its.model}`", its.template)
        assert f"one {card.split(' (')[0]} GPU" in its.description
        assert f"{download} to download" in text and licence.removeprefix("gated: ") in text
        gated = its.model.startswith(("meta-llama/", "google/"))
        assert licence.startswith("gated") == ("This model is gated" in text) == ("not gated" not in text) == gated


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_what_new_writes_beside_its_notes_and_first_values(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    its = load_experiment(name)
    committed = read_yaml(ROOT / its.folder / "experiment.yaml")
    fresh = OmegaConf.create(render_experiment(NewExperiment(name, its.model, cutoff_len=its.cutoff_len)))
    own = {"description", "recipes", "precision"}
    assert {k: v for k, v in committed.items() if k not in own} == {k: v for k, v in fresh.items() if k not in own}
    assert its.template == known_models()[its.model.lower()].template
    check_recipes(its, STEPS)
    for training in TRAININGS:
        recipe = read_yaml(ROOT / its.recipe(training))
        assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 16


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_fits_its_card_by_the_forecasts_formula(name, monkeypatch):
    monkeypatch.chdir(ROOT)
    its = load_experiment(name)
    card = int(re.search(r"one (\d+) GB GPU", its.description)[1]) * 0.98  # GiB: what 24 GB and 48 GB cards offer

    def needs(training, longest):
        config = TrainConfig.of(StageContext(its, training).recipe)
        return sum(training_memory(size_of(its.model), config, longest).values())

    only_sft = "SFT on one" in its.description
    for training in TRAININGS[:1] if only_sft else TRAININGS:
        assert needs(training, its.cutoff_len) < card, training
    if only_sft:
        assert card < needs("dpo_judge", its.cutoff_len)
        assert name != "qwen2.5-1.5b" or needs("dpo_judge", its.cutoff_len) < 10, "the file says 10 GB"
        assert max(needs(training, 512) for training in TRAININGS) < card, "the file says that 512 tokens fit"
    (stated,) = re.findall(rf"^\|[^|]* {re.escape(name)}[ ,][^|]*\| ([\d.]+) \|", PAGE, re.MULTILINE)
    assert float(stated) == pytest.approx(needs("sft", its.cutoff_len), abs=0.06), "docs/presets.md says so"
    if name == "gemma2-9b":
        assert max(needs(training, 1024) for training in TRAININGS) < 24 * 0.98, "the file says that 1024 tokens fit"
        assert needs("dpo_judge", 2048) > 24 * 0.98 > needs("sft", 2048), "docs/presets.md says so"


@pytest.mark.slow
def test_every_preset_and_step_loads_in_llamafactorys_own_parser(tmp_path, monkeypatch):
    """All of them in one process, at 4, 8 and no bits; on a CPU bf16 needs use_cpu beside it."""
    from llamafactory.hparams import get_infer_args, get_train_args

    monkeypatch.chdir(tmp_path)
    for name in (*NAMES, "demo"):
        for bits in (4, 8, None):
            its = load_experiment(name, ROOT).model_copy(update={"quantization_bit": bits})
            for step in STEPS.values():
                recipe = OmegaConf.to_container(OmegaConf.create(render_recipe(its, step.name)))
                if step.merges:
                    model, data, method, _ = get_infer_args(dict(recipe))
                    assert model.adapter_name_or_path == [recipe["adapter_name_or_path"]]
                    assert model.quantization_bit is None
                else:
                    model, data, training, method, _ = get_train_args(recipe | {"use_cpu": True})
                    assert (model.quantization_bit, training.bf16) == (bits, recipe["bf16"])
                    assert method.lora_rank == recipe["lora_rank"]
                    assert data.dataset == [recipe["dataset"]] and data.cutoff_len == its.cutoff_len
                assert (method.stage, data.template) == (recipe.get("stage", "sft"), its.template)
                assert data.enable_thinking is recipe.get("enable_thinking", True)
