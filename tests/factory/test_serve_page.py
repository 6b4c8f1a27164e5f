"""Pages for the browser: addresses that they are served at, and what happens where they cannot."""

import socket

import pytest

from common.errors import ArenaError, UsageError
from common.files import only_run
from common.progress import Show
from factory import serve_page as module
from factory.serve_page import free_port, serve_page, serve_tensorboard


def test_a_port_is_free_or_refused():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} of 127.0.0.1") as caught:
            free_port("127.0.0.1", port)
        assert "--port" in caught.value.remedy
    assert free_port("127.0.0.1", port) == port and free_port("127.0.0.1") >= 7860


def test_a_page_that_cannot_start_says_why(tmp_path):
    with pytest.raises(ArenaError, match="thing ended with exit code"):
        serve_page("no_such_module", [], "thing", tmp_path / "x", "127.0.0.1", None, open_browser=False, show=Show())


def test_tensorboard_needs_a_run(workplace, make_experiment, monkeypatch):
    experiment, served = make_experiment(), []
    with pytest.raises(ArenaError, match="TensorBoard"):
        serve_tensorboard(experiment, "127.0.0.1", None, open_browser=False, show=Show())
    monkeypatch.setattr(module, "serve_page", lambda name, *_, **__: served.append(name))
    with only_run(experiment.output_folder("sft")):  # its events come with its first step
        serve_tensorboard(experiment, "127.0.0.1", None, open_browser=False, show=Show())
    assert served == ["factory.serve_page"]
