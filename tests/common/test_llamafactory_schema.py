"""The generated schema is what LLaMA-Factory's own classes say, and they accept the committed recipes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import common.llamafactory_schema as schema
from common.errors import ArenaError
from common.experiment import read_yaml
from common.llamafactory_schema import arguments, key_fault, known_models, reporters, templates, value_fault
from common.stages import STEPS

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in ROOT.glob("factory_configs/*/*.yaml") if p.name != "experiment.yaml")

# Runs in a child process, as importing LLaMA-Factory takes long and sets global state.
PARSE = """
import json, sys
from llamafactory.hparams import get_infer_args, get_train_args
from omegaconf import OmegaConf

loaded = {}
for path in sys.argv[2:]:
    given = OmegaConf.to_container(OmegaConf.load(path))
    if "export_dir" in given:
        parsed = get_infer_args(dict(given))
    else:
        given["use_cpu"] = True  # bf16: true is refused on a machine without a GPU otherwise
        parsed = get_train_args(dict(given))
    known = {k: v for part in parsed for k, v in vars(part).items()}
    loaded[path] = {k: repr(getattr(known[k], "value", known[k])) for k in given}
with open(sys.argv[1], "w") as file:
    json.dump(loaded, file)
"""


@pytest.mark.slow
def test_the_committed_schema_is_what_its_generator_writes():
    command = [sys.executable, ROOT / "benchmarks/llamafactory_schema.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_llamafactory_accepts_every_committed_recipe(tmp_path):
    assert len(RECIPES) >= 2 * len(STEPS)
    answer = tmp_path / "answer.json"
    command = [sys.executable, "-c", PARSE, answer, *RECIPES]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    loaded = json.loads(answer.read_text())
    assert set(loaded) == {str(path) for path in RECIPES}
    demo = loaded[str(ROOT / "factory_configs/demo/sft.yaml")]
    written = read_yaml(ROOT / "factory_configs/demo/sft.yaml")
    assert demo["learning_rate"] == repr(written["learning_rate"]), "a number, as the recipe writes it"
    assert demo["eval_strategy"] == "'no'"
    assert demo["dataset"] == "['demo_sft_train']"
    assert demo["additional_target"] == "['embed_tokens', 'lm_head']"


def test_the_schema_is_read_without_heavy_imports():
    code = (
        "import sys; from common.llamafactory_schema import arguments, templates; arguments(); templates(); "
        "print([m for m in ('torch', 'transformers', 'llamafactory') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_the_schema_says():
    pref_loss = arguments()["pref_loss"]
    assert pref_loss.choices == ("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo")
    assert (pref_loss.kinds, pref_loss.optional, pref_loss.default) == (frozenset({"str"}), False, "sigmoid")
    assert {"tensorboard", "wandb"} <= set(reporters())
    assert templates()["qwen3"].thinks and not templates()["qwen3_nothink"].thinks
    assert templates()["llama3"].tokens == ["<|eot_id|>"] and not templates()["vicuna"].tokens
    assert templates()["gemma2"].user == "<start_of_turn>user\n{{content}}<end_of_turn>\n<start_of_turn>model\n"
    assert templates()["gemma3"].user is None, "it takes images"
    assert known_models()["microsoft/phi-4-mini-instruct"].template == "phi4_mini"
    assert known_models()["qwen/qwen2.5-7b"].template is None, "a base model"
    assert known_models()["google/gemma-3-4b-it"].multimodal


def test_another_release_of_llamafactory_is_refused(monkeypatch):
    monkeypatch.setattr(schema, "version", lambda _: "0.9.6")
    for reader in (schema._schema, arguments):
        reader.cache_clear()
    with pytest.raises(ArenaError, match=r"checked against LLaMA-Factory 0\.9\.5.*of release 0\.9\.6") as caught:
        arguments()
    assert caught.value.remedy == "make install"


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("eval_strategy", False, 'write eval_strategy: "no"'),
        ("eval_strategy", "step", "did you mean steps?"),
        ("learning_rate", "1e-4", "write it without quotes"),
        ("learning_rate", "small", "expected float; write a number"),
        ("lora_rank", "sixteen", "expected int; write a whole number"),
        ("lora_rank", "16", "write it without quotes"),
        ("lora_rank", 64.0, "write 64"),
        ("lora_rank", True, "expected int"),
        ("do_train", "true", "expected bool; write it without quotes"),
        ("do_train", "perhaps", "expected bool; write true or false"),
        ("do_train", 1, "expected bool"),
        ("cutoff_len", None, "may not be null"),
        ("dataset", 7, "put it in quotes"),
        ("learning_rate", float("nan"), "not a finite number"),
        ("output_dir", "${oc.env:HOME}", "does not resolve interpolations"),
        ("train_sampling_strategy", "length", "choices: random, sequential, group_by_length"),
        ("log_level", "loud", "choices: detail, debug"),
        ("adapter_name_or_path", ["a", "b"], "write one string with commas"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(key, value, part):
    assert part in value_fault(arguments()[key], value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("learning_rate", 1),
        ("report_to", ["tensorboard"]),
        ("lora_alpha", None),
        ("warmup_steps", 0.1),
        ("tf32", None),
        ("lora_target", ["q_proj", "v_proj"]),
    ],
)
def test_a_right_value_is_accepted(key, value):
    assert value_fault(arguments()[key], value) is None


def test_keys_are_judged_by_command():
    assert key_fault("lora_rnak", training=True).endswith("no such key; did you mean lora_rank?")
    assert key_fault("zzzz", training=True).endswith("no such key")
    assert "derives this value itself" in key_fault("compute_dtype", training=True)
    assert "rejects it" in key_fault("learning_rate", training=False)
    assert "set HF_TOKEN in your shell" in key_fault("hub_token", training=True)
    assert "remove the key" in key_fault("swanlab_lark_secret", training=True)
    assert key_fault("export_dir", training=False) is None
