"""What the terminal says after a result: nothing that is flagged is hidden or recommended."""

import io
from types import SimpleNamespace

import pytest
from rich.console import Console

from scoring.report.console import print_comparison


@pytest.fixture
def result() -> dict:
    row = {"log_loss_ci95": [0.8, 1.1], "accuracy": 0.5, "ece": 0.02}
    losses = {"sft": 0.93, "rm": 0.95, "blend": 0.92}
    return {
        "rows": 300,
        "table": [{"name": name, "log_loss": loss, **row} for name, loss in losses.items()],
        "baselines": {"prior": 0.9438, "tfidf": 0.94},
        "bayes": None,
        "differences": [],
        "flags": {"sft": [], "rm": []},
    }


def printed(result: dict, tmp_path) -> str:
    out = io.StringIO()
    experiment = SimpleNamespace(name="exam", output_folder=lambda stage: tmp_path / stage)
    print_comparison(Console(file=out, width=200), experiment, result)
    return out.getvalue()


def test_the_best_single_stage_is_the_one_to_score_with(result, tmp_path):
    said = printed(result, tmp_path)
    assert "next: python run.py score -e exam --stage sft --input FILE" in said
    assert "[red]" not in said and "or better" not in said


def test_a_flagged_stage_is_flagged_again_and_not_advised(result, tmp_path):
    result["flags"]["sft"] = ["Log loss 0.9300 is below the class prior's 0.9438, but nothing is shown."]
    said = printed(result, tmp_path)
    assert "[red] sft: Log loss 0.9300 is below the class prior's 0.9438" in said
    assert "--stage rm --input" in said, "the next best one, of which nothing red is said"
    assert "as good as the best stage, rm (0.9500), or better: class prior (0.9438), TF-IDF (0.9400)" in said
    result["flags"]["rm"] = ["Log loss 0.9500 does not beat the class prior."]
    said = printed(result, tmp_path)
    assert "--input FILE" not in said
    assert "no stage is fit to score with" in said
