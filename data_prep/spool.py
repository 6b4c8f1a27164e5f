"""Rows on their way to disk: a set's lines wait in files until the folds, which need all verdicts, are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from struct import Struct
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

SPLITS = ("train", "valid")
# Lines of a data set in one file; a larger set is a folder of such parts, which LLaMA-Factory reads in parallel.
PART = 500_000
# Battles in one waiting file, which is removed as soon as it is divided: the disk never holds a set twice.
_SEGMENT = 1 << 16
_HEAD = Struct("<IHIH")  # bytes and lines for both folds, then for training only


def record(lines: Sequence[str], training_lines: Sequence[str] = ()) -> bytes:
    """Return a battle's lines as a spool keeps them; `training_lines` are left out where the battle validates."""
    always, extra = "".join(lines).encode("ascii"), "".join(training_lines).encode("ascii")
    return _HEAD.pack(len(always), len(lines), len(extra), len(training_lines)) + always + extra


class Spool:
    """One data set's lines; `divide` turns them into <name>_train.jsonl and <name>_valid.jsonl, or folders of parts."""

    def __init__(self, folder: Path, name: str, part: int = PART, segment: int = _SEGMENT):
        self.name = name
        self._folder, self._part, self._segment = folder, part, segment
        self._paths: list[Path] = []
        self._file: IO[bytes] | None = None
        self._waiting = 0  # battles in the newest file

    def add(self, records: bytes, battles: int) -> None:
        """Keep the records of some battles, as `record` makes them, one after the other."""
        if self._file is None or self._waiting >= self._segment:
            self.close()
            self._paths.append(self._folder / f"{self.name}.spool-{len(self._paths)}")
            self._file, self._waiting = self._paths[-1].open("wb"), 0
        self._file.write(records)
        self._waiting += battles

    def close(self) -> None:
        """Flush what waits; `divide` comes after it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def divide(self, valid: np.ndarray) -> dict[str, int]:
        """Write the two sets, given which battles validate; return the rows in each and remove the spool."""
        train, held = (_Parts(self._folder / f"{self.name}_{split}", self._part) for split in SPLITS)
        validates = iter(valid)
        for path in self._paths:
            with path.open("rb") as spool:
                while head := spool.read(_HEAD.size):
                    size, lines, extra_size, extra_lines = _HEAD.unpack(head)
                    own, extra = spool.read(size), spool.read(extra_size)
                    if next(validates):
                        held.write(own, lines)
                    else:
                        train.write(own + extra, lines + extra_lines)
            path.unlink()
        return dict(zip(SPLITS, (train.finish(), held.finish()), strict=True))


class _Parts:
    """<stem>.jsonl, or once that is full the folder <stem>/ with part-00000.jsonl, part-00001.jsonl, …"""

    def __init__(self, stem: Path, size: int):
        self._stem, self._size = stem, size
        self._single = stem.with_name(f"{stem.name}.jsonl")
        self._file = self._single.open("wb")
        self._number, self._lines, self._total = 0, 0, 0

    def write(self, content: bytes, lines: int) -> None:
        if lines and self._lines + lines > self._size and self._lines:
            self._next()
        self._file.write(content)
        self._lines += lines
        self._total += lines

    def finish(self) -> int:
        """Close the last file; return the number of lines."""
        self._file.close()
        return self._total

    def _next(self) -> None:
        self._file.close()
        if not self._number:
            self._stem.mkdir()
            self._single.rename(self._path(0))
        self._number, self._lines = self._number + 1, 0
        self._file = self._path(self._number).open("wb")

    def _path(self, number: int) -> Path:
        return self._stem / f"part-{number:05}.jsonl"
