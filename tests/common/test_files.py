"""Atomic files and folders: whole or absent, and the earlier ones survive a failure."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from common.files import atomic_file, atomic_folder, sha256_of, write_json

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_file(target) as file:
        file.write("über\r\n")
        assert not target.exists()
    assert target.read_bytes() == "über\r\n".encode()
    assert names(target.parent) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt], ids=("fault", "interrupt"))
def test_a_failed_block_leaves_the_earlier_file_and_nothing_else(tmp_path, error):
    target = tmp_path / "a.bin"
    target.write_bytes(b"earlier")
    with pytest.raises(error), atomic_file(target, "wb") as file:
        file.write(b"half")
        raise error
    assert target.read_bytes() == b"earlier"
    assert names(tmp_path) == ["a.bin"]


def test_a_killed_process_leaves_the_earlier_file_and_folder(tmp_path):
    (tmp_path / "a.txt").write_text("earlier")
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "rows.jsonl").write_text("earlier")
    script = """
import os, signal, sys
from pathlib import Path
from common.files import atomic_file, atomic_folder
place = Path(sys.argv[1])
with atomic_folder(place / "set") as folder, atomic_file(place / "a.txt") as file:
    (folder / "rows.jsonl").write_text("half")
    file.write("half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    child = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT)
    assert child.returncode == -signal.SIGKILL
    assert (tmp_path / "a.txt").read_text() == "earlier"
    assert (tmp_path / "set" / "rows.jsonl").read_text() == "earlier"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_rights_are_those_of_an_ordinary_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "a") as file:
            file.write("x")
        with atomic_folder(tmp_path / "b"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_folder_replaces_the_earlier_one_wholly(tmp_path):
    target = tmp_path / "set"
    for name in ("one", "two"):
        with atomic_folder(target) as folder:
            (folder / name).write_text(name)
    assert names(target) == ["two"]
    assert names(tmp_path) == ["set"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt], ids=("fault", "interrupt"))
def test_a_failed_block_leaves_the_earlier_folder_and_nothing_else(tmp_path, error):
    target = tmp_path / "set"
    with atomic_folder(target) as folder:
        (folder / "one").write_text("one")
    with pytest.raises(error), atomic_folder(target) as folder:
        (folder / "two").write_text("half")
        raise error
    assert names(tmp_path) == ["set"]
    assert names(target) == ["one"]


def test_an_error_between_the_two_renames_puts_the_earlier_folder_back(tmp_path, monkeypatch):
    target = tmp_path / "set"
    target.mkdir()
    (target / "one").write_text("one")
    rename = Path.rename

    def failing(self, to):
        if self.name.endswith(".tmp"):
            raise OSError("disk is gone")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="disk is gone"), atomic_folder(target):
        pass
    assert names(tmp_path) == ["set"]
    assert names(target) == ["one"]


def test_a_crash_between_the_two_renames_is_mended_by_the_next_call(tmp_path):
    (tmp_path / ".set.old").mkdir()
    (tmp_path / ".set.old" / "one").write_text("one")
    with pytest.raises(ValueError), atomic_folder(tmp_path / "set"):
        assert names(tmp_path / "set") == ["one"]
        raise ValueError
    assert names(tmp_path) == ["set"]


def test_json_is_readable_and_refuses_what_is_not_json(tmp_path):
    target = tmp_path / "a.json"
    write_json(target, {"naïve": [1, None, 0.5]})
    assert json.loads(target.read_text(encoding="utf-8")) == {"naïve": [1, None, 0.5]}
    assert "naïve" in target.read_text(encoding="utf-8")
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_json(target, {"x": value})
    assert json.loads(target.read_text(encoding="utf-8")) == {"naïve": [1, None, 0.5]}
    assert names(tmp_path) == ["a.json"]


def test_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 100_000)
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"x" * 100_000).hexdigest()
