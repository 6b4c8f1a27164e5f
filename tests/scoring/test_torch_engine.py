"""The torch engine: whatever the batches, the label logits are those of a plain pass over one row at a time."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import ArenaError, UsageError
from scoring.engines.protocol import open_engine
from scoring.engines.torch_engine import cpu_half_precisions, score_labels
from scoring.links import softmax
from scoring.model_loading import TrainedAdapter
from tests.scoring.fakes import LABELS, token_rows
from tests.scoring.places import save_adapter


@pytest.fixture
def judge(tmp_path, tiny_model):
    """A folder with a merged model in it."""
    tiny_model("qwen3").save_pretrained(tmp_path / "merged")
    return SimpleNamespace(folder=tmp_path / "merged")


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_label_logits_are_those_of_one_row_at_a_time(family_model, plain_logits, budget):
    expected = np.array([plain_logits(family_model, ids)[-1, list(LABELS)].numpy() for ids in token_rows(23)])
    scores = score_labels(family_model, token_rows(23), LABELS, token_budget=budget)
    assert scores.dtype == np.float64
    assert expected.std() > 0.3
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


def test_logits_that_are_not_finite_stay_in_their_own_rows(tiny_model):
    model = tiny_model(seed=2)
    model.get_input_embeddings().weight.data[9] = float("nan")
    scores = score_labels(model, [[1, 2], [1, 9, 2], [4]], LABELS, token_budget=4096)
    assert np.isnan(scores[1]).all() and np.isfinite(scores[[0, 2]]).all()
    assert score_labels(model, [], LABELS).shape == (0, 3)


@pytest.mark.parametrize(
    "precision, really, tolerance",
    [("auto", "fp32", 1e-4), ("fp32", "fp32", 1e-4), ("bf16", "bf16", 2e-2), ("fp16", "fp16", 1e-2)],
)
def test_a_precision_gives_the_probabilities_of_fp32(judge, tiny_model, plain_logits, precision, really, tolerance):
    engine = open_engine(judge, "torch", precision, device="cpu", note=lambda _: None)
    assert (engine.name, engine.precision) == ("torch", really)
    expected = [plain_logits(tiny_model("qwen3"), ids)[-1, list(LABELS)].numpy() for ids in token_rows(20)]
    found = softmax(engine.label_logits(token_rows(20), LABELS))
    difference = np.abs(found - softmax(np.array(expected))).max()
    assert difference < tolerance
    assert (difference > 1e-6) == (really != "fp32"), "16 bit really are 16 bit"


@pytest.mark.parametrize("precision", ["8bit", "4bit"])
def test_a_quantised_merged_model(judge, tiny_model, precision):
    engine = open_engine(judge, "torch", precision, device="cpu")
    assert engine.precision == precision
    found = engine.label_logits(token_rows(5), LABELS)
    exact = score_labels(tiny_model("qwen3"), token_rows(5), LABELS)
    assert 1e-4 < np.abs(softmax(found) - softmax(exact)).max() < 0.5
    np.testing.assert_array_equal(found, engine.label_logits(token_rows(5), LABELS))


def test_the_adapter_on_its_base(judge, tmp_path, tiny_model):
    base = tmp_path / "base"
    tiny_model("qwen3", seed=3).save_pretrained(base)
    adapter = TrainedAdapter(save_adapter(base, tmp_path / "adapter"), str(base), quantization_bit=4)
    engine = open_engine(judge, "torch", "adapter", adapter=adapter, device="cpu")
    assert engine.precision == "adapter"
    expected = score_labels(adapter.load("cpu"), token_rows(5), LABELS)
    np.testing.assert_allclose(engine.label_logits(token_rows(5), LABELS), expected, atol=1e-4)
    with pytest.raises(UsageError, match="needs the trained adapter"):
        open_engine(judge, "torch", "adapter", device="cpu")


def test_a_row_without_a_finite_score_is_named(tmp_path, tiny_model):
    model = tiny_model("llama", seed=2)
    model.get_input_embeddings().weight.data[9] = float("nan")
    model.save_pretrained(tmp_path)
    engine = open_engine(SimpleNamespace(folder=tmp_path), device="cpu")
    with pytest.raises(ArenaError, match=r"no finite score for 1 row.*: id 41") as caught:
        engine.label_logits([[1, 2], [1, 9, 2], [4]], LABELS, name=lambda i: f"id {40 + i}")
    assert "loss curve" in caught.value.remedy


@pytest.mark.parametrize(
    "text, expected",
    [
        ("flags\t\t: fpu avx2\n", set()),
        ("flags\t\t: fpu avx512_bf16\n", {"bf16"}),
        ("processor: 0\nflags: amx_bf16 avx512_fp16\n", {"bf16", "fp16"}),
        ("Features\t: fp asimdhp bf16\n", {"bf16", "fp16"}),
    ],
)
def test_the_processor_s_16_bit_types_are_read_from_its_flags(monkeypatch, text, expected):
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: text)
    assert cpu_half_precisions() == expected
