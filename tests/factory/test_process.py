import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from common.errors import ArenaError
from factory.process import child_environment, run_child

ROOT = Path(__file__).parents[2]
IGNORING = """
    import os, signal, subprocess, sys, time
    from factory.launcher import follow_parent
    follow_parent()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # a grandchild in a session of its own, as torchrun starts its workers
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    print("pids", os.getpid(), other.pid, flush=True)
    time.sleep(60)
"""


def script(text):
    return [sys.executable, "-c", textwrap.dedent(text)]


@pytest.fixture
def log(tmp_path):
    return tmp_path / "run.log"


def wait_for(condition, seconds=10.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if value := condition():
            return value
        time.sleep(0.02)
    raise AssertionError("waited in vain")


def pids_in(log):
    def read():
        # Only a whole line: unbuffered, print writes its arguments one by one.
        *lines, _ = (log.read_text() if log.exists() else "").split("\n")
        line = next((line for line in lines if line.startswith("pids ")), None)
        return [int(part) for part in line.split()[1:]] if line else None

    return wait_for(read)


def alive(pids):
    return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]


def test_the_whole_output_is_kept_and_lines_are_reported_as_they_come(log):
    lines, looks = [], []
    run_child(script("print('earlier')"), log, what="a test")
    seconds = run_child(
        script(
            """
            import sys
            print("out"); print("err", file=sys.stderr); sys.stderr.buffer.write(b" 5%| \\r 6%| \\r\\xff")
            print("y" * 300_000)  # more than a pipe holds
            sys.stdout.write("no newline at the end")
            """
        ),
        log,
        what="a test",
        on_line=lines.append,
        on_look=lambda: looks.append(len(lines)),
    )
    assert lines[:3] == ["out", "err", " 5%| "]
    assert lines[-1] == "no newline at the end" and looks[-1] == len(lines) and seconds > 0
    kept = log.read_text(errors="replace")
    assert kept.startswith("### ") and "earlier" in kept and "y" * 300_000 in kept


@pytest.mark.parametrize(
    ("code", "what", "remedy"),
    [
        ("print('chatter')\nraise ValueError('size mismatch for x')", "size mismatch", "do not belong together"),
        ("import sys; print('boom'); sys.exit(3)", "exit code 3\n  boom", "run.log"),
        ("import os; print('x'); os.kill(os.getpid(), 9)", "killed by signal 9 (SIGKILL)", "out of memory"),
        ("input('run custom code? [y/N]')", "EOFError", "run.log"),
    ],
    ids=("known", "unknown", "killed", "no input"),
)
def test_a_failure_has_the_childs_error_its_log_and_a_remedy(log, code, what, remedy):
    with pytest.raises(ArenaError) as caught:
        run_child(script(code), log, what="a test")
    assert what in caught.value.what and remedy in caught.value.remedy and caught.value.where == str(log)
    assert "Traceback" not in str(caught.value)


def test_a_command_that_does_not_exist_is_an_error(tmp_path, log):
    with pytest.raises(ArenaError, match="could not start"):
        run_child([str(tmp_path / "nothing")], log, what="a test")


def test_an_error_of_a_callback_ends_the_child_and_its_descendants(log):
    def refuse(line):
        if line.startswith("pids"):
            raise ArenaError("rows differ")

    with pytest.raises(ArenaError, match="rows differ"):
        run_child(script(IGNORING), log, what="a test", on_line=refuse, grace=0.3)
    assert alive(pids_in(log)) == []


def outer(log, grace):
    """Start a process of ours that runs the stubborn child, as run.py would."""
    code = f"""
        import sys
        from pathlib import Path
        from common.errors import ArenaError
        from factory.process import run_child
        try:
            run_child({script(IGNORING)!r}, Path({str(log)!r}), what="training sft", grace={grace})
        except ArenaError as error:
            print(error, file=sys.stderr)
            sys.exit(error.exit_code)
    """
    return subprocess.Popen(script(code), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_us_ends_the_childs_whole_group(log, number):
    process = outer(log, grace=0.3)
    pids = pids_in(log)
    assert len(alive(pids)) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1 and alive(pids) == []
    assert errors.splitlines() == [f"{log}: training sft was interrupted", "  remedy: go on with --resume"]


def test_a_second_interrupt_does_not_wait(log):
    process = outer(log, grace=60)
    pids = pids_in(log)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=15)
    assert "was interrupted" in errors and "Traceback" not in errors and alive(pids) == []


def test_the_child_ends_when_we_are_killed(log):
    process = outer(log, grace=60)
    pids = pids_in(log)
    process.kill()
    process.communicate()
    wait_for(lambda: alive(pids) == [], 15)


def test_the_childs_environment(monkeypatch):
    removed = {"USE_V1", "USE_MCA", "ALLOW_EXTRA_ARGS", "LLAMABOARD_ENABLED", "TORCHELASTIC_RUN_ID"}
    kept = {"HF_HUB_OFFLINE", "HF_TOKEN", "DISABLE_VERSION_CHECK", "FORCE_TORCHRUN", "GRADIO_SERVER_NAME"}
    for name in removed | kept:
        monkeypatch.setenv(name, "as given")
    monkeypatch.setenv("PYTHONPATH", "mine")
    environment = child_environment()
    assert not removed & set(environment) and {environment[name] for name in kept} == {"as given"}
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "mine"]
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert os.environ["USE_V1"] == "as given"  # ours is untouched
