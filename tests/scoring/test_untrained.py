"""The stages without training: scored, reported, compared and verified as the trained ones are."""

import csv
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from tests.bad_inputs.place import SCORE

BASE = Path("outputs/exam/base")


def call(*arguments: str) -> str:
    done = CliRunner().invoke(run.cli, arguments)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_the_untrained_base_is_a_stage_like_the_others(place):
    told = CliRunner().invoke(run.cli, [*SCORE, "--stage", "base", "--input", "test.csv"])
    assert told.exit_code == 1 and "score --stage base -e exam" in told.output, "its answers are not calibrated yet"
    report = json.loads(call(*SCORE, "--stage", "base", "--json"))
    assert (report["stage"], report["merge_gate"], report["position_bias"] is None) == ("base", None, False)
    with (BASE / "submission.csv").open() as file:
        assert [row["id"] for row in csv.DictReader(file)] == [str(9000 + i) for i in range(6)]
    assert (BASE / "report.html").is_file() and (BASE / "merged/model.safetensors").is_symlink()
    call(*SCORE, "--stage", "base", "--input", "test.csv", "--output", "mine.csv")
    assert Path("mine.csv").read_bytes() == (BASE / "submission.csv").read_bytes()
    assert json.loads(call("verify", str(BASE), "--json"))["sound"]
    stages = json.loads(call("status", "-e", "exam", "--json"))["experiments"][0]["stages"]
    assert {stage["stage"]: stage["state"] for stage in stages}["base"] == "scored"
    assert "base" not in json.loads(Path("outputs/exam/sft/report.json").read_text())["baselines"]
    trained = json.loads(call(*SCORE, "--fresh", "--json"))
    assert trained["baselines"]["base"] == pytest.approx(report["log_loss"]) != trained["log_loss"]
    assert "Untrained base" in call(*SCORE) and "Untrained base" in Path("outputs/exam/sft/report.html").read_text()
    compared = json.loads(call("compare", "-e", "exam", "--json"))
    assert [row["name"] for row in compared["table"]] == ["sft", "base"]


def test_the_base_of_an_earlier_export_is_no_baseline(place):
    call(*SCORE, "--stage", "base")
    place.table(place.rows(44))
    call("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv")
    stages = json.loads(call("status", "-e", "exam", "--json"))["experiments"][0]["stages"]
    assert {stage["stage"]: stage["state"] for stage in stages}["base"] == "outdated"
    report = json.loads(call(*SCORE, "--stage", "base", "--fresh", "--json"))
    assert report["rows"] > 12, "judge.json and scores are of the new export"
