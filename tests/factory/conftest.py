"""An experiment that LLaMA-Factory itself trains in seconds."""

import json
from pathlib import Path

import pytest

from common.experiment import load_experiment, parse_experiment
from factory.demo import BaseModelSize, build_base_model
from factory.recipes import TEMPLATES, write_recipe

RECIPE = {"max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "logging_steps": 1}
RECIPE |= {"save_steps": 2, "save_total_limit": None, "lora_rank": 4, "additional_target": "embed_tokens,lm_head"}
RECIPE |= {"preprocessing_num_workers": 1, "dataloader_num_workers": 0, "learning_rate": 1.0e-2}
RECIPE |= {"bf16": False, "plot_loss": False, "report_to": "none"}


@pytest.fixture
def exam(workplace):
    """An experiment in its file, of a model that is not here."""
    folder = workplace / "factory_configs" / "exam"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("model: models/tiny\ntemplate: qwen3_nothink\ncutoff_len: 512\n")
    return load_experiment("exam")


@pytest.fixture
def trainable(tmp_path, monkeypatch):
    """A function that makes an experiment of a tiny base and 16 battles in two parts; in a folder with blanks."""
    place = tmp_path / "my own place"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    Path("templates").symlink_to(TEMPLATES)
    turns = [(("human", f"Which is better, {n}?"), ("gpt", "ABC"[n % 3])) for n in range(20)]
    talks = [[{"from": speaker, "value": text} for speaker, text in both] for both in turns]
    rows = [json.dumps({"conversations": talk}) + "\n" for talk in talks]
    size = BaseModelSize(vocabulary=300, hidden=32, layers=2, heads=2, feed_forward=64, positions=256)
    build_base_model(Path("models/a tiny one"), rows, seed=1, size=size)
    (data := Path("data/demo")).joinpath("sft_train").mkdir(parents=True)
    parts = {"sft_train/part-00000": rows[:9], "sft_train/part-00001": rows[9:16], "sft_valid": rows[16:]}
    for name, part in parts.items():
        (data / f"{name}.jsonl").write_text("".join(part))
    shape = {"formatting": "sharegpt", "columns": {"messages": "conversations"}}
    files = {"demo_sft_train": "sft_train", "demo_sft_valid": "sft_valid.jsonl"}
    info = {name: {"file_name": file, **shape} for name, file in files.items()}
    (data / "dataset_info.json").write_text(json.dumps(info))

    def make(recipe: dict | None = None, **changed):
        keys = {"model": "models/a tiny one", "template": "qwen3_nothink", "cutoff_len": 128}
        recipes = {"sft": {**RECIPE, **(recipe or {})}}
        experiment = parse_experiment({**keys, **changed, "recipes": recipes}, "demo", where="here")
        for step in ("sft", "merge_sft"):
            write_recipe(experiment, step, force=True)
        return experiment

    return make
