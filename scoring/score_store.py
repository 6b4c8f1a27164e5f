"""Rows that wait for their scores, the shards in which they are scored, and the finished shards, on disk.

rows.jsonl            what the model reads of each row, a line each
rows.parquet          facts of each row (id, verdict, tokens, …) and where its line begins
ab-00012.scores       the scores of one shard, checked, of these rows and no others

The plan depends on the rows alone: a run that goes on, one with more workers and an undisturbed one make the same
batches, and so the same scores to the last digit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from pyarrow.parquet import ParquetFile, ParquetWriter

from common.errors import ArenaError
from common.files import atomic_file, read_json, sha256_of, write_json
from data_prep.export_reader import read_columns, readable

Facts, ModelInput = dict[str, Any], dict[str, Any]
ROW_FACTS = ("id", "group", "verdict", "language", "turns", "chars_prompt", "chars_a", "chars_b", "tokens", "cut")
_STRINGS, _COUNTS = ROW_FACTS[:4], ROW_FACTS[4:9]
FACTS_SCHEMA = pa.schema(
    [*((name, pa.string()) for name in _STRINGS), *((name, pa.int32()) for name in _COUNTS), ("cut", pa.bool_())]
)
# Rows that are planned, and later written, together.
WINDOW = 8192
# A shard is what a kill can cost: seconds on a GPU, minutes on a CPU. Several full batches of the engine fit in it.
SHARD_TOKENS = 2**17
SHARD_ROWS = 1024
STRAIGHT, SWAPPED = "ab", "ba"
_FILES, _MARKER, _MANIFEST, _FORMAT = ("rows.jsonl", "rows.parquet"), "rows.json", "manifest.json", 4
_AGAIN = "score again: the rows are then read again"


class RowStore:
    """A folder of rows that was written to its end; `lengths` [rows] are their tokens, `unread` what is known of rows
    that could not be read (data_prep.readers.Rejected)."""

    def __init__(self, folder: Path, *, checked: bool = True):
        """Open a store; raises ArenaError if it was not written to its end or, `checked`, its files changed since."""
        self.folder = folder
        with readable(folder / _MARKER, _AGAIN):
            marker = read_json(folder / _MARKER)
            sums, self.unread = dict(marker["sha256"]), list(marker["unread"])
            changed = [name for name in _FILES if checked and sha256_of(folder / name) != sums.get(name)]
        if changed:
            raise ArenaError(f"{' and '.join(changed)} changed on disk", where=str(folder), remedy=_AGAIN)
        with readable(folder / "rows.parquet", _AGAIN):
            places = read_columns(folder / "rows.parquet", ["tokens", "begin"])
        self.lengths, self._begins = (places[name].to_numpy() for name in ("tokens", "begin"))
        self.rows, self.tokens = len(self.lengths), int(self.lengths.sum(dtype=np.int64))

    @classmethod
    def write(
        cls,
        folder: Path,
        rows: Iterable[tuple[Facts, ModelInput | None]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> RowStore:
        """Write rows as they come; a store that was there is replaced. `progress` gets the number of rows so far.

        Facts without an input are of a row that could not be read.
        """
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).unlink(missing_ok=True)
        schema, waiting, count, unread = FACTS_SCHEMA.append(pa.field("begin", pa.int64())), [], 0, []
        with (
            (folder / "rows.jsonl").open("wb") as lines,
            ParquetWriter(folder / "rows.parquet", schema, compression="zstd") as facts_file,
        ):
            for facts, inputs in rows:
                if inputs is None:
                    unread.append(facts)
                    continue
                waiting.append({**facts, "begin": lines.tell()})
                lines.write(json.dumps(inputs).encode("ascii") + b"\n")  # ASCII: half a surrogate pair stays unchanged
                count += 1
                progress(count)
                if len(waiting) == WINDOW:
                    facts_file.write_table(pa.Table.from_pylist(waiting, schema=schema))
                    waiting.clear()
            facts_file.write_table(pa.Table.from_pylist(waiting, schema=schema))
        sums = {name: sha256_of(folder / name) for name in _FILES}
        write_json(folder / _MARKER, {"rows": count, "unread": unread, "sha256": sums})
        return cls(folder, checked=False)

    def inputs(self, numbers: Iterable[int]) -> list[ModelInput]:
        """Return what the model reads of the rows with these numbers, in their order."""
        with (self.folder / "rows.jsonl").open("rb") as lines:
            found = []
            for number in numbers:
                lines.seek(int(self._begins[number]))
                found.append(json.loads(lines.readline()))
            return found

    def windows(self) -> Iterator[pd.DataFrame]:
        """Yield the facts of `WINDOW` rows at a time, in order."""
        path = self.folder / "rows.parquet"
        with readable(path, _AGAIN), ParquetFile(path, pre_buffer=False) as file:
            for number in range(file.num_row_groups):
                table = file.read_row_group(number, columns=list(ROW_FACTS))
                if len(table):
                    yield table.to_pandas()

    def ids(self) -> Iterator[str]:
        """Yield the ids in order."""
        for table in self.windows():
            yield from table["id"]


@dataclass(frozen=True, eq=False)
class Shard:
    """Some rows in one order of their answers: `rows` are numbers in a store, the longest row first."""

    name: str  # ab-00012
    rows: np.ndarray
    tokens: int

    @property
    def swapped(self) -> bool:
        """Whether the answers are exchanged."""
        return self.name.startswith(SWAPPED)


def plan() -> list[int]:
    """Return the numbers that the plan is made with: shards of another plan are not those of this one."""
    return [_FORMAT, WINDOW, SHARD_TOKENS, SHARD_ROWS]


def shards(store: RowStore, order: str) -> Iterator[Shard]:
    """Yield all rows in an order of their answers, window by window, in each the longest rows first, as shards of at
    most `SHARD_ROWS` rows and `SHARD_TOKENS` tokens (or one row)."""
    number, lengths = 0, store.lengths
    for first in range(0, store.rows, WINDOW):
        rows = first + np.argsort(-lengths[first : first + WINDOW], kind="stable")
        sums, start = np.concatenate([[0], np.cumsum(lengths[rows], dtype=np.int64)]), 0
        while start < len(rows):
            stop = int(np.searchsorted(sums, sums[start] + SHARD_TOKENS, side="right")) - 1
            stop = min(max(stop, start + 1), start + SHARD_ROWS, len(rows))
            yield Shard(f"{order}-{number:05d}", rows[start:stop], int(sums[stop] - sums[start]))
            start, number = stop, number + 1


class ShardFolder:
    """The finished shards of one run; `inputs` are everything that its scores depend on."""

    def __init__(
        self, base: Path, target: str, inputs: Mapping[str, Any], note: Callable[[str], None], *, fresh: bool = False
    ):
        """Open the folder of these inputs with what an earlier call left there, or empty where `fresh`."""
        written = json.loads(json.dumps(inputs))
        self._run = hashlib.sha256(json.dumps(written, sort_keys=True).encode()).hexdigest()
        self.path, self._note = base / f"{target}-{self._run[:12]}", note
        manifest = self.path / _MANIFEST
        if fresh:
            shutil.rmtree(self.path, ignore_errors=True)
        if others := [path.parent for path in base.glob(f"{target}-*/{_MANIFEST}") if path != manifest]:
            names = ", ".join(sorted(map(str, others)))
            note(f"unfinished scores of earlier calls with other inputs are not used; delete them if unwanted: {names}")
        self.resumed = manifest.is_file()
        write_json(manifest, written)

    def read(self, shard: Shard, columns: int) -> np.ndarray | None:
        """Return a shard's scores [rows, columns]; None if the file is missing or, which is noted, damaged."""
        path = self._file(shard)
        try:
            head, _, payload = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        try:
            scores = np.frombuffer(payload, "<f8").reshape(len(shard.rows), columns)
            fault = "" if json.loads(head) == self._head(shard, scores) else "is not the shard of this run"
            fault = fault or ("" if np.isfinite(scores).all() else "holds scores that are not finite")
        except ValueError:
            fault = "is damaged"
        if fault:
            self._note(f"{path} {fault}: it is scored again")
            return None
        return scores

    def write(self, shard: Shard, scores: np.ndarray) -> None:
        """Keep the scores [rows, columns] of a shard, whole or not at all."""
        scores = np.ascontiguousarray(scores, "<f8")
        with atomic_file(self._file(shard), "wb") as file:
            file.write(json.dumps(self._head(shard, scores)).encode() + b"\n" + scores.tobytes())

    def remove(self) -> None:
        """Delete this run's folder: its scores are in the final files. The last one takes the base folder along."""
        shutil.rmtree(self.path, ignore_errors=True)
        remove_empty(self.path.parent)

    def _file(self, shard: Shard) -> Path:
        return self.path / f"{shard.name}.scores"

    def _head(self, shard: Shard, scores: np.ndarray) -> dict[str, Any]:
        digest = hashlib.sha256(shard.rows.astype("<i8").tobytes() + scores.tobytes()).hexdigest()
        return {"run": self._run, "shard": shard.name, "shape": list(scores.shape), "sha256": digest}


def remove_empty(base: Path) -> None:
    """Remove a folder of unfinished scores unless other runs have something in it."""
    with suppress(OSError):
        base.rmdir()
