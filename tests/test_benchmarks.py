"""The scripts of benchmarks/ find what they import, and each table of theirs has its place in the documents."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))


# llamafactory_schema imports LLaMA-Factory, which takes long; a test of its own runs it.
@pytest.mark.parametrize("name", [path.stem for path in SCRIPTS if path.stem != "llamafactory_schema"])
def test_a_script_finds_what_it_imports(name):
    import_module(name)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_table_has_its_place_in_a_document(path):
    documents = [page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))]
    for mark in re.findall(r'\b(?:publish|put)\(\s*"([^"]+)"', path.read_text(encoding="utf-8")):
        assert sum(f"<!-- {mark} -->" in text and f"<!-- /{mark} -->" in text for text in documents) == 1, mark
