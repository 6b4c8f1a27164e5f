"""Hostile surroundings: what a stranger's folder, web page or log may not do. One guard, one test ."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from factory.process import child_environment, module

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("psutil", "filelock", "multiprocessing", "sitecustomize", "factory/launcher", "factory/process")


@pytest.fixture
def strangers(tmp_path) -> Path:
    """A folder whose modules are called like ours and those of libraries; each writes a file where it is imported."""
    (tmp_path / "factory").mkdir()
    (tmp_path / "factory_configs").symlink_to(ROOT / "factory_configs")
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("open('pwned', 'w')")
    return tmp_path


def run_py(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    own = {**child_environment(), "PYTHONPATH": "", "ARENA_FACTORY_HERE": "", **environment}
    call = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(call, cwd=folder, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        module("factory.process"),
        [sys.executable, "-c", f"import subprocess as s, sys; s.run([sys.executable, '-c', 'import {NAMES[0]}'])"],
        [sys.executable, "-c", "from multiprocessing.resource_tracker import main"],
    ],
    ids=["child", "grandchild", "worker"],
)
@pytest.mark.parametrize("path", ["", ".", f":{ROOT}"])
def test_no_process_imports_a_module_of_the_current_folder(strangers, monkeypatch, command, path):
    monkeypatch.setenv("PYTHONPATH", path)
    subprocess.run(command, cwd=strangers, env=child_environment(), check=True)
    assert not (strangers / "pwned").exists()


def test_a_strangers_folder_is_refused_unless_told(strangers):
    done = run_py(strangers, "status")
    assert done.returncode == 2 and "not this project's folder" in done.stderr and "--here" in done.stderr
    for told in (run_py(strangers, "--here", "status"), run_py(strangers, "status", ARENA_FACTORY_HERE="1")):
        assert told.returncode == 0 and "run.py demo" in told.stdout, told.stderr
    assert run_py(strangers, "sft", "--help").returncode == run_py(ROOT, "status").returncode == 0
    assert not (strangers / "pwned").exists()


@pytest.mark.parametrize("command", [["status"], ["demo"], ["prepare", "--train", "x.csv"], ["doctor"]], ids=" ".join)
def test_a_deleted_folder_ends_with_a_remedy(tmp_path, command):
    call = f"mkdir gone; cd gone; rmdir ../gone; exec {sys.executable} {ROOT / 'run.py'} --here {' '.join(command)}"
    done = subprocess.run(["sh", "-c", call], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("Error: the current folder was deleted"), done.stderr
