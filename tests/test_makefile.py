"""The Makefile in a folder with a space in its name: what it calls finds the environment that it made."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def tool(path: Path) -> None:
    """Put a program in its place that only notes down how it was called."""
    path.write_text('#!/bin/sh\necho "$VIRTUAL_ENV|$*" >> calls.txt\n')
    path.chmod(0o755)


@pytest.mark.parametrize("target", ["install", "extra-ray", "extra-smollm2"])
def test_a_folder_with_a_space_a_quote_and_a_dollar(tmp_path, target):
    folder = tmp_path / "my kaggle dir's $HOME"
    (folder / ".venv/bin").mkdir(parents=True)
    for name in ("Makefile", "requirements.lock"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("python", "uv"):
        tool(folder / ".venv/bin" / name)
    done = subprocess.run(["make", target], cwd=folder, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    synced = [line for line in (folder / "calls.txt").read_text().splitlines() if "|pip " in line]
    assert len(synced) == (2 if target != "install" else 1)
    assert all(line.startswith(f"{folder}/.venv|pip ") for line in synced)
    assert (folder / ".venv/.synced").exists()
