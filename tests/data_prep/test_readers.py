"""Readers: three schemas, three file formats, one battle; bad rows are not bad files."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from common.errors import ArenaError
from data_prep.readers import VoteReader
from data_prep.synthetic import TRAIN_COLUMNS, cell

REAL = Path(__file__).parents[2].parent / "shared" / "data"
COLUMNS = list(TRAIN_COLUMNS)
ONE_HOT = {"a": ["1", "0", "0"], "b": ["0", "1", "0"], "tie": ["0", "0", "1"], None: ["", "", ""]}


def kaggle_row(identity: str, prompt="hi", a="yes", b="no", verdict: str | None = "a") -> list[str]:
    texts = [text if isinstance(text, str) and text[:1] in "[{" else cell([text]) for text in (prompt, a, b)]
    return [identity, "m1", "m2", *texts, *ONE_HOT[verdict]]


def write_csv(path: Path, rows: list[list[str]], columns: list[str] = COLUMNS, encoding="utf-8") -> Path:
    text = io.StringIO(newline="")
    csv.writer(text).writerows([columns, *rows])
    data = text.getvalue().encode(encoding)
    path.write_bytes(gzip.compress(data, 1) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, columns: dict[str, list]) -> Path:
    parquet.write_table(pa.table(columns), path)
    return path


def read(path: Path, labelled: bool = True) -> list[Battle]:
    return [battle for _, battle in VoteReader(path, labelled=labelled)]


def error_of(path: Path, labelled: bool = True) -> ArenaError:
    with pytest.raises(ArenaError) as caught:
        read(path, labelled)
    error = caught.value
    assert error.remedy
    assert str(path) in error.where
    return error


def good_rows(count: int, start: int = 1000) -> list[list[str]]:
    return [kaggle_row(str(start + i), verdict=VERDICTS[i % 3]) for i in range(count)]


@pytest.mark.parametrize("name", ["votes.csv", "votes.csv.gz", "votes.parquet", "parts"])
def test_the_share_that_is_read_grows_from_0_to_1(tmp_path, name):
    texts = random.Random(0)  # that gzip cannot make small
    rows = [kaggle_row(str(i), prompt=cell([texts.randbytes(200).hex()]), verdict="a") for i in range(3000)]
    if name == "parts":
        (tmp_path / name).mkdir()
        for part in range(3):
            write_csv(tmp_path / name / f"{part}.csv", rows[part::3])
    elif name.endswith(".parquet"):
        write_parquet(tmp_path / name, dict(zip(COLUMNS, map(list, zip(*rows, strict=True)), strict=True)))
    else:
        write_csv(tmp_path / name, rows)
    reader = VoteReader(tmp_path / name, labelled=True)
    shares = [reader.share for _ in reader]
    assert shares == sorted(shares) and shares[0] < 0.35 and shares[-1] > 0.6
    assert len(set(shares)) > 3
    assert abs(shares[1500] - 0.5) < 0.2
    assert reader.share == 1.0


# --- the competition's schema ---------------------------------------------------------------------------------


def test_turns_nulls_empty_texts_and_identical_responses(tmp_path):
    rows = [
        kaggle_row("1", cell(["a/b", "ü"]), cell(["x", None]), cell(["", "y"]), "b"),
        kaggle_row("2", "same", "same", "same", "tie"),
        kaggle_row("3", "[null]", "[null]", "[null]", "a"),
    ]
    reader = VoteReader(write_csv(tmp_path / "votes", rows), labelled=True)
    assert list(reader) == [
        (1, Battle("1", ("a/b", "ü"), ("x", ""), ("", "y"), "b")),
        (2, Battle("2", ("same",), ("same",), ("same",), "tie")),
        (3, Battle("3", ("",), ("",), ("",), "a")),
    ]
    assert (reader.schema, reader.rows_read, reader.rejected) == ("kaggle", 3, [])


@pytest.mark.parametrize(
    ("written", "text"),
    [
        (r'["\ud83d\ude00"]', "😀"),
        (r'["\uD83D\uDE00"]', "😀"),
        (r'["a\ud83d"]', "a\ufffd"),
        (r'["\uDE00a"]', "\ufffda"),
        (r'["\ude00\ud83d"]', "\ufffd\ufffd"),
        (r'["\ud55c\uae00"]', "한글"),
        (r'["\\ud83d"]', "\\ud83d"),
        ('["tab\tnewline\n"]', "tab\tnewline\n"),
        ('["nul\\u0000"]', "nul\0"),
    ],
)
def test_escapes_become_text_that_can_be_written(tmp_path, written, text):
    (battle,) = read(write_csv(tmp_path / "x.csv", [kaggle_row("1", "hi", written, written)]))
    assert battle.responses_a == battle.responses_b == (text,)
    assert "".join(battle.responses_a).encode("utf-8")


@pytest.mark.parametrize("flags", [["0.0", "1.0", "0.0"], [" 0", "1 ", "0.00"]])
def test_one_hot_in_other_spellings(tmp_path, flags):
    rows = [kaggle_row("1")[:6] + flags]
    assert read(write_csv(tmp_path / "x.csv", rows))[0].verdict == "b"


def test_a_test_set_has_no_verdicts_and_a_labelled_file_may_be_scored(tmp_path):
    bare = [row[:1] + row[3:6] for row in good_rows(3)]
    path = write_csv(tmp_path / "test.csv", bare, ["id", "prompt", "response_a", "response_b"])
    assert [battle.verdict for battle in read(path, labelled=False)] == [None, None, None]
    rows = [*good_rows(3), kaggle_row("9", verdict=None), [*kaggle_row("8")[:6], "1", "1", "0"]]
    path = write_csv(tmp_path / "train.csv", rows)
    assert [battle.verdict for battle in read(path, labelled=False)] == ["a", "b", "tie", None, None]
    assert "winner_model_a" in error_of(tmp_path / "test.csv").what
    assert "test set" in error_of(tmp_path / "test.csv").remedy


def test_columns_may_stand_in_any_order_after_a_byte_order_mark_and_between_blank_lines(tmp_path):
    columns = ["language", *reversed(COLUMNS), "extra"]
    rows = [["German", *reversed(kaggle_row(str(i), verdict="tie")), "?"] for i in range(2)]
    path = write_csv(tmp_path / "x.csv", rows, columns, encoding="utf-8-sig")
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r\n\r\n"))
    reader = VoteReader(path, labelled=True)
    assert [row for row, _ in reader] == [1, 2]
    assert [(b.id, b.language, b.verdict) for b in read(path)] == [("0", "German", "tie"), ("1", "German", "tie")]
    assert reader.schema == "kaggle"


# --- the other two schemas ------------------------------------------------------------------------------------


def conversation(*texts: str | None) -> list[dict]:
    return [{"content": text, "role": ("user", "assistant")[i % 2]} for i, text in enumerate(texts)]


CONVERSATIONS = {
    "question_id": ["q1", "q2", "q3", "q4"],
    "model_a": ["m"] * 4,
    "winner": ["model_a", "model_b", "tie", "tie (bothbad)"],
    "conversation_a": [conversation("hi", f"a{i}", "more", None) for i in range(4)],
    "conversation_b": [conversation("hi", f"b{i}", "more", "end") for i in range(4)],
    "language": ["English", "German", None, "French"],
}


def as_text(columns: dict[str, list]) -> tuple[list[list[str]], list[str]]:
    cells = [
        [value if isinstance(value, str) else json.dumps(value) for value in row]
        for row in zip(*columns.values(), strict=True)
    ]
    return [["" if value == "null" else value for value in row] for row in cells], list(columns)


def test_arena_conversations_from_parquet_and_csv(tmp_path):
    first = write_parquet(tmp_path / "first", CONVERSATIONS)
    second = write_csv(tmp_path / "second", *as_text(CONVERSATIONS))
    battles = read(first)
    assert VoteReader(first, labelled=True).schema == "arena_conversations"
    assert battles[1] == Battle("q2", ("hi", "more"), ("a1", ""), ("b1", "end"), "b", "German")
    assert [battle.verdict for battle in battles] == ["a", "b", "tie", "tie"]
    assert read(second) == battles
    unlabelled = {name: CONVERSATIONS[name] for name in ("conversation_a", "conversation_b")} | {"id": [1, 2, 3, 4]}
    assert [battle.id for battle in read(write_parquet(tmp_path / "third", unlabelled), labelled=False)] == list("1234")


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (conversation("other", "b", "more", "end"), "the user's turns in conversation_a and conversation_b differ"),
        (conversation("hi", "b", "more"), "conversation_b ends with the user"),
        (conversation("hi", "b"), "the user's turns in conversation_a and conversation_b differ"),
        ([{"role": "system", "content": "x"}], "conversation_b message 1 has the role 'system'"),
        ([{"role": "user"}], "conversation_b message 1 is not an object with role and content"),
        (["hi"], "conversation_b message 1 is not an object with role and content"),
        ([{"role": "user", "content": 7}], "conversation_b message 1 is not a text: 7"),
        ([], "conversation_b has no turn"),
    ],
)
def test_broken_conversations_are_rejected(tmp_path, broken, reason):
    columns = {name: values[:2] for name, values in CONVERSATIONS.items()} | {
        "conversation_b": [broken, CONVERSATIONS["conversation_b"][1]]
    }
    reader = VoteReader(write_csv(tmp_path / "x.csv", *as_text(columns)), labelled=True)
    assert [battle.id for _, battle in reader] == ["q2"]
    assert reader.rejected[0].reason.startswith(reason)
    assert (reader.rejected[0].row, reader.rejected[0].id) == (1, "q1")


WSDM = {
    "id": ["w1", "w2", "w3"],
    "prompt": ['["not a list, but a text"]', "two\nlines", "p"],
    "response_a": ["a", "b", ""],
    "response_b": ["c", "", "d"],
    "winner": ["model_b", "model_a", "model_a"],
    "language": ["Korean", "English", ""],
}


def test_the_wsdm_table_holds_plain_texts(tmp_path):
    battles = read(write_csv(tmp_path / "x.csv", *as_text(WSDM)))
    assert battles[0] == Battle("w1", ('["not a list, but a text"]',), ("a",), ("c",), "b", "Korean")
    assert battles[1] == Battle("w2", ("two\nlines",), ("b",), ("",), "a", "English")
    assert battles[2].language is None
    with_nulls = {name: [value or None for value in values] for name, values in WSDM.items()}
    assert read(write_parquet(tmp_path / "x.parquet", with_nulls)) == battles


def test_the_wsdm_test_set_is_known_by_scored_or_language(tmp_path):
    for mark in ("scored", "language"):
        columns = {name: WSDM[name] for name in ("id", "prompt", "response_a", "response_b")} | {mark: ["True"] * 3}
        reader = VoteReader(write_csv(tmp_path / "x.csv", *as_text(columns)), labelled=False)
        assert [battle.verdict for _, battle in reader] == [None] * 3
        assert reader.schema == "wsdm"


# --- one table in three formats -------------------------------------------------------------------------------


def test_csv_gzip_and_parquet_give_the_same_battles_whatever_the_files_name(tmp_path):
    rows = [
        kaggle_row(str(i), cell(["ü", None]), cell(["😀", ""]), cell([f"{i}", "/"]), VERDICTS[i % 3])
        for i in range(700)
    ]
    plain = write_csv(tmp_path / "a.parquet", rows)
    zipped = write_csv(tmp_path / "b.gz", rows).rename(tmp_path / "b.csv")
    texts = {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}
    numbers = {name: [int(value) for value in texts[name]] for name in ("id", *PROBABILITY_COLUMNS)}
    lists = {name: [json.loads(value) for value in texts[name]] for name in ("prompt", "response_a", "response_b")}
    floats = {name: [float(value) for value in values] for name, values in numbers.items()}
    battles = read(plain)
    assert len(battles) == 700
    assert battles[1] == Battle("1", ("ü", ""), ("😀", ""), ("1", "/"), "b")
    assert read(zipped) == battles
    assert read(write_parquet(tmp_path / "c.csv", texts)) == battles
    assert read(write_parquet(tmp_path / "d", texts | numbers)) == battles
    assert read(write_parquet(tmp_path / "e", texts | lists | floats)) == battles


@pytest.mark.parametrize(
    ("file", "rows", "verdicts"),
    [
        ("arena/train_natural.csv", 1479, {"a": 530, "b": 506, "tie": 443}),
        ("arena/train_clean.csv.gz", 13579, {"a": 6584, "b": 6552, "tie": 443}),
        ("mtbench/mtbench_human.csv", 1751, {"a": 294, "b": 1040, "tie": 417}),
        ("arena/test.csv", 3, {None: 3}),
    ],
)
def test_real_votes(file, rows, verdicts):
    path = REAL / file
    if not path.exists():
        pytest.skip("the real votes are not on this machine")
    reader = VoteReader(path, labelled=None not in verdicts)
    battles = [battle for _, battle in reader]
    assert (reader.schema, reader.rows_read, reader.rejected) == ("kaggle", rows, [])
    assert Counter(battle.verdict for battle in battles) == verdicts
    for battle in battles:
        assert len(battle.prompts) == len(battle.responses_a) == len(battle.responses_b) >= 1
        "".join((*battle.prompts, *battle.responses_a, *battle.responses_b)).encode("utf-8")


def test_memory_stays_flat(tmp_path):
    rows = [kaggle_row(str(i), "p" * 2000, "a" * 4000, "b" * 4000) for i in range(2000)]
    for path in (
        write_csv(tmp_path / "x.csv", rows),
        write_parquet(tmp_path / "x", {name: [row[i] for row in rows] for i, name in enumerate(COLUMNS)}),
    ):
        del rows[:]
        tracemalloc.start()
        assert sum(1 for _ in VoteReader(path, labelled=True)) == 2000
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 12e6  # of 20 MB of text


# --- one bad row is rejected, the rest goes on ----------------------------------------------------------------


def test_a_lost_quote_costs_its_rows_only(tmp_path):
    path = write_csv(tmp_path / "x.csv", good_rows(300))
    lines = path.read_bytes().split(b"\r\n")
    lines[5] = lines[5].replace(b'"]"', b'"]', 1)
    path.write_bytes(b"\r\n".join(lines))
    reader = VoteReader(path, labelled=True)
    assert 298 <= len(list(reader)) <= 299
    assert "is not valid CSV" in reader.rejected[0].reason
    assert reader.rejected[0].row == 5


def test_scraps_of_a_broken_row_are_not_duplicate_ids(tmp_path):
    rows = [[f"{i}", f"p{i}\n}}\n}}\nend", "a", "b", "model_a", ""] for i in range(500)]
    path = write_csv(tmp_path / "x.csv", rows, list(WSDM))
    path.write_bytes(path.read_bytes().replace(b'"p7\n', b'p7"\n'))
    reader = VoteReader(path, labelled=True)
    assert len(list(reader)) == 499
    assert [(rejected.id, rejected.row) for rejected in reader.rejected[:3]] == [("7", 8), ("}", 9), ("}", 10)]


def test_one_percent_is_allowed_and_more_is_not(tmp_path):
    bad = [kaggle_row(f"bad{i}", "{}") for i in range(3)]
    reader = VoteReader(write_csv(tmp_path / "x.csv", [*good_rows(198), *bad[:2]]), labelled=True)
    assert len(list(reader)) == 198
    error = error_of(write_csv(tmp_path / "y.csv", [*good_rows(197), *bad]))
    assert "3 of 200 rows" in error.what
    assert "row 198 (id bad0): prompt is not a JSON list" in error.what
    assert error.where.endswith("y.csv row 198")


# --- a bad file stops with one error --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("winner", "what"), [("", "no winner"), (None, "no winner"), ("model_c", "unknown winner 'model_c'")]
)
def test_an_unknown_winner_stops(tmp_path, winner, what):
    for columns in (WSDM, CONVERSATIONS):
        columns = columns | {"winner": [winner, *columns["winner"][1:]]}
        assert what in error_of(write_parquet(tmp_path / "x", columns)).what


@pytest.mark.parametrize(
    ("columns", "labelled", "what", "remedy"),
    [
        (COLUMNS[:5] + COLUMNS[6:8], True, "['response_b', 'winner_tie']", "nearest known schema is kaggle"),
        (["id", "conversation_a", "winner"], True, "['conversation_b']", "nearest known schema is arena_conversations"),
        (["conversation_a", "conversation_b"], True, "['question_id or id', 'winner']", "arena_conversations"),
        (["id", "question", "language"], True, "['prompt', 'response_a', 'response_b', 'winner']", "schema is wsdm"),
        (["x", "y"], False, "['id', 'prompt', 'response_a', 'response_b']", "this is not a table of battles"),
        (["id", "conversation_a", "conversation_b"], True, "['winner']", "this is a table without verdicts"),
    ],
)
def test_a_table_that_lacks_columns_is_recognised(tmp_path, columns, labelled, what, remedy):
    error = error_of(write_csv(tmp_path / "x.csv", [["1"] * len(columns)], columns), labelled=labelled)
    assert what in error.what and str(columns)[1:30] in error.what
    assert remedy in error.remedy


def test_a_hopeless_table_is_not_read_to_its_end(tmp_path):
    rows = [kaggle_row(str(i), "[not json") for i in range(10_500)]
    reader = VoteReader(write_csv(tmp_path / "x.csv", rows), labelled=True)
    with pytest.raises(ArenaError, match="no row is left: 10000 of 10000 rows"):
        list(reader)
    assert reader.rows_read == 10_000


# --- properties -----------------------------------------------------------------------------------------------

ANY_TEXT = st.text(alphabet=st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=12)
TURNS = st.lists(st.tuples(*[st.none() | ANY_TEXT] * 3), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


def without_lone_surrogates(text: str | None) -> str:
    return (text or "").encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


@given(
    battles=st.lists(st.tuples(TURNS, st.sampled_from(VERDICTS)), min_size=1, max_size=4), name=st.sampled_from("pz")
)
@settings(deadline=None)
def test_any_battle_survives_the_cell_format(folder, battles, name):
    rows, expected = [], []
    for i, (turns, verdict) in enumerate(battles):
        texts = list(zip(*turns, strict=True))
        rows.append([str(i), "m1", "m2", *(cell(list(text)) for text in texts), *ONE_HOT[verdict]])
        expected.append(Battle(str(i), *(tuple(map(without_lone_surrogates, text)) for text in texts), verdict))
    assert read(write_csv(folder / f"x.{name}.gz" if name == "z" else folder / "x.csv", rows)) == expected
    columns = {column: [row[i] for row in rows] for i, column in enumerate(COLUMNS)}
    assert read(write_parquet(folder / "x.parquet", columns)) == expected


def never_a_traceback(path: Path) -> None:
    for labelled in (True, False):
        try:
            reader = VoteReader(path, labelled=labelled)
            for row, battle in reader:
                assert 1 <= row <= reader.rows_read
                assert isinstance(battle, Battle)
                assert battle.id
                assert len(battle.prompts) == len(battle.responses_a) == len(battle.responses_b) >= 1
                json.dumps(battle.prompts, ensure_ascii=False).encode("utf-8")
                assert battle.verdict in VERDICTS or (battle.verdict is None and not labelled)
        except ArenaError as error:
            assert error.what
            assert error.remedy
            assert str(path) in error.where


KNOWN = [*COLUMNS, "winner", "scored", "language", "question_id", "conversation_a", "conversation_b"]
ANY_CELL = st.one_of(
    st.text(max_size=12),
    st.sampled_from(["", "1", "0", "[]", '["a"]', '["a","b"]', "[null]", "{}", "tie", "model_a", '["\\ud83d"]', "[1]"]),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content"]), inner),
        max_leaves=6,
    ).map(json.dumps),
)


@given(
    columns=st.lists(st.sampled_from(KNOWN), unique=True, min_size=1) | st.lists(st.text(max_size=5), max_size=5),
    data=st.data(),
)
@settings(deadline=None, max_examples=150)
def test_any_table_is_read_or_refused(folder, columns, data):
    rows = data.draw(st.lists(st.lists(ANY_CELL, min_size=len(columns), max_size=len(columns)), max_size=6))
    never_a_traceback(write_csv(folder / "table.csv", rows, columns))
    if len(set(columns)) == len(columns):
        by_name = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        never_a_traceback(write_parquet(folder / "table.parquet", by_name))


ANY_BYTES = st.binary(max_size=60)
STARTS = [
    b"",
    b"\x1f\x8b\x08",
    b"PAR1",
    b"\xff\xfe",
    ",".join(COLUMNS).encode() + b"\n",
    b"id,prompt,response_a,response_b\n",
]


@given(start=st.sampled_from(STARTS), rest=ANY_BYTES, zipped=st.booleans())
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_read_or_refused(folder, start, rest, zipped):
    path = folder / "bytes.csv"
    path.write_bytes(gzip.compress(start + rest, 1) if zipped else start + rest)
    never_a_traceback(path)
