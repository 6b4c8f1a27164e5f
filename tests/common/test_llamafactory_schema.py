"""The generated schema is what LLaMA-Factory's own classes say; tests/bad_inputs/configs.py has faults of recipes."""

import subprocess
import sys
from pathlib import Path

import pytest

import common.llamafactory_schema as schema
from common.errors import ArenaError
from common.llamafactory_schema import arguments, key_fault, value_fault

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_committed_schema_is_what_its_generator_writes():
    command = [sys.executable, ROOT / "benchmarks/llamafactory_schema.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_schema_is_read_without_heavy_imports():
    code = (
        "import sys; from common.llamafactory_schema import arguments, templates; arguments(); templates(); "
        "print([m for m in ('torch', 'transformers', 'llamafactory') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


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
        ("eval_strategy", "step", "did you mean steps?"),
        ("lora_rank", "sixteen", "expected int; write a whole number"),
        ("lora_rank", 64.0, "write 64"),
        ("lora_rank", True, "expected int"),
        ("do_train", "true", "expected bool; write it without quotes"),
        ("do_train", "perhaps", "expected bool; write true or false"),
        ("do_train", 1, "expected bool"),
        ("dataset", 7, "put it in quotes"),
        ("train_sampling_strategy", "length", "choices: random, sequential, group_by_length"),
        ("log_level", "loud", "choices: detail, debug"),
        ("adapter_name_or_path", ["a", "b"], "write one string with commas"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(key, value, part):
    assert part in value_fault(arguments()[key], value)


def test_a_key_without_a_neighbour_or_a_variable_is_refused():
    assert key_fault("zzzz", training=True).endswith("no such key")
    assert "remove the key" in key_fault("swanlab_lark_secret", training=True), "no variable serves instead"
