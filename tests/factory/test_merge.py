"""factory.merge: the copy holds the weights that a quantised training computes with, and is made once."""

import io
import json
from functools import partial
from pathlib import Path

import pytest
from chain import experiment_of

from common.errors import ArenaError
from common.progress import Show
from factory.demo import BaseModelSize, build_base_model
from factory.merge import MANIFEST, DequantisedBase
from factory.recipes import write_recipe
from factory.stage_context import StageContext

experiment = partial(experiment_of, model="models/tiny", cutoff_len=64)
SIZE = BaseModelSize(vocabulary=300, hidden=64, layers=1, heads=2, feed_forward=128, positions=128)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny base and a function that renders an experiment's recipe and returns its copy."""
    monkeypatch.chdir(tmp_path)
    build_base_model(Path("models/tiny"), ["Which is better, A or B?"], seed=1, size=SIZE)

    def prepared(**changed):
        its = experiment(**changed)
        write_recipe(its, "sft")
        return DequantisedBase(StageContext(its, "sft"))

    return prepared


def trained_function(bits: int):
    """Return the hidden states of the quantised base, as PyTorch computes them from the quantised weights."""
    from scoring.model_loading import TrainedAdapter

    return logits(TrainedAdapter(Path("no adapter"), "models/tiny", quantization_bit=bits).load_base("cpu"))


def logits(model):
    import torch

    with torch.inference_mode():
        return model(input_ids=torch.arange(40)[None]).logits.float()


def plain(folder):
    from transformers import AutoModelForCausalLM

    return logits(AutoModelForCausalLM.from_pretrained(folder).eval())


def test_the_4_bit_copy_is_the_quantised_base_and_the_base_is_not(place):
    from transformers import AutoTokenizer

    copy = place()
    copy.ensure(Show(io.StringIO()))
    assert copy.folder.as_posix() == "saves/tiny/dequantised/base_4bit"
    trained = trained_function(4)
    assert (plain(copy.folder) - trained).abs().max() < 1e-5
    assert (plain("models/tiny") - trained).abs().max() > 1e-2, "nf4 rounds, or this test shows nothing"
    assert "quantization_config" not in json.loads((copy.folder / "config.json").read_text())
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (copy.folder, "models/tiny"))
    assert one("Which, <|im_end|>?").input_ids == other("Which, <|im_end|>?").input_ids


@pytest.mark.parametrize(("factor", "kept_in"), [(1, "float16"), (1e6, "bfloat16")])
def test_a_copy_of_bf16_weights_keeps_them_in_fp16_where_they_fit(place, factor, kept_in):
    import torch
    from safetensors.torch import load_file, save_file

    path = Path("models/tiny/model.safetensors")
    weights = {name: (weight * factor).to(torch.bfloat16) for name, weight in load_file(path).items()}
    save_file(weights, path, {"format": "pt"})
    config = json.loads(Path("models/tiny/config.json").read_text())
    Path("models/tiny/config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    copy, shown = place(), io.StringIO()
    copy.ensure(Show(shown))
    stored = load_file(copy.folder / "model.safetensors")
    assert {str(weight.dtype) for weight in stored.values()} == {f"torch.{kept_in}"}
    assert all(torch.isfinite(weight).all() for weight in stored.values())
    embedding = "model.embed_tokens.weight"
    largest = (stored[embedding].float() - weights[embedding].float()).abs().max()
    assert largest <= 2**-25, "half of fp16's smallest step"
    assert ("stays in bf16" in shown.getvalue()) == (factor > 1)
    copy.restore_type(copy.folder / "config.json")
    assert json.loads((copy.folder / "config.json").read_text())["dtype"] == "bfloat16", "what it computes in"


def test_the_8_bit_copy_is_nearer_than_the_base(place):
    copy = place(quantization_bit=8)
    copy.ensure(Show(io.StringIO()))
    trained = trained_function(8)
    # The activations are rounded too, which no weights can imitate.
    assert (plain(copy.folder) - trained).abs().mean() < (plain("models/tiny") - trained).abs().mean()


def test_it_is_made_once_and_again_when_its_source_or_a_file_changed(place, monkeypatch):
    copy = place()
    copy.ensure(Show(io.StringIO()))
    made = []
    monkeypatch.setattr("factory.merge.dequantise", lambda *_: made.append(1) or pytest.fail("made again"))
    copy.ensure(Show(io.StringIO()))
    assert not made
    assert not place(recipes={"sft": {"double_quantization": False}}).is_whole and place().is_whole
    weights = copy.folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-9])
    assert not copy.is_whole
    weights.write_bytes(whole)
    assert copy.is_whole
    config = Path("models/tiny/config.json")
    config.write_text(config.read_text() + " ")
    assert not place().is_whole
    (copy.folder / MANIFEST).write_text("{")
    assert not copy.is_whole


def test_a_base_that_cannot_be_loaded_is_told_and_the_earlier_copy_stays(place):
    copy = place()
    copy.ensure(Show(io.StringIO()))
    before = sorted(path.name for path in copy.folder.iterdir())
    Path("models/tiny/model.safetensors").unlink()
    with pytest.raises(ArenaError, match=r"cannot be loaded to be dequantised(.|\n)*merge_onto: base"):
        DequantisedBase(StageContext(experiment(), "sft")).ensure(Show(io.StringIO()))
    assert sorted(path.name for path in copy.folder.iterdir()) == before
