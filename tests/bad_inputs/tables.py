"""Broken tables of votes: CSV, gzip, parquet, cells, truth."""

from __future__ import annotations

import gzip
import json
import zipfile
from pathlib import Path
from typing import Any

from common.battle import PROBABILITY_COLUMNS
from tests.bad_inputs.case import PREPARE, PREPARE_TEST, Case, change, cut, remove, write
from tests.bad_inputs.place import COLUMNS, Place

HEADER = ",".join(COLUMNS)
LINE = '1,m,n,"[""q""]","[""a""]","[""b""]",1,0,0\n'
DAMAGED = "the file is cut off or damaged: fetch or write it again"


def rows(edit) -> Any:
    """Return what writes the good rows with some of them edited."""

    def breaks(place: Place) -> None:
        table = place.rows()
        edit(table)
        place.table(table)

    return breaks


def zipped(how) -> Any:
    """Return what replaces the votes by their gzip, its bytes changed."""
    return change("votes.csv", lambda data: how(gzip.compress(data, mtime=0)))


def encoded(encoding: str) -> Any:
    return change("votes.csv", lambda data: data.decode().encode(encoding))


def without(*names: str) -> Any:
    return lambda place: place.table(place.rows(), columns=[name for name in COLUMNS if name not in names])


def flags(a: str, b: str, tie: str) -> Any:
    return rows(lambda table: table[4].update(zip(PROBABILITY_COLUMNS, (a, b, tie), strict=True)))


def parquet(**changed: Any) -> Any:
    """Return what writes the votes as parquet with some columns replaced (`...` leaves one out)."""

    def breaks(place: Place) -> None:
        import pyarrow as pa
        from pyarrow.parquet import write_table

        table = place.rows()
        columns = {name: [row[name] for row in table] for name in COLUMNS} | changed
        write_table(pa.table({k: v for k, v in columns.items() if v is not ...}), "votes.csv")

    return breaks


def parquet_bytes(how) -> Any:
    def breaks(place: Place) -> None:
        parquet()(place)
        path = Path("votes.csv")
        path.write_bytes(how(path.read_bytes()))

    return breaks


def raw_bytes() -> Any:
    import pyarrow as pa

    return pa.array([b'["a"]'] * 39 + [b'["\xff"]'], pa.binary()).view(pa.string())


def packed(kind: int, how=bytes) -> Any:
    """Return what packs the votes into votes.zip, its bytes changed."""

    def breaks(place: Place) -> None:
        with zipfile.ZipFile("votes.zip", "w", kind) as archive:
            archive.write("votes.csv")
        path = Path("votes.zip")
        path.write_bytes(how(path.read_bytes()))

    return breaks


def flipped(data: bytes) -> bytes:
    """Invert the bytes in the middle, where a member's content is."""
    at = len(data) // 3
    return data[:at] + bytes(b ^ 255 for b in data[at : at + 100]) + data[at + 100 :]


def misled(data: bytes) -> bytes:
    """Let the directory lead to a place before the file's beginning."""
    at = data.rindex(b"PK\x05\x06") + 16
    return data[:at] + (len(data) * 2).to_bytes(4, "little") + data[at + 4 :]


NO_BATTLES = "this is not a table of battles"
SUBMISSION = without("model_a", "model_b", "prompt", "response_a", "response_b")
FILES = [
    Case("csv_missing", remove("votes.csv"), PREPARE, ("votes.csv: does not exist", "Kaggle's zip, or hf://")),
    Case("csv_is_a_folder", lambda p: None, (*PREPARE[:-1], "models"), ("models: is a folder",)),
    Case("csv_is_a_device", lambda p: None, (*PREPARE[:-1], "/dev/null"), ("is not a regular file",)),
    Case("csv_long_name", lambda p: None, (*PREPARE[:-1], "x" * 5000), ("ile name too long",)),
    Case("csv_link_to_itself", lambda p: Path("loop").symlink_to("loop"), (*PREPARE[:-1], "loop"), ("does not exist",)),
    Case("csv_empty", write("votes.csv", b""), PREPARE, ("votes.csv: is empty", "a header and rows")),
    Case("csv_byte_order_mark", write("votes.csv", b"\xef\xbb\xbf"), PREPARE, ("is empty",)),
    Case("csv_blank_lines", write("votes.csv", b"\n\r\n\n"), PREPARE, ("is empty",)),
    Case("csv_header_only", write("votes.csv", f"{HEADER}\n"), PREPARE, ("has a header and no row",)),
    Case("csv_open_quote", write("votes.csv", b'"id,prompt'), PREPARE, ("has no readable header",)),
    Case("csv_double_column", write("votes.csv", "id,id,prompt\n1,2,3\n"), PREPARE, ("column(s) ['id'] twice",)),
    Case("csv_semicolons", change("votes.csv", lambda d: d.replace(b",", b";")), PREPARE, ("cells with commas",)),
    Case("csv_tabs", change("votes.csv", lambda d: d.replace(b",", b"\t")), PREPARE, ("cells with commas",)),
    Case("csv_utf16", encoded("utf-16"), PREPARE, ("is not UTF-8", "iconv -f UTF-16")),
    Case("csv_utf16_be", encoded("utf-16-be"), PREPARE, ("is not UTF-8", "iconv")),
    Case("csv_utf32", encoded("utf-32"), PREPARE, ("is not UTF-8", "iconv")),
    Case(
        "csv_latin1_row",
        change("votes.csv", lambda d: d.replace(b"first 7", b"f\xfcrst 7")),
        PREPARE,
        ("votes.csv row 8", "0xfc", "iconv -f LATIN1"),
    ),
    Case("csv_latin1_header", change("votes.csv", lambda d: b"\xfc," + d), PREPARE, ("votes.csv header", "0xfc")),
    Case("csv_nul_bytes", write("votes.csv", b"\0" * 5000), PREPARE, ("is not UTF-8",)),
    Case("csv_random_bytes", write("votes.csv", bytes(range(128, 256)) * 20), PREPARE, ("is not UTF-8",)),
    Case(
        "csv_is_html",
        write("votes.csv", "<!DOCTYPE html>\n<p>Sign in</p>\n"),
        PREPARE,
        ("lacks 7 column(s)", NO_BATTLES),
    ),
    Case("csv_is_json", write("votes.csv", json.dumps([{"id": 1}])), PREPARE, ("lacks 7 column(s)", NO_BATTLES)),
    Case("csv_is_jsonl", write("votes.csv", '{"id": 1}\n' * 9), PREPARE, ("lacks 7 column(s)",)),
    Case(
        "csv_no_header", change("votes.csv", lambda d: d.split(b"\r\n", 1)[1]), PREPARE, ("twice", "rename or remove")
    ),
    Case("csv_no_id", without("id"), PREPARE, ("lacks 1 column(s) ['id']",)),
    Case("csv_no_prompt", without("prompt"), PREPARE, ("lacks 1 column(s) ['prompt']",)),
    Case("csv_no_responses", without("response_a", "response_b"), PREPARE, ("['response_a', 'response_b']",)),
    Case("csv_no_tie", without("winner_tie"), PREPARE, ("lacks 1 column(s) ['winner_tie']",)),
    Case("csv_is_the_test_set", lambda p: None, (*PREPARE[:-1], "test.csv"), ("competition's test.csv", "(train.csv)")),
    Case("csv_is_a_submission", SUBMISSION, PREPARE, ("lacks 3 column(s)", "sample_submission.csv", "wants train.csv")),
    Case(
        "test_is_a_submission",
        write("mine.csv", "id,winner_model_a,winner_model_b,winner_tie\n1,0.3,0.3,0.4\n"),
        (*PREPARE_TEST[:-1], "mine.csv"),
        ("sample_submission.csv", "--test wants test.csv"),
    ),
    Case("test_is_the_train_table", lambda p: None, (*PREPARE_TEST[:-1], "votes.csv"), ("is the train table, given",)),
    Case("csv_no_winners", without(*PROBABILITY_COLUMNS), PREPARE, ("pass a file without verdicts as the test set",)),
    Case(
        "csv_double_id",
        rows(lambda t: t[9].update(id="1003")),
        PREPARE,
        ("'1003' is in row 4 and again in row 10",),
    ),
    Case(
        "csv_double_id_in_test",
        write("test.csv", "id,prompt,response_a,response_b\n" + '1,"[""a""]","[""b""]","[""c""]"\n' * 2),
        PREPARE_TEST,
        ("test.csv row 2", "'1' is in row 1 and again in row 2"),
    ),
    Case("csv_no_winner", flags("0", "0", "0"), PREPARE, ("votes.csv row 5", "no winner", "exactly one winner")),
    Case("csv_two_winners", flags("1", "1", "0"), PREPARE, ("row 5", "2 winners")),
    Case("csv_empty_winners", flags("", "", ""), PREPARE, ("row 5", "no winner")),
    Case("csv_shares_as_winners", flags("0.6", "0.3", "0.1"), PREPARE, ("row 5", "no winner")),
    Case("csv_negative_winner", flags("1", "-1", "0"), PREPARE, ("row 5", "no clear winner")),
    Case("csv_nan_winner", flags("nan", "1", "0"), PREPARE, ("row 5", "no clear winner")),
    Case("csv_infinite_winner", flags("inf", "0", "0"), PREPARE, ("row 5", "no winner")),
    Case("csv_word_as_winner", flags("yes", "no", "no"), PREPARE, ("row 5", "no winner")),
    Case(
        "csv_many_bad_rows", rows(lambda t: [r.update(prompt="x") for r in t[3:9]]), PREPARE, ("6 of 40 rows", "row 4")
    ),
    Case("csv_all_rows_bad", rows(lambda t: [r.update(prompt="[]") for r in t]), PREPARE, ("no row is left",)),
    Case(
        "csv_one_battle",
        write("votes.csv", f"{HEADER}\n{LINE}"),
        PREPARE,
        ("1 different prompt(s) in 1 rows", "change valid_share"),
    ),
    Case(
        "csv_one_prompt",
        rows(lambda t: [r.update(prompt='["same"]') for r in t]),
        PREPARE,
        ("1 different prompt(s) in 40 rows", "add battles"),
    ),
    Case(
        "csv_only_ties_as_pairs",
        rows(lambda t: [r.update(zip(PROBABILITY_COLUMNS, "001", strict=True)) for r in t]),
        (*PREPARE, "--pairs"),
        ("no row is left for dpo_reward", "with a winner"),
    ),
    Case("gzip_cut_off", zipped(cut(0.5)), PREPARE, ("cannot be read to its end", DAMAGED)),
    Case("gzip_header_only", write("votes.csv", b"\x1f\x8b\x08"), PREPARE, (DAMAGED,)),
    Case(
        "gzip_flipped_bits",
        zipped(lambda d: d[:200] + bytes(b ^ 255 for b in d[200:230]) + d[230:]),
        PREPARE,
        (DAMAGED,),
    ),
    Case("gzip_wrong_sum", zipped(lambda d: d[:-8] + b"\0" * 8), PREPARE, (DAMAGED,)),
    Case("gzip_of_nothing", write("votes.csv", gzip.compress(b"")), PREPARE, ("is empty",)),
    Case("gzip_in_gzip", zipped(gzip.compress), PREPARE, ("is not UTF-8",)),
    Case("gzip_of_utf16", write("votes.csv", gzip.compress(HEADER.encode("utf-16"))), PREPARE, ("UTF-16",)),
    Case("gzip_then_rubbish", zipped(lambda d: d + b"rubbish"), PREPARE, (DAMAGED,)),
    Case("zip_archive", write("votes.csv", b"PK\x03\x04rest"), PREPARE, ("is a zip archive", "unpack it")),
    Case("xz_archive", write("votes.csv", b"\xfd7zXZ\0rest"), PREPARE, ("compressed with xz", "decompress")),
    Case("bzip2_archive", write("votes.csv", b"BZh91AY"), PREPARE, ("compressed with bzip2",)),
    Case("zstd_archive", write("votes.csv", b"\x28\xb5\x2f\xfdrest"), PREPARE, ("compressed with zstd",)),
    Case("arrow_file", write("votes.csv", b"ARROW1\0\0"), PREPARE, ("is an Arrow (feather) file", "parquet")),
]

PARQUET = [
    Case("parquet_magic_only", write("votes.csv", b"PAR1"), PREPARE, ("is not a readable parquet file", DAMAGED)),
    Case("parquet_cut_off", parquet_bytes(cut(0.7)), PREPARE, ("is not a readable parquet file", DAMAGED)),
    Case("parquet_huge_footer", parquet_bytes(lambda d: d[:-8] + b"\xff\xff\xff\x7fPAR1"), PREPARE, (DAMAGED,)),
    Case("parquet_negative_footer", parquet_bytes(lambda d: d[:-8] + b"\xff\xff\xff\xffPAR1"), PREPARE, (DAMAGED,)),
    Case("parquet_broken_metadata", parquet_bytes(lambda d: d[:-200] + b"\x7f" * 150 + d[-50:]), PREPARE, (DAMAGED,)),
    Case("parquet_broken_pages", parquet_bytes(lambda d: d[:4] + b"\xee" * 900 + d[904:]), PREPARE, (DAMAGED,)),
    Case("parquet_no_rows", parquet(**{name: [] for name in COLUMNS}), PREPARE, ("has a header and no row",)),
    Case("parquet_no_prompt", parquet(prompt=...), PREPARE, ("lacks 1 column(s) ['prompt']",)),
    Case("parquet_numbers_as_prompts", parquet(prompt=[*range(40)]), PREPARE, ("prompt is not a JSON list: 0",)),
    Case("parquet_nested_prompts", parquet(prompt=[[["a"]]] * 40), PREPARE, ("prompt turn 1 is not a text",)),
    Case("parquet_null_prompts", parquet(prompt=[None] * 40), PREPARE, ("prompt is not a JSON list: None",)),
    Case("parquet_null_ids", parquet(id=[None] * 40), PREPARE, ("has no id",)),
    Case("parquet_nan_ids", parquet(id=[float("nan")] * 40), PREPARE, ("has no id",)),
    Case("parquet_equal_ids", parquet(id=[7.0] * 40), PREPARE, ("'7' is in row 1 and again in row 2",)),
    Case("parquet_list_ids", parquet(id=[[1]] * 40), PREPARE, ("'[1]' is in row 1",)),
    Case("parquet_null_winners", parquet(winner_tie=[None] * 40), PREPARE, ("row 1", "no winner")),
    Case("parquet_struct_winners", parquet(winner_tie=[{"a": 1}] * 40), PREPARE, ("row 1", "no winner")),
    Case("parquet_not_utf8", lambda p: parquet(prompt=raw_bytes())(p), PREPARE, ("row 40", "is not UTF-8")),
]


ZIP = (*PREPARE[:-1], "votes.zip")
UNPACKED = ("votes.zip: cannot be unpacked", "download it again")
ZIPS = [
    Case("zip_deflated_flipped", packed(zipfile.ZIP_DEFLATED, flipped), ZIP, UNPACKED),
    Case("zip_stored_flipped", packed(zipfile.ZIP_STORED, flipped), ZIP, UNPACKED),
    Case("zip_bzip2_flipped", packed(zipfile.ZIP_BZIP2, flipped), ZIP, UNPACKED),
    Case("zip_lzma_flipped", packed(zipfile.ZIP_LZMA, flipped), ZIP, UNPACKED),
    *(
        Case(f"zip_misled_{name}", packed(kind, misled), ZIP, UNPACKED)
        for name, kind in (("stored", zipfile.ZIP_STORED), ("lzma", zipfile.ZIP_LZMA), ("bzip2", zipfile.ZIP_BZIP2))
    ),
    Case("zip_cut_off", packed(zipfile.ZIP_LZMA, cut(0.5)), ZIP, ("votes.zip: is a zip archive",)),
    Case(
        "zip_unknown_method",
        packed(zipfile.ZIP_STORED, lambda d: d.replace(b"\x14\0\0\0\0\0", b"\x14\0\0\0\x63\0")),
        ZIP,
        ("votes.zip: cannot be unpacked", "compression"),
    ),
    Case(
        "zip_encrypted",
        packed(zipfile.ZIP_STORED, lambda d: d.replace(b"\x14\0\0\0\0\0", b"\x14\0\1\0\0\0")),
        ZIP,
        ("votes.zip: cannot be unpacked", "password"),
    ),
]


def one(column: str, cell: str) -> Any:
    return rows(lambda table: table[4].update({column: cell}))


CELLS = [
    Case(f"cell_{name}", one(column, cell), PREPARE, words, code=0)
    for name, column, cell, words in [
        ("not_json", "prompt", "hello", ("prompt is not a JSON list (Expecting value)",)),
        ("empty", "prompt", "", ("prompt is not a JSON list",)),
        ("object", "response_a", '{"a": 1}', ("response_a is not a JSON list",)),
        ("number", "response_a", "7", ("response_a is not a JSON list",)),
        ("null", "response_a", "null", ("response_a is not a JSON list",)),
        ("text", "response_b", '"text"', ("response_b is not a JSON list",)),
        ("no_turn", "response_b", "[]", ("response_b has no turn",)),
        ("open_list", "prompt", '["a"', ("Expecting ',' delimiter",)),
        ("open_text", "prompt", '["a', ("Unterminated string",)),
        ("comma_at_the_end", "prompt", '["a",]', ("prompt is not a JSON list",)),
        ("single_quotes", "prompt", "['a']", ("prompt is not a JSON list",)),
        ("two_lists", "prompt", '["a"]["b"]', ("Extra data",)),
        ("number_as_turn", "prompt", "[1]", ("prompt turn 1 is not a text: 1",)),
        ("list_as_turn", "prompt", '[["a"]]', ("prompt turn 1 is not a text",)),
        ("object_as_turn", "response_a", '[{"a": "b"}]', ("response_a turn 1 is not a text",)),
        ("true_as_turn", "response_a", "[true]", ("response_a turn 1 is not a text: True",)),
        ("nan_as_turn", "response_a", "[NaN]", ("response_a turn 1 is not a text: nan",)),
        ("more_prompts", "prompt", '["a", "b"]', ("prompt 2, response_a 1, response_b 1",)),
        ("more_answers", "response_b", '["a", "b"]', ("response_b 2",)),
        ("deep", "prompt", "[" * 100_000, ("nested too deeply or too large",)),
        ("deep_and_closed", "prompt", "[" * 5000 + "]" * 5000, ("nested too deeply or too large",)),
        ("huge_number", "prompt", f"[{'9' * 5000}]", ("nested too deeply or too large",)),
        ("bad_escape", "prompt", '["\\x41"]', ("Invalid \\\\escape",)),
        ("half_escape", "prompt", '["\\u12"]', ("prompt is not a JSON list",)),
        ("no_id", "id", "", ("has no id",)),
        ("blank_id", "id", "  ", ("has no id",)),
    ]
]

BROKEN_ROWS = [
    Case(
        "row_too_long",
        change("votes.csv", lambda d: d.replace(b"\r\n1004,", b"\r\n1004,,")),
        PREPARE,
        ("has 10 cells",),
        0,
    ),
    Case(
        "row_too_short",
        change("votes.csv", lambda d: d.replace(b"\r\n1004,m,", b"\r\n1004,")),
        PREPARE,
        ("has 8 cells",),
        0,
    ),
    Case("row_cut_off", change("votes.csv", lambda d: d[:-20]), PREPARE, ("votes.csv line 41", "is cut off")),
    Case("test_row_cut_off", change("test.csv", lambda d: d[:-4]), PREPARE_TEST, ("test.csv line 7", "is cut off")),
]


def within(name: str, option: str) -> tuple[str, ...]:
    """Return `prepare` with a table that lies in the folder that it replaces."""
    return (*PREPARE[:-1], *(("votes.csv", option) if option != "--train" else ()), f"data/exam/{name}")


def moved(name: str, new: str) -> Any:
    return lambda place: Path(name).rename(new)


LIES_IN, STRANGERS = "lies in data/exam, and an export replaces this folder", "holds 1 file(s) that no export wrote"
LOSSES = [
    Case("votes_in_the_export", moved("votes.csv", "data/exam/votes.csv"), within("votes.csv", "--train"), (LIES_IN,)),
    Case("test_in_the_export", moved("test.csv", "data/exam/test.csv"), within("test.csv", "--test"), (LIES_IN,)),
    Case("truth_in_the_export", write("data/exam/truth.csv", ""), within("truth.csv", "--truth"), (LIES_IN,)),
    Case("zip_in_the_export", write("data/exam/votes.zip", b"PK"), within("votes.zip", "--train"), (LIES_IN,)),
    Case("exported_table_as_test", lambda p: None, within("battles.parquet", "--test"), (LIES_IN,)),
    *(
        Case(
            f"own_file_{i}", write("data/exam/own.jsonl", "{}"), call, (STRANGERS, "own.jsonl", "outside of data/exam")
        )
        for i, call in enumerate((PREPARE, PREPARE_TEST, (*PREPARE, "--pairs")))
    ),
]


def truth(text: str) -> Any:
    return write("truth.csv", text)


NAMES = "id,winner_model_a,winner_model_b,winner_tie\n"
WITH_TRUTH = (*PREPARE, "--truth", "truth.csv")
TRUTH = [
    Case("truth_missing", lambda p: None, WITH_TRUTH, ("truth.csv: does not exist",)),
    Case(
        "truth_without_a_column", truth("id,winner_model_a\n1,1\n"), WITH_TRUTH, ("lacks the column(s)", "leave it out")
    ),
    Case("truth_of_words", truth(f"{NAMES}1,a,b,c\n"), WITH_TRUTH, ("truth.csv row 1", "no three probabilities")),
    Case("truth_does_not_sum", truth(f"{NAMES}1,.5,.5,.5\n"), WITH_TRUTH, ("truth.csv row 1",)),
    Case("truth_nan", truth(f"{NAMES}1,nan,.5,.5\n"), WITH_TRUTH, ("truth.csv row 1",)),
    Case("truth_negative", truth(f"{NAMES}1,1.5,-.5,0\n"), WITH_TRUTH, ("truth.csv row 1",)),
    Case(
        "truth_of_a_part",
        truth(NAMES + "".join(f"{n},.5,.3,.2\n" for n in range(1000, 1030))),
        WITH_TRUTH,
        ("truth.csv: has no true probabilities of 10 of the 40 battles, the first id is 1030", "with these votes"),
    ),
    Case(
        "truth_of_verdicts",
        truth(NAMES + "".join(f"{n},{n % 2},{1 - n % 2},0\n" for n in range(1000, 1040))),
        WITH_TRUTH,
        ("truth.csv: holds verdicts (each row one 1 and two 0), not probabilities", "leave it out"),
    ),
    Case("truth_of_none", truth(NAMES), WITH_TRUTH, ("of 40 of the 40 battles",)),
    Case("truth_twice", truth(f"{NAMES}1,1,0,0\n2,1,0,0\n1,0,1,0\n"), WITH_TRUTH, ("the id 1 is in row 1 and",)),
    Case("truth_without_an_id", truth(f"{NAMES} ,1,0,0\n"), WITH_TRUTH, ("truth.csv row 1: has no id",)),
    Case("truth_packed", write("truth.csv", gzip.compress(NAMES.encode())), WITH_TRUTH, ("is no plain CSV file",)),
    Case("truth_short_row", truth(f"{NAMES}1,1,0,0\n2,1\n"), WITH_TRUTH, ("truth.csv row 2",)),
]
CASES = [*FILES, *PARQUET, *ZIPS, *CELLS, *BROKEN_ROWS, *LOSSES, *TRUTH]
