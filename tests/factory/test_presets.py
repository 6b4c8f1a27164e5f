import re
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from common.experiment import load_experiment, read_yaml
from common.llamafactory_schema import known_models
from common.stages import STEPS, TRAININGS
from factory.memory import training_memory
from factory.model_size import size_of
from factory.new_experiment import render_experiment
from factory.presets import PRESETS, write_preset
from factory.recipe_checks import check_recipes
from factory.recipes import render_recipe
from factory.stage_context import StageContext
from factory.train_config import TrainConfig

ROOT = Path(__file__).parents[2]
NAMES = [preset.name for preset in PRESETS]
# What LLaMA-Factory itself takes for these models; Phi-4-mini's it has in its table, and forgets for a small letter.
TEMPLATES = {
    "qwen3-4b": ("Qwen/Qwen3-4B-Instruct-2507", "qwen3_nothink"),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B-Instruct", "llama3"),
    "llama3.1-8b": ("meta-llama/Meta-Llama-3.1-8B-Instruct", "llama3"),
    "gemma2-9b": ("google/gemma-2-9b-it", "gemma2"),
    "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", "qwen"),
    "qwen3-8b": ("Qwen/Qwen3-8B", "qwen3"),
    "phi4-mini": ("microsoft/Phi-4-mini-instruct", "phi4_mini"),
    "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", "qwen"),
}


def test_the_presets_are_the_committed_experiments():
    folders = {path.parent.name for path in ROOT.glob("factory_configs/*/experiment.yaml")}
    assert folders == {"demo", *NAMES}
    assert set(NAMES) == set(TEMPLATES)


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_a_committed_preset_is_what_is_rendered(preset, tmp_path):
    write_preset(preset, tmp_path)
    fresh = tmp_path / "factory_configs" / preset.name
    committed = ROOT / "factory_configs" / preset.name
    assert sorted(p.name for p in committed.iterdir()) == sorted(p.name for p in fresh.iterdir())
    for path in fresh.iterdir():
        there = (committed / path.name).read_text(encoding="utf-8")
        assert there == path.read_text(encoding="utf-8"), "render it anew: python -m factory.presets"


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_a_preset_names_its_model_and_what_it_needs(preset):
    its = load_experiment(preset.name, ROOT)
    assert (its.model, its.template) == TEMPLATES[preset.name]
    assert known_models()[its.model.lower()].template == its.template
    assert its.enable_thinking is (False if its.template == "qwen3" else None)
    assert its.cutoff_len == (1024 if preset.name == "qwen2.5-1.5b" else 2048)
    text = render_experiment(preset)
    assert max(map(len, text.splitlines())) <= 160
    gated = its.model.startswith(("meta-llama/", "google/"))
    assert ("This model is gated" in text) == gated
    assert ("not gated" in text) == (not gated)
    check_recipes(its, STEPS, ROOT)
    for training in TRAININGS:
        recipe = read_yaml(ROOT / its.recipe(training))
        assert recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"] == 16


def test_the_page_lists_each_preset_as_it_is():
    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| `")
    ]
    assert sorted(row[0].split("`")[1] for row in rows) == sorted(NAMES)
    for name, model, template, card, download, licence in rows:
        its = load_experiment(name.split("`")[1], ROOT)
        text = (ROOT / its.folder / "experiment.yaml").read_text(encoding="utf-8")
        assert (model, template.split("`")[1]) == (f"`{its.model}`", its.template)
        assert f"one {card.split(' (')[0]} GPU" in its.description
        assert f"{download} to download" in text and licence.removeprefix("gated: ") in text
        assert licence.startswith("gated") == ("This model is gated" in text)


@pytest.mark.parametrize("preset", PRESETS, ids=NAMES)
def test_a_preset_fits_its_card_by_the_forecasts_formula(preset, monkeypatch):
    monkeypatch.chdir(ROOT)
    its = load_experiment(preset.name)
    card = int(re.search(r"one (\d+) GB GPU", its.description)[1]) * 0.98  # GiB: what 24 GB and 48 GB cards offer

    def takes(training, longest):
        config = TrainConfig.of(StageContext(its, training).recipe)
        return sum(training_memory(size_of(its.model), config, longest).values())

    only_sft = "SFT on one" in its.description
    for training in TRAININGS[:1] if only_sft else TRAININGS:
        assert takes(training, its.cutoff_len) < card, training
    if only_sft:
        assert card < takes("dpo_judge", its.cutoff_len) < 10, "the file says 10 GB"
        assert max(takes(training, 512) for training in TRAININGS) < card, "the file says that 512 tokens fit"
    if preset.name == "gemma2-9b":
        assert max(takes(training, 1024) for training in TRAININGS) < 24 * 0.98, "the file says that 1024 tokens fit"
        assert takes("dpo_judge", 2048) > 24 * 0.98 > takes("sft", 2048), "docs/presets.md says so"


@pytest.mark.slow
def test_every_preset_and_step_loads_in_llamafactorys_own_parser(tmp_path, monkeypatch):
    """All of them in one process, at 4, 8 and no bits; on a CPU bf16 needs use_cpu beside it."""
    from llamafactory.data.template import TEMPLATES as THEIRS
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS
    from llamafactory.hparams import get_infer_args, get_train_args

    monkeypatch.chdir(tmp_path)
    names = {id: name for name, ids in SUPPORTED_MODELS.items() for id in ids.values()}
    seen = 0
    for preset in PRESETS:
        known = names[preset.model]
        for bits in (4, 8, None):
            its = load_experiment(preset.name, ROOT).model_copy(update={"quantization_bit": bits})
            assert its.template in THEIRS
            assert its.template == DEFAULT_TEMPLATE.get(known) or known == "Phi-4-3.8B-instruct"
            for step in STEPS.values():
                recipe = OmegaConf.to_container(OmegaConf.create(render_recipe(its, step.name)))
                if step.merges:
                    model, data, method, _ = get_infer_args(dict(recipe))
                    assert model.export_dir == recipe["export_dir"]
                    assert model.adapter_name_or_path == [recipe["adapter_name_or_path"]]
                    assert model.quantization_bit is None
                else:
                    model, data, training, method, _ = get_train_args(recipe | {"use_cpu": True})
                    assert (model.quantization_bit, training.bf16, method.lora_rank) == (
                        bits,
                        True,
                        recipe["lora_rank"],
                    )
                    assert data.dataset == [recipe["dataset"]] and data.cutoff_len == its.cutoff_len
                assert (method.stage, data.template) == (recipe.get("stage", "sft"), its.template)
                assert data.enable_thinking is recipe.get("enable_thinking", True)
                seen += 1
    assert seen == len(PRESETS) * len(STEPS) * 3
