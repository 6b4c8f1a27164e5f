"""What the terminal says after a result: nothing that is flagged is hidden or recommended."""

import io
from types import SimpleNamespace

import pytest
from scored_arena import arena, built

from common.progress import PlainConsole
from factory.stage_context import StageContext
from scoring.report.console import print_comparison, print_summary
from scoring.report.findings import LEVELS


@pytest.fixture
def result() -> dict:
    row = {"log_loss_ci95": [0.8, 1.1], "accuracy": 0.5, "ece": 0.02}
    losses = {"sft": 0.93, "rm": 0.95, "blend": 0.92}
    table = [{"name": name, "log_loss": loss, **row} for name, loss in losses.items()]
    pair = {"first": "sft", "second": "rm", "difference": -0.02, "ci95": [-0.03, -0.01], "better": "sft"}
    found = {"experiment": "exam", "left_out": {}, "differs": {}, "rows": 300, "table": table, "differences": [pair]}
    figures = {"baselines": {"prior": 0.9438, "tfidf": 0.94}, "baselines_ci95": {}, "bayes": None}
    return found | figures | {"flags": {"sft": [], "rm": []}}


def printed(result: dict, tmp_path) -> str:
    out = io.StringIO()
    print_comparison(PlainConsole(file=out, width=200), tmp_path, result)
    return out.getvalue()


def test_the_best_stage_without_a_flag_is_advised(result, tmp_path):
    text = printed(result, tmp_path)
    assert "next: python run.py score -e exam --stage sft --input FILE" in text and "sft is better" in text
    assert "Stop:" not in text and "or better" not in text
    result["flags"]["sft"] = ["Log loss 0.9300 is below [b]the class prior's 0.9438[/b], but nothing is shown."]
    text = printed(result, tmp_path)
    assert "Stop: sft: Log loss 0.9300 is below [b]the class prior's 0.9438[/b]" in text
    assert "--stage rm --input" in text and "rm, or better: Class prior, TF-IDF" in text
    result["flags"]["rm"] = ["Log loss 0.9500 does not beat the class prior."]
    text = printed(result, tmp_path)
    assert "--input FILE" not in text and "no stage is fit to score with" in text


def test_the_summary_shows_the_baselines_the_findings_and_every_flag(tmp_path, monkeypatch):
    monkeypatch.setattr("factory.status.experiment_status", lambda context: None)
    monkeypatch.setattr("factory.status.next_commands", lambda view: ["python run.py compare -e exam"])
    scores, texts, truth = arena(400, 3, both_orders=True)
    report = built(scores, texts, truth)[0]
    out = io.StringIO()
    experiment = SimpleNamespace(name="exam", output_folder=lambda stage, fold=None: tmp_path / stage)
    report["with_baselines"] = {"names": ["tfidf"], "log_loss": report["log_loss"] - 0.05}
    print_summary(PlainConsole(file=out, width=300), StageContext(experiment, "sft"), report)
    text = out.getvalue()
    losses = [float(line.split("│")[2]) for line in text.splitlines() if line.count("│") == 4]
    assert len(losses) == 6 and losses == sorted(losses, reverse=True), "the worst first"
    assert all(f"{LEVELS[flag['level']]}: {flag['text']}" in text for flag in report["flags"])
    assert "Run checks: 1 passed, 0 failed, 1 not applicable." in text and "report.html" in text
    assert f"next:       python run.py show {report['worst'][0]['id']} -e exam --stage sft" in text
    assert "next:       python run.py compare -e exam" in text
    assert "python run.py ensemble -e exam:sft -e exam:tfidf --name exam_blend   (log loss" in text
    assert "on these battles, 0.0500 lower)" in text
    flips = next(flag["text"] for flag in report["flags"] if flag["code"] == "position_bias")
    assert text.count(flips) == 1, "a sentence is printed once"
