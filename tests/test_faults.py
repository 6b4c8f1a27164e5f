"""Faults of the machine around us: a full disk, missing rights, signals, no memory, a second run, a move, a clock.

Each ends in exit code 1, an error with a remedy and no traceback; what was finished stays as it was, and the same
command again ends as if nothing had happened. Where a fault has its test elsewhere, docs/trust.md says where.
"""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from datetime import datetime, timedelta
from pathlib import Path
from unittest.mock import Mock

import pytest
from chain import ROOT, call

import run
from common.errors import user_error
from common.files import only_run
from data_prep import export as export_module
from scoring import score_stage
from tests.bad_inputs.place import PREPARE_TEST, SCORE, SCORE_INPUT

ANEW = (*SCORE, "--fresh")
DATA, OUT = Path("data/exam"), Path("outputs/exam/sft")
RESULTS = ("probabilities_valid.csv", "probabilities_test.csv", "submission.csv")


def ours(*arguments: str):
    """Call run.py in this process; an error must be one of ours."""
    done = call(*arguments)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert "Traceback" not in done.output
    return done


def refused(*arguments: str, words: tuple[str, ...] = ()) -> str:
    """Call run.py, which must end with our error; return what it said."""
    done = ours(*arguments)
    assert done.exit_code == 1, done.output
    assert "remedy: " in done.output and all(word in done.output for word in words), done.output
    return done.output


def results() -> dict[str, bytes]:
    """Return what a scored stage is for: probabilities and submission."""
    return {name: (OUT / name).read_bytes() for name in RESULTS}


def exported() -> dict[str, bytes]:
    """Return the files of the export."""
    return {path.name: path.read_bytes() for path in sorted(DATA.iterdir()) if path.is_file()}


def leftovers() -> list[Path]:
    """Return what was begun and not ended."""
    return [path for path in Path().rglob("*.tmp") if not path.is_symlink()]


class Nth:
    """Does `fault` at the n-th call and what it stands for otherwise."""

    def __init__(self, real, n: int, fault):
        self._real, self._n, self._fault, self.calls = real, n, fault, 0

    def __call__(self, *arguments, **options):
        self.calls += 1
        if self.calls == self._n:
            self._fault()
        return self._real(*arguments, **options)


@pytest.mark.parametrize("number, words", [(errno.ENOSPC, "no space left"), (errno.EROFS, "read-only file system")])
@pytest.mark.parametrize("command", [PREPARE_TEST, ANEW], ids=["prepare", "score"])
def test_whichever_write_fails_nothing_finished_is_lost(place, monkeypatch, command, number, words):
    ours(*command)
    whole, export, scored = place.snapshot(), exported(), results()
    n = 0
    while True:
        n += 3 if command is ANEW else 1
        sync = Nth(os.fsync, n, Mock(side_effect=OSError(number, os.strerror(number), "somewhere")))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", sync)
            done = ours(*command)
        if sync.calls < n:
            break
        assert done.exit_code == 1 and words in done.output and "remedy: " in done.output, done.output
        assert exported() == export, "the export is the one of before, or the same made anew"
        assert not leftovers()
    assert n > 3 and done.exit_code == 0, done.output
    assert results() == scored
    lost = [name for name in whole if not Path(name).exists()]
    assert not lost


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a disk")
def test_a_disk_that_is_really_full(place, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("this container may not mount a disk")
    try:
        before = exported()
        shutil.move("data", disk / "data")
        Path("data").symlink_to(disk / "data")
        (disk / "filler").write_bytes(bytes(1000))
        with (disk / "filler").open("ab", buffering=0) as filler:
            try:
                while filler.write(bytes(4096)):
                    pass
            except OSError as error:
                assert error.errno == errno.ENOSPC
        refused(*PREPARE_TEST, words=("no space left", "free disk space"))
        assert exported() == before and not leftovers()
        (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        assert ours(*PREPARE_TEST).exit_code == 0
        assert set(exported()) >= {"manifest.json", "sft_train.jsonl"}
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def limited(limit: str) -> subprocess.CompletedProcess:
    """Prepare in a process of its own under a limit of the shell."""
    code = f"ulimit {limit}; exec {sys.executable} {ROOT / 'run.py'} {' '.join(PREPARE_TEST)}"
    return subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=False)


def test_a_file_that_may_not_grow_is_told(place):
    before = exported()
    done = limited("-f 4")
    assert done.returncode == 1 and "file too large" in done.stderr and "remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert exported() == before and not leftovers()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda sign: sign.name)
@pytest.mark.parametrize("command", [PREPARE_TEST, SCORE_INPUT, ANEW], ids=["prepare", "input", "score"])
def test_a_signal_ends_the_work_in_words_and_it_goes_on(place, monkeypatch, command, sign):
    monkeypatch.setattr(sys, "argv", ["run.py", *command])
    ours(*command)
    export, scored = exported(), results()
    mine = Path("mine.csv").read_bytes() if Path("mine.csv").exists() else None
    Path("mine.csv").unlink(missing_ok=True)
    module, name = (export_module, "write_sets") if command is PREPARE_TEST else (score_stage.Answers, "write")
    with monkeypatch.context() as patch:
        patch.setattr(module, name, Nth(getattr(module, name), 1, lambda: signal.raise_signal(sign)))
        by = "interrupted" if sign is signal.SIGINT else f"interrupted by {sign.name}"
        begins = "starts over" if command is PREPARE_TEST else "goes on from what is scored"
        refused(*command, words=(by, f"the same command {'without --fresh ' if command is ANEW else ''}{begins}"))
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "the handler is put back"
    assert exported() == export and not leftovers() and not Path("mine.csv").exists()
    again = ours(*(SCORE if command is ANEW else command))
    assert again.exit_code == 0, again.output
    assert (exported(), results()) == (export, scored)
    if mine is not None:
        assert Path("mine.csv").read_bytes() == mine
    assert ("were scored by an earlier call, and kept" in again.output) == (command is not PREPARE_TEST)


def test_memory_that_runs_out_is_told(place, monkeypatch):
    before = exported()
    monkeypatch.setattr(export_module, "write_sets", Mock(side_effect=MemoryError))
    refused(*PREPARE_TEST, words=("cannot allocate memory", "--workers"))
    assert exported() == before and not leftovers()


@pytest.mark.parametrize("limit", [450_000, 600_000])
def test_a_process_with_little_memory_loses_nothing(place, limit):
    """Libraries in C++ may abort instead of raising; then nobody can say anything, but nothing is lost either."""
    ours(*PREPARE_TEST)
    before = exported()
    done = limited(f"-v {limit}")
    if done.returncode == 1 and "Error: " in done.stderr:
        assert "memory" in done.stderr and "remedy: " in done.stderr and "Traceback" not in done.stderr
    assert exported() == before
    assert ours(*PREPARE_TEST).exit_code == 0 and exported() == before and not leftovers()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "x/y"), "x/y: no space left"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left"), "no space left"),
        (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "no space left"),
        (PermissionError(errno.EACCES, "Permission denied", "saves"), "saves: permission denied"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "cannot allocate memory"),
        (SyntaxError("expected ':'", ("/x/site-packages/pandas/f.py", 3, 1, "", 3, 1)), "cannot allocate memory"),
        (ImportError("libarrow.so: failed to map segment: cannot allocate memory"), "cannot allocate memory"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "mine"), "mine: is a directory"),
        (OSError(errno.EMFILE, "Too many open files"), "ulimit -n"),
        (KeyboardInterrupt(), "interrupted"),
    ],
)
def test_an_error_of_the_operating_system_has_a_remedy(error, words):
    told = user_error(error)
    assert words in str(told) and told.remedy


@pytest.mark.parametrize("command", [None, *run.cli.commands])
def test_the_advice_after_an_interruption_fits_the_command(monkeypatch, command):
    remedy = user_error(KeyboardInterrupt(), command).remedy
    parameters = getattr(run.cli.commands.get(command), "params", ())
    options = {option for parameter in parameters for option in parameter.opts}
    called = remedy.split("python run.py")[0]  # a whole call has options of its own
    assert {word for word in called.split() if word.startswith("--")} <= options
    assert remedy in str(user_error(OSError(errno.ENOSPC, "x"), command))
    if "--fresh" in options:  # the same call again would put aside what was finished meanwhile
        monkeypatch.setattr(sys, "argv", ["run.py", command, "--fresh"])
        for error in (KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device", "x")):
            assert "the same command without --fresh goes on from what is " in user_error(error, command).remedy


OURS = SyntaxError("expected ':'", ("/x/arena-factory/scoring/pipeline.py", 3, 1, "", 3, 1))  # no lack of memory


@pytest.mark.parametrize("error", [ValueError("x"), KeyError("id"), OURS])
def test_a_fault_of_ours_stays_a_traceback(error):
    assert user_error(error) is None


@pytest.mark.parametrize("reader_gone", [True, False])
def test_a_broken_pipe_is_silent_only_where_our_own_reader_is_gone(reader_gone):
    code = "input(); from common.errors import user_error; raise SystemExit(user_error(BrokenPipeError(32, 'x')))"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes) as process:
        if reader_gone:
            process.stdout.close()
        process.stdin.write("\n")
        process.stdin.close()
        assert ("was killed" in process.stderr.read()) is not reader_gone
    assert process.returncode == (0 if reader_gone else 1)


def test_two_runs_at_once_are_told_who_is_at_work(place):
    before = place.snapshot()
    with only_run(DATA):
        refused(*PREPARE_TEST, words=(f"process {os.getpid()}", "another run is at work", "data/.exam.lock"))
    with only_run(OUT):
        refused(*SCORE, words=(f"process {os.getpid()}", "wait for it"))
    with only_run(OUT / "scoring" / "input-mine.csv"):
        refused(*SCORE_INPUT, words=("another run is at work",))
    assert {k: v for k, v in place.snapshot().items() if "input-" not in k} == before


@pytest.mark.parametrize("options", [["--precision", "16bit"], ["--engine", "llama.cpp"]])
def test_options_that_cannot_be_had_put_no_result_aside(place, monkeypatch, options):
    monkeypatch.setattr("scoring.engines.find_spec", lambda name: None)
    before = place.snapshot()
    done = ours(*SCORE, "--fresh", *options)
    assert done.exit_code in (1, 2) and "remedy: " in done.output and "loading" not in done.output, done.output
    assert place.snapshot() == before


def test_a_model_that_cannot_be_loaded_puts_no_result_aside(place):
    weights = OUT / "merged" / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    before = place.snapshot()
    refused(*SCORE, "--fresh")
    assert place.snapshot() == before
    weights.write_bytes(whole)
    done = ours(*SCORE, "--fresh")
    assert done.exit_code == 0 and "the earlier report is now outputs/exam/sft/report.json.earlier-1" in done.output


def test_a_project_that_moved_keeps_what_is_finished(place, tmp_path, monkeypatch):
    for path in (*OUT.glob("*.json"), *DATA.glob("*.json")):
        assert str(tmp_path) not in path.read_text(encoding="utf-8"), path
    moved = tmp_path / "elsewhere" / "project"
    shutil.copytree(Path.cwd(), moved, symlinks=True, copy_function=shutil.copyfile)  # other times of change
    shutil.rmtree(Path.cwd())
    monkeypatch.chdir(moved)
    assert "scores kept" in ours(*SCORE).output
    before = results()
    assert ours(*ANEW).exit_code == 0 and results() == before and ours(*SCORE_INPUT).exit_code == 0


def test_a_clock_that_goes_backwards_decides_nothing(place, monkeypatch):
    whole = results()
    for path in Path().rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.utime(path, (4e9, 4e9))  # files of the future

    class Backwards(datetime):
        calls = 0

        @classmethod
        def now(cls, tz=None):
            cls.calls += 1
            return datetime.fromtimestamp(2e9) - timedelta(days=cls.calls)

    ticks = iter(range(2_000_000_000, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(ticks)))
    monkeypatch.setattr("factory.state.datetime", Backwards)
    monkeypatch.setattr("common.files.datetime", Backwards)
    assert "scores kept" in ours(*SCORE).output and ours(*ANEW).exit_code == 0 and results() == whole
    record = json.loads((OUT / "state.json").read_text())["parts"]["score"]
    assert record["finished_at"] < record["started_at"] and record["seconds"] > 0
    assert "scores kept" in ours(*SCORE).output and ours(*SCORE_INPUT).exit_code == 0


def test_a_damaged_report_of_a_finished_stage_names_the_way_to_make_it_anew(place):
    before = results()
    report = OUT / "report.json"
    report.write_bytes(report.read_bytes()[:500])
    said = refused(*SCORE, words=("no readable report", "score -e exam --stage sft --fresh"))
    assert "run.py sft" not in said, "that would end here again"
    assert ours("score", "-e", "exam", "--stage", "sft", "--fresh").exit_code == 0
    assert results() == before and json.loads(report.read_text())["stage"] == "sft"


SENDER = """
import os, signal, sys, threading
sys.path.insert(0, sys.argv[1])
from data_prep.export_rows import open_pool
from scoring.executor import Workers

class Killed:
    def __reduce__(self):  # is pickled last: what precedes it is being sent when its process is killed
        threading.Timer(0.02, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return Killed, ()

class Sender:
    engine, precision, open = "llama.cpp", "fp32", int
    scorer = lambda self: self
    ask = lambda self, *_, **__: (bytes(200_000_000), Killed())

if __name__ == "__main__":
    try:
        if sys.argv[2] == "prepare":
            with open_pool(Sender(), 2) as work:
                list(work("ask", [(), ()]))
        Workers(Sender(), print, 1).ask([])
    except Exception as error:
        sys.exit(f"Error: {error}")
"""


@pytest.mark.slow
@pytest.mark.parametrize(("command", "told"), [("prepare", "of prepare ended"), ("score", "was killed, for want of")])
def test_a_worker_that_is_killed_while_it_sends_a_result_is_told(command, told, tmp_path):
    script = tmp_path / "sender.py"
    script.write_text(SENDER)  # Python's own pool waits for the rest of the result for ever
    call = [sys.executable, script, ROOT, command]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1 and told in done.stderr, done.stderr
