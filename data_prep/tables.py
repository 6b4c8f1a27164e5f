"""Tables on the disk, read as a stream of rows: CSV (plain or gzip) and parquet, told apart by their first bytes.

table = open_table(Path("train.csv"))
tables = open_tables(Path("parts"))  # a folder of such files
table.columns                      # ["id", "model_a", …]
next(table.rows(["id", "prompt"]))  # ("30192", '["Is it morally right …"]')
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from common.errors import ArenaError

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile
import csv
import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from operator import itemgetter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pyarrow

# Rows that are read at a time; the first number for which they fit into LARGEST_BATCH.
STEPS = (512, 128, 32, 8, 1)
LARGEST_BATCH = 5 << 27  # bytes; 128 rows of three texts fit, whose dictionaries have the usual 1 to 1.5 MB
LARGEST_PAGE = 1 << 27  # bytes; of usual writers a page has 1 MB, or the texts of 1,000 rows
_BYTES_AN_ITEM = 64  # of a list, beside its text: its places and the Python object
_DEEPEST = 16  # structs and lists within each other; a footer has eight
_HEADER, _LARGEST_HEADER = 512, 1 << 24  # bytes; the second is what parquet-cpp reads at most
# Fields of the footer: of FileMetaData, RowGroup, ColumnChunk and ColumnMetaData.
_ROW_GROUPS, _COLUMNS, _ROWS, _ABOUT = 4, 1, 3, 3
_CODEC, _VALUES, _PACKED, _FIRST_PAGE, _DICTIONARY_PAGE = 4, 5, 7, 9, 11
_CODECS = {1: "snappy", 2: "gzip", 4: "brotli", 6: "zstd", 7: "lz4_raw"}
_DAMAGES = (LookupError, ValueError, TypeError, AttributeError, OverflowError)
_DATA, _DICTIONARY, _DATA_V2 = 0, 2, 3
_DICTIONARY_CODED = (2, 8)
_PREFIX_CODED = 7  # DELTA_BYTE_ARRAY: a value repeats the beginning of the one before it
# DELTA_…: the lengths of a page's values, which take next to nothing packed.
_LENGTHS_FIRST, _BYTES_A_LENGTH = (6, 7), 8
_DAMAGED = "the file is cut off or damaged: fetch or write it again"
_LARGE = (
    "a table of votes has no texts that large; write it anew in smaller row groups: "
    "pyarrow.parquet.write_table(table, path, row_group_size=1000)"
)


@dataclass
class _Chunk:
    """What the headers of one column chunk say: (values, bytes) of its pages, and of what its values repeat."""

    pages: list[tuple[int, int]] = field(default_factory=list)
    coded: int = 0  # values that name an entry of the dictionary, or go on from the value before
    entry: int = 0  # bytes that one of those may have
    prefixed: int = 0  # bytes that one which goes on from the value before may have
    dictionary: tuple[int, int, int] | None = None  # place, packed and unpacked bytes
    codec: int = 0  # number of its compression

    @property
    def largest(self) -> int:
        """Bytes of the largest page."""
        return max((self.entry, *(size for _, size in self.pages)))

    @property
    def whole(self) -> int:
        """Bytes that all of its values may take, as items of lists."""
        items = _BYTES_AN_ITEM * sum(count for count, _ in self.pages)
        return sum(size for _, size in self.pages) + self.coded * self.entry + items


@dataclass
class _Column:
    """A column (or a part of a nested one) of the whole file: (rows, bytes) of its pieces, and a row's share of more.

    A piece is a page. Of lists a header does not say how many rows a page holds: there it is a whole chunk.
    """

    pieces: list[tuple[int, int]] = field(default_factory=list)
    entry: int = 0

    def bytes_of(self, rows: int) -> int:
        """Return what any `rows` rows in a row take at most."""
        return _widest(self.pieces, rows) + rows * self.entry


def batch_rows(file: ParquetFile, path: Path, names: Sequence[str]) -> int:
    """Return how many rows of these columns may be read at a time, so that they take `LARGEST_BATCH` at most.

    Raises ArenaError where a page is larger than `LARGEST_PAGE`, or where the lists of a row group may take more.
    """
    wanted = [
        (number, column)
        for number, column in ((i, file.schema.column(i)) for i in range(file.metadata.num_columns))
        if any(column.path == name or column.path.startswith(f"{name}.") for name in names)
    ]
    columns = {number: _Column() for number, _ in wanted}
    with path.open("rb") as raw:
        for group, row_group in enumerate(_row_groups(raw, path)):
            for number, column in wanted:
                where = f"{column.path}, row group {group}"
                chunk = _chunk(raw, row_group, number, path, where)
                if column.max_repetition_level:
                    columns[number].pieces.append((row_group[_ROWS], _lists(raw, chunk, path, where)))
                else:
                    columns[number].pieces += chunk.pages
                    columns[number].entry = max(columns[number].entry, chunk.entry)
    return next((n for n in STEPS if sum(each.bytes_of(n) for each in columns.values()) <= LARGEST_BATCH), STEPS[-1])


def _row_groups(raw: IO[bytes], path: Path) -> list[dict[int, Any]]:
    """Return the row groups of a footer, as fields by their numbers."""
    try:
        end = raw.seek(-8, os.SEEK_END)
        raw.seek(end - int.from_bytes(raw.read(4), "little"))
        groups = _struct(raw.read(end - raw.tell()), 0)[0][_ROW_GROUPS]
        if min((group[_ROWS] for group in groups), default=0) < 0:
            raise ValueError("a negative number of rows")
        return groups
    except (*_DAMAGES, OSError):  # what pyarrow made of the same bytes says nothing of what they are here
        raise _refused(path, "its footer is damaged", _DAMAGED) from None


def _chunk(raw: IO[bytes], row_group: dict[int, Any], number: int, path: Path, where: str) -> _Chunk:
    try:
        chunk = _pages(raw, row_group[_COLUMNS][number][_ABOUT])
    except _DAMAGES:
        raise _refused(path, f"the pages of {where} are damaged", _DAMAGED) from None
    if chunk.largest > LARGEST_PAGE:
        raise _refused(path, f"a page of {where} unpacks to {chunk.largest / 2**20:,.0f} MiB")
    return chunk


def _lists(raw: IO[bytes], chunk: _Chunk, path: Path, where: str) -> int:
    """Return the bytes that the lists of a chunk may take."""
    if chunk.whole > LARGEST_BATCH and chunk.dictionary:
        chunk.entry = max(_longest_entry(raw, chunk), chunk.prefixed)
    if chunk.whole > LARGEST_BATCH:
        raise _refused(path, f"the lists of {where} may take {chunk.whole / 2**20:,.0f} MiB of memory")
    return chunk.whole


def _refused(path: Path, what: str, remedy: str = _LARGE) -> ArenaError:
    return ArenaError(f"is not a readable parquet file: {what}", where=str(path), remedy=remedy)


def _pages(raw: IO[bytes], about: dict[int, Any]) -> _Chunk:
    """Go through the page headers of a column chunk, as parquet-cpp goes through its pages."""
    chunk, values = _Chunk(codec=about[_CODEC]), 0
    at = min(about[_FIRST_PAGE], about.get(_DICTIONARY_PAGE) or about[_FIRST_PAGE])
    end = at + about[_PACKED]
    while at < end and values < about[_VALUES]:
        header, length = _page_header(raw, at)
        size, packed = header[2], header[3]
        if min(size, packed) < 0:
            raise ValueError("a negative size")
        if header[1] == _DICTIONARY:
            chunk.dictionary, chunk.entry = (at + length, packed, size), max(chunk.entry, size)
        elif header[1] in (_DATA, _DATA_V2):
            values += _add(chunk, header, size)
        at += length + packed
    return chunk


def _add(chunk: _Chunk, header: dict[int, Any], size: int) -> int:
    """Add a page of values to what is known of a chunk, and return their number."""
    about = header[5] if header[1] == _DATA else header[8]
    count, encoding = about[1], about[2] if header[1] == _DATA else about[4]
    if count < 0:
        raise ValueError("a negative number of values")
    size += _BYTES_A_LENGTH * count if encoding in _LENGTHS_FIRST else 0
    chunk.pages.append((count, size))
    if encoding in (*_DICTIONARY_CODED, _PREFIX_CODED):
        chunk.coded += count
    if encoding == _PREFIX_CODED:
        chunk.prefixed = max(chunk.prefixed, size)
        chunk.entry = max(chunk.entry, size)
    return count


def _widest(pages: Iterable[tuple[int, int]], rows: int) -> int:
    """Return the bytes of the largest run of pages that `rows` rows in a row may touch."""
    run: deque[tuple[int, int]] = deque()
    most = total = inner = 0  # inner: the rows of all pages of the run but the first and the last
    for count, size in pages:
        if len(run) > 1:
            inner += run[-1][0]
        run.append((count, size))
        total += size
        while len(run) > 1 and inner + 2 > rows:  # one row at least of the first page, and one of the last
            total -= run.popleft()[1]
            if len(run) > 1:
                inner -= run[0][0]
        most = max(most, total)
    return most


def _longest_entry(raw: IO[bytes], chunk: _Chunk) -> int:
    """Return the bytes of the longest text in a chunk's dictionary; where it cannot be unpacked, of all of them."""
    import pyarrow

    place, packed, size = chunk.dictionary
    raw.seek(place)
    data = raw.read(packed)
    try:
        if chunk.codec:
            data = pyarrow.Codec(_CODECS[chunk.codec]).decompress(data, size, asbytes=True)
    except (pyarrow.ArrowException, OSError, ValueError, LookupError):
        return size
    at, longest = 0, 0
    while at + 4 <= len(data):
        length = int.from_bytes(data[at : at + 4], "little")
        at, longest = at + 4 + length, max(longest, length)
    return min(longest, size)


def _page_header(raw: IO[bytes], at: int) -> tuple[dict[int, Any], int]:
    """Return the fields of the page header at a place in the file, by their numbers, and its length in bytes."""
    size = _HEADER
    while True:
        raw.seek(at)
        data = raw.read(size)
        try:
            return _struct(data, 0)
        except IndexError:  # longer than what was read: it may hold the least and the greatest value
            if len(data) < size or size >= _LARGEST_HEADER:
                raise
            size *= 16


def _struct(data: bytes, at: int, depth: int = 0) -> tuple[dict[int, Any], int]:
    fields: dict[int, Any] = {}
    number = 0
    while kind := data[at]:
        at += 1
        if kind >> 4:
            number += kind >> 4
        else:
            number, at = _integer(data, at)
        fields[number], at = _value(data, at, kind & 15, depth)
    return fields, at + 1


def _value(data: bytes, at: int, kind: int, depth: int) -> tuple[Any, int]:
    """Read a truth value, a number, bytes (their length alone), a struct or a list of such; maps are not in use."""
    if kind in (4, 5, 6):
        return _integer(data, at)
    if kind in (1, 2):
        return kind == 1, at
    if kind in (3, 7):  # a byte, a double
        return None, at + (1 if kind == 3 else 8)
    if kind in (9, 10) and depth < _DEEPEST:
        return _list(data, at, depth + 1)
    if kind == 8:
        length, at = _unsigned(data, at)
        data[at + length]
        return length, at + length
    if kind == 12 and depth < _DEEPEST:
        return _struct(data, at, depth + 1)
    raise ValueError(f"a field of kind {kind}")


def _list(data: bytes, at: int, depth: int) -> tuple[list[Any], int]:
    size, kind, at = data[at] >> 4, data[at] & 15, at + 1
    if size == 15:
        size, at = _unsigned(data, at)
    values = []
    for _ in range(size):
        value, at = (None, at + 1) if kind in (1, 2) else _value(data, at, kind, depth)
        values.append(value)
        data[at - 1]  # ends the loop where a list claims to be longer than the footer
    return values, at


def _integer(data: bytes, at: int) -> tuple[int, int]:
    value, at = _unsigned(data, at)
    return (value >> 1) ^ -(value & 1), at


def _unsigned(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
    raise ValueError("a number of more than 64 bits")


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
