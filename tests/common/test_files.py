"""Atomic files and folders: whole or absent, and the earlier ones survive a failure."""

import csv
import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas
import pyarrow
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.csv import ConvertOptions, ParseOptions, read_csv

from common.errors import ArenaError
from common.files import atomic_file, atomic_folder, csv_line, only_run, write_json

ROOT = Path(__file__).parents[2]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "a.txt"
    with atomic_file(target) as file:
        file.write("über\r\n")
        assert not target.exists()
    assert target.read_bytes() == "über\r\n".encode() and names(target.parent) == ["a.txt"]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1))
def test_a_line_of_csv_is_read_back_by_all_readers(texts):
    """Every character but NUL, and nothing of ours writes CSV in another way."""
    written = "".join(map(csv_line, [("id", "n"), *((text, 1) for text in texts)]))
    assert [row[0] for row in csv.reader(io.StringIO(written, newline=""))] == ["id", *texts]
    assert pandas.read_csv(io.StringIO(written, newline=""), dtype=str, keep_default_na=False)["id"].tolist() == texts
    types = ConvertOptions(column_types={"id": pyarrow.string()})
    options = {"parse_options": ParseOptions(newlines_in_values=True), "convert_options": types}
    assert read_csv(io.BytesIO(written.encode()), **options)["id"].to_pylist() == texts


@pytest.mark.parametrize("write", [atomic_file, atomic_folder])
def test_what_a_killed_writer_left_is_removed_by_the_next_one_and_a_living_ones_is_not(tmp_path, write):
    code = f"import os; from pathlib import Path; from common.files import {write.__name__}\n"
    code += f"with {write.__name__}(Path({str(tmp_path / 'x')!r})): os.kill(os.getpid(), 9)"
    child = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)})
    assert child.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    with write(tmp_path / "x"):
        assert not left.exists()
        (mine,) = tmp_path.iterdir()
        with write(tmp_path / "x"):
            assert mine.exists()
        if write is atomic_folder:
            (tmp_path / "x").rmdir()
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_rights_are_those_of_an_ordinary_new_file(tmp_path, mask):
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "a") as file, atomic_folder(tmp_path / "b"):
            file.write("x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~mask
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o777 & ~mask


def test_a_fault_or_a_crash_between_the_two_renames_loses_nothing(tmp_path, monkeypatch):
    target = tmp_path / "set"
    target.mkdir()
    (target / "one").write_text("one")
    rename = Path.rename

    def failing(self, to):
        if self.name.endswith(".tmp"):
            raise OSError("disk is gone")
        return rename(self, to)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "rename", failing)
        with pytest.raises(OSError, match="disk is gone"), atomic_folder(target):
            pass
    assert names(tmp_path) == ["set"] and names(target) == ["one"]
    target.rename(tmp_path / ".set.old")  # as a crash leaves it
    with pytest.raises(ValueError), atomic_folder(target):
        assert names(target) == ["one"]
        raise ValueError
    assert names(tmp_path) == ["set"]
    with pytest.raises(FileExistsError), atomic_folder(target, replace=False):
        pass
    assert names(tmp_path) == ["set"] and names(target) == ["one"]


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


def held_by_another(code: str) -> subprocess.Popen:
    """Return a process that holds the lock of outputs/x while it runs `code`, once it holds it."""
    script = "import os, time; from pathlib import Path; from common.files import only_run\n"
    script += f"with only_run(Path('outputs/x')): print('held', flush=True); {code}"
    child = subprocess.Popen([sys.executable, "-c", script], env={"PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"held\n"
    return child


@pytest.fixture
def lock(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("outputs/.x.lock")


def test_a_lock_may_be_waited_for_and_that_of_a_killed_run_is_free(lock):
    for code, status in (("time.sleep(0.5)", 0), ("time.sleep(0.2); os.kill(os.getpid(), 9)", -signal.SIGKILL)):
        holder, waited = held_by_another(code), []
        with only_run(Path("outputs/x"), wait=waited.append):
            assert holder.wait() == status
            assert json.loads(lock.read_text())["pid"] == os.getpid()
        assert f"process {holder.pid}" in waited[0]


def test_runs_that_wait_for_each_other_enter_one_at_a_time(lock):
    code = """
from pathlib import Path
from common.files import only_run
for _ in range(50):
    with only_run(Path("x/y"), wait=lambda who: None):
        Path("number").write_text(str(int(Path("number").read_text()) + 1))
"""
    Path("number").write_text("0")
    runs = [subprocess.Popen([sys.executable, "-c", code], env={"PYTHONPATH": str(ROOT)}) for _ in range(4)]
    assert [run.wait() for run in runs] == [0] * 4
    assert Path("number").read_text() == "200"


def test_the_lock_of_another_host_is_not_taken_over_and_a_torn_one_is(lock):
    lock.parent.mkdir()
    lock.write_text('{"pid": 1, "host": "elsewhere", "started_at": "2026-01-01"}')
    with (
        pytest.raises(ArenaError, match="process 1 on elsewhere, since 2026-01-01") as caught,
        only_run(lock.parent / "x"),
    ):
        pass
    assert f"delete {lock}" in caught.value.remedy and "elsewhere" in lock.read_text()
    lock.write_text('{"pid": 1, "ho')
    with only_run(lock.parent / "x"):
        lock.unlink()  # too early, as the remedy says for a run that is gone
        lock.write_text("another's")
    assert lock.read_text() == "another's"
