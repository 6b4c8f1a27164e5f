"""What is read from LLaMA-Factory's source is what its imported classes are, and they take the committed recipes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from common.experiment import read_yaml
from common.llamafactory_schema import (
    GROUPS,
    UNKNOWN,
    Argument,
    arguments,
    key_fault,
    reporters,
    templates,
    value_fault,
)
from common.stages import STEPS

ROOT = Path(__file__).parents[2]
RECIPES = sorted(p for p in ROOT.glob("factory_configs/*/*.yaml") if p.name != "experiment.yaml")

# Runs in one child process, as importing LLaMA-Factory takes long and sets global state.
CHILD = """
import dataclasses, enum, json, sys, types, typing
from llamafactory.data.template import TEMPLATES, ReasoningTemplate
from llamafactory.hparams import get_infer_args, get_train_args, parser
from llamafactory.hparams.parser import _TRAIN_ARGS
from omegaconf import OmegaConf
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

PLAIN = (bool, int, float, str, list, dict)

def plain(value):
    return value.value if isinstance(value, enum.Enum) else value

def kinds(hint):
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        parts = [kinds(each) for each in inner]
        return {k for p in parts for k in p[0]}, [c for p in parts for c in p[1]], any(p[2] for p in parts)
    if hint is type(None):
        return set(), [], True
    if origin is typing.Literal:
        return {"str"}, list(inner), False
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return {"str"}, [each.value for each in hint], False
    name = origin or hint
    return {name.__name__ if name in PLAIN else "other"}, [], False

found = {}
for group in _TRAIN_ARGS:
    hints = typing.get_type_hints(group)
    for field in dataclasses.fields(group):
        its, choices, optional = kinds(hints[field.name])
        made = field.default_factory is not dataclasses.MISSING
        found.setdefault(field.name, {
            "group": group.__name__, "kinds": sorted(its), "optional": optional, "settable": field.init,
            "choices": choices or list(field.metadata.get("choices", [])),
            "default": plain(field.default_factory() if made else field.default),
        })
loaded = {}
for path in sys.argv[2:]:
    given = OmegaConf.to_container(OmegaConf.load(path))
    if "export_dir" in given:
        parsed = get_infer_args(dict(given))
    else:
        given["use_cpu"] = True  # bf16: true is refused on a machine without a GPU otherwise
        parsed = get_train_args(dict(given))
    known = {k: v for part in parsed for k, v in vars(part).items()}
    loaded[path] = {k: repr(plain(known[k])) for k in given}
with open(sys.argv[1], "w") as file:
    json.dump({
        "fields": found, "loaded": loaded, "reporters": list(INTEGRATION_TO_CALLBACK),
        "templates": {name: isinstance(t, ReasoningTemplate) for name, t in TEMPLATES.items()},
    }, file, default=repr)
"""


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """What LLaMA-Factory's own classes say, and how they read every committed recipe."""
    answer = tmp_path_factory.mktemp("child") / "answer.json"
    environment = {k: v for k, v in os.environ.items() if k not in ("USE_V1", "USE_MCA", "ALLOW_EXTRA_ARGS")}
    command = [sys.executable, "-c", CHILD, answer, *RECIPES]
    done = subprocess.run(command, cwd=answer.parent, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(answer.read_text())


@pytest.mark.slow
def test_the_parsed_fields_are_those_of_the_imported_classes(imported):
    ours, theirs = arguments(), imported["fields"]
    assert list(ours) == list(theirs)
    assert {a.group for a in ours.values()} == set(GROUPS)
    for name, argument in ours.items():
        its = theirs[name]
        assert (argument.group, argument.optional, argument.settable) == (
            its["group"],
            its["optional"],
            its["settable"],
        )
        extra = {"list"} if "list" in argument.kinds and "list" not in its["kinds"] else set()  # comma lists
        assert argument.kinds == set(its["kinds"]) | extra, name
        if name not in ("log_level", "log_level_replica"):  # whose choices are computed
            assert list(argument.choices) == its["choices"], name
        if argument.default is not UNKNOWN:
            assert argument.default == its["default"], name
    assert [a.name for a in ours.values() if a.default is UNKNOWN] == ["optim"]


@pytest.mark.slow
def test_the_parsed_templates_and_reporters_are_the_imported_ones(imported):
    assert templates() == imported["templates"]
    assert list(reporters()) == imported["reporters"]
    assert templates()["qwen3"]
    assert not templates()["qwen3_nothink"]


@pytest.mark.slow
def test_llamafactory_takes_every_committed_recipe(imported):
    assert len(RECIPES) >= 2 * len(STEPS)
    assert set(imported["loaded"]) == {str(path) for path in RECIPES}
    demo = imported["loaded"][str(ROOT / "factory_configs/demo/sft.yaml")]
    written = read_yaml(ROOT / "factory_configs/demo/sft.yaml")
    assert demo["learning_rate"] == str(written["learning_rate"]), "a number, as it stands in the recipe"
    assert isinstance(written["learning_rate"], float)
    assert demo["eval_strategy"] == "'no'"
    assert demo["dataset"] == "['demo_sft_train']"
    assert demo["additional_target"] == "['embed_tokens', 'lm_head']"


def test_reading_the_source_imports_nothing_heavy():
    code = (
        "import sys, time; from common.llamafactory_schema import arguments, templates; arguments(); templates(); "
        "print([m for m in ('torch', 'transformers', 'llamafactory') if m in sys.modules], time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, seconds = done.stdout.rsplit(" ", 1)
    assert loaded == "[]"
    assert float(seconds) < 5, "of the processor's time, whatever else is at work"


def test_a_comma_list_may_be_a_yaml_list_only_where_llamafactory_splits_it():
    assert value_fault(arguments()["lora_target"], ["q_proj", "v_proj"]) is None
    assert value_fault(arguments()["adapter_name_or_path"], ["a", "b"]).endswith("write one string with commas")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("eval_strategy", False, 'write eval_strategy: "no"'),
        ("eval_strategy", "step", "did you mean steps?"),
        ("learning_rate", "1e-4", "write it without quotes"),
        ("learning_rate", "small", "expected float; write a number"),
        ("lora_rank", "sixteen", "'sixteen' is of type str, expected int; write a whole number"),
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
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(key, value, part):
    assert part in value_fault(arguments()[key], value)


@pytest.mark.parametrize(
    ("key", "value"),
    [("learning_rate", 1), ("report_to", ["tensorboard"]), ("lora_alpha", None), ("warmup_steps", 0.1), ("tf32", None)],
)
def test_a_right_value_stands(key, value):
    assert value_fault(arguments()[key], value) is None


def test_keys_are_judged_by_command():
    assert key_fault("lora_rnak", training=True) == "LLaMA-Factory has no such key; did you mean lora_rank?"
    assert key_fault("zzzz", training=True) == "LLaMA-Factory has no such key"
    assert "derives this value itself" in key_fault("compute_dtype", training=True)
    assert "rejects it" in key_fault("learning_rate", training=False)
    assert key_fault("export_dir", training=False) is None


def test_an_argument_is_complete():
    assert arguments()["pref_loss"] == Argument(
        name="pref_loss",
        group="FinetuningArguments",
        kinds=frozenset({"str"}),
        choices=("sigmoid", "hinge", "ipo", "kto_pair", "orpo", "simpo"),
        optional=False,
        default="sigmoid",
        settable=True,
    )
