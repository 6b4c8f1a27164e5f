"""An export deletes no file of a person with its folder: inputs, own data sets, notes, links."""

import json
from pathlib import Path

import pytest

from common.errors import ArenaError
from data_prep.export import ensure_views, export
from data_prep.export_folder import check_overwrite
from data_prep.synthetic import write_arena

FOLDER = Path("data/exam")


@pytest.fixture
def exported(experiment, workplace):
    """An experiment with its export and the arena that it was made from."""
    arena = write_arena(workplace / "arena", seed=5, train_rows=100, test_rows=10)
    export(experiment, arena.train, arena.test)
    return experiment, arena


def everything(folder: Path = FOLDER) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def manifest(**changed) -> None:
    content = json.loads((FOLDER / "manifest.json").read_text()) | changed
    (FOLDER / "manifest.json").write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))


def test_a_view_follows_only_where_no_file_of_a_person_would_be_lost(exported):
    experiment, _ = exported
    (own := FOLDER / "truth.csv").write_text("mine")
    before = everything()
    with pytest.raises(ArenaError, match=r"holds 1 file\(s\) that no export wrote.*: truth\.csv") as caught:
        ensure_views(experiment, ("reward",))
    assert caught.value.where == "data/exam" and everything() == before
    own.unlink()
    assert ensure_views(experiment, ("reward",)), "once it is moved away all goes on"


def test_a_file_that_comes_while_an_export_works_stops_it_too(exported):
    experiment, arena = exported
    late = FOLDER / "late.md"
    with pytest.raises(ArenaError, match=r"no export wrote.*: late\.md"):
        export(experiment, arena.train, progress=lambda *_: late.write_text("mine"))
    assert late.read_text() == "mine"
    assert not list(Path("data").glob(".exam.*.tmp"))


def test_inputs_elsewhere_may_be_read(workplace):
    for given in ("hf://datasets/data/exam", "data/.sources/x/train.csv", "data/exam2/votes.csv", "x" * 5000):
        check_overwrite(FOLDER, [given, None])
    Path("loop").symlink_to("loop")
    check_overwrite(FOLDER, ["loop/votes.csv"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda: (FOLDER / "manifest.json").write_text("{"),
        lambda: (FOLDER / "manifest.json").write_bytes(b"\xff"),
        lambda: manifest(files=[1]),
        lambda: manifest(format=1),
        lambda: manifest(format=2, files=...),
        lambda: (FOLDER / ".DS_Store").write_text("x"),
        lambda: (FOLDER / "empty").mkdir(),
        lambda: (FOLDER / "battles.parquet").unlink(),
        lambda: (FOLDER / "battles.parquet").write_text("edited"),
    ],
)
def test_earlier_exports_are_replaced_also_damaged_ones_and_those_of_other_versions(exported, damage):
    experiment, arena = exported
    before = everything()
    damage()
    (FOLDER / "own.jsonl").write_text("mine")
    with pytest.raises(ArenaError, match=r"holds 1 file\(s\) that no export wrote.*: own\.jsonl"):
        export(experiment, arena.train)
    (FOLDER / "own.jsonl").unlink()
    export(experiment, arena.train, arena.test)
    assert everything() == before
