"""Files that are either whole or absent: everything is written beside its place and renamed into it.

What is being written is called .<name>.<host>-<process>.<random>.tmp, so that the next writer of the same name knows
what a killed one left behind, and removes it.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, Any

# Of smaller files the time of change is too coarse to tell two contents apart, and they are read at once.
_WORTH_REMEMBERING = 16 * 2**20  # bytes


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

    An earlier `path` survives a failed block untouched; where it is a link, the link is replaced and what it leads to
    stays as it was. Between the two renames a crash leaves the earlier folder as `.<name>.old`, which the next call
    puts back. Without `replace` an earlier `path` raises FileExistsError and stays.
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
    """Write `value` as indented JSON, whole or not at all; NaN and infinity are refused (ValueError)."""
    with atomic_file(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False, allow_nan=False)
        file.write("\n")


def read_json(path: Path) -> Any:
    """Return the content of a JSON file; raises OSError, or ValueError for whatever is wrong with its text."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def sha256_of(path: Path) -> str:
    """Return the SHA-256 of a file's bytes as hexadecimal digits."""
    status = path.stat()
    if status.st_size < _WORTH_REMEMBERING:
        return _digest(path)
    return _remembered(path.resolve(), status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=64)
def _remembered(path: Path, size: int, changed_at: int) -> str:
    """Return the digest of a large file, which several parts of one run ask for; size and time tell another content."""
    return _digest(path)


def _digest(path: Path) -> str:
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
    for rest in path.parent.glob(f".{glob.escape(path.name)}.{host}-*.tmp"):
        process = rest.name.removeprefix(f".{path.name}.{host}-").split(".")[0]
        if process.isdecimal() and not _is_alive(int(process)):
            if rest.is_dir() and not rest.is_symlink():
                shutil.rmtree(rest, ignore_errors=True)
            else:
                rest.unlink(missing_ok=True)
    return f".{path.name}.{host}-{os.getpid()}."


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _discard(folder: Path) -> None:
    """Remove a folder and all that is in it; of a link the link alone, whatever it leads to."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _umask() -> int:
    current = os.umask(0)
    os.umask(current)
    return current


def is_within(path: str | Path, folder: Path) -> bool:
    """Tell whether a path is the folder or leads into it, by its text or through links."""
    ways = (os.path.abspath, os.path.realpath)  # neither raises for loops and names that are too long
    return any(Path(way(path)).is_relative_to(way(folder)) for way in ways)
