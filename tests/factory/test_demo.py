"""The demo leaves votes of people alone."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from data_prep.errors import ArenaError
from data_prep.files import write_json
from factory import demo as demo_module
from factory.demo import ARENA, demo_arena, ensure_embedded_base, refuse_other_votes
from factory.experiment import load_experiment
from factory.progress import Show


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


def as_demo(place, monkeypatch, model: str = "models/arena-tiny"):
    """Return the place's experiment as the demo's, with an arena of some rows."""
    monkeypatch.setattr(demo_module, "TRAIN_ROWS", 60)
    place.edit_experiment(f"model: {model}\n")
    return load_experiment("exam")


def test_the_demo_deletes_no_file_of_anybody_else(place, monkeypatch):
    exam = as_demo(place, monkeypatch)
    demo_arena(exam, 1, Show())
    demo_arena(exam, 2, Show())  # over its own
    for folder, words in ((exam.data_folder, "no export wrote"), (ARENA, "no demo wrote")):
        (folder / "notes.md").write_text("mine")
        before = place.snapshot()
        with pytest.raises(ArenaError, match=f"holds 1 file.*{words}.*notes"):
            demo_arena(exam, 3, Show())
        assert place.snapshot() == before
        (folder / "notes.md").unlink()
    (ARENA / "drawn.json").unlink()
    with pytest.raises(ArenaError, match=r"holds 3 file.*test\.csv, train\.csv, truth\.csv"):
        demo_arena(exam, 1, Show())


def test_a_base_is_not_built_over_tables_of_a_person(place, monkeypatch):
    exam = as_demo(place, monkeypatch)
    ARENA.mkdir()
    place.table(place.rows(), str(ARENA / "train.csv"))
    before = place.snapshot()
    with pytest.raises(ArenaError, match=r"holds 1 file.*train\.csv"):
        ensure_embedded_base(exam, Show())
    assert place.snapshot() == before


@pytest.mark.parametrize("model", ["models/tiny", "some/model"])
def test_nor_does_the_demo_build_its_base_in_the_place_of_another_model(place, monkeypatch, model):
    exam, before = as_demo(place, monkeypatch, model), place.snapshot()
    with pytest.raises(ArenaError, match=f"names the model {model}, and the demo would build"):
        demo_arena(exam, 2, Show())
    assert place.snapshot() == before
    if Path(model).is_dir():  # over the arena that is there already it may be any model
        ARENA.mkdir()
        write_json(ARENA / "drawn.json", {"seed": 1, "train_rows": 60, "test_rows": 500})
        assert demo_arena(exam, 1, Show())[1] is False
