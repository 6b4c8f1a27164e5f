"""The pages: the numbers of the report, the texts of its listed battles, and nothing of the data becomes markup."""

import re
from html.parser import HTMLParser

import pandas as pd
import pytest
from scored_arena import arena, as_rewards, built, comparison

from scoring.report.findings import number, percent, shares
from scoring.report.page import LONGEST, shown_battles, write_compare_page, write_page

SECTIONS = {
    *("baselines", "classes", "confusion", "reliability", "calibration", "position", "slices", "training"),
    *("truncation", "merge", "checks", "worst", "battles", "provenance", "glossary"),
}
VOID = {"meta", "br", "hr", "img", "link", "input"}
HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&"


class Page(HTMLParser):
    """Collects tags, texts and table rows, and fails on a tag that is not closed in order."""

    def __init__(self, html: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th") and self.rows:
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another tag"

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.texts.append(data)
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def ids(self) -> set[str]:
        return {attributes["id"] for _, attributes in self.tags if attributes.get("id")}

    def row(self, start: str) -> list[str]:
        return next(row for row in self.rows if row and row[0].strip().startswith(start))

    def flags(self, level: str) -> int:
        return sum(attributes.get("class") == f"flag {level}" for _, attributes in self.tags)


@pytest.fixture
def report() -> dict:
    scores, texts, truth = arena(400, 3, both_orders=True)
    return built(scores, texts, truth)[0]


def shown(tmp_path, value: dict, write=write_page, *more) -> tuple[str, Page]:
    write(value, tmp_path / "page.html", *more)
    html = (tmp_path / "page.html").read_text(encoding="utf-8")
    return html, Page(html)


def test_the_page_holds_the_numbers_of_the_report(tmp_path, report):
    page = shown(tmp_path, report)[1]
    assert page.ids >= SECTIONS
    assert f"beats the class prior by {number(report['gain_over_prior'])} ±" in page.text
    assert page.row("TF-IDF")[-1].startswith(number(report["baselines"]["tfidf"]))
    assert page.row("Bayes")[-1].startswith(number(report["bayes"]))
    assert page.row("Tie")[1:4:2] == [str(report["class_counts"]["tie"]), number(report["per_class_log_loss"]["tie"])]
    total = sum(report["confusion"][1])
    cells = [f"{cell}{percent(cell / total)}" for cell in report["confusion"][1]]
    assert ["Bwins", *cells] in [[re.sub(r"\s", "", cell) for cell in row] for row in page.rows]
    worst, biased = report["worst"][0], report["most_biased"][0]
    assert [worst["id"], number(worst["log_loss"], 2)] in [[row[0], row[-1]] for row in page.rows]
    assert shares(biased["a_first"]) in [row[3] for row in page.rows if row[0] == biased["id"] and len(row) == 5]
    assert "rows_cut_share: 0.3333 fields_cut: a: 1" in page.text and "sha256: data: 4e5a0b8f" in page.text
    finnish = next(row for row in report["slices"]["language"] if row["name"] == "Finnish")
    assert page.row("Finnish")[-1] == str(finnish["rows"])
    assert page.row("loss not rising")[1] == "not applicable"
    for point in report["agreement"]["curve"]:
        assert f"{percent(point['bound'])} to {percent(point['agreement'])}" in page.text
    for row, more in ((worst, ""), (biased, " --swapped")):
        assert f"python run.py show {row['id']} -e demo --stage sft{more}" in page.text


def test_the_page_is_small_self_contained_and_labelled(tmp_path, report):
    html, page = shown(tmp_path, report)
    assert len(html.encode()) < 500_000
    assert not [word for word in ("http://", "https://", "url(") if word in html]
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.tags}
    assert "default-src 'none'" in html and ("html", {"lang": "en"}) in page.tags
    drawings = [a for tag, a in page.tags if tag == "svg" and "preserveaspectratio" not in a]
    assert len(drawings) > 10 and all(a.get("aria-hidden") == "true" or a.get("aria-label") for a in drawings)
    assert html.count("<caption") == html.count("<table")
    assert "prefers-color-scheme: dark" in html and "@media print" in html
    targets = {a["href"].removeprefix("#") for tag, a in page.tags if tag == "a"}
    assert targets and targets <= page.ids


def few_rewards():
    scores, texts, _ = arena(40, 9)
    nothing = {"merge_gate": None, "checks": [], "loss_curve": []}
    return built(as_rewards(scores.assign(language=None)), texts, stage="dpo_reward", **nothing)[0]


def no_ties():
    scores, texts, _ = arena(300, 10)
    keep = (scores["verdict"] != "tie").to_numpy()
    return built(scores[keep], texts[keep], target_prior={"a": 0.3, "b": 0.3, "tie": 0.4})[0]


def one_prompt():
    scores, texts, _ = arena(60, 11)
    return built(scores.assign(group="one"), texts, loss_curve=[{"step": 1, "loss": None, "eval_loss": 0.5}])[0]


@pytest.mark.parametrize("make", [few_rewards, no_ties, one_prompt])
def test_what_was_not_measured_is_shown_as_missing(tmp_path, make):
    report = make()
    html, page = shown(tmp_path, report)
    assert page.ids >= SECTIONS and "None" not in page.text and not re.search(r"\b(nan|inf)\b", html.lower())
    red = sum(flag["level"] == "red" for flag in report["flags"])
    assert page.flags("red") == red and (not red or html.index("flag red") < html.index("<h1>"))


def test_the_comparison_says_who_leads_and_what_chance_explains(tmp_path):
    compared = comparison()
    html, page = shown(tmp_path, compared, write_compare_page)
    assert {"baselines", "differences", "table", "blend"} <= page.ids and page.flags("red") == 0
    assert "sft is better" in page.row("sft − rm")[0] and page.row("rm")[-1].startswith("1.099")
    assert "Chance alone may have put it ahead of" in page.text
    assert compared["blend"]["reason"] in page.text.replace("Cross", "cross") and "https://" not in html
    compared["flags"]["sft"] = ["It does not beat the prior."]
    page = shown(tmp_path, compared, write_compare_page)[1]
    assert page.flags("red") == 1 and "sft: It does not beat the prior." in page.text
    compared |= {"table": compared["table"][:1], "differences": [], "bayes": None}
    assert "at least two stages must have run" in shown(tmp_path, compared, write_compare_page)[1].text


TEXTS = [("ask", "word " * 1000, "no"), ("x", "y", "z"), (f"{HOSTILE} \x1b[31m \u202eevil", "1", "3")]
LISTS = {"worst": [{"id": "hostile"}, {"id": "long"}], "most_biased": [{"id": "long"}]}


@pytest.fixture
def data(tmp_path):
    """An exported folder's tables: a long battle, one of training, and a hostile one whose pair is a single turn."""
    ids, names = ["long", "train", "hostile"], ("prompt", "response_a", "response_b")
    turns = [[[text] for text in texts] for texts in TEXTS]
    for column, second in zip(turns[2], ("second", "2", "4"), strict=True):
        column.append(second)
    rows = {"split": ["valid", "train", "valid"], "verdict": ["a", "b", "tie"], "dropped": [0, 0, 3]}
    rows |= {"language": None, "shares": None}
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    plural = ("prompts", "responses_a", "responses_b")
    pd.DataFrame(turns, columns=plural).assign(id=ids).to_parquet(tmp_path / "battles.parquet")
    pd.DataFrame(TEXTS, columns=names).assign(id=ids, dropped=[0, 0, 1]).to_parquet(tmp_path / "pairs.parquet")
    return tmp_path


@pytest.mark.parametrize(("stage", "dropped", "turns"), [("sft", 3, 2), ("dpo_judge", 3, 2), ("rm", 1, 1)])
def test_each_listed_battle_comes_once_with_the_texts_that_the_stage_was_fed(data, stage, dropped, turns):
    hostile, long = shown_battles(data, "valid", LISTS, stage)
    assert (hostile["id"], hostile["dropped"], len(hostile["turns"])) == ("hostile", dropped, turns)
    assert "\x1b" not in hostile["turns"][0]["prompt"] and "\\u202eevil" in hostile["turns"][0]["prompt"]
    answer = long["turns"][0]["response_a"]
    assert answer.startswith("word word") and len(answer) < LONGEST + 60 and long["dropped"] == 0
    assert f"{5000 - LONGEST:,} characters are not shown here" in answer


def test_the_page_links_each_listed_row_to_its_texts(data, tmp_path, report):
    worst, biased = report["worst"][:2], report["most_biased"][:1]
    worst[0]["id"], worst[1]["id"], biased[0]["id"] = "hostile", "long", "long"
    report |= {"worst": worst, "most_biased": biased}
    html, page = shown(tmp_path, report, write_page, shown_battles(data, "valid", report, "sft"))
    assert html.count('<a href="#battle-1">hostile</a>') == 1 and html.count('<a href="#battle-2">long</a>') == 2
    assert {"battle-1", "battle-2"} <= page.ids and "battle-3" not in page.ids
    assert "turn 4" in page.text and "turn 5" in page.text, "turns count as in the vote, the dropped ones included"
    assert f"A first: A wins {percent(biased[0]['a_first'][0])}, B wins" in page.text
    assert "<script" not in html and "<img" not in html and "&lt;script&gt;alert(1)" in html
    assert "not shown" in shown(tmp_path, report)[1].text.lower(), "without the texts the page says so"
