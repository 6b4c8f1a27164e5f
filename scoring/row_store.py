"""Rows to score, on disk: what is fed of each, readable by number from any process, and what is known of it.

    store = RowStore.write(folder, rows)         # rows: (facts, fed), streamed; facts are `ROW_FACTS`
    store.fed([3, 1])                            # what is fed of rows 3 and 1
    for first, facts in store.windows(): ...     # facts of rows first, first + 1, … as a table

rows.texts     one JSON line a row: what is fed          rows.index    int64: where each line begins, and the end
rows.lengths   int32: tokens of each row                 rows.parquet  the facts, `WINDOW` rows a group
rows.json      written last: rows, tokens and the SHA-256 of the four files

Memory does not grow with the rows: everything is read in pieces.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from common.errors import ArenaError
from common.files import sha256_of, write_json
from data_prep.export_reader import readable

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

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
