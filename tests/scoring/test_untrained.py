"""The stages without training: scored, reported, compared and verified as the trained ones are."""

import json
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
from chain import call, called, rows_of

from tests.bad_inputs.place import SCORE

BASE, PROBE = Path("outputs/exam/base"), Path("outputs/exam/probe")


def states() -> dict[str, str]:
    stages = json.loads(called("status", "-e", "exam", "--json"))["experiments"][0]["stages"]
    return {stage["stage"]: stage["state"] for stage in stages}


def test_the_untrained_base_is_a_stage_like_the_others(place):
    told = call(*SCORE, "--stage", "base", "--input", "test.csv")
    assert told.exit_code == 1 and "score --stage base -e exam" in told.output, "its answers are not calibrated yet"
    report = json.loads(called(*SCORE, "--stage", "base", "--json"))
    assert (report["stage"], report["merge_gate"], report["position_bias"] is None) == ("base", None, False)
    assert [row["id"] for row in rows_of(BASE / "submission.csv")] == [str(9000 + i) for i in range(6)]
    assert (BASE / "report.html").is_file() and (BASE / "merged/model.safetensors").is_symlink()
    called(*SCORE, "--stage", "base", "--input", "test.csv", "--output", "mine.csv")
    assert Path("mine.csv").read_bytes() == (BASE / "submission.csv").read_bytes()
    assert json.loads(called("verify", str(BASE), "--json"))["sound"]
    assert states()["base"] == "scored"
    assert "base" not in json.loads(Path("outputs/exam/sft/report.json").read_text())["baselines"]
    trained = json.loads(called(*SCORE, "--fresh", "--json"))
    assert trained["baselines"]["base"] == pytest.approx(report["log_loss"]) != trained["log_loss"]
    assert "Untrained base" in called(*SCORE) and "Untrained base" in Path("outputs/exam/sft/report.html").read_text()
    compared = json.loads(called("compare", "-e", "exam", "--json"))
    losses = {row["name"]: row["log_loss"] for row in compared["table"]}
    assert losses == pytest.approx({"sft": trained["log_loss"], "base": report["log_loss"]}, abs=1e-6)


def test_the_base_of_an_earlier_export_is_no_baseline(place):
    called(*SCORE, "--stage", "base")
    place.table(place.rows(44))
    called("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv")
    assert states()["base"] == "outdated"
    report = json.loads(called(*SCORE, "--stage", "base", "--fresh", "--json"))
    assert report["rows"] > 12, "judge.json and scores are of the new export"


def test_the_probe_is_a_stage_like_the_others_and_goes_on_where_it_was_ended(place, monkeypatch):
    assert "no probe was fitted yet" in call(*SCORE, "--stage", "probe").output
    assert "at least 50 are needed" in call("probe", "-e", "exam").output
    place.table(place.rows(160))
    called("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv")
    wrong = call("probe", "-e", "exam", "--layer", "2")
    assert (wrong.exit_code, "choose from 1 to 1" in wrong.output) == (2, True)
    with monkeypatch.context() as patch:
        patch.setattr("scoring.probe_stage.fit_probe", Mock(side_effect=KeyboardInterrupt))
        call("probe", "-e", "exam")
    assert states()["probe"] == "interrupted"
    parts = sorted(PROBE.glob("states/*/*.npy"))  # those of the earlier votes are gone
    parts[0].write_bytes(b"damaged")
    kept = parts[1].stat().st_mtime_ns
    report = json.loads(called("probe", "-e", "exam", "--json"))
    assert len(parts) > 1 and parts[1].stat().st_mtime_ns == kept and np.load(parts[0]).shape == (16, 32)
    assert (report["stage"], report["position_bias"], report["target_prior"]) == ("probe", None, None)
    tried = json.loads((PROBE / "probe.json").read_text())
    assert tried["chosen"] == min(tried["tried"], key=lambda each: each["log_loss"]) and tried["rows"] == 112
    assert states()["probe"] == "scored" and json.loads(called("verify", str(PROBE), "--json"))["sound"]
    called(*SCORE, "--stage", "probe", "--input", "test.csv", "--output", "mine.csv")
    assert Path("mine.csv").read_bytes() == (PROBE / "submission.csv").read_bytes()
    called("show", "9000", "-e", "exam", "--stage", "probe")
    beside = json.loads(called(*SCORE, "--stage", "base", "--json"))["baselines"]
    assert beside["probe"] == pytest.approx(report["log_loss"])
    assert "kept, fitted" in call("probe", "-e", "exam").stderr
    place.table(place.rows(170))
    called("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv")
    assert states()["probe"] == "outdated"
    told = call("probe", "-e", "exam")
    assert told.exit_code == 1 and "run.py probe -e exam --fresh" in told.output
    assert json.loads(called("probe", "-e", "exam", "--fresh", "--json"))["rows"] > report["rows"]
