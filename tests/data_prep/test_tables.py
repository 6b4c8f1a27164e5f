"""Tables on the disk: batches of parquet that fit into memory, damage, encodings; bombs: tests/test_hostile.py."""

import gzip
import json
import time
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from common.errors import ArenaError
from data_prep.readers import VoteReader
from data_prep.tables import BrokenRow, open_table, open_tables

NAMES = ["id", "text"]


def write(path: Path, text: list, **options) -> Path:
    table = pa.table({"id": [str(i) for i in range(len(text))], "text": text})
    parquet.write_table(table, path, **options)
    return path


def cells(path: Path) -> list:
    return [row if isinstance(row, BrokenRow) else row[1] for row in open_table(path).rows(NAMES)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"data_page_version": "2.0"},
        {"use_dictionary": False, "compression": "none"},
        {"compression": "gzip", "row_group_size": 100},
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY", "id": "DELTA_LENGTH_BYTE_ARRAY"}},
        {"data_page_size": 2000, "write_batch_size": 10},
    ],
    ids=str,
)
def test_every_row_comes_out_however_it_was_written(tmp_path, options):
    text = [None, *(f"{i} " * (i % 200) for i in range(3000))]
    assert cells(write(tmp_path / "x.parquet", text, **options)) == text


def test_a_cell_that_is_too_large_costs_its_row_alone(tmp_path):
    first, second, third = cells(write(tmp_path / "x.parquet", ["a", "x" * (65 << 20), "b"], compression="zstd"))
    assert (first, third) == ("a", "b")
    assert second == BrokenRow("text is larger than 67,108,864 bytes", "1")


def test_categories_and_lists_come_out_as_they_are(tmp_path):
    categories = pa.array(["a", "b", "a"]).dictionary_encode()
    parquet.write_table(pa.table({"id": categories, "text": [["a", None], [], None]}), tmp_path / "x")
    assert list(open_table(tmp_path / "x").rows(NAMES)) == [("a", ["a", None]), ("b", []), ("a", None)]


def test_lists_that_repeat_short_texts_are_read_and_long_ones_are_refused(tmp_path):
    words = [[str(i + j) * 200 for j in range(10)] for i in range(0, 5000, 2)]
    assert cells(write(tmp_path / "x.parquet", words, compression="zstd")) == words
    items = pa.DictionaryArray.from_arrays(pa.array([0] * 5000, pa.int32()), pa.array(["x" * (1 << 20)]))
    lists = pa.ListArray.from_arrays(pa.array([0, 5000], pa.int32()), items)
    path = write(tmp_path / "y.parquet", lists, dictionary_pagesize_limit=1 << 30, store_schema=False)
    with pytest.raises(ArenaError, match=r"row group 0 .* GiB") as caught:
        cells(path)
    assert "row_group_size" in caught.value.remedy and caught.value.where == str(path)


def test_a_parquet_text_that_is_not_utf_8_is_named(tmp_path):
    raw = pa.array([b"a"] * 1300 + [b"b\xff"] + [b"c"] * 199, pa.binary()).view(pa.string())
    with pytest.raises(ArenaError, match="text is not UTF-8: byte 0xff") as caught:
        cells(write(tmp_path / "x", raw))
    assert caught.value.where == f"{tmp_path / 'x'} row 1301"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
@pytest.mark.parametrize(("row", "where"), [(701, "row 701"), (0, "header")])
def test_latin_1_is_named_with_row_and_byte(tmp_path, pack, row, where):
    lines = ["id,text", *(f'{i},"two\nlines"\n' for i in range(900))]  # and blank lines
    lines[row] = lines[row].replace("t", "ö", 1)
    path = tmp_path / "x.csv"
    path.write_bytes(pack("\n".join(lines).encode("latin-1")))
    with pytest.raises(ArenaError, match="is not UTF-8: byte 0xf6") as caught:
        cells(path)
    assert caught.value.where == f"{path} {where}" and "iconv" in caught.value.remedy


OBJECTS = [{"id": "1", "text": "a"}, {"id": "2", "text": "x" * 200_000}, {"text": "é\ud83d", "id": 3, "more": [1]}]
READ = ["a", "x" * 200_000, "é\ufffd"]


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("\n".join(map(json.dumps, OBJECTS)), READ),
        ("\r\n\r\n".join(map(json.dumps, OBJECTS)) + "\n", READ),
        ("\ufeff" + json.dumps(OBJECTS), READ),
        (f"\n {json.dumps(OBJECTS, indent=2)} \n", READ),
        ("\n".join(json.dumps(each, indent=1) for each in OBJECTS), READ),
        ('{"id": 1, "text": "a"}\n{"id": 2,\n[1]\n{"id": 4}\n', ["a", "is not JSON: ", "is no JSON object: '[", None]),
        ('{"id": 1, "text": "a"}\n' + "[" * 100_000 + "\n", ["a", "is not JSON: nested too deeply"]),
        ('[{"id": 1, "text": "a"}, 7]', ["a", "is no JSON object: '7'"]),
    ],
)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_json_objects_one_a_line_in_a_list_or_one_behind_another(tmp_path, pack, written, expected):
    path = tmp_path / "x.csv"  # whatever it is called
    path.write_bytes(pack(written.encode("utf-8")))
    for found, wanted in zip(cells(path), expected, strict=True):
        assert found.reason.startswith(wanted) if isinstance(found, BrokenRow) else found == wanted


def test_a_header_of_a_hundred_thousand_columns_is_read_in_a_second(tmp_path):
    names = [f"c{i}" for i in range(100_000)]
    path = tmp_path / "x.csv"
    for columns, found in ((names, "lacks 4 column"), ([*names, *names[:50]], "twice")):
        path.write_text(",".join(columns) + "\n" + ",".join("1" * len(columns)) + "\n")
        started = time.process_time()
        with pytest.raises(ArenaError, match=found) as caught:
            VoteReader(path, labelled=True)
        assert time.process_time() - started < 3 and len(str(caught.value)) < 1500


def test_a_folder_holds_parts_alone(tmp_path):
    with pytest.raises(ArenaError, match="holds no part"):
        open_tables(tmp_path)
    for name in ("b.csv", "a.csv", "_SUCCESS", ".hidden"):
        (tmp_path / name).write_text("id,text\n1,a\n")
    assert [table.path.name for table in open_tables(tmp_path)] == ["a.csv", "b.csv"]
