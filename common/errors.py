"""The errors that a user may see: what is wrong, where, and what to do about it.

Standard library only, and readable for an old Python, because `require_packages` runs before anything else.
"""

from __future__ import annotations

import errno
import os
import re
import resource
import select
import shlex
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

from common.console import one_line, printable

OLDEST_PYTHON = (3, 11)
LEAST_MEMORY = 2**30  # of addresses (ulimit -v), for the libraries of the smallest command


class ArenaError(Exception):
    """A fault in the work or in a file: what is wrong, where (file, row, key), and the remedy."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return partial(type(self), where=self.where, remedy=self.remedy), (self.what,)  # for another process

    def __str__(self) -> str:
        where = one_line(self.where or "")
        head = f"{where}: {self.what}" if where else self.what
        return printable(f"{head}\n  remedy: {self.remedy}" if self.remedy else head)


class UsageError(ArenaError):
    """The command was called wrongly: an unknown experiment, an option that does not fit."""

    exit_code = 2


class Interrupted(ArenaError):
    """The user ended the work: nothing is wrong with it."""


class Stopped(BaseException):
    """SIGTERM or SIGHUP reached us."""


# What each command does after an interruption; `same` is the command itself, see `same_command`.
_AFTERWARDS = {
    "sft": "{same} goes on from what is finished; where a training had saved a checkpoint, with --resume",
    "dpo": "{same} goes on from what is finished; where a training had saved a checkpoint, with --resume",
    "rm": "{same} goes on from what is finished; where a training had begun, with --fresh",  # it cannot be resumed
    "demo": "{same} goes on from what is finished; where a training had begun: python run.py sft -e demo --resume",
    "score": "{same} goes on from what is scored",
    "probe": "{same} goes on from what is read",
    "prepare": "{same} starts over; an earlier export stays unchanged until it ends",
}
_SPACE = "free disk space (old checkpoints under saves/, earlier runs: python run.py clean)"
_RIGHTS = "make it writable for yourself (ls -ld, chown, chmod), or work in a copy of the project"
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EFBIG: "raise the limit (ulimit -f)",
    errno.EROFS: _RIGHTS,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EIO: "check the disk (dmesg)",
    errno.EMFILE: "raise the limit of open files (ulimit -n 4096)",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "close other programs, use fewer --workers, or a machine with more memory",
    errno.EAGAIN: "raise the limit of processes (ulimit -u)",
}
# Libraries in C++ and Rust wrap the operating system's error in a text of their own.
_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)\b", re.IGNORECASE)
_NO_MEMORY = re.compile(
    r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc|failed to map segment"
    r"|can't start new thread",
    re.IGNORECASE,
)


def user_error(error: BaseException, command: str | None = None) -> ArenaError | None:
    """Return what an error of the operating system means for a user of `command`, None for a fault in our code."""
    again = _AFTERWARDS.get(command or "", "give {same} again").format(same=same_command())
    if isinstance(error, (KeyboardInterrupt, Stopped)):
        return ArenaError(f"interrupted{f' by {error}' if str(error) else ''}", remedy=again)
    if is_panic(error):
        what = f"the model's tokenizer fails on a text ({error})"
        return ArenaError(what, remedy="choose another model: its tokenizer.json holds a bad regular expression")
    if isinstance(error, BrokenPipeError):
        if _reader_is_gone():
            return None
        what = "a process of this command was killed, probably for want of memory, before it had read what it was sent"
        return ArenaError(what, remedy=again)
    where = str(error.filename) if isinstance(error, (OSError, SyntaxError)) and error.filename else None
    number = _number(error)
    if isinstance(error, FileNotFoundError) and error.args == (errno.ENOENT, os.strerror(errno.ENOENT)):  # os.getcwd
        return UsageError("the current folder was deleted", remedy="change to a folder that exists")
    if number in _REMEDIES:
        return ArenaError(os.strerror(number).lower(), where=where, remedy=f"{_REMEDIES[number]}; {again}")
    if isinstance(error, OSError) and where and error.strerror:
        return ArenaError(error.strerror.lower(), where=where, remedy="check this path; -v shows what used it")
    return None


def _reader_is_gone() -> bool:
    """Tell whether whoever read our output or errors has closed it (`run.py … | head`)."""
    outputs = select.poll()
    for number in (1, 2):
        outputs.register(number, 0)
    return any(event & select.POLLERR for _, event in outputs.poll(0))


def _number(error: BaseException) -> int | None:
    """Return the operating system's number of an error, also where a library wrapped it; None where it has none."""
    if isinstance(error, MemoryError) or (isinstance(error, Exception) and _NO_MEMORY.search(str(error))):
        return errno.ENOMEM
    if isinstance(error, SyntaxError):  # Python's parser can report a lack of memory so; a package has no such fault
        return errno.ENOMEM if "site-packages" in str(error.filename) else None
    if isinstance(error, OSError) and error.errno:
        return error.errno
    found = _NUMBER.search(str(error))
    return int(found[1]) if found else None


def is_panic(error: BaseException) -> bool:
    """Tell whether Rust code panicked, such as a tokenizer's: no Exception, and its class cannot be imported."""
    return type(error).__name__ == "PanicException"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text; its class and arguments where it has none."""
    return (str(error).strip() or repr(error)).splitlines()[0]


def same_command() -> str:
    """Return how to name the command that was given: with --fresh again it would archive what it has finished."""
    return "the same command without --fresh" if "--fresh" in sys.argv[1:] else "the same command"


@contextmanager
def stop_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise Stopped, as Ctrl-C raises (only the main thread can do that)."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(signal.Signals(number).name)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watched = [s for s in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in watched}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def require_packages() -> None:
    """End the process with one message and exit code 2 where this Python is too old or lacks our packages."""
    if 0 < (limit := resource.getrlimit(resource.RLIMIT_AS)[0]) < LEAST_MEMORY:  # OpenBLAS would try for ever
        sys.stderr.write(f"Error: the limit of memory is {limit / 2**30:.1f} GiB\n  remedy: ulimit -v unlimited\n")
        sys.exit(1)
    missing = [name for name in ("click", "jinja2", "omegaconf", "psutil", "pydantic", "rich") if not find_spec(name)]
    if sys.version_info < OLDEST_PYTHON:
        what = f"arena-factory needs Python {'.'.join(map(str, OLDEST_PYTHON))} or newer, and {sys.executable} is older"
    elif missing:
        what = f"the packages of this project are not in this Python ({sys.executable}): no {', '.join(missing)}"
    else:
        return
    root = shlex.quote(str(Path(__file__).resolve().parents[1]))
    sys.stderr.write(f"Error: {what}\n  remedy: `make -C {root} install`, then `source {root}/.venv/bin/activate`\n")
    sys.exit(2)
