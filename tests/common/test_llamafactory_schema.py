"""The generated schema is what LLaMA-Factory's own classes say; tests/bad_inputs/configs.py has faults of recipes."""

import subprocess
import sys

import pytest
from chain import ROOT

import common.llamafactory_schema as schema
from common.errors import ArenaError
from common.llamafactory_schema import arguments


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
