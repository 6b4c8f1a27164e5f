import json
from pathlib import Path

import pytest

from factory.fingerprint import data_sets, differences, local_models, training_rows

RECIPE = {"dataset": "one, two", "dataset_dir": "data/demo", "model_name_or_path": "org/model"}
INFO = Path("data/demo/dataset_info.json")


@pytest.fixture(autouse=True)
def _export(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    INFO.parent.mkdir(parents=True)
    files = {"one": "one.jsonl", "two": "two.jsonl", "csv": "x.csv"}
    INFO.write_text(json.dumps({name: {"file_name": file} for name, file in files.items()}))
    (INFO.parent / "one.jsonl").write_text("{}\n{}\n{}")  # no newline at the end
    (INFO.parent / "two.jsonl").write_text("{}\n\n{}\n")
    (INFO.parent / "x.csv").write_text("a\n1\n")


@pytest.mark.parametrize(
    ("values", "rows"),
    [
        ({}, 5),
        ({"max_samples": 2}, 4),
        ({"packing": True}, None),
        ({"mix_strategy": "interleave_under"}, None),
        ({"dataset": "csv"}, None),
        ({"dataset": "one,unknown_hub_set"}, None),
        ({"dataset_dir": "elsewhere"}, None),
    ],
)
def test_the_rows_that_must_be_trained_are_counted_where_the_recipe_fixes_them(values, rows):
    assert training_rows({**RECIPE, **values}) == rows


def test_models_and_data_count_by_their_content_and_known_sums_are_not_read_again():
    model = Path("models/tiny")
    (model / "checkpoint-1").mkdir(parents=True)
    for name in ("model.safetensors", "config.json", "tokenizer.json", "trainer_state.json", "training_args.bin"):
        (model / name).write_text(name)
    found = local_models({"model_name_or_path": "models/tiny", "adapter_name_or_path": "org/none"})
    assert {key: set(value) for key, value in found.items()} == {
        "model_name_or_path models/tiny": {"model.safetensors", "config.json", "tokenizer.json"}
    }
    known = {"data/demo/one.jsonl": "sha256:known"}
    data = data_sets(RECIPE, known)
    assert data["data/demo/one.jsonl"] == "sha256:known" and len(data["data/demo/two.jsonl"]) == len("sha256:") + 64
    (INFO.parent / "two.jsonl").write_text("{}\n{}\n")
    assert differences(data, data_sets(RECIPE, known)) == ["data/demo/two.jsonl has other content"]
    found = differences({"data": {"a": "sha256:1"}}, {"data": {"b": "sha256:1"}, "x": 1})
    assert found == ["data: a is gone", "data: b is new", "x (absent) -> 1"]


def test_a_change_in_any_block_of_a_large_file_of_weights_is_noticed():
    path = Path("model/model.safetensors")
    path.parent.mkdir()
    with path.open("wb") as file:
        file.truncate(300 * 2**20)
    before = local_models({"model_name_or_path": "model"})
    with path.open("r+b") as file:
        file.seek(200 * 2**20)
        file.write(b"1" * 4 * 2**20)
    assert local_models({"model_name_or_path": "model"}) != before
