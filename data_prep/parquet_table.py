"""Parquet files, read as a stream of rows in batches that are small in memory.

next(ParquetTable(Path("train.parquet")).rows(["id", "prompt"]))  # ("30192", '["Is it morally right …"]')
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow
from pyarrow import compute, parquet

from common.errors import ArenaError, first_line

# One cell larger than this is a lost quote that has swallowed rows, not a text.
LARGEST_CELL = 1 << 26
DAMAGED = "the file is cut off or damaged: fetch or write it again"


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row whose cells could not be read; `first` is the cell of the first wanted column, if it is known."""

    reason: str
    first: object = None


class ParquetTable:
    """A parquet file, read in batches that are small in memory, whatever its pages unpack to."""

    _ROWS, _ROWS_OF_LARGE_GROUPS, _LARGE_GROUP = 512, 8, 1 << 30  # rows that are read at a time; bytes
    _LARGEST_BATCH = 1 << 28  # bytes of texts that rows may repeat
    _LARGEST_LISTS = 1 << 32  # bytes that the lists of a row group might take
    _BYTES_AN_ITEM = 64  # of a list, beside its text: its places and the Python object
    _SMALLER = (
        "write it with smaller row groups: pyarrow.parquet.write_table(table, path, row_group_size=1000); "
        "or remove the huge texts"
    )

    def __init__(self, path: Path):
        self.path = path
        self._row = 0
        with self._file() as file:
            self.columns = list(file.schema_arrow.names)
            self._count = file.metadata.num_rows

    @property
    def share(self) -> float:
        """The part of the rows, 0 to 1, that was read when the last row came out."""
        return self._row / self._count if self._count else 1.0

    def rows(self, names: Sequence[str]) -> Iterator[tuple[object, ...] | BrokenRow]:
        """Yield the cells of the named columns, row by row. Raises ArenaError."""
        self._row = 0
        with self._file() as file:
            leaves = [
                number
                for number in range(file.metadata.num_columns)
                if file.schema.column(number).path.startswith(tuple(f"{name}." for name in names))
                or file.schema.column(number).path in names
            ]
            with self._file(read_dictionary=[file.schema.column(number).path for number in leaves]) as dictionaries:
                for group in range(file.metadata.num_row_groups):
                    size = self._batch_rows(dictionaries, group, leaves)
                    for batch in file.iter_batches(batch_size=size, row_groups=[group], columns=list(names)):
                        yield from self._cells(batch, names)
                        self._row += len(batch)

    def _batch_rows(self, dictionaries: parquet.ParquetFile, group: int, leaves: list[int]) -> int:
        """Return how many rows of a row group may be read at a time; raises ArenaError where none may.

        A few KB may unpack to gigabytes: a page of one letter, or a dictionary whose one text each row repeats. So a
        row is taken to be as large as the longest text of the dictionary, and a list to hold all items of the group.
        """
        # First, because pyarrow raises for damaged metadata when it reads rows, but aborts when it shows the metadata.
        texts = [_longest(dictionaries, group, dictionaries.schema.column(number).path) for number in leaves]
        whole = repeated = lists = 0
        for number, text in zip(leaves, texts, strict=True):
            chunk = dictionaries.metadata.row_group(group).column(number)
            size, whole = chunk.total_uncompressed_size, whole + chunk.total_uncompressed_size
            # A value of DELTA_BYTE_ARRAY may repeat the one before it.
            unknown = "DELTA_BYTE_ARRAY" in chunk.encodings or (text is None and chunk.has_dictionary_page)
            longest = size if unknown else text or 0
            if dictionaries.schema.column(number).max_repetition_level:
                lists += size + chunk.num_values * (longest + self._BYTES_AN_ITEM)
            else:
                repeated += longest
        for needed, most in ((whole, psutil.virtual_memory().available // 2), (lists, self._LARGEST_LISTS)):
            if needed > most:
                raise ArenaError(
                    f"row group {group} might unpack to {needed / 2**30:,.1f} GiB, more than {most / 2**30:,.1f} GiB",
                    where=str(self.path),
                    remedy=self._SMALLER,
                )
        # In a large group all bytes may lie in a few rows: this number fits even if each cell has the largest size.
        rows = self._ROWS if whole <= self._LARGE_GROUP else self._ROWS_OF_LARGE_GROUPS
        return max(1, min(rows, self._LARGEST_BATCH // max(repeated, 1)))

    def _cells(self, batch: pyarrow.RecordBatch, names: Sequence[str]) -> Iterator[tuple[object, ...] | BrokenRow]:
        if all(batch.column(name).nbytes <= LARGEST_CELL for name in names):
            try:
                return zip(*[batch.column(name).to_pylist() for name in names], strict=True)
            except UnicodeDecodeError:
                pass  # _one_by_one says where
        return self._one_by_one(batch, names)

    def _one_by_one(self, batch: pyarrow.RecordBatch, names: Sequence[str]) -> Iterator[tuple[object, ...] | BrokenRow]:
        """Yield rows without making Python objects of a cell that is too large."""
        for number in range(len(batch)):
            cells: list[object] = []
            for name in names:
                cell = batch.column(name).slice(number, 1)
                if isinstance(cell, pyarrow.DictionaryArray):  # pandas' categories
                    cell = cell.dictionary_decode()
                if cell.nbytes > LARGEST_CELL:
                    yield BrokenRow(f"{name} is larger than {LARGEST_CELL:,} bytes", cells[0] if cells else None)
                    break
                try:
                    cells.append(cell[0].as_py())
                except UnicodeDecodeError as error:
                    raise ArenaError(
                        f"{name} is not UTF-8: byte 0x{error.object[error.start]:02x}",
                        where=f"{self.path} row {self._row + number + 1}",
                        remedy="write the column as UTF-8 text",
                    ) from None
            else:
                yield tuple(cells)

    @contextmanager
    def _file(self, **options: object) -> Iterator[parquet.ParquetFile]:
        try:
            # without pre-buffering, a file of a single row group is not held in memory
            with parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20, **options) as file:
                yield file
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            what = f"is not a readable parquet file: {first_line(error)}"
            raise ArenaError(what, where=str(self.path), remedy=DAMAGED) from None


def _longest(dictionaries: parquet.ParquetFile, group: int, leaf: str) -> int | None:
    """Return the bytes of the longest text in the dictionary of a column, None where the first row shows none."""
    try:
        batch = next(dictionaries.iter_batches(batch_size=1, row_groups=[group], columns=[leaf]), None)
    except OSError as error:
        if "Not yet implemented" in str(error):  # pyarrow's words for a first page in an encoding without a dictionary
            return None
        raise
    array = None if batch is None else batch.column(0)
    while isinstance(array, pyarrow.StructArray) or hasattr(array, "values"):
        array = array.field(0) if isinstance(array, pyarrow.StructArray) else array.values
    if isinstance(array, pyarrow.DictionaryArray):
        return compute.max(compute.binary_length(array.dictionary)).as_py()
    return None
