"""scoring.engines.protocol: engines are opened by name, and what is missing is said with its remedy."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import ArenaError, UsageError
from scoring.engines.protocol import open_engine
from scoring.engines.torch_engine import score_labels
from scoring.scorer import TrainedAdapter, adapter_of, trained_adapter
from tests.scoring.test_rewards import trained_adapter as make_adapter
from tests.scoring.test_torch_engine import LABELS, rows


@pytest.fixture
def judge(tmp_path, tiny_model):
    """A folder with a merged model in it."""
    tiny_model("qwen3").save_pretrained(tmp_path / "merged")
    return SimpleNamespace(folder=tmp_path / "merged")


def probabilities(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    "engine, precision, told", [("onnx", "auto", "no engine 'onnx'"), ("torch", "int3", "no precision 'int3'")]
)
def test_an_unknown_name_is_wrong_use(judge, engine, precision, told):
    with pytest.raises(UsageError, match=told) as caught:
        open_engine(judge, engine, precision)
    assert "choose one of: " in caught.value.remedy


@pytest.mark.parametrize("engine, extra", [("llama.cpp", "gguf")])
def test_an_engine_that_is_not_installed_names_its_extra(judge, monkeypatch, engine, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArenaError, match="is not installed") as caught:
        open_engine(judge, engine)
    assert caught.value.remedy == f"make extra-{extra}"


@pytest.mark.parametrize(
    "precision, really, tolerance",
    [("auto", "fp32", 1e-4), ("fp32", "fp32", 1e-4), ("bf16", "bf16", 2e-2), ("fp16", "fp16", 1e-2)],
)
def test_a_precision_gives_the_probabilities_of_fp32(judge, tiny_model, plain_logits, precision, really, tolerance):
    engine = open_engine(judge, "torch", precision, device="cpu")
    assert (engine.name, engine.precision) == ("torch", really)
    model = tiny_model("qwen3")
    expected = np.array([plain_logits(model, ids)[-1, list(LABELS)].numpy() for ids in rows(20)])
    found = engine.label_logits(rows(20), LABELS)
    difference = np.abs(probabilities(found) - probabilities(expected)).max()
    assert difference < tolerance
    assert (difference > 1e-6) == (really != "fp32"), "16 bit really are 16 bit"


@pytest.mark.parametrize("precision, layer", [("8bit", "Linear8bitLt"), ("4bit", "Linear4bit")])
def test_a_quantised_merged_model(judge, tiny_model, precision, layer):
    engine = open_engine(judge, "torch", precision, device="cpu")
    assert engine.precision == precision
    assert layer in {type(module).__name__ for module in engine._reader.model.modules()}
    found = engine.label_logits(rows(5), LABELS)
    exact = score_labels(tiny_model("qwen3"), rows(5), LABELS)
    assert 1e-4 < np.abs(probabilities(found) - probabilities(exact)).max() < 0.5
    np.testing.assert_array_equal(found, engine.label_logits(rows(5), LABELS))


def test_the_adapter_on_its_base(judge, tmp_path, tiny_model):
    base = tmp_path / "base"
    tiny_model("qwen3", seed=3).save_pretrained(base)
    adapter = TrainedAdapter(make_adapter(base, tmp_path / "adapter"), str(base), quantization_bit=4)
    engine = open_engine(judge, "torch", "adapter", adapter=adapter, device="cpu")
    assert engine.precision == "adapter"
    assert "Linear4bit" in {type(module).__name__ for module in engine._reader.model.modules()}
    np.testing.assert_allclose(
        engine.label_logits(rows(5), LABELS), score_labels(adapter.load("cpu"), rows(5), LABELS), atol=1e-4
    )


def test_the_judge_s_adapter_is_the_one_of_its_experiment_s_recipe(workplace, tmp_path):
    folder = tmp_path / "factory_configs" / "exam"
    folder.mkdir(parents=True)
    (folder / "experiment.yaml").write_text("model: some/base\nrevision: v2\ntemplate: qwen\ncutoff_len: 64\n")
    recipe = "model_name_or_path: some/base\noutput_dir: saves/x\nquantization_bit: 8\nquantization_type: fp4\n"
    (folder / "sft.yaml").write_text(recipe)
    found = adapter_of(SimpleNamespace(source={"experiment": "exam", "stage": "sft"}))
    assert (str(found.folder), found.base, found.revision) == ("saves/x", "some/base", "v2")
    assert (found.quantization_bit, found.quantization_type, found.double_quantization) == (8, "fp4", True)


def test_an_adapter_on_an_adapter_has_no_base_of_its_own(workplace, tmp_path, make_experiment):
    folder = tmp_path / "factory_configs" / "exam"
    folder.mkdir(parents=True)
    (folder / "sft.yaml").write_text("model_name_or_path: b\noutput_dir: s\nadapter_name_or_path: first\n")
    with pytest.raises(ArenaError, match="another adapter") as caught:
        trained_adapter(make_experiment("exam"), "sft")
    assert "--precision auto" in caught.value.remedy


def test_a_row_without_a_finite_score_is_named(tmp_path, tiny_model):
    model = tiny_model("llama", seed=2)
    model.get_input_embeddings().weight.data[9] = float("nan")
    model.save_pretrained(tmp_path)
    engine = open_engine(SimpleNamespace(folder=tmp_path), device="cpu")
    with pytest.raises(ArenaError, match=r"no finite score for 1 row.*: id 41") as caught:
        engine.label_logits([[1, 2], [1, 9, 2], [4]], LABELS, name=lambda i: f"id {40 + i}")
    assert "loss curve" in caught.value.remedy


def test_a_closed_engine_holds_no_model(judge):
    engine = open_engine(judge, device="cpu")
    engine.close()
    assert engine._reader is None
