"""The errors that a user may see: what is wrong, where, and what to do about it."""

from __future__ import annotations

import errno
import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from common.console import printable


class ArenaError(Exception):
    """A fault in the work, told in three parts: what, where (file, row, key) and the remedy."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return printable(f"{head}\n  remedy: {self.remedy}" if self.remedy else head)


class UsageError(ArenaError):
    """The command was called wrongly: an unknown experiment, an option that does not fit."""

    exit_code = 2


class Interrupted(ArenaError):
    """Somebody ended the work: nothing is wrong with it."""


_FINISHED = "{same} goes on from what is finished"
# What each command promises after an interruption; `same` is the command itself, see `same_command`.
_AGAIN = {
    "sft": f"{_FINISHED}; where a training had saved a checkpoint, with --resume",
    "dpo": f"{_FINISHED}; where a training had saved a checkpoint, with --resume",
    "rm": f"{_FINISHED}; where a training had begun, with --fresh",  # LLaMA-Factory cannot resume a reward model
    "demo": f"{_FINISHED}; where a training had begun: python run.py sft -e demo --resume",
    "score": "{same} goes on from what is scored",
    "prepare": "{same} begins anew; until it has ended an earlier export stays as it was",
}
_ANEW = "give {same} again"
_ROOM = "free disk space (old checkpoints under saves/, earlier runs named *.earlier-N)"
_RIGHTS = "give yourself the right to write there (ls -ld, chown, chmod), or work in a copy of the project"
_MEMORY = "close other programs, use fewer --workers, or a machine with more memory"
_REFUSALS = {
    errno.ENOSPC: ("the disk is full", _ROOM),
    errno.EDQUOT: ("the disk quota is used up", _ROOM),
    errno.EFBIG: ("the file would be larger than allowed", "raise the limit (ulimit -f)"),
    errno.EROFS: ("the disk can only be read", _RIGHTS),
    errno.EACCES: ("permission denied", _RIGHTS),
    errno.EPERM: ("operation not permitted", _RIGHTS),
    errno.EIO: ("the disk failed to read or write", "look at the disk (dmesg)"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n 4096)"),
    errno.ENFILE: ("too many files are open on this machine", "close other programs"),
    errno.ENOMEM: ("memory ran out", _MEMORY),
    errno.EAGAIN: ("no more processes or threads can be started", "raise the limit (ulimit -u)"),
}
# Libraries in C++ and Rust wrap the system's number in a text of their own.
_NUMBER = re.compile(r"\b(?:os error|errno) (\d+)\b", re.IGNORECASE)
_NO_MEMORY = re.compile(r"can't allocate memory|cannot allocate memory|out of memory|bad_alloc", re.IGNORECASE)


class Stopped(BaseException):
    """SIGTERM or SIGHUP reached us."""


@contextmanager
def stop_signals() -> Iterator[None]:
    """Within the block SIGTERM and SIGHUP raise, as Ctrl-C does (in the main thread; others cannot)."""

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


def same_command() -> str:
    """Name the command that was given, as it goes on: --fresh would put aside what it has finished meanwhile."""
    return "the same command without --fresh" if "--fresh" in sys.argv[1:] else "the same command"


def in_words(error: BaseException, command: str | None = None) -> ArenaError | None:
    """Return what an error of the system means for a user of `command`, None where it is a fault in our code."""
    again = _AGAIN.get(command or "", _ANEW).format(same=same_command())
    if isinstance(error, KeyboardInterrupt | Stopped):
        return ArenaError(f"interrupted{f' by {error}' if str(error) else ''}", remedy=again)
    if isinstance(error, BrokenPipeError):  # whoever read our output has enough of it
        return None
    number = error.errno if isinstance(error, OSError) and error.errno else _number_in(str(error))
    if isinstance(error, MemoryError) or (isinstance(error, Exception) and _NO_MEMORY.search(str(error))):
        number = errno.ENOMEM
    if isinstance(error, SyntaxError) and "site-packages" in str(error.filename):
        # Python's parser can take a lack of memory for a fault in the text, seen with pandas in 450 MB.
        what = "memory ran out while this package was compiled, or its file is damaged"
        return ArenaError(what, where=error.filename, remedy=f"{_MEMORY}; if it comes again, `make install` anew")
    where = str(error.filename) if isinstance(error, OSError) and error.filename else None
    if number in _REFUSALS:
        what, remedy = _REFUSALS[number]
        return ArenaError(what, where=where, remedy=f"{remedy}; {again}")
    if isinstance(error, OSError) and where and error.strerror:
        return ArenaError(error.strerror.lower(), where=where, remedy="look at this path; -v shows who asked for it")
    return None


def _number_in(text: str) -> int | None:
    found = _NUMBER.search(text)
    return int(found[1]) if found else None
