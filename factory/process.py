"""A child process: LLaMA-Factory in its own process group, watched, and ended with us (POSIX only)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import psutil

from common.console import secrets
from common.error_hints import all_errors, clean_lines, last_lines, remedy_for
from common.errors import ArenaError, Interrupted, Stopped, stop_signals
from factory.launcher import LIFELINE

_ROOT = Path(__file__).resolve().parents[1]
_POLL = 0.2  # seconds between two looks at the child
_CENSUS = 2.0  # seconds between two lists of its descendants
_TAIL = 400_000  # bytes of the log that are searched for the error

# Variables of a user's shell that LLaMA-Factory must not see: another launcher that refuses our recipes; silence about
# unknown keys; a log without the number of rows; LLaMA Board's mode; the rank of an outer torchrun's worker.
_REMOVED = (
    *("USE_V1", "USE_MCA", "ALLOW_EXTRA_ARGS", "LLAMAFACTORY_VERBOSITY", "LLAMABOARD_ENABLED", "LLAMABOARD_WORKDIR"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "TORCHELASTIC_RUN_ID"),
)


def module(name: str, *arguments: str) -> list[str]:
    """Return the command that runs a module of ours or of a library, never one in the current folder."""
    return [sys.executable, "-P", "-m", name, *arguments]


def llamafactory(*arguments: str) -> list[str]:
    """Return the command that runs one command of LLaMA-Factory, e.g. train recipe.yaml key=value."""
    return module("factory.launcher", *arguments)


def child_environment() -> dict[str, str]:
    """Return our environment as LLaMA-Factory may see it: its switches removed, tokens and hub settings kept."""
    environment = {key: value for key, value in os.environ.items() if key not in _REMOVED}
    paths = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if Path(path) != Path()]
    environment["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *paths])
    environment["PYTHONSAFEPATH"] = "1"  # nor do grandchildren import from the current folder
    # torchrun lies beside the interpreter, and is looked for on the PATH
    beside = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join(filter(None, [beside, environment.get("PATH")]))
    environment["PYTHONUNBUFFERED"] = "1"
    environment["PYTHONIOENCODING"] = "utf-8:backslashreplace"  # the log is read as UTF-8, whatever the terminal is
    environment.setdefault("TQDM_MININTERVAL", "5")  # seconds; the log is a file
    return environment


def run_child(
    command: Sequence[str],
    log: Path,
    *,
    what: str,
    on_line: Callable[[str], None] = lambda line: None,
    on_look: Callable[[], None] = lambda: None,
    interrupted_remedy: Callable[[], str] = lambda: "go on with --resume",
    grace: float = 10.0,
    environment: Mapping[str, str] | None = None,
) -> float:
    """Run `command` to its end, appending its output to `log`, and return the seconds; `environment` is added to ours.

    `on_line` gets each line of its output, `on_look` is called some times a second; what they raise ends the child.
    Ctrl-C, SIGTERM or SIGHUP to us end the child with all of its descendants: SIGINT, after `grace` seconds
    SIGTERM, then SIGKILL (a second Ctrl-C does not wait). If we are killed by SIGKILL the launcher notices.
    Raises ArenaError with the child's last error and its remedy, or Interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    theirs, ours = os.pipe()  # only we hold the other end: the child sees by it when we are gone
    with log.open("ab") as file, os.fdopen(theirs), os.fdopen(ours, "wb"), stop_signals():
        file.write(f"### {datetime.now().isoformat(timespec='seconds')} {' '.join(command)}\n".encode())
        file.flush()
        begins_at = file.tell()
        try:
            # The output goes into the file itself: no pipe that could fill up and block the child.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**child_environment(), LIFELINE: str(theirs), **(environment or {})},
                pass_fds=(theirs,),
                start_new_session=True,
            )
        except OSError as error:
            raise ArenaError(f"{what} could not start: {error}", where=command[0]) from None
        family = _Family(process)
        try:
            _follow(family, log, begins_at, on_line, on_look)
            family.end((signal.SIGTERM, 2.0))  # what the child left behind
        except BaseException as error:
            family.end((signal.SIGINT, grace), (signal.SIGTERM, grace))
            if isinstance(error, KeyboardInterrupt | Stopped):
                raise Interrupted(f"{what} was interrupted", where=str(log), remedy=interrupted_remedy()) from None
            raise
        finally:
            _hide_secrets(log)
    if process.returncode != 0:
        raise _failure(what, process.returncode, log, begins_at)
    return time.monotonic() - started


def _follow(
    family: _Family, log: Path, begins_at: int, on_line: Callable[[str], None], on_look: Callable[[], None]
) -> None:
    """Report the child's output line by line until it ends."""
    rest, ended = b"", False
    with log.open("rb") as output:
        output.seek(begins_at)
        while not ended:
            ended = family.wait(_POLL)
            # tqdm ends its lines by \r
            *lines, rest = (rest + output.read()).replace(b"\r", b"\n").split(b"\n")
            for line in [*lines, rest] if ended and rest else lines:
                for text in clean_lines(line.decode("utf-8", "replace")):
                    on_line(text)
            on_look()


class _Family:
    """The child and all of its descendants, also those in sessions of their own (torchrun's workers)."""

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process
        self._descendants: set[psutil.Process] = set()
        self._next_census = 0.0

    def wait(self, seconds: float) -> bool:
        """Wait at most that long; return whether the child has ended."""
        if time.monotonic() >= self._next_census:
            self._take_census()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def end(self, *steps: tuple[int, float]) -> None:
        """End all of them: for each step a signal and the seconds to wait, at last SIGKILL.

        A second Ctrl-C skips the waiting.
        """
        with suppress(KeyboardInterrupt, Stopped):
            for number, seconds in steps:
                self._send(number)
                if self._have_ended(seconds):
                    break
        self._send(signal.SIGKILL)
        self._have_ended(5.0)

    def _take_census(self) -> None:
        # Remembered, because a descendant whose parent ended cannot be found any more.
        self._next_census = time.monotonic() + _CENSUS
        with suppress(psutil.Error):
            if self._process.returncode is None:
                self._descendants.update(psutil.Process(self._process.pid).children(recursive=True))

    def _send(self, number: int) -> None:
        self._take_census()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
        for other in self._descendants:
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(other.pid) != self._process.pid:  # those in the group have it already
                    other.send_signal(number)

    def _have_ended(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        _, alive = psutil.wait_procs(list(self._descendants), timeout=max(until - time.monotonic(), 0))
        self._descendants = set(alive)
        return self._process.returncode is not None and not alive


def _failure(what: str, code: int, log: Path, begins_at: int) -> ArenaError:
    """Return the error of a child that failed, from its exit code and what it wrote last."""
    with log.open("rb") as file:
        file.seek(max(file.seek(0, os.SEEK_END) - _TAIL, begins_at))
        output = file.read().decode("utf-8", "replace")
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
    # A process cannot report that it was killed by signal 9: the end of its log is not the reason.
    errors = [] if code == -signal.SIGKILL else all_errors(output)
    error = errors[-1] if errors else "" if code < 0 else last_lines(output)
    known = (remedy_for(text) for text in [*reversed(errors), how, error])
    remedy = next((text for text in known if text), f"read the end of {log}: this error is not in our table")
    return ArenaError("\n  ".join([f"{what} {how}", *error.splitlines()]), where=str(log), remedy=remedy)


def _hide_secrets(log: Path) -> None:
    """Replace the values of tokens and keys in the log of a child that has ended."""
    content = log.read_bytes()
    hidden = content
    for name, value in secrets().items():
        hidden = hidden.replace(value.encode(), f"<{name}>".encode())
    if hidden != content:
        log.write_bytes(hidden)
