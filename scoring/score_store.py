"""Which rows are scored together: shards, the pieces in which scores are computed, kept and gone on from.

The plan depends on the rows alone. So a run that goes on, one with more workers and an undisturbed one make the same
batches, and their scores are the same to the last digit wherever the kernels are.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from common.errors import ArenaError
from common.files import atomic_file, sha256_of, write_json
from data_prep.export_reader import readable
from factory.fingerprint import differences

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

# A shard is what a kill can cost: seconds on a GPU, minutes on a CPU. Several full batches of the engine fit in it.
SHARD_TOKENS = 2**17
SHARD_ROWS = 1024
# Rows of similar uncertainty that are put in order of length together: few enough to spend a last hour well.
_RANKED_TOGETHER = 1024
STRAIGHT, SWAPPED = "ab", "ba"


@dataclass(frozen=True, eq=False)
class Shard:
    """Some rows in one order of their answers: `rows` are numbers in a store, the longest row first."""

    name: str  # ab-00012
    rows: np.ndarray
    tokens: int

    @property
    def swapped(self) -> bool:
        """Whether the answers change places."""
        return self.name.startswith(SWAPPED)


def constants() -> list[int]:
    """Return what the plan is made with: shards of another plan are not those of this one."""
    return [1, WINDOW, SHARD_TOKENS, SHARD_ROWS, _RANKED_TOGETHER]


def straight_shards(store: RowStore) -> Iterator[Shard]:
    """Yield the shards of all rows in the straight order, window by window, in each the longest rows first."""
    number = 0
    for start in range(0, store.rows, WINDOW):
        lengths = store.lengths(start, start + WINDOW)
        for rows in _cut(start + np.arange(len(lengths)), lengths):
            yield _shard(STRAIGHT, number, rows, lengths[rows - start])
            number += 1


def swapped_shards(store: RowStore, uncertainty: np.ndarray) -> Iterator[Shard]:
    """Yield the shards of all rows in the swapped order, the most uncertain rows first; `uncertainty` [rows]."""
    lengths, number = store.lengths(), 0
    ranked = np.argsort(-uncertainty, kind="stable")
    for start in range(0, len(ranked), _RANKED_TOGETHER):
        together = ranked[start : start + _RANKED_TOGETHER]
        for rows in _cut(together, lengths[together]):
            yield _shard(SWAPPED, number, rows, lengths[rows])
            number += 1


def _cut(rows: np.ndarray, lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Cut rows, the longest first, into runs of at most `SHARD_ROWS` rows and `SHARD_TOKENS` tokens (or one row)."""
    order = np.argsort(-lengths, kind="stable")
    rows, sums = rows[order], np.concatenate([[0], np.cumsum(lengths[order], dtype=np.int64)])
    start = 0
    while start < len(rows):
        stop = int(np.searchsorted(sums, sums[start] + SHARD_TOKENS, side="right")) - 1
        stop = min(max(stop, start + 1), start + SHARD_ROWS, len(rows))
        yield rows[start:stop]
        start = stop


def _shard(order: str, number: int, rows: np.ndarray, lengths: np.ndarray) -> Shard:
    return Shard(f"{order}-{number:05d}", rows, int(lengths.sum()))


_MANIFEST = "manifest.json"
_FORMAT = 1


class ShardFolder:
    """The finished shards of one run; `inputs` are everything that its scores depend on."""

    def __init__(
        self,
        base: Path,
        target: str,
        inputs: Mapping[str, Any],
        note: Callable[[str], None],
        *,
        fresh: bool = False,
    ):
        """Open the folder of these inputs, with what an earlier call left there, or `fresh`; `note` tells a person."""
        self._inputs = json.loads(json.dumps({"format": _FORMAT, **inputs}))
        self._run = hashlib.sha256(json.dumps(self._inputs, sort_keys=True).encode()).hexdigest()
        self.path, self._note = base / f"{target}-{self._run[:12]}", note
        if fresh:
            shutil.rmtree(self.path, ignore_errors=True)
        manifest = self.path / _MANIFEST
        self._tell_others(base, target)
        if manifest.is_file() and _read(manifest) != self._inputs:
            raise ArenaError(
                "the manifest of these unfinished scores was changed",
                where=str(manifest),
                remedy="move the folder away: it is then begun anew",
            )
        self.resumed = manifest.is_file()
        write_json(manifest, self._inputs)

    def read(self, shard: Shard, columns: int) -> np.ndarray | None:
        """Return a shard's scores [rows, columns], None if it is not there or, which is noted, not what it must be."""
        path = self._file(shard)
        try:
            head, _, payload = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        fault = self._fault(head, payload, shard, columns)
        if fault:
            self._note(f"{path}: {fault}; scored again")
            return None
        return np.frombuffer(payload, "<f8").reshape(len(shard.rows), columns)

    def write(self, shard: Shard, scores: np.ndarray) -> None:
        """Keep the scores [rows, columns] of a shard, whole or not at all."""
        payload = np.ascontiguousarray(scores, "<f8").tobytes()
        with atomic_file(self._file(shard), "wb") as file:
            file.write(json.dumps(self._head(shard, scores.shape[1], payload)).encode() + b"\n")
            file.write(payload)

    def remove(self) -> None:
        """Delete this run's folder: its scores are in the final files. The last one takes the base folder along."""
        shutil.rmtree(self.path, ignore_errors=True)
        remove_empty(self.path.parent)

    def _file(self, shard: Shard) -> Path:
        return self.path / f"{shard.name}.scores"

    def _head(self, shard: Shard, columns: int, payload: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(shard.rows.astype("<i8").tobytes())
        digest.update(payload)
        about = {"run": self._run, "shard": shard.name, "rows": len(shard.rows), "columns": columns}
        return {**about, "sha256": digest.hexdigest()}

    def _fault(self, head: bytes, payload: bytes, shard: Shard, columns: int) -> str | None:
        try:
            found = dict(json.loads(head))
        except (ValueError, TypeError):
            return "is no shard of scores"
        expected = self._head(shard, columns, payload)
        if (found.get("run"), found.get("shard")) != (expected["run"], expected["shard"]):
            return "belongs to another run"
        if found != expected or len(payload) != 8 * columns * len(shard.rows):
            return "is damaged (its checksum does not fit)"
        return None if np.isfinite(np.frombuffer(payload, "<f8")).all() else "holds scores that are not finite"

    def _tell_others(self, base: Path, target: str) -> None:
        """Say which unfinished runs of the same target are left alone, and in what they differ."""
        for manifest in sorted(base.glob(f"{target}-*/{_MANIFEST}")):
            if manifest.parent != self.path and len(manifest.parent.name) == len(self.path.name):
                changed = differences(_read(manifest) or {}, self._inputs)
                self._note(
                    f"{manifest.parent}: unfinished scores of an earlier call with other inputs are not used "
                    f"({'; '.join(changed[:3])}{' …' if len(changed) > 3 else ''}); delete the folder if they are not "
                    "wanted any more"
                )


def remove_empty(base: Path) -> None:
    """Remove a folder of unfinished runs if there are none, nor a lock: what lies in there belongs to other runs."""
    with suppress(OSError):
        base.rmdir()


def _read(manifest: Path) -> dict[str, Any] | None:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


Facts, Fed = dict[str, Any], dict[str, Any]
ROW_FACTS = ("id", "group", "verdict", "language", "turns", "chars_prompt", "chars_a", "chars_b", "tokens", "cut")
# Rows that are planned, and later written, together.
WINDOW = 8192
_FILES = ("rows.texts", "rows.index", "rows.lengths", "rows.parquet")
_MARKER = "rows.json"
_GROUP = 1024  # rows that wait in memory on their way to rows.parquet


class RowStore:
    """A folder of rows that was written to its end."""

    def __init__(self, folder: Path, *, checked: bool = True):
        """Open a store; raises ArenaError if it was not written to its end or, `checked`, its files changed since."""
        self.folder = folder
        try:
            about = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
            self.rows, self.tokens, sums = int(about["rows"]), int(about["tokens"]), dict(about["sha256"])
            broken = [name for name in _FILES if checked and sha256_of(folder / name) != sums.get(name)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArenaError(f"is no finished set of rows ({error})", where=str(folder), remedy=_REMEDY) from None
        if broken:
            raise ArenaError(f"{' and '.join(broken)} changed on disk", where=str(folder), remedy=_REMEDY)

    @classmethod
    def write(
        cls,
        folder: Path,
        rows: Iterable[tuple[Facts, Fed]],
        progress: Callable[[int], None] = lambda _: None,
    ) -> RowStore:
        """Write rows as they come; a store that was there is replaced. `progress` gets the number of rows so far."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / _MARKER).unlink(missing_ok=True)
        count = tokens = 0
        with _Files(folder) as files:
            for facts, fed in rows:
                files.add(facts, fed)
                count, tokens = count + 1, tokens + facts["tokens"]
                progress(count)
        sums = {name: sha256_of(folder / name) for name in _FILES}
        write_json(folder / _MARKER, {"rows": count, "tokens": tokens, "sha256": sums})
        return cls(folder, checked=False)

    def fed(self, numbers: Sequence[int] | np.ndarray) -> list[Fed]:
        """Return what is fed of the rows with these numbers, in their order."""
        found = []
        for number in map(int, numbers):
            begin, end = np.frombuffer(os.pread(self._index, 16, 8 * number), "<i8")
            found.append(json.loads(os.pread(self._texts, int(end - begin), int(begin))))
        return found

    def lengths(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Return the tokens of rows start … stop - 1, int32."""
        stop = self.rows if stop is None else min(stop, self.rows)
        return np.fromfile(self.folder / "rows.lengths", "<i4", count=stop - start, offset=4 * start)

    def windows(self) -> Iterator[tuple[int, pd.DataFrame]]:
        """Yield (number of the first row, facts of up to `WINDOW` rows) in order."""
        first = 0
        for table in self.tables():
            yield first, table.to_pandas()
            first += len(table)

    def tables(self) -> Iterator[pa.Table]:
        """Yield the facts of up to `WINDOW` rows at a time, in order, as Arrow tables."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        path = self.folder / "rows.parquet"
        with readable(path, _REMEDY), ParquetFile(path, pre_buffer=False) as file:
            waiting: list[pa.RecordBatch] = []
            for batch in file.iter_batches(batch_size=_GROUP):
                waiting.append(batch)
                if sum(map(len, waiting)) >= WINDOW:
                    yield pa.Table.from_batches(waiting)
                    waiting = []
            if waiting:
                yield pa.Table.from_batches(waiting)

    def ids(self) -> Iterator[str]:
        """Yield the ids in order."""
        for table in self.tables():
            yield from table["id"].to_pylist()

    @cached_property
    def _texts(self) -> int:
        return os.open(self.folder / "rows.texts", os.O_RDONLY)

    @cached_property
    def _index(self) -> int:
        return os.open(self.folder / "rows.index", os.O_RDONLY)

    def close(self) -> None:
        """Close the files that `fed` opened."""
        for name in ("_texts", "_index"):
            if name in self.__dict__:
                os.close(self.__dict__.pop(name))


_REMEDY = "score again: the rows are then read anew"


class _Files:
    """The four files of a store while it is written."""

    def __init__(self, folder: Path):
        self._folder, self._waiting, self._at = folder, [], 0

    def __enter__(self) -> _Files:
        from pyarrow.parquet import ParquetWriter

        self._stack = ExitStack()
        self._texts, self._index, self._lengths = (self._open(name) for name in _FILES[:3])
        self._parquet = self._stack.enter_context(
            ParquetWriter(self._folder / "rows.parquet", facts_schema(), compression="zstd")
        )
        self._index.write(np.int64(0).tobytes())
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._stack.close()

    def add(self, facts: Facts, fed: Fed) -> None:
        line = json.dumps(fed).encode("ascii") + b"\n"  # ASCII: half a surrogate pair goes through unchanged
        self._texts.write(line)
        self._at += len(line)
        self._index.write(self._at.to_bytes(8, "little"))
        self._lengths.write(int(facts["tokens"]).to_bytes(4, "little"))
        self._waiting.append(facts)
        if len(self._waiting) >= _GROUP:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._parquet.write_table(pa.Table.from_pylist(self._waiting, schema=facts_schema()))
            self._waiting.clear()

    def _open(self, name: str) -> IO[bytes]:
        return self._stack.enter_context((self._folder / name).open("wb", buffering=1 << 20))


def facts_schema() -> pa.Schema:
    """Return the columns of the facts: those of an export's rows.parquet."""
    import pyarrow as pa

    strings, counts = ("id", "group", "verdict", "language"), ("turns", "chars_prompt", "chars_a", "chars_b", "tokens")
    fields = {**dict.fromkeys(strings, pa.string()), **dict.fromkeys(counts, pa.int32()), "cut": pa.bool_()}
    return pa.schema([(name, fields[name]) for name in ROW_FACTS])
