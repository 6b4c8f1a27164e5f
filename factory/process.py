"""A child process: LLaMA-Factory at work in its own process group, watched, and ended with us (POSIX only)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import psutil

from common.console import secrets
from common.error_hints import all_errors, clean_lines, last_lines, remedy_for
from common.errors import ArenaError, Interrupted, Stopped, stop_signals
from factory.launcher import LIFELINE

_ROOT = Path(__file__).parents[1]
_POLL = 0.2  # seconds between two looks at the child
_TAIL = 400_000  # bytes of the log that are searched for the error

# What a user's shell may hold and must not reach LLaMA-Factory: another launcher that refuses our recipes; silence
# about unknown keys; a log without the number of rows; LLaMA Board's mode; the place of an outer torchrun's worker.
_REMOVED = (
    "USE_V1",
    "USE_MCA",
    "ALLOW_EXTRA_ARGS",
    "LLAMAFACTORY_VERBOSITY",
    "LLAMABOARD_ENABLED",
    "LLAMABOARD_WORKDIR",
    "RANK",
    "LOCAL_RANK",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "TORCHELASTIC_RUN_ID",
)


@dataclass(frozen=True)
class Finished:
    """A child that ended well: its run time in seconds, and its part of the log file."""

    seconds: float
    log: Path
    begins_at: int  # byte of the log file

    def lines(self) -> list[str]:
        """Return what this child wrote, line by line, without colours."""
        return clean_lines(_read(self.log, self.begins_at))


def llamafactory(*arguments: str) -> list[str]:
    """Return the command that runs one command of LLaMA-Factory, e.g. train recipe.yaml key=value."""
    return [sys.executable, "-m", "factory.launcher", *arguments]


def run_child(
    command: Sequence[str],
    log: Path,
    *,
    what: str,
    on_line: Callable[[str], None] = lambda line: None,
    on_look: Callable[[], None] = lambda: None,
    interrupted_remedy: str | Callable[[], str] = "go on with --resume",
    grace: float = 10.0,
    environment: Mapping[str, str] | None = None,
) -> Finished:
    """Run `command` to its end, appending all of its output to `log`; `environment` is added to ours.

    `on_line` gets each line of its output, `on_look` is called some times a second; what they raise ends the child.
    Ctrl-C, SIGTERM or SIGHUP to us end the child with all of its descendants: SIGINT, after `grace` seconds
    SIGTERM, then SIGKILL (a second Ctrl-C does not wait); a remedy that is a function is asked after that. If we are
    killed by -9 the launcher notices.
    Raises ArenaError with the child's last error and its remedy, or that it was interrupted.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        file.write(f"### {datetime.now().isoformat(timespec='seconds')} {' '.join(command)}\n".encode())
        file.flush()
        begins_at, started = file.tell(), time.monotonic()
        with stop_signals(), _lifeline() as (theirs, ours):
            try:
                # The output goes into the file itself: no pipe that could fill up and hold the child.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env={**ours, **(environment or {})},
                    pass_fds=(theirs,),
                    start_new_session=True,
                )
            except OSError as error:
                raise ArenaError(f"{what} could not start: {error}", where=command[0]) from None
            try:
                _follow(process, log, begins_at, on_line, on_look, what, interrupted_remedy, grace)
            finally:
                _hide_secrets(log)
    if process.returncode != 0:
        raise _failure(what, process.returncode, _read(log, begins_at), log)
    return Finished(time.monotonic() - started, log, begins_at)


def child_environment() -> dict[str, str]:
    """Return our environment as LLaMA-Factory may see it: its switches gone, tokens and hub settings kept."""
    environment = {key: value for key, value in os.environ.items() if key not in _REMOVED}
    paths = [str(_ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    # torchrun lies beside the interpreter, and is looked for on the PATH
    beside = str(Path(sys.executable).parent)
    environment["PATH"] = os.pathsep.join(filter(None, [beside, environment.get("PATH", "")]))
    environment["PYTHONUNBUFFERED"] = "1"
    environment.setdefault("TQDM_MININTERVAL", "5")  # the log is a file: ten bars a second serve nobody
    return environment


@contextmanager
def _lifeline() -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the child's end of a pipe that we hold open, and the environment that names it."""
    theirs, ours = os.pipe()
    try:
        yield theirs, {**child_environment(), LIFELINE: str(theirs)}
    finally:
        os.close(theirs)
        os.close(ours)


def _follow(
    process: subprocess.Popen[bytes],
    log: Path,
    begins_at: int,
    on_line: Callable[[str], None],
    on_look: Callable[[], None],
    what: str,
    interrupted_remedy: str | Callable[[], str],
    grace: float,
) -> None:
    family, tail = _Family(process), _Tail(log, begins_at)
    try:
        ended = False
        while not ended:
            ended = family.wait(_POLL)
            for line in tail.read_new(whole=ended):
                on_line(line)
            on_look()
        family.end_stragglers()
    except (KeyboardInterrupt, Stopped):
        family.end(grace)
        remedy = interrupted_remedy if isinstance(interrupted_remedy, str) else interrupted_remedy()
        raise Interrupted(f"{what} was interrupted", where=str(log), remedy=remedy) from None
    except BaseException:
        family.end(grace)
        raise


class _Family:
    """The child and all of its descendants, also those in sessions of their own (torchrun's workers)."""

    _LOOK = 2.0  # seconds between two censuses

    def __init__(self, process: subprocess.Popen[bytes]):
        self._process = process
        self._others: set[psutil.Process] = set()
        self._next_look = 0.0

    def wait(self, seconds: float) -> bool:
        """Wait at most that long; return whether the child has ended."""
        self._look()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        return self._process.returncode is not None

    def end_stragglers(self) -> None:
        """End what the child left behind."""
        self._signal(signal.SIGTERM)
        self._gone(2.0)
        self._signal(signal.SIGKILL)

    def end(self, grace: float) -> None:
        """End all of them, in vain attempts harder each time; a second interrupt does not wait."""
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._look(now=True)
                self._signal(number)
                if self._gone(grace):
                    break
        except (KeyboardInterrupt, Stopped):
            pass
        finally:
            self._look(now=True)
            self._signal(signal.SIGKILL)
            self._gone(5.0)

    def _look(self, now: bool = False) -> None:
        # Remembered, for a descendant whose parent ended cannot be found any more.
        if self._process.returncode is None and (now or time.monotonic() >= self._next_look):
            with suppress(psutil.Error):
                self._others.update(psutil.Process(self._process.pid).children(recursive=True))
            self._next_look = time.monotonic() + self._LOOK

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, number)
        for other in self._others:
            with suppress(psutil.Error, ProcessLookupError):
                if os.getpgid(other.pid) != self._process.pid:  # the group has it already
                    other.send_signal(number)

    def _gone(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(seconds)
        _, alive = psutil.wait_procs(list(self._others), timeout=max(until - time.monotonic(), 0))
        self._others = set(alive)
        return self._process.returncode is not None and not alive


class _Tail:
    """The whole lines that another process appends to a file."""

    def __init__(self, path: Path, offset: int):
        self._path, self._offset, self._rest = path, offset, b""

    def read_new(self, whole: bool = False) -> list[str]:
        """Return the lines since the last call; with `whole` a last line without its end, too."""
        with self._path.open("rb") as file:
            file.seek(self._offset)
            block = file.read()
        self._offset += len(block)
        # tqdm ends its lines by \r
        *lines, self._rest = (self._rest + block).replace(b"\r", b"\n").split(b"\n")
        if whole and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        return [text for line in lines for text in clean_lines(line.decode("utf-8", "replace"))]


def _failure(what: str, code: int, output: str, log: Path) -> ArenaError:
    """Return the error that says what the child said."""
    how = f"ended with exit code {code}"
    if code < 0:
        how = f"was killed by signal {-code} ({signal.Signals(-code).name})"
    # Nobody can say anything on signal 9: what the log ends with is not the reason.
    errors = [] if code == -signal.SIGKILL else all_errors(output)
    error = errors[-1] if errors else "" if code < 0 else last_lines(output)
    told = f"{what} {how}" + "".join(f"\n  {line}" for line in error.splitlines())
    known = (remedy_for(text) for text in [*reversed(errors), how, error])
    remedy = next((advice for advice in known if advice), f"read the end of {log}: this error is not in our table")
    return ArenaError(told, where=str(log), remedy=remedy)


def _hide_secrets(log: Path) -> None:
    """Replace the values of tokens and keys in the log of a child that has ended, which may have told them."""
    content = log.read_bytes()
    hidden = content
    for name, value in secrets().items():
        hidden = hidden.replace(value.encode(), f"<{name}>".encode())
    if hidden != content:
        log.write_bytes(hidden)


def _read(path: Path, offset: int) -> str:
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(offset, size - _TAIL))
        return file.read().decode("utf-8", "replace")
