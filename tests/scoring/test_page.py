"""The pages: what they say, that nothing of the data becomes markup, and that no missing figure breaks them."""

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from scoring.report import page
from scoring.report.formatting import percent
from scoring.report.page import write_compare_page, write_page

ASSETS = Path(__file__).parent / "assets"
SECTIONS = (
    *("ladder", "classes", "confusion", "reliability", "calibration", "position", "slices", "training"),
    *("truncation", "merge", "checks", "worst", "battles", "provenance", "glossary"),
)
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
        assert self.open, f"</{tag}> closes nothing"
        assert self.open.pop() == tag

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
        return next(row for row in self.rows if row and row[0].startswith(start))


@pytest.fixture
def report() -> dict:
    return json.loads((ASSETS / "report.json").read_text())


@pytest.fixture
def comparison() -> dict:
    return json.loads((ASSETS / "comparison.json").read_text())


def shown(tmp_path: Path, value: dict, write=write_page) -> tuple[str, Page]:
    path = tmp_path / "page.html"
    write(value, path)
    html = path.read_text(encoding="utf-8")
    return html, Page(html)


def banners(found: Page, level: str) -> int:
    return sum(attributes.get("class") == f"flag {level}" for _, attributes in found.tags)


def test_headline_and_figures_say_the_result(tmp_path, report):
    _, found = shown(tmp_path, report)
    assert "The judge beats the class prior by 0.067 ± 0.030 and learned 64% of what could be learned." in found.text
    assert "log loss is 1.010 (95% interval 0.979 to 1.043) on 1,240 battles" in found.text
    assert "validation fold, which was not trained on" in found.text
    assert banners(found, "red") == 0
    assert banners(found, "amber") == 1


def test_tables_hold_the_numbers_of_the_report(tmp_path, report):
    _, found = shown(tmp_path, report)
    assert found.row("TF-IDF")[-1].startswith("1.012")
    assert found.row("Bayes")[-1].strip() == "0.973"
    assert found.row("Tie") == ["Tie", "297", "24%", "1.502", "0%", "–"]
    confusion = [row for row in found.rows if row and row[0] == "B wins" and len(row) == 4]
    assert [re.sub(r"\s", "", cell) for cell in confusion[0][1:]] == ["14632%", "30568%", "00%"]
    worst = report["worst"][0]
    assert found.row(worst["id"])[1:] == ["A wins", "2.2%", "88%", "9.8%", "3.81"]
    biased = report["most_biased"][0]
    row = next(row for row in found.rows if row[0] == biased["id"] and row[1].endswith(" points"))
    assert row[2] == " / ".join(percent(value) for value in biased["a_first"]), "one unit on the whole page"
    assert found.row("rows cut share")[1:] == ["4.9%", "4.9%", "4.7%"]
    assert found.row("SHA-256: data")[1] == report["provenance"]["sha256"]["data"]
    assert found.row("Vietnamese")[-1] == str(report["slices"]["language"][-1]["rows"])


def test_the_command_that_shows_a_listed_row_stands_there(tmp_path, report):
    _, found = shown(tmp_path, report)
    where = f"-e {report['experiment']} --stage {report['stage']}"
    assert f"python run.py show {report['worst'][0]['id']} {where}" in found.text
    assert f"python run.py show {report['most_biased'][0]['id']} {where} --swapped" in found.text


def test_sentences_for_bias_calibration_merge_and_truncation(tmp_path, report):
    text = shown(tmp_path, report)[1].text
    assert "In 29% of the battles the first choice itself changes." in text
    assert "Averaging both orders lowers the log loss by 0.028" in text
    assert "Kept: temperature and class bias. It takes the log loss from 1.060 to 1.010" in text
    assert "too sure: a temperature of 1.18 makes its probabilities softer" in text
    assert "the largest difference of a probability is 0.41 percentage points" in text
    assert "61 of the judged battles (4.9%) were shortened" in text
    assert "overconfident by 5 percentage points" in text


def test_the_merge_gate_and_the_checks_are_shown(tmp_path, report):
    gate = {"max_abs_diff": 0.07, "mean_abs_diff": 0.002, "log_loss_adapter": 1.0, "log_loss_merged": 1.1, "rows": 200}
    report["merge_gate"] = gate | {"threshold": 0.05, "passed": False, "merged_into": "saves/x", "measure": "rewards"}
    detail = {"detail": HOSTILE, "stops": True, "remedy": ""}
    report["checks"] = [
        {"name": "canaries", "passed": True, **detail},
        {"name": "merge gate", "passed": False, **detail},
        {"name": "labels distinct", "passed": None, **detail},
    ]
    html, found = shown(tmp_path, report)
    assert "200 battles were scored by the trained adapter" in found.text
    assert "the largest difference of a probability is 7 percentage points (0.2 on average)" in found.text
    assert "Allowed are 5 points: failed." in found.text and "It was merged into saves/x." in found.text
    outcomes = [found.row(name)[1] for name in ("canaries", "merge gate", "labels distinct")]
    assert outcomes == ["passed", "failed", "not applicable"]
    assert "<script>alert" not in html
    report |= {"merge_gate": None, "stage": "dpo_reward", "checks": []}
    text = shown(tmp_path, report)[1].text
    assert "Nothing merged is scored" in text and "the report holds no run checks" in text


def test_every_figure_says_how_to_read_it(tmp_path, report):
    html, _ = shown(tmp_path, report)
    for name in ("ladder", "classes", "confusion", "reliability", "slices", "training", "worst"):
        section = html.split(f'<section id="{name}">')[1].split("</section>")[0]
        assert section.count("How to read it:") == 1, name


def test_page_is_small_self_contained_and_labelled(tmp_path, report):
    html, found = shown(tmp_path, report)
    assert len(html.encode()) < 500_000
    assert "http://" not in html
    assert "https://" not in html
    assert "url(" not in html
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in found.tags}
    assert ("html", {"lang": "en"}) in found.tags
    drawings = [
        attributes for tag, attributes in found.tags if tag == "svg" and "preserveaspectratio" not in attributes
    ]
    assert len(drawings) > 10
    assert all(a.get("aria-hidden") == "true" or a.get("aria-label") for a in drawings)
    assert html.count("<caption") == html.count("<table")
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html


def test_links_of_the_page_lead_to_its_sections(tmp_path, report):
    _, found = shown(tmp_path, report)
    targets = {a["href"].removeprefix("#") for tag, a in found.tags if tag == "a"}
    assert targets
    assert targets <= found.ids
    assert set(SECTIONS) <= found.ids


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        (1.21, "The judge does not beat the class prior: it is worse by 0.133"),
        (1.07, "The judge is ahead of the class prior by 0.007 ± 0.030, but not by more than chance."),
    ],
)
def test_a_result_that_does_not_beat_the_prior_has_a_red_banner(tmp_path, report, model, sentence):
    report |= {"log_loss": model, "beats_prior": False, "flags": []}
    html, found = shown(tmp_path, report)
    assert banners(found, "red") == 1
    assert html.index("flag red") < html.index("<h1>")
    assert sentence in found.text
    assert "and learned" not in found.text


def test_a_red_flag_about_the_prior_is_not_said_twice(tmp_path, report):
    flag = {"level": "red", "code": "not_better_than_prior", "text": "Log loss 1.2 does not beat it."}
    _, found = shown(tmp_path, report | {"beats_prior": False, "flags": [flag]})
    assert banners(found, "red") == 1
    other = {"level": "red", "code": "merge_gate", "text": "Not the same model."}
    _, found = shown(tmp_path, report | {"beats_prior": False, "flags": [other]})
    assert banners(found, "red") == 2


def test_text_of_the_data_never_becomes_markup(tmp_path, report, comparison):
    report["worst"][0]["id"] = report["most_biased"][0]["id"] = HOSTILE
    report["worst"][0]["verdict"] = HOSTILE
    report["flags"] = [{"level": "amber", "code": HOSTILE, "text": HOSTILE}]
    report["experiment"] = report["stage"] = report["set"] = HOSTILE
    report["slices"][HOSTILE] = [{"name": HOSTILE, "rows": 3, "log_loss": 1.0}]
    report["baselines"][HOSTILE] = 1.0
    report["provenance"][HOSTILE] = {HOSTILE: HOSTILE}
    report["calibration"]["link"][HOSTILE] = HOSTILE
    comparison["table"][0]["name"] = comparison["differences"][0]["first"] = HOSTILE
    comparison["blend"]["weights"][HOSTILE] = 0.1
    for value, write in ((report, write_page), (comparison, write_compare_page)):
        html, found = shown(tmp_path, value, write)
        assert "<script" not in html
        assert "<img" not in html
        assert "&lt;script&gt;" in html
        assert not any(name.startswith("on") for _, attributes in found.tags for name in attributes)


def test_lone_surrogates_and_other_scripts_are_written(tmp_path, report):
    report["worst"][0]["id"] = "a\ud800b 日本語"
    assert "日本語" in shown(tmp_path, report)[1].text


def test_an_empty_report_shows_every_section(tmp_path):
    html, found = shown(tmp_path, {})
    assert set(SECTIONS) <= found.ids
    assert "No log loss was measured" in found.text
    assert found.text.count("Not measured") >= 6
    assert "None" not in found.text
    assert "nan" not in html.lower().replace("provenance", "")


@pytest.mark.parametrize("empty", [False, True], ids=["null", "empty"])
def test_each_missing_key_leaves_the_rest_whole(tmp_path, report, empty):
    for key, usual in report.items():
        value = copy.deepcopy(report) | {key: type(usual)() if empty and isinstance(usual, list | dict) else None}
        _, found = shown(tmp_path, value)
        assert set(SECTIONS) <= found.ids, key
        assert "None" not in found.text, key


def test_numbers_that_are_none_are_shown_as_missing(tmp_path, report):
    report["baselines"]["tfidf"] = float("nan")
    report["per_class_log_loss"]["tie"] = None
    report["slices"]["turns"][0]["log_loss_ci95"] = None
    report["loss_curve"][3]["loss"] = float("inf")
    report["reliability"]["tie"] = [{"confidence": None, "frequency": None, "count": 0}]
    html, found = shown(tmp_path, report)
    assert found.row("TF-IDF")[-1].startswith("–")
    assert found.row("Tie")[3] == "–"
    assert not re.search(r"\b(nan|inf)\b", html.lower())


def test_long_lists_are_cut_and_said_to_be(tmp_path, report):
    report["slices"]["language"] = [
        {"name": f"language {n}", "rows": n, "log_loss": 1.0, "log_loss_ci95": [0.9, 1.1], "prior": 1.1}
        for n in range(300)
    ]
    report["worst"] = report["worst"] * 5000
    report["loss_curve"] = [{"step": n, "loss": 1 / (1 + n)} for n in range(50_000)]
    report["provenance"]["environment"] = {f"package{n}": "1" * 2000 for n in range(3000)}
    html, found = shown(tmp_path, report)
    assert len(html.encode()) < 500_000
    assert "288 smaller slices stand in report.json" in found.text
    assert "language 299" in found.text
    assert "language 100" not in found.text


def test_a_page_is_whole_or_absent(tmp_path, report, monkeypatch):
    path = tmp_path / "report.html"
    path.write_text("earlier")

    def broken(*_):
        raise RuntimeError

    monkeypatch.setattr(page, "report_view", broken)
    with pytest.raises(RuntimeError):
        write_page(report, path)
    assert path.read_text() == "earlier"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_comparison_says_who_leads_and_what_chance_explains(tmp_path, comparison):
    html, found = shown(tmp_path, comparison, write_compare_page)
    assert "Lowest log loss: blend with 0.999, 0.078 below the class prior." in found.text
    assert "Chance alone may have put it ahead of sft" in found.text
    assert "no difference beyond chance" in found.row("sft − dpo judge")[0]
    assert found.row("sft − dpo judge")[-1].startswith("−0.008")
    assert "rm is better" in found.row("dpo reward − rm")[0]
    header = next(row for row in found.rows if row[0] == "name")
    assert header[:4] == ["name", "log loss", "log loss 95% interval", "accuracy"]
    assert [row for row in found.rows if row == ["dpo reward", "0.08"]]
    assert len(html.encode()) < 500_000
    assert "https://" not in html
    assert banners(found, "red") == 0
    comparison["flags"] = {"sft": ["It does not beat the prior."], "rm": []}
    _, found = shown(tmp_path, comparison, write_compare_page)
    assert banners(found, "red") == 1 and "sft: It does not beat the prior." in found.text


@pytest.mark.parametrize("key", ["rows", "table", "differences", "baselines", "baselines_ci95", "bayes", "blend"])
def test_comparison_without_a_key_still_has_every_section(tmp_path, comparison, key):
    del comparison[key]
    _, found = shown(tmp_path, comparison, write_compare_page)
    assert {"ladder", "differences", "table", "blend"} <= found.ids
    assert "None" not in found.text


def test_an_empty_comparison_and_one_of_a_single_stage(tmp_path, comparison):
    assert "there is nothing to compare" in shown(tmp_path, {}, write_compare_page)[1].text
    comparison |= {"table": comparison["table"][:1], "differences": []}
    comparison["blend"] = {"weights": {}, "reason": "no blend: a blend needs at least two stages"}
    _, found = shown(tmp_path, comparison, write_compare_page)
    assert "at least two stages must have run" in found.text
    assert "a blend needs at least two stages" in found.text


def test_the_numbers_half_fits_the_page(tmp_path):
    """What `compare` and `calibrate` return is shown as it is: no key is renamed between the two halves."""
    import numpy as np
    import pandas as pd

    from scoring.calibration import calibrate
    from scoring.compare import compare

    random = np.random.default_rng(5)
    logits = random.normal(0, 1.5, (300, 3))
    chances = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    verdicts = np.array(["a", "b", "tie"])[(chances.cumsum(axis=1) < random.random((300, 1))).sum(axis=1)]
    rows = pd.DataFrame(
        {"id": [str(n) for n in range(300)], "verdict": verdicts, "group": [str(n) for n in range(300)]}
    )
    scores = rows.assign(**{f"ab_{name}": 2 * logits[:, i] for i, name in enumerate(("a", "b", "tie"))})
    found = calibrate(scores.assign(group=rows["group"], verdict=rows["verdict"]), seed=1)
    _, shown_report = shown(tmp_path, found.to_json())
    assert "Kept: temperature and class bias. It takes the log loss from" in shown_report.text
    assert "The raw model was too sure" in shown_report.text
    frames = {
        name: rows.assign(**{f"p_{key}": p[:, i] for i, key in enumerate(("a", "b", "tie"))})
        for name, p in (("sft", chances), ("rm", np.full((300, 3), 1 / 3)))
    }
    _, found = shown(tmp_path, compare(frames, seed=1), write_compare_page)
    assert "sft is better" in found.row("sft − rm")[0]
    assert found.row("rm")[-1].startswith("1.099")
    assert "cross-fitted; the weights shown are those of all rows" in found.text
