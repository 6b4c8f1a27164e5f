"""The demo leaves votes of people alone."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from data_prep.errors import ArenaError
from factory.demo import ARENA, refuse_other_votes
from factory.experiment import load_experiment


def test_an_export_of_other_votes_is_not_replaced_by_the_arena(place):
    Path("factory_configs/exam").rename("factory_configs/demo")
    assert CliRunner().invoke(run.cli, ["prepare", "-e", "demo", "--train", "votes.csv"]).exit_code == 0
    before = place.snapshot()
    refused = CliRunner().invoke(run.cli, ["demo"])
    assert refused.exit_code == 1 and "holds an export of votes.csv" in refused.output
    assert "python run.py demo --fresh" in refused.output
    assert place.snapshot() == before


def test_an_arena_of_any_seed_and_an_empty_place_are_replaced(place):
    manifest = Path("data/exam/manifest.json")
    exam, content = load_experiment("exam"), json.loads(manifest.read_text())
    with pytest.raises(ArenaError, match="holds an export of votes"):
        refuse_other_votes(exam)
    content["sources"]["train"]["file"] = str(ARENA / "train.csv")
    manifest.write_text(json.dumps(content))
    refuse_other_votes(exam)
    manifest.unlink()
    refuse_other_votes(exam)
