"""The lock of a folder: one run at a time may make it; who holds it is named, and what a killed run left is stale."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from common.errors import ArenaError
from common.files import read_json


@contextmanager
def only_run(folder: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of a folder, beside it; raises ArenaError while another run holds it.

    With `wait` it is waited for instead, after `wait` was told who holds it. The operating system releases the lock of
    a process that died: what such a run left in the file is stale and taken over. The text in it (process id, host,
    start) is for the reader, and for other hosts on a shared disk.
    """
    refuse_links_out(folder)
    path = folder.with_name(f".{folder.name}.lock")
    with _taken(folder, path, wait) as file:
        try:
            file.truncate(0)
            started_at = datetime.now().astimezone().isoformat(timespec="seconds")
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started_at": started_at}, file)
            file.flush()
            yield
        finally:
            if _lies_at(path, file):
                path.unlink(missing_ok=True)
            file.truncate(0)  # after that, for a run of another host that has opened it already: see `_taken`


def refuse_links_out(folder: Path) -> None:
    """Raise ArenaError where a link below outputs/ leads out of it: what lies there is not ours to replace."""
    root = Path(folder.parts[0])
    below = [root.joinpath(*folder.parts[1:end]) for end in range(2, len(folder.parts) + 1)]
    for link in (path for path in below if path.is_symlink()):
        if not link.resolve().is_relative_to(root.resolve()):
            raise ArenaError(
                f"is a link that leads out of {root}/, and a run replaces what lies in its folder",
                where=str(link),
                remedy=f"put a folder in its place; to keep all results on another disk, make {root} itself the link",
            )


def _taken(folder: Path, path: Path, wait: Callable[[str], None] | None) -> IO[str]:
    """Return the lock's file, locked. One that its holder has deleted since it was opened locks nothing: opened anew.

    Nobody but the holder may delete a lock's file: whoever still holds it would not be alone any more.
    """
    while True:
        folder.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("a+", encoding="utf-8")
        except FileNotFoundError:  # another run has just removed its empty folder
            continue
        try:
            _take(file, folder, path, wait)
            owner = _owner(path)
            if _lies_at(path, file):  # asked last: what was read is then what a holder wrote, or nobody's
                if owner.get("host", socket.gethostname()) != socket.gethostname():
                    raise _held(folder, path)  # its system's lock may not reach over a shared disk
                return file
        except BaseException:
            file.close()
            raise
        file.close()


def _lies_at(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _take(file: IO[str], folder: Path, path: Path, wait: Callable[[str], None] | None) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if wait is None:
            raise _held(folder, path) from None
        wait(_who(path))
        fcntl.flock(file, fcntl.LOCK_EX)


def _held(folder: Path, path: Path) -> ArenaError:
    return ArenaError(
        f"another run is at work here ({_who(path)})",
        where=str(folder),
        remedy=f"wait for it or end it; if it does not live any more, delete {path}",
    )


def _who(path: Path) -> str:
    return "process {pid} on {host}, since {started_at}".format_map(
        {"pid": "?", "host": "?", "started_at": "?", **_owner(path)}
    )


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = read_json(path)
    except (OSError, ValueError):  # empty: released; torn: its writer died
        return {}
    return owner if isinstance(owner, dict) else {}
