"""The hub that does not answer: asked once, no retries on the terminal, the cache where it has the model."""

import http.server
import logging
import subprocess
import sys
import threading

import pytest
from chain import ROOT

from data_prep.hub import asked_once, why_silent

_SCRIPT = """
import logging
from data_prep.hub import asked_once
from transformers import AutoTokenizer
try:
    with asked_once("some/model", "main"):
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


def test_a_hub_that_does_not_answer_is_asked_once_and_in_silence(tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", _SCRIPT]
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.stdout.startswith("refused: couldn't connect to http://127.0.0.1:9"), done.stderr
    assert "the cache does not hold it" in done.stdout
    assert "Retry" not in done.stderr and "thrown while requesting" not in done.stderr


def test_what_the_cache_holds_is_taken_without_the_hub(library, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: "/cache/config.json")
    logger = logging.getLogger("huggingface_hub.utils._http")
    before = logger.level
    with asked_once("some/model", "main"):
        assert library.HF_HUB_OFFLINE is True and not logger.isEnabledFor(logging.WARNING)
    assert library.HF_HUB_OFFLINE is False and logger.level == before


def test_a_folder_and_a_hub_that_is_switched_off_are_not_asked_for(library, monkeypatch, tmp_path):
    monkeypatch.setattr("data_prep.hub.why_silent", lambda *_: pytest.fail("the hub was asked"))
    with asked_once(str(tmp_path), "main"):
        pass
    monkeypatch.setattr(library, "HF_HUB_OFFLINE", True)
    with asked_once("some/model", "main"):
        assert library.HF_HUB_OFFLINE is True
    assert library.HF_HUB_OFFLINE is True


def test_a_refusal_is_an_answer(library, monkeypatch):
    class Refuses(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.send_error(401)

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Refuses)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}/{{repo_id}}/{{revision}}/{{filename}}"
    monkeypatch.setattr(library, "HUGGINGFACE_CO_URL_TEMPLATE", place)
    try:
        assert why_silent("some/model", "main") is None
    finally:
        server.shutdown()
