import pyarrow as pa
import pytest
from pyarrow import parquet

from scoring.report.page import LONGEST, shown_battles, write_page

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)> \x1b[31m \u202eevil"


@pytest.fixture
def data(tmp_path):
    """An exported folder's two tables: a long battle, a hostile one of two turns, a plain one, and one of training."""
    rows = {
        "split": ["valid", "train", "valid", "valid"],
        "verdict": ["a", "b", "tie", "b"],
        "language": [None] * 4,
        "dropped": [0, 0, 3, 0],
    }
    texts = [[["ask"], ["word " * 1000], ["no"]], [["x"], ["y"], ["z"]], [[HOSTILE, "second"], ["1", "2"], ["3", "4"]]]
    texts.append([["plain"], ["yes"], ["no"]])
    columns = dict(zip(("prompts", "responses_a", "responses_b"), map(list, zip(*texts, strict=True)), strict=True))
    parquet.write_table(pa.table(rows), tmp_path / "rows.parquet")
    parquet.write_table(
        pa.table({"id": ["long", "train", "hostile", "plain"], **columns}), tmp_path / "battles.parquet"
    )
    return tmp_path


REPORT = {
    "experiment": "exam",
    "stage": "sft",
    "worst": [
        {"id": "hostile", "verdict": "tie", "probabilities": {"a": 0.9, "b": 0.08, "tie": 0.02}, "log_loss": 3.9},
        {"id": "long", "verdict": "a", "probabilities": {"a": 0.1, "b": 0.8, "tie": 0.1}, "log_loss": 2.3},
    ],
    "most_biased": [{"id": "long", "change": 0.5, "a_first": [0.7, 0.2, 0.1], "b_first": [0.2, 0.7, 0.1]}],
}


def test_each_listed_battle_comes_once_with_its_texts(data):
    hostile, long = shown_battles(data, "valid", REPORT, "sft")
    assert (hostile["id"], hostile["verdict"], hostile["dropped"], len(hostile["turns"])) == ("hostile", "tie", 3, 2)
    assert hostile["turns"][1] == {"prompt": "second", "response_a": "2", "response_b": "4"}
    assert "\x1b" not in hostile["turns"][0]["prompt"] and "\\u202eevil" in hostile["turns"][0]["prompt"]
    answer = long["turns"][0]["response_a"]
    assert answer.startswith("word word") and len(answer) < LONGEST + 60
    assert f"{5000 - LONGEST:,} characters are not shown here" in answer
    assert shown_battles(data, "valid", {}, "sft") == []


def test_stages_of_pairs_show_the_pair_that_was_fed(data):
    texts = [("ask", "word", "no"), ("x", "y", "z"), ("second", "2", "4\n\n### User\nmore"), ("plain", "yes", "no")]
    names = ("prompt", "response_a", "response_b")
    columns = dict(zip(names, map(list, zip(*texts, strict=True)), strict=True))
    ids = ["long", "train", "hostile", "plain"]
    parquet.write_table(pa.table({"id": ids, **columns, "dropped": [0, 0, 1, 0]}), data / "pairs.parquet")
    for stage in ("rm", "dpo_reward"):
        hostile, long = shown_battles(data, "valid", REPORT, stage)
        assert (hostile["id"], hostile["verdict"], hostile["dropped"]) == ("hostile", "tie", 1)
        assert hostile["turns"] == [dict(zip(names, texts[2], strict=True))]
        assert long["turns"] == [dict(zip(names, texts[0], strict=True))] and long["dropped"] == 0
    assert shown_battles(data, "valid", REPORT, "dpo_judge")[0]["dropped"] == 3


def test_the_page_links_each_row_to_its_texts(data, tmp_path):
    write_page(REPORT, tmp_path / "report.html", shown_battles(data, "valid", REPORT, "sft"))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert '<a href="#battle-1">hostile</a>' in html and html.count('<a href="#battle-2">long</a>') == 2
    assert html.count('id="battle-1"') == html.count('id="battle-2"') == 1 and 'id="battle-3"' not in html
    assert "python run.py show hostile -e exam --stage sft" in html
    assert "User, turn 4" in html and "User, turn 5" in html, "turns count as in the vote, the dropped ones included"
    assert "A first: A wins 70%, B wins 20%, Tie 10%. B first: A wins 20%" in " ".join(html.split())
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;alert(1)" in html
    write_page(REPORT, tmp_path / "bare.html")
    bare = (tmp_path / "bare.html").read_text(encoding="utf-8")
    assert "#battle-1" not in bare and "the texts are not at hand" in bare
