"""A hub that does not answer: one request, no retries on the terminal, the cache where it has the model."""

import subprocess
import sys

import pytest
from chain import ROOT

from data_prep.hub import cached_file, offline_if_unreachable

_SCRIPT = """
from data_prep.hub import offline_if_unreachable
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
    model = tmp_path / "cache" / "models--some--model"
    (model / "snapshots" / "0123").mkdir(parents=True)
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("0123")
    (model / "snapshots" / "0123" / "config.json").write_text("{}")
    assert cached_file("some/model", "config.json").name == "config.json" and cached_file("a\nb", "config.json") is None
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
