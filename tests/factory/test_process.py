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
from factory import process as child
from factory.process import child_environment, llamafactory, run_child

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


def script(text, *arguments):
    return [sys.executable, "-c", textwrap.dedent(text), *arguments]


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


def test_the_whole_output_is_kept_and_lines_are_reported_as_they_come(tmp_path):
    log, lines, looks = tmp_path / "run.log", [], []
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
    assert lines[-1] == "no newline at the end" and looks[-1] == len(lines)
    assert "y" * 300_000 in log.read_text(errors="replace")
    assert log.read_text(errors="replace").startswith("### ")
    assert seconds > 0


def test_a_second_run_appends_and_reads_only_its_own_part(tmp_path):
    log, lines = tmp_path / "run.log", []
    run_child(script("print('first')"), log, what="a test")
    run_child(script("print('second')"), log, what="a test", on_line=lines.append)
    assert lines == ["second"] and "first" in log.read_text()


def test_a_failure_tells_the_childs_error_its_log_and_a_remedy(tmp_path):
    log = tmp_path / "run.log"
    with pytest.raises(ArenaError) as caught:
        run_child(script("print('chatter')\nraise ValueError('Template x does not exist.')"), log, what="training sft")
    text = str(caught.value)
    assert text.startswith(f"{log}: training sft ended with exit code 1\n  ValueError: Template x does not exist.")
    assert "remedy: set `template`" in text
    assert "Traceback" not in text


def test_an_unknown_error_points_to_the_log(tmp_path):
    with pytest.raises(ArenaError, match="boom") as caught:
        run_child(script("import sys; print('boom'); sys.exit(3)"), tmp_path / "run.log", what="a test")
    assert "exit code 3" in caught.value.what
    assert "run.log" in caught.value.remedy


def test_a_child_that_was_killed_is_taken_for_out_of_memory(tmp_path):
    kill = "import os; print('ValueError: old'); os.kill(os.getpid(), 9)"
    with pytest.raises(ArenaError, match=r"killed by signal 9 \(SIGKILL\)") as caught:
        run_child([sys.executable, "-uc", kill], tmp_path / "run.log", what="a test")
    assert "out of memory" in caught.value.remedy
    assert "old" not in caught.value.what


def test_a_command_that_does_not_exist_is_an_error_of_ours(tmp_path):
    with pytest.raises(ArenaError, match="could not start"):
        run_child([str(tmp_path / "nothing")], tmp_path / "run.log", what="a test")


def test_an_error_of_a_watcher_ends_the_child_and_its_descendants(tmp_path):
    log = tmp_path / "run.log"

    def refuse(line):
        if line.startswith("pids"):
            raise ArenaError("rows differ")

    with pytest.raises(ArenaError, match="rows differ"):
        run_child(script(IGNORING), log, what="a test", on_line=refuse, grace=0.3)
    assert alive(pids_in(log)) == []


def test_what_a_child_leaves_behind_is_ended(tmp_path):
    log = tmp_path / "run.log"
    run_child(
        script(
            """
            import subprocess, sys
            other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
            print("pids", other.pid)
            """
        ),
        log,
        what="a test",
    )
    wait_for(lambda: alive(pids_in(log)) == [])


def test_descendants_that_end_by_themselves_are_no_error(tmp_path, monkeypatch):
    monkeypatch.setattr(child, "_CENSUS", 0.0)
    log = tmp_path / "run.log"
    run_child(
        script(
            """
            import subprocess, sys, time
            other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(0.6)"], start_new_session=True)
            print("pids", other.pid, flush=True)
            time.sleep(0.5)
            other.wait()
            """
        ),
        log,
        what="a test",
    )
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
def test_an_interrupt_of_ours_ends_the_childs_whole_group(tmp_path, number):
    log = tmp_path / "run.log"
    process = outer(log, grace=0.3)
    pids = pids_in(log)
    assert len(alive(pids)) == 2
    process.send_signal(number)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 1
    assert errors.splitlines() == [f"{log}: training sft was interrupted", "  remedy: go on with --resume"]
    assert alive(pids) == []


def test_a_second_interrupt_does_not_wait(tmp_path):
    log = tmp_path / "run.log"
    process = outer(log, grace=60)
    pids = pids_in(log)
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert time.monotonic() - started < 15
    assert "was interrupted" in errors
    assert "Traceback" not in errors
    assert alive(pids) == []


def test_the_child_ends_when_we_are_killed(tmp_path):
    log = tmp_path / "run.log"
    process = outer(log, grace=60)
    pids = pids_in(log)
    process.kill()
    process.communicate()
    wait_for(lambda: alive(pids) == [], 15)


def test_the_childs_environment(monkeypatch):
    for name in ("USE_V1", "USE_MCA", "ALLOW_EXTRA_ARGS", "LLAMABOARD_ENABLED", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "DISABLE_VERSION_CHECK", "FORCE_TORCHRUN", "GRADIO_SERVER_NAME"):
        monkeypatch.setenv(name, "kept")
    monkeypatch.setenv("PYTHONPATH", "mine")
    environment = child_environment()
    assert not {"USE_V1", "USE_MCA", "ALLOW_EXTRA_ARGS", "LLAMABOARD_ENABLED", "TORCHELASTIC_RUN_ID"} & set(environment)
    kept = ("HF_HUB_OFFLINE", "HF_TOKEN", "DISABLE_VERSION_CHECK", "FORCE_TORCHRUN", "GRADIO_SERVER_NAME")
    assert {environment[name] for name in kept} == {"kept"}
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(ROOT), "mine"]
    assert environment["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert environment["PYTHONUNBUFFERED"] == "1"
    assert os.environ["USE_V1"] == "1"  # ours is untouched


def test_no_input_can_be_asked_for(tmp_path):
    with pytest.raises(ArenaError, match="EOFError"):
        run_child(script("input('run custom code? [y/N]')"), tmp_path / "run.log", what="a test")


def test_an_unknown_command_is_an_error(tmp_path):
    with pytest.raises(ArenaError, match="Unknown command: trian") as caught:
        run_child(llamafactory("trian", "x.yaml"), tmp_path / "run.log", what="a test")
    assert "exit code 2" in caught.value.what
