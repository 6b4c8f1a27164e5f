"""Files that are either complete or absent, hashes, and the lock of a run.

Everything is written beside its place, as .<name>.<host>-<process>.<random>.tmp, and renamed into it; the next writer
of the same name removes what a killed one left.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import os
import re
import shutil
import socket
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

import psutil
from filelock import FileLock, Timeout

from common.errors import ArenaError

_LARGE = 16 * 2**20  # bytes; hashes of larger files are remembered
_LARGEST_JSON = 2**30
_MOST_DIGITS = 100
# Folders of the project that a person may keep on another disk, by a link.
_FOLDERS = ("data", "factory_configs", "models", "outputs", "saves", "templates")
_NEEDS_QUOTES = re.compile('[",\r\n]')


@contextmanager
def atomic_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file beside `path` and rename it to `path` when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with temporary.open(mode, **text) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """Yield a new empty folder beside `path`; it takes the place of `path` when the block ends without an error.

    An earlier `path` survives a failed block; where it is a link, only the link is replaced. A crash between the two
    renames leaves the earlier folder as `.<name>.old`, which the next call puts back. Without `replace` an earlier
    `path` raises FileExistsError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    old = path.with_name(f".{path.name}.old")
    if old.exists() and not path.exists():
        old.rename(path)
    _discard(old)
    fresh = Path(tempfile.mkdtemp(prefix=_prefix(path), suffix=".tmp", dir=path.parent))
    fresh.chmod(0o777 & ~_umask())
    try:
        yield fresh
        for file in fresh.iterdir():
            if file.is_file() and not file.is_symlink():  # safetensors writes files that only their owner may read
                file.chmod(0o666 & ~_umask())
        if path.exists():
            if not replace:
                raise FileExistsError(path)
            path.rename(old)
        fresh.rename(path)
        _discard(old)
    except BaseException:
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically; raises ValueError for NaN and infinity."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_regular(path: Path, most: int) -> bytes:
    """Return the bytes of a regular file; raises OSError for a device, a pipe or more than `most` bytes.

    Those that a configuration names may be anything: a device has no end, and a pipe waits for a writer.
    """
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:  # noqa: PTH123
        status = os.fstat(file.fileno())
        if stat.S_ISDIR(status.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"longer than {most:,} bytes", str(path))
        return file.read(most)


def refuse_endless(*folders: Path) -> None:
    """Raise ArenaError for a device, a pipe or a sparse file in a folder: reading it would never end."""
    for path in (Path(top, name) for folder in folders for top, _, names in os.walk(folder) for name in names):
        if not path.exists():
            continue
        status, what = path.stat(), ""
        if not stat.S_ISREG(status.st_mode):
            what = "is a device or a pipe, and no file"
        elif status.st_size > max(_LARGE, 1000 * 512 * status.st_blocks) and _has_holes(path, status.st_size):
            what = f"claims {status.st_size:,} bytes, of which the disk holds {512 * status.st_blocks:,}"
        if what:
            raise ArenaError(what, where=str(path), remedy="remove it, and ask where this experiment comes from")


def _has_holes(path: Path, size: int) -> bool:
    with path.open("rb") as file:
        return os.lseek(file.fileno(), 0, os.SEEK_HOLE) < size


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises OSError, or ValueError for any fault in its text."""
    try:
        return json.loads(read_regular(path, _LARGEST_JSON).decode(), parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(digits: str) -> int:
    if len(digits) > _MOST_DIGITS:  # float() fails on them
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def csv_line(cells: Iterable[object]) -> str:
    """Return a line of CSV from which csv, pandas and Arrow read the same cells, all characters but NUL.

    csv.writer leaves a carriage return without quotes, and readers then end the row there.
    """
    texts = map(str, cells)
    return ",".join('"' + t.replace('"', '""') + '"' if _NEEDS_QUOTES.search(t) else t for t in texts) + "\n"


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    status = path.stat()
    key = (path.resolve(), status.st_size, status.st_mtime_ns)
    # A small file may change twice within the clock's resolution, and is read at once.
    return _digest(*key) if status.st_size >= _LARGE else _digest.__wrapped__(*key)


@lru_cache(maxsize=64)
def _digest(path: Path, size: int, changed_at: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_of_table(path: Path) -> str:
    """Return the SHA-256 of a file, or of a folder of parts: of the list of their names and sums."""
    if not path.is_dir():
        return sha256_of(path)
    parts = "".join(f"{sha256_of(part)}  {part.name}\n" for part in sorted(path.iterdir()) if part.is_file())
    return hashlib.sha256(parts.encode(errors="surrogateescape")).hexdigest()


def _prefix(path: Path) -> str:
    """Return how the name of a temporary of `path` begins, after removing those of processes that were killed."""
    host = f"{zlib.crc32(socket.gethostname().encode()):08x}"
    for left in path.parent.glob(f".{glob.escape(path.name)}.{host}-*.tmp"):
        process = left.name.removeprefix(f".{path.name}.{host}-").split(".")[0]
        if not process.isdecimal() or psutil.pid_exists(int(process)):
            continue
        _discard(left)
    return f".{path.name}.{host}-{os.getpid()}."


def _discard(path: Path) -> None:
    """Remove a file, or a folder with all that is in it; of a link the link alone."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_within(path: str | Path, folder: Path) -> bool:
    """Tell whether a path is the folder or leads into it, by its text or through links."""
    ways = (os.path.abspath, os.path.realpath)  # neither raises for a loop of links or a name that is too long
    return any(Path(way(path)).is_relative_to(way(folder)) for way in ways)


def is_in_project(path: str | Path) -> bool:
    """Tell whether a path leads to a place in the current folder, by its text and through links."""
    text = Path(os.path.abspath(path))  # noqa: PTH100
    if not text.is_relative_to(Path.cwd()):
        return False
    top = text.relative_to(Path.cwd()).parts[:1]
    root = Path.cwd() / top[0] if top and top[0] in _FOLDERS else Path.cwd()
    return Path(os.path.realpath(text)).is_relative_to(os.path.realpath(root))


@contextmanager
def only_run(folder: Path, *, wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold the lock of a folder, which lies beside it; raises ArenaError while another run holds it.

    With `wait` this waits for the other run instead, after calling `wait` with the name of its process. The operating
    system frees the lock of a killed run. The lock's text names the holder: for the error, for `run.py status`, and for
    other hosts on a shared disk, which the operating system's lock may not reach.
    """
    refuse_links_out(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        if wait is None:
            raise _held(folder, path) from None
        wait(_holder(path))
        lock.acquire()
    try:
        if _owner(path).get("host", socket.gethostname()) != socket.gethostname():
            raise _held(folder, path)
        started_at = datetime.now().astimezone().isoformat(timespec="seconds")
        me = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": started_at}
        path.write_text(json.dumps(me), encoding="utf-8")
        try:
            yield
        finally:
            if _owner(path) == me:  # else somebody deleted the file, and another run has made its own
                path.unlink()
    finally:
        lock.release()


def _held(folder: Path, path: Path) -> ArenaError:
    return ArenaError(
        f"another run is at work here ({_holder(path)})",
        where=str(folder),
        remedy=f"wait for it or end it; if that process is gone, delete {path}",
    )


def _holder(path: Path) -> str:
    owner = {"pid": "?", "host": "?", "started_at": "?", **_owner(path)}
    return f"process {owner['pid']} on {owner['host']}, since {owner['started_at']}"


def _owner(path: Path) -> dict[str, Any]:
    """Return what a lock's holder wrote; nothing where it has not yet, or was killed while writing."""
    try:
        owner = read_json(path)
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) else {}


def refuse_links_out(folder: Path) -> None:
    """Raise ArenaError where a link below outputs/ leads out of it: a run must not replace what lies there."""
    root = Path(folder.parts[0])
    below = [root.joinpath(*folder.parts[1:end]) for end in range(2, len(folder.parts) + 1)]
    for link in (path for path in below if path.is_symlink()):
        if not link.resolve().is_relative_to(root.resolve()):
            raise ArenaError(
                f"is a link that leads out of {root}/, and a run replaces what lies in its folder",
                where=str(link),
                remedy=f"put a folder in its place; to keep all results on another disk, make {root} itself the link",
            )
