"""Tables on the disk, read as a stream of rows: CSV and JSON (plain or gzip) and parquet, by their first bytes.

table = open_table(Path("train.csv"))
tables = open_tables(Path("parts"))  # a folder of such files
table.columns                      # ["id", "model_a", …]
next(table.rows(["id", "prompt"]))  # ("30192", '["Is it morally right …"]')
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import re
import zlib
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

from common.errors import ArenaError
from data_prep.cells import DECODER, parse_id, without_lone_surrogates
from data_prep.parquet_table import DAMAGED, LARGEST_CELL, BrokenRow, ParquetTable

# What the parts of a table in a folder end with.
PARTS = (".csv", ".csv.gz", ".parquet", ".jsonl", ".jsonl.gz", ".json")
_LARGEST_LINE = 1 << 27
_ESCAPED = re.compile("[\udc80-\udcff]")  # how Python's surrogateescape writes a byte that is not UTF-8
_UTF8 = "convert the file to UTF-8, for example: iconv -f {} -t UTF-8 old.csv > new.csv"
_OTHER_MAGIC = {
    b"PK\x03\x04": ("is a zip archive (or a spreadsheet)", "unpack it, or save the sheet as CSV in UTF-8"),
    b"\x28\xb5\x2f\xfd": ("is compressed with zstd", "decompress it, or use gzip"),
    b"BZh": ("is compressed with bzip2", "decompress it, or use gzip"),
    b"\xfd7zXZ": ("is compressed with xz", "decompress it, or use gzip"),
    b"ARROW1": ("is an Arrow (feather) file", "save it as parquet or CSV"),
    b"version https://git-lfs": (
        "is a git-LFS pointer: a note of three lines that stands for the file",
        "fetch the file itself: git lfs install && git lfs pull, in the folder that you cloned",
    ),
    b"<!DOCTYPE": ("is a web page", "it may be a login or error page: download the table itself"),
    b"<html": ("is a web page", "it may be a login or error page: download the table itself"),
}
_LONG_LINE = f"a line is longer than {_LARGEST_LINE:,} characters"
_BETWEEN = re.compile(r"[\s,]*")  # the items of a JSON list
_RECORDS = 'write one object a line: {"id": …, "prompt": …}; pandas: to_json(path, orient=\'records\', lines=True)'
_SAMPLE = 100  # objects whose keys are the columns


def open_tables(path: Path) -> list[Table]:
    """Return the table in `path`, or those of a folder of parts in the order of their names.

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


def open_table(path: Path) -> Table:
    """Return the table in a file, its columns read. Raises ArenaError where the file holds no table."""
    where = str(path)
    if not path.is_file():
        what = "is not a regular file" if path.exists() else "does not exist"
        raise ArenaError(what, where=where, remedy=f"give the path of a {', '.join(PARTS)} file")
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        remedy = "check the disk and the file's permissions"
        raise ArenaError(f"cannot be read: {error.strerror}", where=where, remedy=remedy) from None
    for magic, (what, remedy) in _OTHER_MAGIC.items():
        if head.startswith(magic):
            raise ArenaError(what, where=where, remedy=remedy)
    if head.startswith(b"PAR1"):
        table = ParquetTable(path)
    else:
        compressed = head.startswith(b"\x1f\x8b")
        is_json = (_unpacked(path) if compressed else head).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"[", b"{")
        table = (JsonTable if is_json else CsvTable)(path, compressed)
    if double := sorted(name for name, count in Counter(table.columns).items() if count > 1):
        raise ArenaError(f"has the column(s) {double[:30]} twice", where=where, remedy="rename or remove one")
    return table


def keyed_rows(path: Path, names: Sequence[str], remedy: str) -> Iterator[tuple[int, str | None, tuple[object, ...]]]:
    """Yield each row's number, id and cells of `names`, the id first, of a table beside the votes.

    Raises ArenaError for a row that cannot be read, and, with `remedy`, for a table without these columns.
    """
    table = open_table(path)
    if missing := [name for name in names if name not in table.columns]:
        raise ArenaError(f"lacks the column(s) {missing}", where=str(path), remedy=remedy)
    for number, cells in enumerate(table.rows(names), 1):
        if isinstance(cells, BrokenRow):
            raise ArenaError(cells.reason, where=f"{path} row {number}", remedy="correct or remove the row")
        yield number, parse_id(cells[0]), cells


def _unpacked(path: Path) -> bytes:
    """Return the first bytes of what gzip packed; nothing where it is damaged, which its reader reports."""
    try:
        with gzip.open(path) as file:
            return file.read(64)
    except (EOFError, zlib.error, OSError):
        return b""


class _TextTable(ABC):
    """A table in UTF-8 text, with or without gzip; its rows are read one at a time."""

    def __init__(self, path: Path, compressed: bool):
        self.path, self.compressed = path, compressed
        self._source: IO[bytes] | None = None
        self.columns = self._read_columns()

    @abstractmethod
    def _read_columns(self) -> list[str]: ...

    @abstractmethod
    def rows(self, names: Sequence[str]) -> Iterator[tuple[object, ...] | BrokenRow]:
        """Yield the cells of some columns, row by row. Raises ArenaError."""

    @abstractmethod
    def _split(self, text: IO[str]) -> Iterator[Any]:
        """Yield what the text holds: rows, or a BrokenRow where one cannot be read."""

    @property
    def share(self) -> float:
        """The part of the file, 0 to 1, that was read when the last row came out."""
        if self._source is None or self._source.closed:
            return float(self._source is not None)
        return self._source.tell() / max(os.fstat(self._source.fileno()).st_size, 1)

    def _parsed(self, errors: str = "strict") -> Iterator[Any]:
        """Yield what `_split` yields; faults of the file as a whole come out as an ArenaError."""
        csv.field_size_limit(max(csv.field_size_limit(), LARGEST_CELL))
        try:
            with self._bytes() as raw, io.TextIOWrapper(raw, "utf-8-sig", errors, newline="") as text:
                if errors == "strict":
                    self._refuse_wide_encoding(raw)
                yield from self._split(text)
        except UnicodeDecodeError:
            raise self._encoding_error() from None
        except (EOFError, zlib.error, OSError) as error:
            raise ArenaError(f"cannot be read to its end: {error}", where=str(self.path), remedy=DAMAGED) from None

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
            broken = isinstance(row, BrokenRow)
            if found := None if broken else _ESCAPED.search(json.dumps(row, ensure_ascii=False)):
                what = f"is not UTF-8: byte 0x{ord(found[0]) & 255:02x}"
                return ArenaError(what, where=f"{where} row {number}" if number else f"{where} header", remedy=remedy)
        return ArenaError("is not UTF-8", where=where, remedy=remedy)


class CsvTable(_TextTable):
    """A CSV file.

    Python's own reader, since pyarrow.csv takes everything after an unclosed quote as one text without an error.
    """

    def _read_columns(self) -> list[str]:
        header = next(self._parsed(), None)
        if header is None:
            raise ArenaError("is empty", where=str(self.path), remedy="give a file with a header and rows")
        if isinstance(header, BrokenRow):
            remedy = "give a CSV with a header line"
            raise ArenaError(f"has no readable header: {header.reason}", where=str(self.path), remedy=remedy)
        return header

    def rows(self, names: Sequence[str]) -> Iterator[tuple[str, ...] | BrokenRow]:
        places = [self.columns.index(name) for name in names]
        wanted, width = itemgetter(*places, places[0]), len(self.columns)  # of one place alone it makes no tuple
        parsed = self._parsed()
        next(parsed, None)  # the header
        for row in parsed:
            if isinstance(row, BrokenRow):
                yield row
            elif len(row) == width:
                yield wanted(row)[:-1]
            else:
                first = row[places[0]] if places[0] < len(row) else None
                yield BrokenRow(f"has {len(row)} cells, the header has {width}", first)

    def _split(self, text: IO[str]) -> Iterator[list[str] | BrokenRow]:
        def next_line() -> str:
            line = _next_line(text)
            if line is None:
                raise csv.Error(_LONG_LINE)
            return line

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


class JsonTable(_TextTable):
    """JSON objects, one a line or in one list; the columns are the keys of the first hundred."""

    def _read_columns(self) -> list[str]:
        first = list(islice(self._parsed(), _SAMPLE))
        records = [record for record in first if isinstance(record, dict)]
        by_columns = len(first) == len(records) == 1 and all(isinstance(value, dict) for value in records[0].values())
        if by_columns or not any(records):
            what = "is JSON by columns" if by_columns else f"holds no JSON object{_reason(first)}"
            raise ArenaError(what, where=str(self.path), remedy=_RECORDS)
        return list(dict.fromkeys(key for record in records for key in record))

    def rows(self, names: Sequence[str]) -> Iterator[tuple[object, ...] | BrokenRow]:
        """Yield the values of some keys, object by object; None where it lacks one. Raises ArenaError."""
        for record in self._parsed():
            yield tuple(map(record.get, names)) if isinstance(record, dict) else record

    def _split(self, text: IO[str]) -> Iterator[dict[str, Any] | BrokenRow]:
        while (first := text.read(1)).isspace():
            pass
        if first == "[":
            yield from self._items("", text)
            return
        line = first + (_next_line(text) or "")
        if not _is_json(line):  # objects that do not stand on lines of their own
            yield from self._items(line, text)
            return
        while line != "":
            if line is None:
                yield BrokenRow(_LONG_LINE)
            elif line.strip():
                try:
                    yield _record(DECODER.decode(line), line)
                except (ValueError, RecursionError) as error:
                    yield BrokenRow(f"is not JSON: {getattr(error, 'msg', 'nested too deeply')}")
            line = _next_line(text)

    def _items(self, buffer: str, text: IO[str]) -> Iterator[dict[str, Any] | BrokenRow]:
        """Yield the objects of a list, or those that follow each other, with no more than one of them in memory."""
        at, number, in_list = 0, 1, buffer == ""
        while True:
            at = _BETWEEN.match(buffer, at).end()
            if in_list and buffer[at : at + 1] == "]":
                return
            try:
                value, end = DECODER.raw_decode(buffer, at)
            except (ValueError, RecursionError) as error:
                short = isinstance(error, json.JSONDecodeError) and len(buffer) - at < _LARGEST_LINE
                more = text.read(max(len(buffer) - at, 1 << 16)) if short else ""
                if not more and at == len(buffer) and not in_list:
                    return
                if not more:
                    reason = getattr(error, "msg", "nested too deeply") if at < len(buffer) else "the list does not end"
                    remedy = f"{DAMAGED}; or {_RECORDS}"
                    where = f"{self.path} object {number}"
                    raise ArenaError(f"is not JSON: {reason}", where=where, remedy=remedy) from None
                buffer, at = buffer[at:] + more, 0
                continue
            yield _record(value, buffer[at:end])
            at, number = end, number + 1


def _next_line(text: IO[str]) -> str | None:
    """Return the next line, "" at the end, None for a line that is too long, which is skipped."""
    line = text.readline(_LARGEST_LINE)
    if len(line) < _LARGEST_LINE or line.endswith(("\n", "\r")):
        return line
    while (rest := text.readline(1 << 20)) and not rest.endswith(("\n", "\r")):
        pass
    return None


def _is_json(line: str) -> bool:
    try:
        DECODER.decode(line)
    except (ValueError, RecursionError):
        return False
    return True


def _record(value: object, written: str) -> dict[str, Any] | BrokenRow:
    """Return an object that JSON decoded, without halves of surrogate pairs, which only an escape can bring in."""
    if not isinstance(value, dict):
        return BrokenRow(f"is no JSON object: {written[:40]!a}")
    return without_lone_surrogates(value) if "\\ud" in written or "\\uD" in written else value


def _reason(first: Sequence[Any]) -> str:
    return f": {first[0].reason}" if first and isinstance(first[0], BrokenRow) else ""


Table = CsvTable | JsonTable | ParquetTable
