"""Engines are opened by name, and a missing one comes with its remedy."""

from __future__ import annotations

import pytest

from common.errors import ArenaError, UsageError
from scoring.engines import protocol
from scoring.engines.protocol import require_engine


@pytest.mark.parametrize(
    "engine, precision, said", [("onnx", "auto", "no engine 'onnx'"), ("torch", "int3", "no precision 'int3'")]
)
def test_an_unknown_name_is_wrong_use(engine, precision, said):
    with pytest.raises(UsageError, match=said) as caught:
        require_engine(engine, precision)
    assert "choose one of: " in caught.value.remedy


def test_an_engine_that_is_not_installed_names_its_extra(monkeypatch):
    monkeypatch.setattr(protocol, "find_spec", lambda name: None)
    with pytest.raises(ArenaError, match="is not installed") as caught:
        require_engine("llama.cpp", "auto")
    assert caught.value.remedy == "make extra-gguf"
