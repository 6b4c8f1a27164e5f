"""A GGUF file is used only with the judge that it was made of."""

import json
from types import SimpleNamespace

import pytest

from common.errors import ArenaError, UsageError
from common.files import sha256_of
from scoring.engines.llama_cpp import check_gguf, find_gguf, gguf_path, manifest_path, source_files

SOURCE = ["config.json", "judge.json", "model.safetensors", "tokenizer.json"]


@pytest.fixture
def judge(tmp_path):
    """A merged folder with stand-ins for its files; no weight is read here."""
    folder = tmp_path / "merged"
    folder.mkdir()
    for name in (*SOURCE, "README.md"):
        (folder / name).write_text(name)
    return SimpleNamespace(folder=folder, source={"experiment": "mine", "stage": "dpo_judge"})


def exported(judge, quantization="q8_0"):
    path = gguf_path(judge.folder, quantization)
    path.write_bytes(b"GGUF" + quantization.encode())
    source = source_files(judge.folder)
    manifest = {"format": 1, "quantization": quantization, "sha256": sha256_of(path), "source": source}
    manifest_path(path).write_text(json.dumps(manifest))
    return path


def test_a_file_is_accepted_until_its_judge_is_made_again(judge):
    path = exported(judge)
    assert path.name == "judge-q8_0.gguf" and path.parent == judge.folder.parent
    (judge.folder / "README.md").write_text("a card has no part in the answers")
    manifest = check_gguf(path, judge)
    assert manifest["quantization"] == "q8_0" and sorted(manifest["source"]) == SOURCE
    for name in SOURCE:
        (judge.folder / name).write_text("another")
        with pytest.raises(ArenaError, match="trained again since") as caught:
            check_gguf(path, judge)
        assert name in str(caught.value) and "run.py export -e mine --stage dpo_judge" in caught.value.remedy
        (judge.folder / name).write_text(name)


def test_a_small_machine_needs_no_weights_but_the_rest(judge):
    (judge.folder / "model-2.safetensors").write_text("second")
    path = exported(judge)
    (judge.folder / "model-2.safetensors").unlink()
    with pytest.raises(ArenaError, match=r"model-2\.safetensors"):  # one shard is missing, not all weights
        check_gguf(path, judge)
    (judge.folder / "model.safetensors").unlink()
    check_gguf(path, judge)
    (judge.folder / "tokenizer.json").unlink()
    with pytest.raises(ArenaError, match=r"tokenizer\.json"):
        check_gguf(path, judge)


def test_a_damaged_or_incomplete_file_is_refused(judge):
    path = exported(judge)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ArenaError, match="damaged"):
        check_gguf(path, judge)
    manifest_path(path).unlink()
    for missing in (manifest_path(path), path):
        with pytest.raises(ArenaError, match="is missing") as caught:
            check_gguf(path, judge)
        assert caught.value.where == str(missing)
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("text", ["", "[]", "{", '"x"', "null", '{"format": 99}', '{"format": 1, "source": {}}'])
def test_a_damaged_or_foreign_manifest_is_refused(judge, text):
    path = exported(judge)
    manifest_path(path).write_text(text)
    with pytest.raises(ArenaError, match="another version" if "99" in text else "damaged"):
        check_gguf(path, judge)


def test_auto_is_the_only_file_and_never_a_guess(judge):
    with pytest.raises(ArenaError, match="was not exported") as caught:
        find_gguf(judge, "auto")
    assert "run.py export -e mine --stage dpo_judge --quantization f16" in caught.value.remedy
    path = exported(judge, "q4_k_m")
    assert find_gguf(judge, "auto") == find_gguf(judge, "q4_k_m") == path
    exported(judge, "f16")
    with pytest.raises(UsageError, match="f16, q4_k_m"):
        find_gguf(judge, "auto")
    with pytest.raises(ArenaError, match="as bf16"):
        find_gguf(judge, "bf16")
    with pytest.raises(UsageError, match="no precision 'fp32'"):
        find_gguf(judge, "fp32")
