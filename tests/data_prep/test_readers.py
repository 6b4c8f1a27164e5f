"""Readers: any way to write texts with any way to write verdicts, in any file; bad rows are not bad files."""

import csv
import gzip
import io
import json
import random
import tracemalloc
from collections import Counter
from contextlib import chdir
from pathlib import Path

import pyarrow as pa
import pytest
from fuzz_targets import TARGETS, never_crashes
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle, swap
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


def write(path: Path, records: list[dict]) -> Path:
    """Write records in the form that the file's name ends with; in a CSV what is no text becomes JSON."""
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist(records), path)
    elif path.suffix == ".csv":
        cells = [[v if isinstance(v, str) else "" if v is None else json.dumps(v) for v in r.values()] for r in records]
        write_csv(path, cells, list(records[0]))
    else:
        one_list = path.suffix == ".json"
        path.write_text(json.dumps(records, indent=1) if one_list else "".join(f"{json.dumps(r)}\n" for r in records))
    return path


def error_of(path: Path, labelled: bool = True) -> ArenaError:
    with pytest.raises(ArenaError) as caught:
        list(VoteReader(path, labelled=labelled))
    error = caught.value
    assert error.remedy and str(path) in error.where
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
    assert shares == sorted(shares) and shares[0] < 0.35 and shares[-1] > 0.6 and len(set(shares)) > 3
    assert abs(shares[1500] - 0.5) < 0.2
    assert reader.share == 1.0


def messages(*texts, role="role", content="content", names=("user", "assistant")) -> list[dict]:
    return [{role: names[i % 2], content: text} for i, text in enumerate(texts)]


def parts(*texts) -> list[dict]:
    return messages(*([{"type": "text", "text": text, "image": None}] for text in texts))


ANSWERS = ("prompt", "response_a", "response_b")
BOTH = ("conversation_a", "conversation_b")
PAIR = ("prompt", "chosen", "rejected")
THREE = (("hi", "more"), ("a1", ""), ("b1", "b2"))
TALKS = (("hi", "a1", "more", ""), ("hi", "b1", "more", "b2"))
SHAREGPT = {"role": "from", "content": "value", "names": ("human", "gpt")}
# What is said of them, the kind of file, the columns and their cells: all of them hold THREE.
TEXTS = [
    ("JSON lists of turns", "csv", ANSWERS, ['["hi","more"]', '["a1",null]', '["b1","b2"]']),
    ("JSON lists of turns", "parquet", ANSWERS, ['["hi","more"]', '["a1",""]', '["b1","b2"]']),
    ("lists of turns", "parquet", ANSWERS, [["hi", "more"], ["a1", None], ["b1", "b2"]]),
    ("lists of turns", "jsonl", ANSWERS, [["hi", "more"], ["a1", None], ["b1", "b2"]]),
    ("Python lists of turns", "csv", ANSWERS, ["['hi', 'more']", "['a1', None]", "[\"b1\", 'b2']"]),
    ("Python lists of turns", "csv", ANSWERS, ["['hi', \"more\"]", "['a1', '']", '["b1", "b2"]']),
    ("lists of messages", "parquet", BOTH, [messages(*each) for each in TALKS]),
    ("lists of messages", "parquet", BOTH, [parts(*each) for each in TALKS]),
    ("lists of messages", "json", BOTH, [messages(*each, **SHAREGPT) for each in TALKS]),
    ("JSON lists of messages", "csv", BOTH, [messages(*each) for each in TALKS]),
    ("JSON lists of messages", "csv", BOTH, [parts(*each) for each in TALKS]),
    ("Python lists of messages", "csv", BOTH, [str(messages(*each)) for each in TALKS]),
    ("lists of messages in prompt, plain texts in", "jsonl", ANSWERS, [messages("hi", "a1", "more"), "", "b2"]),
]
VOTES = [
    ("one-hot", PROBABILITY_COLUMNS, [("1", "0", "0"), (" 0", "1 ", "0.00"), ("0", "0", "1")]),
    ("one-hot", PROBABILITY_COLUMNS, [(True, False, False), (False, True, False), (False, False, True)]),
    ("one-hot", PROBABILITY_COLUMNS, [("TRUE", "False", "false"), ("0.0", "1.0", "0"), ("0", "FALSE", "True")]),
    ("winner", ("winner",), [("model_a",), ("model_b",), ("tie (bothbad)",)]),
    ("winner", ("winner",), [("A",), ("b",), ("Tie",)]),
    ("winner", ("winner",), [("Model A",), ("response_b",), ("both_bad",)]),
    ("shares", PROBABILITY_COLUMNS, [(0.98, 0.01, 0.01), (0.0, 1.0, 0.0), ("0", "0", "1")]),
]


def table(path: Path, columns, cells, votes, names) -> Path:
    """Write a table of one battle for each vote, all with the same texts."""
    if path.suffix == ".parquet":
        votes = [tuple(map(str, vote)) for vote in votes]
    texts = dict(zip(columns, cells, strict=True))
    return write(path, [{"id": f"{i}", **texts, **dict(zip(names, vote, strict=True))} for i, vote in enumerate(votes)])


@pytest.mark.parametrize("votes", VOTES, ids=lambda votes: f"{votes[0]} {votes[2][0][0]}")
@pytest.mark.parametrize("texts", TEXTS, ids=lambda texts: f"{texts[0]} {texts[1]}")
def test_any_texts_go_with_any_verdicts(tmp_path, texts, votes):
    said, suffix, columns, cells = texts
    reader = VoteReader(table(tmp_path / f"x.{suffix}", columns, cells, votes[2], votes[1]), labelled=True)
    battles = [battle for _, battle in reader]
    assert reader.facts["texts"].startswith(said) and reader.facts["verdicts"] == votes[0]
    assert [battle.verdict for battle in battles] == ["a", "b", "tie"] and reader.rejected == []
    for battle in battles:
        shown = (battle.prompts, battle.responses_a, battle.responses_b)
        assert shown == (THREE if "plain" not in said else (THREE[0], ("a1", ""), ("a1", "b2")))
    assert reader.facts["verdicts_of_shares"] == sum(b.shares is not None for b in battles) == (votes[0] == "shares")
    assert reader.facts["verdict_counts"] == {"a": 1, "b": 1, "tie": 1}


HUMAN = "\n\nHuman: hi\n\nAssistant: a1\n\nHuman: more\n\nAssistant: "


@pytest.mark.parametrize(
    ("suffix", "columns", "cells"),
    [
        ("csv", PAIR, ["hi", "good", "bad"]),
        ("parquet", PAIR, ["hi", messages("hi", "good"), messages("hi", "bad")]),  # UltraFeedback
        ("jsonl", PAIR, [messages("hi"), messages("hi", "good")[1:], messages("hi", "bad")[1:]]),  # TRL
        ("jsonl", PAIR, [messages("hi", "a1", "more", **SHAREGPT), {"from": "gpt", "value": "good"}, "bad"]),
        ("json", PAIR, [messages("hi", "a1", "more"), "good", "bad"]),
        ("jsonl", PAIR[1:], [messages("hi", "a1", "more", "good"), messages("hi", "a1", "more", "bad")]),
        ("csv", PAIR[1:], [f"{HUMAN}good", f"{HUMAN}bad"]),  # HH-RLHF
        ("csv", PAIR, [HUMAN, "good", "bad"]),  # Nectar
    ],
)
def test_of_preferences_the_chosen_side_is_drawn(tmp_path, suffix, columns, cells):
    records = [dict(zip(columns, cells, strict=True)) for _ in range(200)]
    reader = VoteReader(write(tmp_path / f"x.{suffix}", records), labelled=True)
    battles = [battle for _, battle in reader]
    for battle in battles:
        chosen, rejected = battle.responses_a, battle.responses_b
        chosen, rejected = (chosen, rejected) if battle.verdict == "a" else (rejected, chosen)
        assert (chosen[-1], rejected[-1]) == ("good", "bad") and chosen[:-1] == rejected[:-1]
        assert battle.prompts in (("hi",), ("hi", "more"))
    assert 70 < reader.facts["verdict_counts"]["a"] < 130 and reader.has_verdicts
    assert [battle.id for battle in battles[:2]] == ["1", "2"] and reader.facts["ids"] == "row numbers"
    assert battles == [battle for _, battle in reader]


@pytest.mark.parametrize(
    ("records", "said"),
    [
        ([("['not', but a text", "[]", "x")] * 3, "plain texts"),
        ([('["a list"]', "a", "b"), ("two\nlines", "", "b"), ("p", "c", None)], "plain texts (1 of the first 3"),
        ([("Write a JSON list", '["a", "b"]', '["c"]'), ("and now prose", "once", "upon")] * 9, "plain texts"),
        ([('["q"]', '["a"]', '["b"]')] * 30 + [("x", "x", "x")] * 9, "JSON lists of turns"),
        ([('["q"]', '["a"]', '["b"]')] * 30 + [("['x']", "x", "x")] * 2, "JSON lists of turns"),
        ([("", "", "")] + [("['q']", '["it\'s"]', '["b\'s"]')] * 9, "Python lists of turns"),
    ],
)
def test_most_cells_decide_how_texts_are_read(tmp_path, records, said):
    path = write(tmp_path / "x.csv", [dict(zip(ANSWERS, texts, strict=True)) for texts in records])
    assert VoteReader(path, labelled=False).facts["texts"].startswith(said)


def test_shares_draw_verdicts_by_id_in_their_proportion(tmp_path):
    votes = [(0, 0, 1)] * 70 + [(0.5, 0.3, 0.2)] * 3000  # the first rows, which are looked at, hold none
    path = table(tmp_path / "x.csv", ANSWERS, ["q", "a", "b"], votes, PROBABILITY_COLUMNS)
    reader = VoteReader(path, labelled=True)
    battles = [battle for _, battle in reader]
    assert battles == [battle for _, battle in reader]
    counts = reader.facts["verdict_counts"]
    assert all(abs(counts[each] / 3000 - share) < 0.03 for each, share in zip("ab", votes[-1], strict=False))
    assert battles[-1].shares == votes[-1] and swap(battles[-1]).shares == (0.3, 0.5, 0.2)


def mt_bench(**changed) -> list[dict]:
    both = {"conversation_a": messages("hi", "a1", "more", "a2"), "conversation_b": messages("hi", "b1", "more", "b2")}
    one = {"question_id": 81, "model_a": "m", "model_b": "n", "winner": "model_a", "judge": "expert_1"} | both
    return [one | {"turn": turn} | changed for turn in (1, 2)]


def test_ids_that_repeat_beside_judge_and_turn_are_made_of_all_and_the_judged_turn_is_the_last(tmp_path):
    reader = VoteReader(write(tmp_path / "x.parquet", mt_bench()), labelled=True)
    battles = [battle for _, battle in reader]
    assert [battle.id for battle in battles] == ["81:m:n:expert_1:1", "81:m:n:expert_1:2"]
    assert [battle.responses_b for battle in battles] == [("b1",), ("b1", "b2")]
    assert reader.facts["ids"] == "question_id, model_a, model_b, judge, turn"
    error = error_of(write(tmp_path / "y.parquet", mt_bench(turn=2)))
    assert "'81:m:n:expert_1:2' is in row 1 and again in row 2" in error.what
    unique = [row | {"question_id": i} for i, row in enumerate(mt_bench(turn=2.0))]
    assert [battle.id for battle in read(write(tmp_path / "z.jsonl", unique))] == ["0", "1"]
    assert "turn 3 was judged, and turns count from" in error_of(write(tmp_path / "w.jsonl", mt_bench(turn=3)[:1])).what


def test_a_system_message_stands_before_the_question_and_language_and_anony_are_kept(tmp_path):
    talk = [{"role": "system", "content": "Be brief."}, *messages("hi", "a")]
    records = [
        {"id": i, "conversation_a": talk, "conversation_b": talk, "winner": "tie", "language": said, "anony": i < 2}
        for i, said in enumerate(("German", None, " "))
    ]
    reader = VoteReader(write(tmp_path / "x.jsonl", records), labelled=True)
    battles = [battle for _, battle in reader]
    assert battles[0].prompts == ("Be brief.\n\nhi",) and [b.language for b in battles] == ["German", None, None]
    assert reader.facts["not_anonymous"] == 1


FIRST_TURNS = ("How does a kettle work?", "Shorter, please.")


CASES = {  # how many battles each holds
    "JSON lists of turns": {"ok_test.csv": 12, "test_language.csv": 12, "test_one_bad.csv": 11, "part_one.csv": 40}
    | {"two_sources/b_valid.csv": 20, "ok_train.csv": 60, "utf8.csv": 60, "bool_flags.csv": 60},
    "lists of messages": dict.fromkeys(("mt_bench_unique_ids.parquet", "arena140k.parquet", "flat_bothbad.parquet"), 60)
    | dict.fromkeys(("battles.jsonl", "battles.jsonl.gz", "battles.json"), 60),
    "Python lists of turns": {"python_lists.csv": 60},
    "plain texts": {"plain_onehot.csv": 60},
}


@pytest.mark.parametrize(("texts", "file"), [(texts, file) for texts, files in CASES.items() for file in files])
def test_the_folder_of_cases(texts, file):
    path = REAL.parent / "cases" / file
    if not path.exists():
        pytest.skip("the folder of cases is not beside this checkout")
    reader = VoteReader(path, labelled="test" not in file)
    battles = [battle for _, battle in reader]
    assert (len(battles), reader.facts["texts"]) == (CASES[texts][file], texts)
    assert not [battle for battle in battles if battle.prompts[0][:1] in ("[", "{", "'")]
    if reader.labelled and len(battles) == 60:
        assert Counter(battle.verdict for battle in battles) == {"a": 20, "b": 20, "tie": 20}
    if file.startswith("mt_bench"):
        assert [battle.turns for battle in battles[:2]] == [1, 2]
    if file == "test_language.csv":
        assert battles[0].language == "English" and battles[0].prompts == FIRST_TURNS


def many(columns, *rows: list, votes=None) -> list[dict]:
    """Return records with verdicts, the given texts by turns."""
    found = [dict(zip(columns, rows[i % len(rows)], strict=True)) for i in range(12)]
    return [{"id": i, **row, "winner": "model_a"} for i, row in enumerate(found)]


IMAGE = [{"role": "user", "content": [{"type": "image", "image": "a.png"}]}, *messages("", "x")[1:]]
URL = [{"role": "user", "content": [{"type": "text", "text": "?"}, {"type": "image_url"}]}, *messages("", "x")[1:]]
AS_JSON = "json.dumps"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 1\n", ["git-LFS pointer", "git lfs pull"]),
        (b"<html><body>", ["is a web page", "login"]),
        (many(BOTH, [IMAGE, IMAGE]), ["12 of 12 rows", "holds 'image'", "texts alone", "leave out"]),
        (many(BOTH, [URL, URL]), ["holds 'image_url'", "leave out"]),
        (many((*ANSWERS, "images"), ["q", "a", "b", ["x.png"]]), ["battles about images (column images)"]),
        (many(ANSWERS, ["['a' 'b']", "['c'\n 'd']", "['e' 'f']"]), ["12 rows", "pandas' text of lists", AS_JSON]),
        (many(ANSWERS, ["['a' \"b's\"]", "['c' 'd']", "['e']"]), ["pandas' text of lists", AS_JSON]),
        (many(BOTH, ["[{'role': 'user', 'content': 'x'}\n {'role': 'assistant', 'content': 'y'}]"] * 2), [AS_JSON]),
        (many((*ANSWERS, "judge"), ["q", "a", "b", "gpt-4"]), ["verdicts of a model", "column judge: gpt-4", "human"]),
        (many((*ANSWERS, "judge"), ["q", "a", "b", ["claude-v1", "pair"]]), ["verdicts of a model"]),
        (many((*ANSWERS, "judge"), ["q", "a", "b", "Qwen2-72B"]), ["verdicts of a model", "remove the column judge"]),
        (many(PAIR[1:], ["good", "bad"]), ["a text without its prompt", "--columns prompt=COLUMN"]),
        (many(ANSWERS, [["q"], ["a"], [7]], [["q"], ["a"], [8]]), ["12 rows, the first is row 1 (", "not a text: 7"]),
        (b'{"id": {"0": 1}, "prompt": {"0": "x"}}', ["JSON by columns", "orient='records'"]),
        (b'[{"id": 1, "prompt": "x"},\n {"id": 2, "pro', ["is not JSON", "object 2", "cut off"]),
        (b'[{"id": 1}, {"id": 2} {"id": 3} oops]', ["is not JSON", "object 4"]),
        (b"[]", ["holds no JSON object"]),
        (b"{oops\n", ["is not JSON", "object 1"]),
        (b'{"id": "\xfc"}\n', ["is not UTF-8", "0xfc"]),
    ],
)
def test_what_cannot_be_read_is_named_with_its_remedy(tmp_path, content, words):
    path = tmp_path / "votes"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        write(path, content)
    said = str(error_of(path))
    assert not [each for each in words if each not in said], said


@pytest.mark.parametrize(  # tests/bad_inputs/tables.py has others
    ("votes", "words"),
    [
        (["1,0,0", ",,", ",,", ",,"], ["row 2", "no winner", "3 of 4 rows", "ties"]),
        (["model_a", "", "tie", ""], ["row 2", "no winner", "2 of 4 rows", "both are bad"]),
        (["model_a", "model_c", "tie", ""], ["row 2", "unknown winner 'model_c'", "2 of 4 rows", "one of these words"]),
        ([".5,.3,.2"] * 3 + [".5,.3,.1"], ["row 4", "no clear winner, nor shares that sum to 1"]),
        (["1,0,0,B", "0,0,1,A", "0,1,0,"], ["row 1", "2 of 3 rows", "winner says b, and winner_model_a, winner_mod"]),
    ],
)
def test_rows_without_a_winner_are_counted(tmp_path, votes, words):
    columns = (*PROBABILITY_COLUMNS, "winner")[: 1 + votes[0].count(",")] if "," in votes[0] else ("winner",)
    path = table(tmp_path / "x.csv", ANSWERS, ["q", "a", "b"], [vote.split(",") for vote in votes], columns)
    said = str(error_of(path))
    assert not [each for each in words if each not in said], said
    assert len(read(path, labelled=False)) == len(votes)


@pytest.mark.parametrize(
    ("columns", "labelled", "what", "remedy"),
    [
        (COLUMNS[:5] + COLUMNS[6:8], True, "['response_b', 'winner_tie']", "add or rename"),
        (["id", "conversation_a", "winner"], True, "['conversation_b']", "add or rename"),
        (["id", "conversation_a", "conversation_b"], True, "['winner']", "this is a table without verdicts"),
        (["question", "left", "right", "label"], True, "4 column(s)", "prompt=question,response_a=left,response_b="),
        (["ID", *ANSWERS, "winner"], True, "['id']", "did you mean --columns id=ID?"),
        (["id", "prompts", "response_a", "response_b"], False, "['prompt']", "prompt=prompts?"),
        (["chosen", "prompt"], True, "['rejected']", "add or rename"),
    ],
)
def test_a_table_that_lacks_columns_is_recognised(tmp_path, columns, labelled, what, remedy):
    error = error_of(write_csv(tmp_path / "x.csv", [["1"] * len(columns)], columns), labelled=labelled)
    assert what in error.what and str(columns)[1:30] in error.what and remedy in error.remedy


def test_plain_texts_and_turns_do_not_mix_in_one_experiment(tmp_path):
    vote = ([("A",)], ("winner",))
    kinds = {"plain": ["q", "a", "b"], "turns": ['["q"]', '["a"]', '["b"]']}
    paths = [table(tmp_path / f"{name}.csv", ANSWERS, cells, *vote) for name, cells in kinds.items()]
    paths.append(table(tmp_path / "z.jsonl", BOTH, [messages("q", "a")] * 2, *vote))
    plain, turns, talk = (VoteReader(path, labelled=True) for path in paths)
    for train, test in ((plain, plain), (turns, turns), (talk, turns), (turns, talk), (talk, plain)):
        train.require_same_texts(test)
    for train, test in ((plain, turns), (turns, plain)):
        with pytest.raises(ArenaError, match="plain texts") as caught:
            train.require_same_texts(test)
        assert str(test.path) in caught.value.where and "JSON lists of turns" in caught.value.what


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
    assert battle.responses_a == battle.responses_b == (text,) and "".join(battle.responses_a).encode("utf-8")


def test_columns_may_stand_in_any_order_after_a_byte_order_mark_and_between_blank_lines(tmp_path):
    columns = ["language", *reversed(COLUMNS), "extra"]
    rows = [["German", *reversed(kaggle_row(str(i), verdict="tie")), "?"] for i in range(2)]
    path = write_csv(tmp_path / "x.csv", rows, columns, encoding="utf-8-sig")
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\r\n\r\n"))
    reader = VoteReader(path, labelled=True)
    assert [row for row, _ in reader] == [1, 2]
    assert [(b.id, b.language, b.verdict) for b in read(path)] == [("0", "German", "tie"), ("1", "German", "tie")]


@pytest.mark.parametrize(
    ("file", "rows", "verdicts"),
    [
        ("arena/train_natural.csv", 1479, {"a": 530, "b": 506, "tie": 443}),
        ("arena/train_clean.csv.gz", 13579, {"a": 6584, "b": 6552, "tie": 443}),
        ("mtbench/mtbench_human.csv", 1751, {"a": 294, "b": 1040, "tie": 417}),
        ("arena/test.csv", 3, {None: 3}),
    ],
)
def test_real_votes(real_data, file, rows, verdicts):
    path = real_data / file
    reader = VoteReader(path, labelled=None not in verdicts)
    battles = [battle for _, battle in reader]
    assert (reader.facts["texts"], reader.rows_read, reader.rejected) == ("JSON lists of turns", rows, [])
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


def test_a_lost_quote_costs_its_rows_only(tmp_path):
    path = write_csv(tmp_path / "x.csv", good_rows(300))
    lines = path.read_bytes().split(b"\r\n")
    lines[5] = lines[5].replace(b'"]"', b'"]', 1)
    path.write_bytes(b"\r\n".join(lines))
    reader = VoteReader(path, labelled=True)
    assert 298 <= len(list(reader)) <= 299 and "is not valid CSV" in reader.rejected[0].reason
    assert reader.rejected[0].row == 5


def test_scraps_of_a_broken_row_are_not_duplicate_ids(tmp_path):
    rows = [[f"{i}", f"p{i}\n}}\n}}\nend", "a", "b", "model_a", ""] for i in range(500)]
    path = write_csv(tmp_path / "x.csv", rows, ["id", *ANSWERS, "winner", "language"])
    path.write_bytes(path.read_bytes().replace(b'"p7\n', b'p7"\n'))
    reader = VoteReader(path, labelled=True)
    assert len(list(reader)) == 499
    assert [(rejected.id, rejected.row) for rejected in reader.rejected[:3]] == [("7", 8), ("}", 9), ("}", 10)]


def test_one_percent_is_allowed_and_more_is_not(tmp_path):
    bad = [kaggle_row(f"bad{i}", "{}") for i in range(3)]
    reader = VoteReader(write_csv(tmp_path / "x.csv", [*good_rows(198), *bad[:2]]), labelled=True)
    assert len(list(reader)) == 198
    error = error_of(write_csv(tmp_path / "y.csv", [*good_rows(197), *bad]))
    assert "3 of 200 rows" in error.what and "row 198 (id bad0): prompt is not a JSON list" in error.what
    assert error.where.endswith("y.csv row 198")


def test_a_hopeless_table_is_not_read_to_its_end(tmp_path):
    rows = [kaggle_row(str(i), "[not json") for i in range(10_500)]
    reader = VoteReader(write_csv(tmp_path / "x.csv", rows), labelled=True)
    with pytest.raises(ArenaError, match="no row is left: 10000 of 10000 rows"):
        list(reader)
    assert reader.rows_read == 10_000


ANY_TEXT = st.text(alphabet=st.one_of(st.characters(), st.characters(categories=["Cs"])), max_size=12)
TURNS = st.lists(st.tuples(*[st.none() | ANY_TEXT] * 3), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("properties")


@given(st.lists(st.tuples(TURNS, st.sampled_from(VERDICTS)), min_size=1, max_size=4), st.sampled_from("pz"))
@settings(deadline=None)
def test_any_battle_survives_the_cell_format(folder, battles, name):
    rows, expected = [], []
    for i, (turns, verdict) in enumerate(battles):
        texts = list(zip(*turns, strict=True))
        rows.append([str(i), "m1", "m2", *(cell(list(text)) for text in texts), *ONE_HOT[verdict]])
        raw = [[(text or "").encode("utf-16-le", "surrogatepass") for text in column] for column in texts]
        read_back = (tuple(text.decode("utf-16-le", "replace") for text in column) for column in raw)
        expected.append(Battle(str(i), *read_back, verdict, model_a="m1", model_b="m2"))
    assert read(write_csv(folder / f"x.{name}.gz" if name == "z" else folder / "x.csv", rows)) == expected
    columns = {column: [row[i] for row in rows] for i, column in enumerate(COLUMNS)}
    assert read(write_parquet(folder / "x.parquet", columns)) == expected


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


@given(st.lists(st.sampled_from(KNOWN), unique=True, min_size=1) | st.lists(st.text(max_size=5), max_size=5), st.data())
@settings(deadline=None, max_examples=150)
def test_any_table_is_read_or_refused(folder, columns, data):
    rows = data.draw(st.lists(st.lists(ANY_CELL, min_size=len(columns), max_size=len(columns)), max_size=6))
    tables = [write_csv(folder / "table.csv", rows, columns)]
    if len(set(columns)) == len(columns):
        by_name = {name: [row[i] for row in rows] for i, name in enumerate(columns)}
        tables.append(write_parquet(folder / "table.parquet", by_name))
    with chdir(folder):
        for table_ in tables:
            never_crashes(TARGETS["csv"], table_.read_bytes())
