import json
from pathlib import Path

import pytest

from common.errors import ArenaError
from factory.state import inputs_of, names, training_rows

RECIPE = {"dataset": "one, two", "dataset_dir": "data/demo", "model_name_or_path": "org/model"}


@pytest.fixture(autouse=True)
def _export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("data/demo")
    folder.mkdir(parents=True)
    (folder / "dataset_info.json").write_text(
        json.dumps(
            {"one": {"file_name": "one.jsonl"}, "two": {"file_name": "two.jsonl"}, "csv": {"file_name": "x.csv"}}
        )
    )
    (folder / "one.jsonl").write_text("{}\n{}\n{}")  # no newline at the end
    (folder / "two.jsonl").write_text("{}\n\n{}\n")
    (folder / "x.csv").write_text("a\n1\n")


def test_the_rows_of_all_datasets_count():
    assert training_rows(RECIPE) == 5
    assert training_rows({**RECIPE, "max_samples": 2}) == 4
    assert training_rows({**RECIPE, "max_samples": 100}) == 5


@pytest.mark.parametrize(
    "values",
    [
        {"packing": True},
        {"streaming": True},
        {"val_size": 0.1},
        {"mix_strategy": "interleave_under"},
        {"dataset": "csv"},
        {"dataset": "one,unknown_hub_set"},
        {"dataset_dir": "elsewhere"},
        {"dataset": None},
    ],
)
def test_what_cannot_be_known_is_not_guessed(values):
    assert training_rows({**RECIPE, **values}) is None


def test_inputs_are_recipe_data_and_local_models_but_not_what_a_trainer_writes_beside_them():
    model = Path("models/tiny")
    model.mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "training_args.bin"):
        (model / name).write_text(name)
    (model / "checkpoint-1").mkdir()
    recipe = {**RECIPE, "model_name_or_path": "models/tiny"}
    inputs = inputs_of(Path("sft.yaml"), recipe)
    assert inputs["sft.yaml"] == recipe
    assert set(inputs["model_name_or_path models/tiny"]) == {"model.safetensors", "config.json", "tokenizer.json"}
    assert set(inputs["data"]) == {
        "data/demo/dataset_info.json one",
        "data/demo/dataset_info.json two",
        "data/demo/one.jsonl",
        "data/demo/two.jsonl",
    }
    before = inputs_of(Path("sft.yaml"), recipe)
    assert before == inputs
    (model / "model.safetensors").write_text("other")
    changed = inputs_of(Path("sft.yaml"), recipe)
    assert changed != before
    assert [key for key in changed if changed[key] != before[key]] == ["model_name_or_path models/tiny"]


def test_a_large_weights_file_counts_by_size_and_samples(monkeypatch):
    monkeypatch.setattr("factory.state._HASHED_UP_TO", 3)
    Path("models").mkdir()
    Path("models/model.safetensors").write_text("12345")
    inputs = inputs_of(Path("sft.yaml"), {"model_name_or_path": "models"})
    assert inputs["model_name_or_path models"]["model.safetensors"].endswith(" of samples, 5 bytes")


def test_a_model_of_the_hub_is_its_name():
    assert set(inputs_of(Path("sft.yaml"), {"model_name_or_path": "org/model"})) == {"sft.yaml"}


def test_a_damaged_dataset_info_is_an_error_with_a_remedy():
    Path("data/demo/dataset_info.json").write_text("{")
    with pytest.raises(ArenaError, match="is not JSON") as caught:
        training_rows(RECIPE)
    assert caught.value.where == "data/demo/dataset_info.json"


def test_names_come_from_a_comma_list_or_a_yaml_list():
    assert names("a, b,") == ["a", "b"]
    assert names(["a", "b"]) == ["a", "b"]
    assert names(None) == []
