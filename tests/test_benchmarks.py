"""The scripts of benchmarks/ find what they import, and each table of theirs has its place in the documents."""

import json
import re
import subprocess
import sys
from importlib import import_module

import pytest
from chain import ROOT

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


@pytest.mark.slow
def test_every_part_of_what_a_gpu_is_asked_gives_a_row_and_is_kept(tmp_path):
    from data_prep.synthetic import write_arena

    write_arena(tmp_path / "arena", seed=1, train_rows=60, test_rows=5)
    call = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--votes", str(tmp_path / "arena" / "train.csv")]
    call += ["--work", str(tmp_path / "work"), "--tiny", "--steps", "3", "--minutes", "30"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line]
    assert [row[0].removeprefix("| ") for row in rows] == [
        *("recipe", "LLaMA-Factory's example", "ours"),
        *("rows", "real lengths", "real lengths", "real lengths"),
    ]
    assert all(cell.strip(" |") for row in rows for cell in row)
    kept = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "work" / "results").glob("*.json")}
    assert set(kept) == {"model", "example", "ours", "scoring", "parity"}
    losses = [json.loads((tmp_path / f"work/results/{name}.json").read_text())["loss"] for name in ("example", "ours")]
    assert losses[0][0] == pytest.approx(losses[1][0], rel=0.1), "equal recipes but for the batches"
    (tmp_path / "work" / "results" / "parity.json").unlink()
    assert subprocess.run(call, capture_output=True, check=False).returncode == 0
    again = {path.stem: path.stat().st_mtime_ns for path in (tmp_path / "work" / "results").glob("*.json")}
    assert {name for name in kept if kept[name] != again[name]} == {"parity"}, "what is there is not run again"
