"""The template that fits a model; and a hub that does not answer: one request, no retries, its cache."""

import json
import subprocess
import sys

import pytest
from chain import ROOT, hub_cache

from common.errors import ArenaError, UsageError
from data_prep.model_lookup import choose_template, model_file, offline_if_unreachable


def folder_of(path, kind):
    path.mkdir(parents=True)
    (path / "config.json").write_text(json.dumps({"model_type": kind}), encoding="utf-8")
    return str(path)


KNOWN = {"META-LLAMA/meta-llama-3.1-8b-instruct": "llama3", "Qwen/Qwen3-8B": "qwen3"}
KNOWN |= {"LLM-Research/gemma-2-9b-it": "gemma2", "Qwen/Qwen2.5-7B": "default"}


@pytest.mark.parametrize("model, template", KNOWN.items())  # tests/factory/test_presets.py has the presets' models
def test_a_known_model_has_its_own_template(model, template):
    choice = choose_template(model)
    assert (choice.template, choice.thinks) == (template, template == "qwen3")
    assert choice.reason.startswith("LLaMA-Factory's own for ")
    assert ("no chat model" in choice.reason) == (template == "default")


@pytest.mark.parametrize(
    ("model", "asked", "part"),
    [
        ("me/gemma-2-9b-it-tuned", None, "google/gemma-2-9b-it has gemma2"),
        ("me/something-else-entirely", None, "--template"),
        ("models/nothere", None, "there is no folder models/nothere, and LLaMA-Factory's table does not"),
        ("gpt2", None, "there is no folder gpt2, and LLaMA-Factory's table does not"),
        ("google/gemma-3-4b-it", None, "reads images too"),
        ("Qwen/Qwen3-8B", "qwen3_nothin", "qwen3_nothink"),
        ("models/absent/folder", None, "neither a folder nor a hub id"),
        ("./absent", "llama3", "neither a folder nor a hub id"),
        ("a b", "llama3", "neither a folder nor a hub id"),
        ("", "llama3", "neither a folder nor a hub id"),
    ],
)
def test_what_is_not_known_is_asked_for(model, asked, part):
    with pytest.raises(UsageError) as caught:
        choose_template(model, asked)
    assert part in str(caught.value)
    assert caught.value.remedy and "gpt-oss" not in caught.value.remedy, "another model is no advice"


def test_an_unknown_model_takes_the_template_that_is_named():
    assert choose_template("me/tuned", "llama3").template == "llama3"
    assert choose_template("google/gemma-3-4b-it", "gemma2").template == "gemma2"


@pytest.mark.parametrize(
    ("name", "template"),
    [
        ("SmolLM2-135M-Instruct", "smollm2"),
        ("qwen3-8b", "qwen3"),
        ("gemma-2b-it", "gemma"),
        ("Qwen2.5-7B", "default"),
        ("models--google--gemma-3-1b-it/snapshots/0123abc", "gemma2"),
    ],
)
def test_a_folder_is_known_by_its_name(tmp_path, name, template):
    choice = choose_template(folder_of(tmp_path / name, "mystery"))
    assert choice.template == template and choice.thinks == (template == "qwen3")


def test_a_folder_that_does_not_tell_is_asked_for(tmp_path):
    with pytest.raises(UsageError, match="does not hold a model called silent") as caught:
        choose_template(folder_of(tmp_path / "silent", "gemma2"))
    assert caught.value.remedy.endswith("perhaps: gemma2")
    with pytest.raises(UsageError, match="does not hold a model called gemma-2-9b-it-tuned") as caught:
        choose_template(folder_of(tmp_path / "gemma-2-9b-it-tuned", "gemma2"))
    assert "google/gemma-2-9b-it has gemma2" in caught.value.remedy
    assert choose_template(folder_of(tmp_path / "told", "llama"), "llama3").template == "llama3"


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(UsageError, match=r"holds no config\.json"):
        choose_template(str(tmp_path), "llama3")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "config.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArenaError, match="is not readable JSON"):
        choose_template(str(tmp_path / "bad"))


_SCRIPT = """
from data_prep.model_lookup import offline_if_unreachable
from transformers import AutoTokenizer
try:
    with offline_if_unreachable("some/model", "main"):
        AutoTokenizer.from_pretrained("some/model")
except OSError as error:
    print("refused:", error)
"""


@pytest.fixture
def library(monkeypatch, tmp_path):
    """huggingface_hub with a cache of its own and an endpoint at which nothing listens."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "http://127.0.0.1:9/{repo_id}/{revision}/{filename}")
    return constants


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_one_error_without_retries(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.startswith("refused: couldn't connect to http://127.0.0.1:9"), done.stderr
    assert "the cache does not hold some/model" in done.stdout
    assert "Retry" not in done.stderr and "thrown while requesting" not in done.stderr


def test_what_the_cache_holds_is_taken_without_the_hub(library, tmp_path):
    (hub_cache(tmp_path / "cache", "some/model") / "config.json").write_text("{}")
    assert model_file("some/model", "config.json").name == "config.json" and model_file("a\nb", "config.json") is None
    with offline_if_unreachable("some/model", "main"):
        assert library.HF_HUB_OFFLINE is True
    assert library.HF_HUB_OFFLINE is False


def test_a_folder_and_a_hub_that_is_switched_off_need_no_request(library, monkeypatch, tmp_path):
    with offline_if_unreachable(str(tmp_path), "main"):
        assert library.HF_HUB_OFFLINE is False
    monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    with offline_if_unreachable("some/model", "main"):
        assert library.HF_HUB_OFFLINE is True
    assert library.HF_HUB_OFFLINE is True
