"""lora_target: names that no module of the model has are told before anything is put aside."""

import json

import pytest
from click.testing import CliRunner

import run
from common.error_hints import remedy_for
from factory.recipe_checks import _modules, target_fault


@pytest.fixture(autouse=True)
def _fresh():
    _modules.cache_clear()


def test_a_name_that_no_module_has_puts_nothing_aside(place):
    place.edit_recipe("sft", "lora_target: q_projj,v_proj")
    before = place.snapshot()
    done = CliRunner().invoke(run.cli, ["sft", "-e", "exam", "--fresh"])
    assert done.exit_code == 1, done.output
    assert "sft.yaml: lora_target: models/tiny has no module 'q_projj'; did you mean q_proj?" in done.output
    after = place.snapshot()
    assert {name: after[name] for name in before} == before and "earlier-" not in "".join(after)


@pytest.mark.parametrize(
    ("targets", "part"),
    [
        ("all", None),
        ("q_proj, v_proj", None),
        (["self_attn.q_proj", "lm_head"], None),
        (
            "query",
            "has no module 'query'; its layers hold down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj",
        ),
    ],
)
def test_names_are_compared_as_peft_does(place, targets, part):
    fault = target_fault({"model_name_or_path": "models/tiny", "lora_target": targets})
    assert fault is None if part is None else part in fault


def test_an_index_and_a_hubs_cache_are_read_too(tmp_path, monkeypatch):
    kept = tmp_path / "hub" / "models--some--model"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    index = kept / "snapshots" / "abc" / "model.safetensors.index.json"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    recipe = {"model_name_or_path": "some/model", "lora_target": "q_proj"}
    assert target_fault(recipe) is None, "not on this disk"
    _modules.cache_clear()
    index.parent.mkdir(parents=True)
    index.write_text(json.dumps({"weight_map": {"model.layers.0.attn.qkv_proj.weight": "1.safetensors"}}))
    assert (
        target_fault(recipe) == "some/model has no module 'q_proj'; did you mean qkv_proj? (all takes every linear one)"
    )
    _modules.cache_clear()
    index.write_text("{")
    assert target_fault(recipe) is None and target_fault({**recipe, "model_name_or_path": "no/such/id"}) is None


def test_what_peft_says_of_no_module_is_in_the_table():
    said = "ValueError: No modules were targeted for adaptation. This might be caused by a combination of mismatched"
    assert "use `lora_target: all`" in remedy_for(said)
