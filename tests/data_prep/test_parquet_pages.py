"""How many rows of a parquet file are read at a time, and what its page headers say; bombs: tests/test_hostile.py."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from common.errors import ArenaError
from data_prep.tables import (
    LARGEST_BATCH,
    STEPS,
    BrokenRow,
    _pages,
    _row_groups,
    _struct,
    _widest,
    batch_rows,
    open_table,
)

NAMES = ["id", "text"]
OPTIONS = [
    {},
    {"data_page_version": "2.0"},
    {"use_dictionary": False},
    {"compression": "none"},
    {"compression": "gzip", "row_group_size": 100},
    {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "id": "DELTA_LENGTH_BYTE_ARRAY"}},
    {"data_page_size": 2000, "write_batch_size": 10},
]


def write(path: Path, text: list, **options) -> Path:
    table = pa.table({"id": [str(i) for i in range(len(text))], "text": text})
    parquet.write_table(table, path, **options)
    return path


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_ordinary_files_are_read_in_large_batches_and_every_page_is_seen(tmp_path, options):
    text = [f"{i} " * (i % 200) for i in range(3000)]
    path = write(tmp_path / "x.parquet", text, **options)
    with parquet.ParquetFile(path) as file, path.open("rb") as raw:
        groups = _row_groups(raw, path)
        assert [group[3] for group in groups] == [
            file.metadata.row_group(i).num_rows for i in range(file.metadata.num_row_groups)
        ]
        for number in range(2):
            chunks = [_pages(raw, group[1][number][3]) for group in groups]
            assert sum(count for chunk in chunks for count, _ in chunk.pages) == 3000
            plain = sum(len(each) + 4 for each in text) if number else 0
            bound = sum(chunk.coded * chunk.entry + sum(size for _, size in chunk.pages) for chunk in chunks)
            assert bound >= plain, "what the headers say is never less than what comes out"
        assert batch_rows(file, path, NAMES) in STEPS[:2]
    assert [row[1] for row in open_table(path).rows(NAMES)] == text


def test_the_widest_run_is_that_of_trying_all():
    chosen = random.Random(4)
    for _ in range(300):
        pages = [(chosen.randint(0, 6), chosen.randint(0, 50)) for _ in range(chosen.randint(0, 9))]
        rows = chosen.randint(1, 12)
        ends = [sum(count for count, _ in pages[: i + 1]) for i in range(len(pages))]
        of_row = [next(i for i, end in enumerate(ends) if row < end) for row in range(ends[-1] if ends else 0)]
        tried = [
            sum(size for _, size in pages[of_row[start] : of_row[min(start + rows, len(of_row)) - 1] + 1])
            for start in range(len(of_row))
        ]
        assert _widest(pages, rows) >= max(tried, default=0)
        if all(count for count, _ in pages):
            assert _widest(pages, rows) == max(tried, default=0)


def test_rows_that_may_be_large_are_read_one_by_one(tmp_path):
    text = ["x" * (50 << 20)] * 2
    path = write(tmp_path / "x.parquet", text, compression="zstd", dictionary_pagesize_limit=1 << 30)
    with parquet.ParquetFile(path) as file:
        rows = batch_rows(file, path, NAMES)
        assert rows * (50 << 20) <= LARGEST_BATCH
        assert batch_rows(file, path, ["id"]) == STEPS[0], "columns that are not read do not count"


def test_a_cell_that_is_too_large_costs_its_row_alone(tmp_path):
    path = write(tmp_path / "x.parquet", ["a", "x" * (65 << 20), "b"], compression="zstd")
    first, second, third = open_table(path).rows(NAMES)
    assert first == ("0", "a") and third == ("2", "b")
    assert isinstance(second, BrokenRow) and second.first == "1"
    assert second.reason == "text is larger than 67,108,864 bytes"


def test_categories_and_lists_come_out_as_they_are(tmp_path):
    categories = pa.array(["a", "b", "a"]).dictionary_encode()
    path = tmp_path / "x.parquet"
    parquet.write_table(pa.table({"id": categories, "text": [["a", None], [], None]}), path)
    assert list(open_table(path).rows(NAMES)) == [("a", ["a", None]), ("b", []), ("a", None)]


def test_lists_of_one_short_text_are_no_bomb_and_of_a_long_one_are(tmp_path):
    """The dictionary as a whole would be too much for so many items; its longest text is looked up."""
    words = [str(i) * 200 for i in range(5000)]
    path = write(tmp_path / "x.parquet", [words[i : i + 10] for i in range(0, 5000, 2)], compression="zstd")
    with parquet.ParquetFile(path) as file:
        assert batch_rows(file, path, NAMES) in STEPS
    path = write(tmp_path / "y.parquet", [["x" * (1 << 20)] * 700], compression="zstd")
    with parquet.ParquetFile(path) as file, pytest.raises(ArenaError, match=r"may take .* MiB of memory") as caught:
        batch_rows(file, path, NAMES)
    assert "row_group_size" in caught.value.remedy and caught.value.where == str(path)


@pytest.mark.parametrize("data", [b"", b"\x15", b"\x15\x80", b"\x1b\x00", b"\x15" + b"\xff" * 12, b"\x18\x7f"])
def test_a_damaged_header_is_told_apart_from_a_long_one(data):
    with pytest.raises((IndexError, ValueError)):
        _struct(data, 0)


def test_lists_within_lists_end_before_python_does():
    with pytest.raises(ValueError, match="a field of kind 9"):
        _struct(b"\x19" * 100_000, 0)
    assert _struct(b"\x19\x19\x15\x02\x00", 0)[0] == {1: [[1]]}, "what a footer may hold is read"


def test_every_damage_to_the_pages_is_our_own_error(tmp_path):
    path = write(tmp_path / "x.parquet", [f"text {i}" for i in range(50)])
    whole, chosen = path.read_bytes(), random.Random(3)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chosen.randrange(4, 700)] ^= 1 << chosen.randrange(8)
        path.write_bytes(damaged)
        try:
            table = open_table(path)
            if set(NAMES) <= set(table.columns):
                list(table.rows(NAMES))
        except ArenaError as error:
            refused += 1
            assert error.remedy
    assert refused > 20
