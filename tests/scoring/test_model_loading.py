"""Models are loaded as they were trained, and a file that does not fit is refused."""

import json
from pathlib import Path

import pytest

from common.errors import ArenaError
from factory.stage_context import StageContext
from scoring.model_loading import TrainedAdapter, is_same_model, trained_adapter
from tests.scoring.places import save_adapter


def changed(adapter: Path, folder: Path, change) -> Path:
    """Copy an adapter with other tensors."""
    from safetensors.torch import load_file, save_file

    folder.mkdir(exist_ok=True)
    (folder / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    save_file(change(load_file(adapter / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def test_a_head_tied_to_the_embeddings_comes_back_too(tiny_model, tmp_path, plain_logits):
    model = tiny_model("llama", tied=True)
    model.save_pretrained(tmp_path / "base")
    trained = save_adapter(tmp_path / "base", tmp_path / "adapter")
    policy = TrainedAdapter(trained, str(tmp_path / "base")).load("cpu")
    with policy.disable_adapter():
        assert (plain_logits(policy, [1, 2, 3]) == plain_logits(model, [1, 2, 3])).all()


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda t: {k: v for k, v in t.items() if "lora_B" not in k}, r"lacks 14 weights .*lora_B"),
        (lambda t: {k: v for k, v in t.items() if "embed_tokens" not in k}, "cannot be put on .*embed_tokens"),
        (lambda t: t | {k.replace("layers.1", "layers.7"): v.clone() for k, v in t.items()}, "no place for"),
        (lambda t: {k: v[..., :-1].contiguous() for k, v in t.items()}, "cannot be put on"),
    ],
    ids=["lacks_lora_b", "lacks_embeddings", "extra_layer", "other_size"],
)
def test_weights_that_do_not_fit_the_base_are_refused(base, adapter, tmp_path, change, said):
    with pytest.raises(ArenaError, match=said) as caught:
        TrainedAdapter(changed(adapter, tmp_path / "changed", change), str(base)).load("cpu")
    assert "train again" in caught.value.remedy


def test_an_adapter_that_changed_the_base_itself_has_no_reference(base, tmp_path):
    save_adapter(base, tmp_path, train=False, init_lora_weights="pissa")
    with pytest.raises(ArenaError, match="does not give the base back"):
        TrainedAdapter(tmp_path, str(base)).load("cpu")


def test_a_base_that_does_not_exist_is_named(adapter, tmp_path):
    folder, base = changed(adapter, tmp_path / "adapter", dict), str(tmp_path / "gone")
    config = folder / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": base}))
    with pytest.raises(ArenaError, match="the base model cannot be loaded") as caught:
        TrainedAdapter(folder, base).load("cpu")
    assert caught.value.where == base


def test_names_of_one_model():
    for one, other in (("x/y-4B", "x/y-4B"), ("hub/models/Qwen/Qwen2___5-7B", "Qwen/Qwen2.5-7B"), (".", "./")):
        assert is_same_model(one, other)
    for one, other in (("x/y-4B", "x/y-8B"), (".", ".."), (".", "x/y-4B")):
        assert not is_same_model(one, other)


def test_a_stage_s_adapter_is_the_one_of_its_recipe(workplace, make_experiment):
    context = StageContext(make_experiment(model="some/base", revision="v2"), "sft")
    context.recipe_path.parent.mkdir(parents=True)
    recipe = "model_name_or_path: some/base\noutput_dir: saves/base/lora/exam_sft\nquantization_bit: 8\n"
    recipe += "quantization_type: fp4\n"
    context.recipe_path.write_text(recipe)
    expected = TrainedAdapter(Path("saves/base/lora/exam_sft"), "some/base", 8, "fp4", True, "v2", False)
    assert trained_adapter(context) == expected
    context = StageContext(context.experiment, "sft")
    context.recipe_path.write_text(f"{recipe}adapter_name_or_path: first\n")
    with pytest.raises(ArenaError, match=r"another adapter(.|\n)*--precision auto"):
        trained_adapter(context)


@pytest.mark.slow
@pytest.mark.parametrize("bit", [4, 8])
def test_a_quantised_policy_is_the_one_that_llamafactory_s_loader_makes(tiny_base, tmp_path, bit, plain_logits):
    from llamafactory.hparams import get_infer_args
    from llamafactory.model import load_model, load_tokenizer

    adapter = save_adapter(tiny_base, tmp_path)
    policy = TrainedAdapter(adapter, str(tiny_base), quantization_bit=bit).load("cpu")
    keys = {"model_name_or_path": str(tiny_base), "adapter_name_or_path": str(adapter), "quantization_bit": bit}
    model_args, _, method_args, _ = get_infer_args(keys | {"template": "qwen3_nothink", "infer_dtype": "float32"})
    theirs = load_model(load_tokenizer(model_args)["tokenizer"], model_args, method_args)
    ids = range(3, 60)
    assert (plain_logits(policy, ids) == plain_logits(theirs, ids)).all()
    with policy.disable_adapter(), theirs.disable_adapter():
        assert (plain_logits(policy, ids) == plain_logits(theirs, ids)).all()
