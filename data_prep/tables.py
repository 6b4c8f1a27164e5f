"""Tables on the disk, read as a stream of rows: CSV (plain or gzip) and parquet, recognised by their first bytes.

table = open_table(Path("train.csv"))
tables = open_tables(Path("parts"))  # a folder of such files
table.columns                      # ["id", "model_a", …]
next(table.rows(["id", "prompt"]))  # ("30192", '["Is it morally right …"]')
"""

from __future__ import annotations

import csv
import gzip
import io
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO

import psutil
import pyarrow
from pyarrow import compute, parquet

from common.errors import ArenaError

# What the parts of a table in a folder end with.
PARTS = (".csv", ".csv.gz", ".parquet")
# One cell larger than this is a lost quote that has swallowed rows, not a text.
_LARGEST_CELL = 1 << 26
_LARGEST_LINE = 1 << 27
_ESCAPED = re.compile("[\udc80-\udcff]")  # how Python's surrogateescape writes a byte that is not UTF-8
_DAMAGED = "the file is cut off or damaged: fetch or write it again"
_UTF8 = "convert the file to UTF-8, for example: iconv -f {} -t UTF-8 old.csv > new.csv"
_OTHER_MAGIC = {
    b"PK\x03\x04": ("is a zip archive (or a spreadsheet)", "unpack it, or save the sheet as CSV in UTF-8"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "decompress it, or use gzip"),
    b"BZh": ("is compressed with bzip2", "decompress it, or use gzip"),
    b"\xfd7zXZ": ("is compressed with xz", "decompress it, or use gzip"),
    b"ARROW1": ("is an Arrow (feather) file", "save it as parquet or CSV"),
}


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row whose cells could not be read; `first` is the cell of the first wanted column, if it is known."""

    reason: str
    first: object = None


def open_tables(path: Path) -> list[CsvTable | ParquetTable]:
    """Return the table in `path`, or those of a folder of parts (.csv, .csv.gz, .parquet) in the order of their names.

    Hidden files and what other programs leave (`_SUCCESS`) are no parts. Raises ArenaError for any other file.
    """
    if not path.is_dir():
        return [open_table(path)]
    files = sorted(p for p in path.iterdir() if not p.name.startswith((".", "_")))
    others = [p.name for p in files if not p.is_file() or not p.name.endswith(PARTS)]
    if others or not files:
        what = f"holds more than parts of a table: {', '.join(others[:5])}" if others else "holds no part of a table"
        remedy = f"give a folder with nothing but files named {', '.join('*' + end for end in PARTS)}"
        raise ArenaError(f"is a folder that {what}", where=str(path), remedy=remedy)
    return [open_table(file) for file in files]


def open_table(path: Path) -> CsvTable | ParquetTable:
    """Return the table in a file, its columns read. Raises ArenaError where the file holds no table."""
    where = str(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise ArenaError(what, where=where, remedy="give the path of a .csv, .csv.gz or .parquet file")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        remedy = "check the disk and the file's permissions"
        raise ArenaError(f"cannot be read: {error.strerror}", where=where, remedy=remedy) from None
    for magic, (what, remedy) in _OTHER_MAGIC.items():
        if head.startswith(magic):
            raise ArenaError(what, where=where, remedy=remedy)
    table = ParquetTable(path) if head.startswith(b"PAR1") else CsvTable(path, head.startswith(b"\x1f\x8b"))
    double = sorted({name for name in table.columns if table.columns.count(name) > 1})
    if double:
        raise ArenaError(f"has the column(s) {double} twice", where=where, remedy="rename or remove one")
    return table


class CsvTable:
    """A CSV file in UTF-8, with or without gzip; its rows are read one at a time.

    Python's own reader, since pyarrow.csv takes everything after an unclosed quote as one text without an error.
    """

    def __init__(self, path: Path, compressed: bool):
        self.path, self.compressed = path, compressed
        self._source: IO[bytes] | None = None
        header = next(self._parsed(), None)
        if header is None:
            raise ArenaError("is empty", where=str(path), remedy="give a file with a header and rows")
        if isinstance(header, BrokenRow):
            remedy = "give a CSV with a header line"
            raise ArenaError(f"has no readable header: {header.reason}", where=str(path), remedy=remedy)
        self.columns = header

    @property
    def share(self) -> float:
        """The part of the file, 0 to 1, that was read when the last row came out."""
        if self._source is None or self._source.closed:
            return float(self._source is not None)
        return self._source.tell() / max(os.fstat(self._source.fileno()).st_size, 1)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, ...] | BrokenRow]:
        """Yield the cells of two or more columns, row by row; blank lines are no rows. Raises ArenaError."""
        places = [self.columns.index(name) for name in names]
        wanted, width = itemgetter(*places), len(self.columns)
        parsed = self._parsed()
        next(parsed, None)  # the header
        for row in parsed:
            if isinstance(row, BrokenRow):
                yield row
            elif len(row) == width:
                yield wanted(row)
            else:
                first = row[places[0]] if places[0] < len(row) else None
                yield BrokenRow(f"has {len(row)} cells, the header has {width}", first)

    def _parsed(self, errors: str = "strict") -> Iterator[list[str] | BrokenRow]:
        """Yield the header and the rows, all their cells; faults of the file as a whole come out as an ArenaError."""
        csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))
        try:
            with self._bytes() as raw, io.TextIOWrapper(raw, "utf-8-sig", errors, newline="") as text:
                if errors == "strict":
                    self._refuse_wide_encoding(raw)
                yield from self._split(text)
        except UnicodeDecodeError:
            raise self._encoding_error() from None
        except (EOFError, zlib.error, OSError) as error:
            raise ArenaError(f"cannot be read to its end: {error}", where=str(self.path), remedy=_DAMAGED) from None

    def _split(self, text: IO[str]) -> Iterator[list[str] | BrokenRow]:
        def next_line() -> str:
            line = text.readline(_LARGEST_LINE)
            if len(line) < _LARGEST_LINE or line.endswith(("\n", "\r")):
                return line
            while (rest := text.readline(1 << 20)) and not rest.endswith(("\n", "\r")):
                pass
            raise csv.Error(f"a line is longer than {_LARGEST_LINE:,} characters")

        # strict: a lost quote is a broken row, never a guess
        reader, begins = csv.reader(iter(next_line, ""), strict=True), 1
        while True:
            try:
                for row in reader:
                    if row:
                        yield row
                    begins = reader.line_num + 1
                return
            except csv.Error as error:  # the reader goes on at the next line
                if begins > 1 and str(error) == "unexpected end of data":  # one row or a thousand may be missing
                    raise ArenaError(
                        "the file ends within a quoted cell of this row: it is cut off, or a quote is not closed",
                        where=f"{self.path} line {begins}",
                        remedy="fetch or write the file again; or close the quote, or remove that row",
                    ) from None
                yield BrokenRow(f"is not valid CSV up to line {reader.line_num}: {error}")
                begins = reader.line_num + 1

    @contextmanager
    def _bytes(self) -> Iterator[IO[bytes]]:
        with self.path.open("rb") as self._source:
            if self.compressed:
                with gzip.open(self._source, "rb") as unpacked:
                    yield unpacked
            else:
                yield self._source

    def _refuse_wide_encoding(self, raw: IO[bytes]) -> None:
        """Refuse UTF-16 and UTF-32, for which a strict UTF-8 reader would blame some byte."""
        head = raw.peek(4096)[:4096]
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head.split(b"\n", 1)[0]:
            what = "is not UTF-8: the header looks like UTF-16, UTF-32 or a binary file"
            raise ArenaError(what, where=str(self.path), remedy=_UTF8.format("UTF-16"))

    def _encoding_error(self) -> ArenaError:
        """Return the error for the first row that is not UTF-8, which is found by reading the file once more."""
        where, remedy = str(self.path), _UTF8.format("LATIN1")
        for number, row in enumerate(self._parsed("surrogateescape")):
            found = None if isinstance(row, BrokenRow) else _ESCAPED.search("".join(row))
            if found:
                what = f"is not UTF-8: byte 0x{ord(found[0]) & 255:02x}"
                return ArenaError(what, where=f"{where} row {number}" if number else f"{where} header", remedy=remedy)
        return ArenaError("is not UTF-8", where=where, remedy=remedy)


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
        if all(batch.column(name).nbytes <= _LARGEST_CELL for name in names):
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
                if cell.nbytes > _LARGEST_CELL:
                    yield BrokenRow(f"{name} is larger than {_LARGEST_CELL:,} bytes", cells[0] if cells else None)
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
            what = f"is not a readable parquet file: {str(error).splitlines()[0]}"
            raise ArenaError(what, where=str(self.path), remedy=_DAMAGED) from None


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
