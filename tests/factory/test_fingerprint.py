import json
from pathlib import Path

import pytest

from factory.fingerprint import local_models, training_rows

RECIPE = {"dataset": "one, two", "dataset_dir": "data/demo", "model_name_or_path": "org/model"}
NOT_FIXED = [{"packing": True}, {"mix_strategy": "interleave_under"}, {"dataset": "csv"}, {"dataset_dir": "elsewhere"}]
NOT_FIXED.append({"dataset": "one,unknown_hub_set"})
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


@pytest.mark.parametrize("values, rows", [({}, 5), ({"max_samples": 2}, 4), *((each, None) for each in NOT_FIXED)])
def test_the_rows_that_must_be_trained_are_counted_where_the_recipe_fixes_them(values, rows):
    assert training_rows({**RECIPE, **values}) == rows


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
