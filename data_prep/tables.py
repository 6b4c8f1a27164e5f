"""Tables on the disk, read as a stream of rows: CSV (plain or gzip) and parquet, told apart by their first bytes.

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
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, TYPE_CHECKING

from common.errors import ArenaError
from data_prep.parquet_pages import batch_rows

if TYPE_CHECKING:
    import pyarrow

# One cell larger than this is a lost quote that has swallowed rows, not a text.
_LARGEST_CELL = 1 << 26
_AT_THE_END = "unexpected end of data"  # what csv says in a quoted cell that nothing closes
_LARGEST_LINE = 1 << 27
# What the parts of a table in a folder end with.
PARTS = (".csv", ".csv.gz", ".parquet")
_UTF8 = "convert the file to UTF-8, for example: iconv -f {encoding} -t UTF-8 old.csv > new.csv"
_OTHER_MAGIC = {
    b"PK\x03\x04": ("is a zip archive (or a spreadsheet)", "unpack it, or save the sheet as CSV in UTF-8"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "decompress it, or use gzip"),
    b"BZh": ("is compressed with bzip2", "decompress it, or use gzip"),
    b"\xfd7zXZ": ("is compressed with xz", "decompress it, or use gzip"),
    b"ARROW1": ("is an Arrow (feather) file", "save it as parquet or CSV"),
}


@dataclass(frozen=True, slots=True)
class BrokenRow:
    """A row whose cells could not be told apart; `first` is the cell of the first wanted column, if it is there."""

    reason: str
    first: str | None = None


def open_tables(path: Path) -> list[CsvTable | ParquetTable]:
    """Return the table in `path`, or those of a folder of parts (.csv, .csv.gz, .parquet) in the order of their names.

    Hidden files and what other programs leave (`_SUCCESS`) are no parts. Raises ArenaError, for any other file as well.
    """
    try:
        parts = path.is_dir()
    except OSError:  # told by open_table
        parts = False
    if not parts:
        return [open_table(path)]
    files = sorted(p for p in path.iterdir() if not p.name.startswith((".", "_")))
    others = [p.name for p in files if not p.is_file() or not p.name.endswith(PARTS)]
    if others:
        raise ArenaError(
            f"is a folder that holds more than parts of a table: {', '.join(others[:5])}",
            where=str(path),
            remedy=f"give a folder with nothing but files named {', '.join('*' + end for end in PARTS)}",
        )
    if not files:
        raise ArenaError("is a folder without a part", where=str(path), remedy=f"put {' or '.join(PARTS)} files in it")
    return [open_table(file) for file in files]


def open_table(path: Path) -> CsvTable | ParquetTable:
    """Return the table in `path`, its columns read. Raises ArenaError when it is none."""
    try:
        is_file = path.is_file()
    except OSError as error:  # a name that is too long, a disk that does not answer
        raise ArenaError(f"cannot be read: {error.strerror}", where=str(path)[:200], remedy="check the path") from None
    if not is_file:
        what = "is a folder" if path.is_dir() else "is not a regular file" if path.exists() else "does not exist"
        raise ArenaError(what, where=str(path), remedy="give the path of a .csv, .csv.gz or .parquet file")
    try:
        with path.open("rb") as file:
            head = file.read(8)
    except OSError as error:
        raise ArenaError(f"cannot be read: {error.strerror}", where=str(path), remedy="check its rights") from None
    if not head:
        raise ArenaError("is empty", where=str(path), remedy="give a file with a header and rows")
    for magic, (what, remedy) in _OTHER_MAGIC.items():
        if head.startswith(magic):
            raise ArenaError(what, where=str(path), remedy=remedy)
    table = ParquetTable(path) if head.startswith(b"PAR1") else CsvTable(path, head.startswith(b"\x1f\x8b"))
    double = sorted({name for name in table.columns if table.columns.count(name) > 1})
    if double:
        raise ArenaError(f"has the column(s) {double} twice", where=str(path), remedy="rename or remove one")
    return table


class _Lines:
    """The lines of a text, one at a time; of one that no memory should hold only an error is left."""

    def __init__(self, text: IO[str]):
        self._text = text

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        """Return the next line; raises csv.Error for one that is too long, after which the next call goes on."""
        line = self._text.readline(_LARGEST_LINE)
        if not line:
            raise StopIteration
        if len(line) < _LARGEST_LINE or line.endswith(("\n", "\r")):
            return line
        while (rest := self._text.readline(1 << 20)) and not rest.endswith(("\n", "\r")):
            pass
        raise csv.Error(f"a line is longer than {_LARGEST_LINE:,} characters")


class CsvTable:
    """A CSV file in UTF-8, with or without gzip; its rows are read one at a time."""

    def __init__(self, path: Path, compressed: bool):
        self.path, self.compressed = path, compressed
        self._source: IO[bytes] | None = None
        self._refuse_wide_encodings()
        with self._reader() as reader:
            self.columns = self._header(reader)

    @property
    def share(self) -> float:
        """The part of the file, 0 to 1, that was read when the last row came out."""
        if self._source is None or self._source.closed:
            return float(self._source is not None)
        return self._source.tell() / max(os.fstat(self._source.fileno()).st_size, 1)

    def _open_row(self, line: int) -> ArenaError:
        return ArenaError(
            "the file ends within a quoted cell of this row: it is cut off, or a quote is not closed",
            where=f"{self.path} line {line}",
            remedy="fetch or write the file again; or close the quote, or remove that row",
        )

    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, ...] | BrokenRow]:
        """Yield the cells of two or more columns, row by row; blank lines are no rows. Raises ArenaError."""
        places = [self.columns.index(name) for name in names]
        wanted, width = itemgetter(*places), len(self.columns)
        with self._reader() as reader:
            self._header(reader)
            while True:
                begins = reader.line_num + 1
                try:
                    row = next(reader)
                except StopIteration:
                    return
                except csv.Error as error:  # the reader goes on at the next line
                    if str(error) == _AT_THE_END:  # whatever followed that quote is gone, be it one row or a thousand
                        raise self._open_row(begins) from None
                    yield BrokenRow(f"is not valid CSV up to line {reader.line_num}: {error}")
                    continue
                if len(row) == width:
                    yield wanted(row)
                elif row:
                    first = row[places[0]] if places[0] < len(row) else None
                    yield BrokenRow(f"has {len(row)} cells, the header has {width}", first)

    def _header(self, reader: Iterator[list[str]]) -> list[str]:
        try:
            for row in reader:
                if row:
                    return row
        except csv.Error as error:
            raise ArenaError(
                f"has no readable header: {error}",
                where=str(self.path),
                remedy="give a CSV with a header line",
            ) from None
        raise ArenaError("is empty", where=str(self.path), remedy="give a file with a header and rows")

    @contextmanager
    def _bytes(self) -> Iterator[IO[bytes]]:
        with self.path.open("rb") as file:
            self._source = file
            if not self.compressed:
                yield file
                return
            with gzip.open(file, "rb") as unpacked:
                yield unpacked

    @contextmanager
    def _reader(self) -> Iterator[Iterator[list[str]]]:
        """Yield a csv reader; whatever is wrong with the file as a whole comes out as an ArenaError."""
        csv.field_size_limit(max(csv.field_size_limit(), _LARGEST_CELL))
        try:
            with self._bytes() as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as text:
                # strict: a lost quote is a broken row, never a guess
                yield csv.reader(_Lines(text), strict=True)
        except UnicodeDecodeError:
            try:
                found = self._encoding_error()
            except (EOFError, zlib.error, OSError) as error:  # damaged in both ways
                found = self._cut_off(error)
            raise found from None
        except (EOFError, zlib.error, OSError) as error:
            raise self._cut_off(error) from None

    def _cut_off(self, error: Exception) -> ArenaError:
        return ArenaError(
            f"cannot be read to its end: {error}",
            where=str(self.path),
            remedy="the file is cut off or damaged: fetch or write it again",
        )

    def _refuse_wide_encodings(self) -> None:
        """Refuse UTF-16 and UTF-32, which a strict UTF-8 reader would blame on some byte."""
        try:
            with self._bytes() as raw:
                head = raw.read(4096)
        except (EOFError, zlib.error, OSError):
            return  # told with its remedy when the header is read
        if head.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in head.split(b"\n", 1)[0]:
            raise ArenaError(
                "is not UTF-8: the header (row 0, byte 0) looks like UTF-16, UTF-32 or a binary file",
                where=str(self.path),
                remedy=_UTF8.format(encoding="UTF-16"),
            )

    def _encoding_error(self) -> ArenaError:
        """Find the first byte that is not UTF-8, and its row, by reading the file once more."""
        faults: list[tuple[int, int]] = []

        def lines(raw: IO[bytes]) -> Iterator[str]:
            offset = 0
            for line in iter(lambda: raw.readline(_LARGEST_LINE), b""):  # no UTF-8 character holds a newline byte
                try:
                    yield line.decode()
                except UnicodeDecodeError as error:
                    faults.append((offset + error.start, line[error.start]))
                    yield line.decode(errors="replace")
                offset += len(line)

        row = 0
        with self._bytes() as raw:
            reader = csv.reader(lines(raw))
            while not faults:
                try:
                    row += bool(next(reader)) and not faults
                except csv.Error:
                    row += not faults
                except StopIteration:
                    break
        byte, value = faults[0]
        return ArenaError(
            f"is not UTF-8: byte {byte} is 0x{value:02x}",
            where=f"{self.path} row {row}" if row else f"{self.path} header",
            remedy=_UTF8.format(encoding="LATIN1"),
        )


def _one_by_one(batch: pyarrow.RecordBatch, names: Sequence[str]) -> Iterator[tuple[object, ...] | BrokenRow]:
    """Yield the rows of a batch that is large, without making anything of a cell that is too large."""
    for number in range(len(batch)):
        cells = {name: _decoded(batch.column(name).slice(number, 1)) for name in names}
        large = [name for name, cell in cells.items() if cell.nbytes > _LARGEST_CELL]
        if not large:
            yield tuple(cells[name][0].as_py() for name in names)
            continue
        first = None if names[0] in large else cells[names[0]][0].as_py()
        yield BrokenRow(f"{large[0]} is larger than {_LARGEST_CELL:,} bytes", first)


def _decoded(column: pyarrow.Array) -> pyarrow.Array:
    """Return a column with each text in its own place: pandas' categories are texts beside their numbers."""
    return column.dictionary_decode() if hasattr(column, "dictionary_decode") else column


class ParquetTable:
    """A parquet file, read in batches that are small in memory, whatever its pages unpack to."""

    def __init__(self, path: Path):
        self.path = path
        self._row, self._rows = 0, 1
        with self._file() as file:
            self.columns = list(file.schema_arrow.names)
            self._rows = file.metadata.num_rows

    @property
    def share(self) -> float:
        """The part of the rows, 0 to 1, that was read when the last row came out."""
        return self._row / max(self._rows, 1)

    def rows(self, names: Sequence[str]) -> Iterator[tuple[object, ...] | BrokenRow]:
        """Yield the cells of the named columns, row by row. Raises ArenaError."""
        self._row = 0
        with self._file() as file:
            size = batch_rows(file, self.path, names)
            for batch in file.iter_batches(batch_size=size, columns=list(names)):
                try:
                    if any(batch.column(name).nbytes > _LARGEST_CELL for name in names):
                        yield from _one_by_one(batch, names)
                    else:
                        yield from zip(*[batch.column(name).to_pylist() for name in names], strict=True)
                except UnicodeDecodeError:
                    raise self._encoding_error(batch, names, self._row) from None
                self._row += len(batch)

    @contextmanager
    def _file(self) -> Iterator:
        import pyarrow
        from pyarrow import parquet

        try:
            # without pre-buffering, a file of a single row group is not held in memory
            with parquet.ParquetFile(self.path, pre_buffer=False, buffer_size=1 << 20) as file:
                yield file
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ArenaError(
                f"is not a readable parquet file: {str(error).splitlines()[0]}",
                where=str(self.path),
                remedy="the file is cut off or damaged: fetch or write it again",
            ) from None

    def _encoding_error(self, batch, names: Sequence[str], before: int) -> ArenaError:
        """Find the first cell of a batch that is not UTF-8."""
        for i in range(len(batch)):
            for name in names:
                try:
                    batch.column(name)[i].as_py()
                except UnicodeDecodeError as error:
                    return ArenaError(
                        f"{name} is not UTF-8: byte {error.start} of the cell is 0x{error.object[error.start]:02x}",
                        where=f"{self.path} row {before + i + 1}",
                        remedy="write the column as UTF-8 text",
                    )
        raise AssertionError("a batch that cannot be read has a cell that cannot be read")
