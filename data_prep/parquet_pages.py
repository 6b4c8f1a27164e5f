"""How much memory the rows of a parquet file take, told by the headers of its pages before any page is unpacked.

A text that stands in a dictionary once may fill a million rows, and a page of a few KB may unpack to gigabytes. The
footer does not say so (its sizes are those of the encoded pages, and nobody checks them), and pyarrow does not show the
pages. Their headers give the sizes that pyarrow unpacks to; so it is decided here how many rows may be read at a time.
The places of the pages are read from the footer itself: where it is damaged, pyarrow ends the process when asked.

    batch_rows(file, path, ["id", "prompt"])    # 512; 1 where a row may be large

Footer and headers are Thrift's compact protocol; the numbers of their fields are those of parquet.thrift in
https://github.com/apache/parquet-format.
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
