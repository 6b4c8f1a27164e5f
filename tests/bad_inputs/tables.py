"""Broken tables of votes: CSV, gzip, parquet, cells, truth."""

import gzip
import json
import shutil
import zipfile
from functools import partial
from pathlib import Path
from typing import Any

from common.battle import PROBABILITY_COLUMNS
from data_prep.synthetic import TRAIN_COLUMNS as COLUMNS
from tests.bad_inputs.place import PREPARE, PREPARE_TEST, SCORE, SCORE_INPUT, cases, change, cut, nothing, remove, write

HEADER = ",".join(COLUMNS)
LINE = '1,m,n,"[""q""]","[""a""]","[""b""]",1,0,0\n'
DAMAGED = "the file is cut off or damaged: fetch or write it again"


def rows(edit) -> Any:
    """Return what writes the good rows with some of them edited."""

    def breaks(place) -> None:
        table = place.rows()
        edit(table)
        place.table(table)

    return breaks


def every(**cells: str) -> Any:
    return rows(lambda table: [row.update(cells) for row in table])


votes, altered, truth = partial(write, "votes.csv"), partial(change, "votes.csv"), partial(write, "truth.csv")


def instead(table: str) -> tuple[str, ...]:
    return (*PREPARE[:-1], table)


def zipped(how) -> Any:
    """Return what replaces the votes by their gzip, its bytes changed."""
    return altered(lambda data: how(gzip.compress(data, mtime=0)))


def encoded(encoding: str) -> Any:
    return altered(lambda data: data.decode().encode(encoding))


def without(*names: str) -> Any:
    return lambda place: place.table(place.rows(), columns=[name for name in COLUMNS if name not in names])


def flags(a: str, b: str, tie: str) -> Any:
    return rows(lambda table: table[4].update(zip(PROBABILITY_COLUMNS, (a, b, tie), strict=True)))


def parquet(**changed: Any) -> Any:
    """Return what writes the votes as parquet with some columns replaced (`...` leaves one out)."""

    def breaks(place) -> None:
        import pyarrow as pa
        from pyarrow.parquet import write_table

        table = place.rows()
        columns = {name: [row[name] for row in table] for name in COLUMNS} | changed
        write_table(pa.table({k: v for k, v in columns.items() if v is not ...}), "votes.csv")

    return breaks


def parquet_bytes(how) -> Any:
    return lambda place: (parquet()(place), altered(how)(place))


def raw_bytes() -> Any:
    import pyarrow as pa

    return pa.array([b'["a"]'] * 39 + [b'["\xff"]'], pa.binary()).view(pa.string())


def packed(kind: int, how=bytes) -> Any:
    """Return what packs the votes into votes.zip, its bytes changed."""

    def breaks(place) -> None:
        with zipfile.ZipFile("votes.zip", "w", kind) as archive:
            archive.write("votes.csv")
        change("votes.zip", how)(place)

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
ZIP = (*PREPARE[:-1], "votes.zip")
UNPACKED = ("votes.zip: cannot be unpacked", "download it again")


def in_its_place(place) -> None:
    shutil.rmtree("data/exam")
    Path("data/exam").write_text("mine")


def one(column: str, cell: str) -> Any:
    return rows(lambda table: table[4].update({column: cell}))


def within(name: str, option: str) -> tuple[str, ...]:
    """Return `prepare` with a table that lies in the folder that it replaces."""
    return (*PREPARE[:-1], *(("votes.csv", option) if option != "--train" else ()), f"data/exam/{name}")


def moved(name: str, new: str) -> Any:
    return lambda place: Path(name).rename(new)


def linked(name: str, new: str) -> Any:
    """Return what moves a file or folder and leaves a link to it."""
    return lambda place: (Path(name).rename(new), Path(name).symlink_to(Path(new).absolute()))


def own(name: str) -> Any:
    """Return what puts a file of a person into the export's folder."""
    path = Path("data/exam", name)
    return lambda place: (path.parent.mkdir(parents=True, exist_ok=True), path.write_text("mine"))


LIES_IN, STRANGERS = "lies in data/exam, and an export replaces this folder", "holds 1 file(s) that no export wrote"


def own_folds(table: str) -> Any:
    return lambda place: (write("folds.csv", table)(place), place.edit_experiment("folds: 2\n"))


def folds(of, count: int = 40) -> Any:
    """Return what asks for two folds and writes the fold of each battle."""
    return own_folds("id,fold\n" + "".join(f"{1000 + n},{int(of(n))}\n" for n in range(count)))


def soft(text: str, path: str = "soft.csv") -> Any:
    return write(path, f"{NAMES}{text}\n")


NAMES, TEXTS = "id,winner_model_a,winner_model_b,winner_tie\n", "id,prompt,response_a,response_b\n"
ROW, TIE = '1,"[""a""]","[""b""]","[""c""]"\n', dict(zip(PROBABILITY_COLUMNS, "001", strict=True))
A_PART = "".join(f"{n},.5,.3,.2\n" for n in range(1000, 1030))
OF_VERDICTS = "".join(f"{n},{n % 2},{1 - n % 2},0\n" for n in range(1000, 1040))
AS_TEST, STORED = PREPARE_TEST[:-1], zipfile.ZIP_STORED
WITH_TRUTH = (*PREPARE, "--truth", "truth.csv")
TRAIN = [
    ("csv_missing", remove("votes.csv"), "votes.csv: does not exist", "Kaggle's zip, or hf://"),
    ("csv_empty", votes(b""), "votes.csv: is empty", "a header and rows"),
    ("csv_byte_order_mark", votes(b"\xef\xbb\xbf"), "is empty"),
    ("csv_header_only", votes(f"{HEADER}\n"), "has a header and no row"),
    ("csv_open_quote", votes(b'"id,prompt'), "has no readable header"),
    ("csv_double_column", votes("id,id,prompt\n1,2,3\n"), "column(s) ['id'] twice"),
    ("csv_semicolons", altered(lambda d: d.replace(b",", b";")), "cells with commas"),
    ("csv_utf16", encoded("utf-16"), "is not UTF-8", "iconv -f UTF-16"),
    ("csv_utf32", encoded("utf-32"), "is not UTF-8", "iconv"),
    ("csv_latin1_row", altered(lambda d: d.replace(b"first 7", b"f\xfcrst 7")), "votes.csv row 8", "0xfc", "iconv"),
    ("csv_latin1_header", altered(lambda d: b"\xfc," + d), "votes.csv header", "0xfc"),
    ("csv_nul_bytes", votes(b"\x00" * 5000), "is not UTF-8"),
    ("csv_random_bytes", votes(bytes(range(128, 256)) * 20), "is not UTF-8"),
    ("csv_is_html", votes("<!DOCTYPE html>\n<p>Sign in</p>\n"), "votes.csv: is a web page", "download the table"),
    ("csv_of_something", votes("x,y\n1,2\n"), "lacks 4 column(s)", NO_BATTLES),
    ("csv_is_json", votes(json.dumps([{"id": 1}])), "lacks 4 column(s)", "--columns"),
    ("csv_no_header", altered(lambda d: d.split(b"\r\n", 1)[1]), "twice", "rename or remove"),
    ("csv_no_responses", without("response_a", "response_b"), "['response_a', 'response_b']"),
    ("csv_no_tie", without("winner_tie"), "lacks 1 column(s) ['winner_tie']"),
    ("csv_is_a_submission", SUBMISSION, "lacks 3 column(s)", "sample_submission.csv", "wants train.csv"),
    ("csv_no_winners", without(*PROBABILITY_COLUMNS), "pass a file without verdicts as the test set"),
    ("csv_double_id", rows(lambda t: t[9].update(id="1003")), "'1003' is in row 4 and again in row 10"),
    ("csv_no_winner", flags("0", "0", "0"), "votes.csv row 5", "no winner", "both are bad"),
    ("csv_two_winners", flags("1", "1", "0"), "row 5", "several winners"),
    ("csv_negative_winner", flags("1", "-1", "0"), "row 5", "no clear winner"),
    ("csv_nan_winner", flags("nan", "1", "0"), "row 5", "no clear winner"),
    ("csv_word_as_winner", flags("yes", "no", "no"), "row 5", "no clear winner", "exactly one winner"),
    ("csv_many_bad_rows", rows(lambda t: [r.update(prompt="x") for r in t[3:9]]), "6 of 40 rows", "row 4"),
    ("csv_all_rows_bad", every(prompt="[]"), "no row is left"),
    ("csv_one_battle", votes(f"{HEADER}\n{LINE}"), "1 different prompt(s) in 1 rows", "change valid_share"),
    ("csv_one_prompt", every(prompt='["x"]'), "1 different prompt(s) in 40 rows", "add battles"),
    ("gzip_cut_off", zipped(cut(0.5)), "cannot be read to its end", DAMAGED),
    ("gzip_flipped_bits", zipped(lambda d: d[:200] + bytes(b ^ 255 for b in d[200:230]) + d[230:]), DAMAGED),
    ("gzip_wrong_sum", zipped(lambda d: d[:-8] + b"\x00" * 8), DAMAGED),
    ("gzip_of_nothing", votes(gzip.compress(b"")), "is empty"),
    ("gzip_in_gzip", zipped(gzip.compress), "is not UTF-8"),
    ("gzip_of_utf16", votes(gzip.compress(HEADER.encode("utf-16"))), "UTF-16"),
    ("gzip_then_rubbish", zipped(lambda d: d + b"rubbish"), DAMAGED),
    ("zip_archive", votes(b"PK\x03\x04rest"), "is a zip archive", "unpack it"),
    ("xz_archive", votes(b"\xfd7zXZ\x00rest"), "compressed with xz", "decompress"),
    ("bzip2_archive", votes(b"BZh91AY"), "compressed with bzip2"),
    ("zstd_archive", votes(b"(\xb5/\xfdrest"), "compressed with zstd"),
    ("arrow_file", votes(b"ARROW1\x00\x00"), "is an Arrow (feather) file", "parquet"),
    ("parquet_magic_only", votes(b"PAR1"), "is not a readable parquet file", DAMAGED),
    ("parquet_cut_off", parquet_bytes(cut(0.7)), "is not a readable parquet file", DAMAGED),
    ("parquet_huge_footer", parquet_bytes(lambda d: d[:-8] + b"\xff\xff\xff\x7fPAR1"), DAMAGED),
    ("parquet_broken_metadata", parquet_bytes(lambda d: d[:-200] + b"\x7f" * 150 + d[-50:]), DAMAGED),
    ("parquet_broken_pages", parquet_bytes(lambda d: d[:4] + b"\xee" * 900 + d[904:]), DAMAGED),
    ("parquet_no_rows", parquet(**{name: [] for name in COLUMNS}), "has a header and no row"),
    ("parquet_no_prompt", parquet(prompt=...), "lacks 1 column(s) ['prompt']"),
    ("parquet_numbers_as_prompts", parquet(prompt=[*range(40)]), "prompt is not a JSON list: 0"),
    ("parquet_nested_prompts", parquet(prompt=[[["a"]]] * 40), "prompt turn 1 is not a text"),
    ("parquet_null_prompts", parquet(prompt=[None] * 40), "prompt is not a JSON list: None"),
    ("parquet_null_ids", parquet(id=[None] * 40), "has no id"),
    ("parquet_nan_ids", parquet(id=[float("nan")] * 40), "has no id"),
    ("parquet_equal_ids", parquet(id=[7.0] * 40), "'7' is in row 1 and again in row 2"),
    ("parquet_null_winners", parquet(winner_tie=[None] * 40), "row 1", "no clear winner"),
    ("parquet_not_utf8", lambda p: parquet(prompt=raw_bytes())(p), "row 40", "is not UTF-8"),
    ("row_cut_off", altered(lambda d: d[:-20]), "votes.csv line 41", "is cut off"),
]
CELLS = [
    ("cell_not_json", one("prompt", "hello"), '"row": 5, "id": "1004"', "prompt is not a JSON list (Expecting value)"),
    ("cell_object", one("response_a", '{"a": 1}'), "response_a is not a JSON list"),
    ("cell_no_turn", one("response_b", "[]"), "response_b has no turn"),
    ("cell_open_list", one("prompt", '["a"'), "Expecting ',' delimiter"),
    ("cell_single_quotes", one("prompt", "['a']"), "prompt is not a JSON list"),
    ("cell_two_lists", one("prompt", '["a"]["b"]'), "Extra data"),
    ("cell_number_as_turn", one("prompt", "[1]"), "prompt turn 1 is not a text: 1"),
    ("cell_object_as_turn", one("response_a", '[{"a": "b"}]'), "response_a turn 1 is not a text"),
    ("cell_true_as_turn", one("response_a", "[true]"), "response_a turn 1 is not a text: True"),
    ("cell_nan_as_turn", one("response_a", "[NaN]"), "response_a turn 1 is not a text: nan"),
    ("cell_more_prompts", one("prompt", '["a", "b"]'), "prompt 2, response_a 1, response_b 1"),
    ("cell_more_answers", one("response_b", '["a", "b"]'), "response_b 2"),
    ("cell_deep", one("prompt", "[" * 100000), "nested too deeply or too large"),
    ("cell_deep_and_closed", one("prompt", "[" * 5000 + "]" * 5000), "nested too deeply or too large"),
    ("cell_huge_number", one("prompt", f"[{'9' * 5000}]"), "nested too deeply or too large"),
    ("cell_bad_escape", one("prompt", '["\\x41"]'), "Invalid \\\\escape"),
    ("cell_no_id", one("id", ""), "has no id"),
    ("cell_blank_id", one("id", "  "), "has no id"),
    ("row_too_long", altered(lambda d: d.replace(b"\r\n1004,", b"\r\n1004,,")), "has 10 cells"),
    ("row_too_short", altered(lambda d: d.replace(b"\r\n1004,m,", b"\r\n1004,")), "has 8 cells"),
]
OTHERS = [
    ("csv_is_a_folder", nothing, instead("models"), "models: is a folder"),
    ("csv_is_a_device", nothing, instead("/dev/null"), "is not a regular file"),
    ("csv_long_name", nothing, instead("x" * 5000), "ile name too long"),
    ("csv_link_to_itself", lambda p: Path("loop").symlink_to("loop"), instead("loop"), "does not exist"),
    ("csv_is_the_test_set", nothing, instead("test.csv"), "competition's test.csv", "(train.csv)"),
    ("test_is_a_submission", write("mine.csv", f"{NAMES}1,.3,.3,.4\n"), (*AS_TEST, "mine.csv"), "--test wants"),
    ("test_is_the_train_table", nothing, (*AS_TEST, "votes.csv"), "is the train table, given"),
    ("test_is_the_train_table_by_a_link", linked("votes.csv", "test.csv"), PREPARE_TEST, "is the train table, given"),
    ("test_is_a_copy_of_train", lambda p: p.table(p.rows(), "test.csv"), PREPARE_TEST, "all of its 40 rows are"),
    ("csv_double_id_in_test", write("test.csv", TEXTS + ROW * 2), PREPARE_TEST, "test.csv row 2", "'1' is in row 1"),
    ("csv_only_ties_as_pairs", every(**TIE), (*PREPARE, "--pairs"), "no row is left for dpo_reward", "with a winner"),
    *(
        (f"list_of_sets_{name}_{folder}", write(f"{folder}/dataset_info.json", text), PREPARE, "is not readable JSON")
        for folder in ("data", "data/exam")
        for name, text in (("comma", '{"mine": {"hf_hub_url": "a/b"},}'), ("list", "[]"), ("deep", "[" * 100_000))
    ),
    ("zip_deflated_flipped", packed(zipfile.ZIP_DEFLATED, flipped), ZIP, *UNPACKED),
    ("zip_stored_flipped", packed(zipfile.ZIP_STORED, flipped), ZIP, *UNPACKED),
    ("zip_bzip2_flipped", packed(zipfile.ZIP_BZIP2, flipped), ZIP, *UNPACKED),
    ("zip_lzma_flipped", packed(zipfile.ZIP_LZMA, flipped), ZIP, *UNPACKED),
    ("zip_misled_stored", packed(zipfile.ZIP_STORED, misled), ZIP, *UNPACKED),
    ("zip_misled_lzma", packed(zipfile.ZIP_LZMA, misled), ZIP, *UNPACKED),
    ("zip_misled_bzip2", packed(zipfile.ZIP_BZIP2, misled), ZIP, *UNPACKED),
    ("zip_cut_off", packed(zipfile.ZIP_LZMA, cut(0.5)), ZIP, "votes.zip: is a zip archive"),
    ("zip_unknown_method", packed(STORED, lambda d: d.replace(b"\x14\0\0\0\0", b"\x14\0\0\0c")), ZIP, "compression"),
    ("zip_encrypted", packed(STORED, lambda d: d.replace(b"\x14\0\0\0\0", b"\x14\0\1\0\0")), ZIP, "password"),
    ("test_row_cut_off", change("test.csv", lambda d: d[:-4]), PREPARE_TEST, "test.csv line 7", "is cut off"),
    ("votes_in_the_export", moved("votes.csv", "data/exam/votes.csv"), within("votes.csv", "--train"), LIES_IN),
    ("test_of_plain_texts", write("test.csv", f"{TEXTS}1,q,a,b\n2,q,a,b\n"), PREPARE_TEST, "plain texts", "one format"),
    ("test_in_the_export", moved("test.csv", "data/exam/test.csv"), within("test.csv", "--test"), LIES_IN),
    ("truth_in_the_export", write("data/exam/truth.csv", ""), within("truth.csv", "--truth"), LIES_IN),
    ("zip_in_the_export", write("data/exam/votes.zip", b"PK"), within("votes.zip", "--train"), LIES_IN),
    ("votes_by_dots", moved("votes.csv", "data/exam/votes.csv"), instead("models/../data/exam/votes.csv"), LIES_IN),
    ("votes_by_a_link", linked("votes.csv", "data/exam/mine.csv"), instead("votes.csv"), LIES_IN),
    ("votes_by_a_linked_folder", linked("data", "elsewhere"), instead("elsewhere/exam/rows.parquet"), LIES_IN),
    ("exported_table_as_test", nothing, within("battles.parquet", "--test"), LIES_IN),
    ("truth_missing", nothing, WITH_TRUTH, "truth.csv: does not exist"),
    ("truth_without_a_column", truth("id,winner_model_a\n1,1\n"), WITH_TRUTH, "lacks the column(s)", "leave it out"),
    ("truth_of_words", truth(f"{NAMES}1,a,b,c\n"), WITH_TRUTH, "truth.csv row 1", "no three probabilities"),
    ("truth_does_not_sum", truth(f"{NAMES}1,.5,.5,.5\n"), WITH_TRUTH, "truth.csv row 1"),
    ("truth_of_a_part", truth(NAMES + A_PART), WITH_TRUTH, "10 of the 40 battles, the first id is 1030", "with these"),
    ("truth_of_verdicts", truth(NAMES + OF_VERDICTS), WITH_TRUTH, "holds verdicts (each row one 1", "leave it out"),
    ("truth_of_none", truth(NAMES), WITH_TRUTH, "of 40 of the 40 battles"),
    ("truth_twice", truth(f"{NAMES}1,1,0,0\n2,1,0,0\n1,0,1,0\n"), WITH_TRUTH, "the id 1 is in row 1 and"),
    ("truth_without_an_id", truth(f"{NAMES} ,1,0,0\n"), WITH_TRUTH, "truth.csv row 1: has no id"),
    ("truth_packed", write("truth.csv", gzip.compress(NAMES.encode())), WITH_TRUTH, "is no plain CSV file"),
    ("truth_short_row", truth(f"{NAMES}1,1,0,0\n2,1\n"), WITH_TRUTH, "truth.csv row 2"),
]
FOLDS = [
    ("folds_lack_a_class", folds(lambda n: n % 3 == 2 or n % 2), "folds.csv: fold 0 has no battle with the"),
    ("folds_lack_a_battle", folds(lambda n: n % 2, 39), "folds.csv: has no fold for the battle 1039"),
    ("folds_without_a_column", own_folds("id,part\n1,0\n"), "folds.csv", "lacks the column(s) ['fold']"),
    ("folds_negative", own_folds("id,fold\n1,0\n2,-1\n"), "folds.csv row 2", "a fold from 0 to 1"),
    ("folds_nan", own_folds("id,fold\n1,0\n2,NaN\n"), "folds.csv row 2", "a fold from 0 to 1"),
    ("folds_twice", own_folds("id,fold\n1,0\n1,1\n"), "folds.csv", "the id 1 is in two folds"),
    ("folds_without_a_battle", own_folds("id,fold\n1,0\n2,0\n"), "folds.csv", "has no battle in fold 1"),
    ("folds_of_another_number", folds(lambda n: n % 3), "folds.csv row 3: holds no id with a fold from 0 to 1"),
]
SOFT = [
    ("soft_foreign_ids", soft("1000,.2,.3,.5\n77,.2,.3,.5"), "soft.csv row 2", "1 ids that are no battles of --train"),
    ("soft_nan", soft("1000,.2,.3,.5\n1001,nan,.5,.5"), "soft.csv row 2: holds no three probabilities", "run.py score"),
    ("soft_negative", soft("1000,-.2,.7,.5"), "soft.csv row 1: holds no three probabilities"),
    ("soft_does_not_sum", soft("1000,1,.5,.5"), "soft.csv row 1: holds no three probabilities"),
    ("soft_twice", soft("1000,.2,.3,.5\n1000,.2,.3,.5"), "soft.csv row 2: the id 1000 is in row 1 and again in row 2"),
]
LOSSES = [
    *(
        (f"own_file_{i}", own("own.jsonl"), call, STRANGERS, "own.jsonl", "outside of data/exam")
        for i, call in enumerate((PREPARE, PREPARE_TEST, (*PREPARE, "--pairs")))
    ),
    *(
        (f"own_{Path(name).stem}", own(name), PREPARE, STRANGERS, f": {name}")
        for name in (".hidden", "notes/deep/x.md", "truth.csv")
    ),
    ("own_without_manifest", remove("data/exam/manifest.json"), PREPARE, "that no export wrote", "audit.json"),
    ("own_link", lambda p: Path("data/exam/votes").symlink_to("nowhere"), PREPARE, STRANGERS, ": votes"),
    ("file_in_the_folders_place", in_its_place, PREPARE, "is a file, where the export makes a folder"),
]
COLUMNS_GIVEN = [
    ("columns_no_pair", "prompt", "'prompt' is no pair: write prompt=question"),
    ("columns_twice", "prompt=a,prompt=b", "prompt is named twice"),
    ("columns_for_two", "response_a=a,response_b=a", "a is named twice"),
    ("columns_unknown", "prompt=promt", "csv: has no column 'promt'", "prompt=prompt?", "It has: id"),
    ("columns_not_ours", "promt=prompt", "'promt' is no name of ours", "did you mean prompt?"),
]
NAMED = [
    ("columns_without_input", nothing, (*SCORE, "--columns", "a=b"), "belong to --input"),
    *(
        (f"{name}_{call[0]}", nothing, (*call, "--columns", given), *words)
        for name, given, *words in COLUMNS_GIVEN
        for call in (PREPARE, SCORE_INPUT)
    ),
]
CASES = [
    *(*cases(TRAIN, PREPARE), *cases(CELLS, PREPARE, code=0)),
    *(*cases(FOLDS, (*PREPARE, "--folds-from", "folds.csv")), *cases(SOFT, (*PREPARE_TEST, "--soft", "soft.csv"))),
    *(*cases(OTHERS), *cases(LOSSES), *cases(NAMED, code=2)),
]
