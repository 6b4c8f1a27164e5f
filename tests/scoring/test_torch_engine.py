"""The torch engine: whatever the batches, the label logits are those of a plain pass over one row at a time."""

from types import SimpleNamespace

import numpy as np
import pytest

from common.errors import UsageError
from scoring.engines import open_engine, require_engine
from scoring.engines.torch_engine import score_labels
from scoring.links import softmax
from scoring.model_loading import TrainedAdapter
from tests.scoring.fakes import LABELS, token_rows
from tests.scoring.places import save_adapter


@pytest.fixture
def judge(tmp_path, tiny_model):
    """A folder with a merged model in it."""
    tiny_model("qwen3").save_pretrained(tmp_path / "merged")
    return SimpleNamespace(folder=tmp_path / "merged")


LIMITS = {"auto": 1e-4, "fp32": 1e-4, "bf16": 2e-2, "fp16": 1e-2, "8bit": 0.6, "4bit": 0.6}


@pytest.mark.parametrize(("precision", "most"), LIMITS.items())
def test_a_precision_gives_nearly_the_probabilities_of_fp32(judge, tiny_model, plain_logits, precision, most):
    engine = open_engine(judge, "torch", precision, device="cpu")
    assert engine.precision == ("fp32" if precision == "auto" else precision)
    expected = [plain_logits(tiny_model("qwen3"), ids)[-1, list(LABELS)].numpy() for ids in token_rows(20)]
    found = engine.label_logits(token_rows(20), LABELS)
    difference = np.abs(softmax(found) - softmax(np.array(expected))).max()
    assert difference < most and (difference > 1e-6) == (engine.precision != "fp32")
    np.testing.assert_array_equal(found, engine.label_logits(token_rows(20), LABELS))


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


def test_an_unknown_engine_or_precision_comes_with_those_that_are():
    for engine, precision in (("onnx", "auto"), ("torch", "int3")):
        with pytest.raises(UsageError, match=r"there is no (.|\n)*choose one of: "):
            require_engine(engine, precision)
