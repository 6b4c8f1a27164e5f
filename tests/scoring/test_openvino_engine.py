"""The OpenVINO engine: the same class probabilities as the torch engine, from a model that is converted once."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("openvino", reason="the extra openvino is not installed (make extra-openvino)")

from common.errors import ArenaError, UsageError
from scoring.engines import openvino_engine
from scoring.engines.openvino_engine import OpenVinoEngine, converted, fast_bf16
from scoring.engines.protocol import open_engine
from scoring.links import softmax

LABELS = (35, 7, 599)


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2"])
def judge(request, tmp_path_factory, tiny_model):
    """A merged folder of each family: grouped keys, normed queries, capped logits and a window."""
    folder = tmp_path_factory.mktemp(request.param) / "merged"
    tiny_model(request.param).save_pretrained(folder)
    return SimpleNamespace(folder=folder, frame=SimpleNamespace(label_ids=LABELS), cutoff_len=200)


def rows(count: int = 12, longest: int = 120) -> list[list[int]]:
    random = np.random.default_rng(3)
    return [random.integers(0, 600, random.integers(2, longest)).tolist() for _ in range(count)]


def test_every_precision_answers_as_torch_does(judge, monkeypatch):
    sequences, seen = rows(), []
    expected = open_engine(judge, "torch", "fp32").label_logits(sequences, LABELS)
    assert np.ptp(softmax(expected)[:, 0]) > 0.1, "the rows differ"
    exact = OpenVinoEngine(judge, "fp32")
    found = exact.label_logits(sequences, LABELS, progress=seen.append)
    np.testing.assert_allclose(found, expected, atol=2e-4, rtol=0)
    assert found.dtype == np.float64
    assert (seen[-1].rows, seen[-1].tokens, len(seen)) == (12, sum(map(len, sequences)), 12)
    turned = exact.label_logits(sequences, LABELS[::-1])
    np.testing.assert_array_equal(turned, found[:, ::-1])
    with pytest.raises(ArenaError, match=r"not for \[8\]"):
        exact.label_logits(sequences, (35, 7, 8))
    exact.close()
    # The second time nothing is converted.
    monkeypatch.setattr(openvino_engine, "openvino_model", lambda *_, **__: pytest.fail("converted again"))
    if fast_bf16():
        half = OpenVinoEngine(judge, "bf16")
        apart = np.abs(softmax(half.label_logits(sequences, LABELS)) - softmax(expected)).max()
        assert half.precision == "bf16" and 1e-6 < apart < 0.05


def test_eight_bits_are_near(own_judge):
    sequences, judge = rows(), own_judge
    expected = softmax(open_engine(judge, "torch", "fp32").label_logits(sequences, LABELS))
    converted(judge, "fp32")
    engine = OpenVinoEngine(judge, "8bit")
    apart = np.abs(softmax(engine.label_logits(sequences, LABELS)) - expected).max()
    assert engine.precision == "8bit" and 1e-6 < apart < 0.1
    weights = judge.folder.parent / "openvino"
    assert (weights / "8bit" / "model.bin").stat().st_size < (weights / "fp32" / "model.bin").stat().st_size


@pytest.fixture
def own_judge(tmp_path, tiny_model):
    """A judge whose files a test may change."""
    tiny_model("llama").save_pretrained(tmp_path / "merged")
    return SimpleNamespace(folder=tmp_path / "merged", frame=SimpleNamespace(label_ids=LABELS), cutoff_len=200)


def test_what_was_converted_is_used_only_for_the_same_files(own_judge, monkeypatch):
    import openvino
    from openvino import opset13

    calls = []

    def stand_in(model, labels, **_):
        calls.append(labels)
        given = opset13.parameter([1, 3], np.float32)
        return openvino.Model([opset13.relu(given)], [given], "stand_in"), None

    monkeypatch.setattr(openvino_engine, "openvino_model", stand_in)
    path = converted(own_judge, "fp32")
    assert path.is_file() and converted(own_judge, "fp32") == path and len(calls) == 1
    (own_judge.folder / "config.json").write_text((own_judge.folder / "config.json").read_text() + "\n")
    converted(own_judge, "fp32")
    assert len(calls) == 2, "the judge's files changed"
    (path.parent / "made_of.json").unlink()
    converted(own_judge, "fp32")
    assert len(calls) == 3, "unfinished"
    assert not list(path.parent.parent.glob(".*")), "nothing is left behind"


def test_a_damaged_conversion_is_told(own_judge, monkeypatch):
    path = own_judge.folder.parent / "model.xml"
    path.write_text("<net")
    monkeypatch.setattr(openvino_engine, "converted", lambda *_: path)
    with pytest.raises(ArenaError, match="cannot compile") as caught:
        OpenVinoEngine(own_judge, "fp32")
    assert "--engine torch" in caught.value.remedy


def test_wrong_precisions_are_told_before_anything_is_loaded(own_judge):
    with pytest.raises(UsageError, match="no precision 'adapter'"):
        OpenVinoEngine(own_judge, "adapter")
    with pytest.raises(ArenaError, match="2 threads or more"):
        OpenVinoEngine(own_judge, "bf16", threads=1)


def test_auto_is_what_the_processor_is_fast_in(monkeypatch):
    monkeypatch.setattr(openvino_engine, "fast_bf16", lambda: True)
    assert openvino_engine._precision("auto", 4) == "bf16"
    assert openvino_engine._precision("auto", 1) == "fp32", "one thread"
    monkeypatch.setattr(openvino_engine, "fast_bf16", lambda: False)
    assert openvino_engine._precision("auto", 4) == "fp32"
