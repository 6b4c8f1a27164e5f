"""Rows on their way to disk: a set's lines wait in one file until the folds, which need all verdicts, are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SPLITS = ("train", "valid")


class Spool:
    """One data set's lines, battle by battle; `divide` turns them into <name>_train.jsonl and <name>_valid.jsonl."""

    def __init__(self, folder: Path, name: str):
        self.name = name
        self._folder, self._path = folder, folder / f"{name}.spool"
        self._file = self._path.open("wb")
        self._battles: list[tuple[int, int, int, int]] = []  # bytes and lines for both folds, then for training only

    def add(self, lines: Sequence[str], training_lines: Sequence[str] = ()) -> None:
        """Keep a battle's lines; `training_lines` are left out where the battle validates."""
        always, extra = "".join(lines).encode("ascii"), "".join(training_lines).encode("ascii")
        self._file.write(always)
        self._file.write(extra)
        self._battles.append((len(always), len(lines), len(extra), len(training_lines)))

    def close(self) -> None:
        """Flush what waits; `divide` comes after it."""
        self._file.close()

    def divide(self, splits: Sequence[str]) -> dict[str, int]:
        """Write the two files, given each battle's split; return the rows in each and remove the spool."""
        counts = dict.fromkeys(SPLITS, 0)
        train, valid = (self._folder / f"{self.name}_{split}.jsonl" for split in SPLITS)
        with self._path.open("rb") as spool, train.open("wb") as to_train, valid.open("wb") as to_valid:
            for split, (size, lines, extra_size, extra_lines) in zip(splits, self._battles, strict=True):
                own, extra = spool.read(size), spool.read(extra_size)
                if split == "valid":
                    to_valid.write(own)
                    counts["valid"] += lines
                else:
                    to_train.write(own)
                    to_train.write(extra)
                    counts["train"] += lines + extra_lines
        self._path.unlink()
        return counts
