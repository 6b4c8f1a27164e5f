"""A test set that is the train table, in whole or in part: refused or told."""

import csv
import json
import shutil
from pathlib import Path

import pytest

from common.errors import ArenaError
from data_prep.export import export, warnings_of
from data_prep.synthetic import write_arena


@pytest.fixture
def arena(workplace):
    return write_arena(workplace / "arena", seed=5, train_rows=60, test_rows=10)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path: Path, rows: list[dict[str, str]], columns: list[str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_the_train_table_is_no_test_set(experiment, arena, tmp_path):
    (tmp_path / "link.csv").symlink_to(arena.train.resolve())
    for test in (arena.train, tmp_path / "link.csv"):
        with pytest.raises(ArenaError, match="is the train table, given as the test set") as caught:
            export(experiment, arena.train, test)
        assert caught.value.where == str(test) and "leave --test out" in caught.value.remedy
    copy = Path(shutil.copy(arena.train, tmp_path / "copy.csv"))
    with pytest.raises(ArenaError, match="all of its 60 rows are training rows"):
        export(experiment, arena.train, copy)
    assert not experiment.data_folder.exists()


def test_training_rows_among_others_are_counted(experiment, arena, tmp_path):
    test, train = rows_of(arena.test), rows_of(arena.train)
    same_id = [{**row, "id": other["id"]} for row, other in zip(test[:2], train, strict=False)]  # other prompts
    mixed = write(tmp_path / "mixed.csv", [*test[2:], *same_id, *train[10:13]], list(test[0]))
    audit = export(experiment, arena.train, mixed)
    assert audit["test_rows_in_train"] == 3
    told = [line for line in warnings_of(audit) if "training rows" in line]
    assert len(told) == 1 and told[0].startswith(f"warning: 3 of 13 rows of {mixed} are training rows")


def test_training_rows_without_verdicts_are_told_and_kept(experiment, arena, tmp_path):
    bare = write(tmp_path / "bare.csv", rows_of(arena.train)[:5], list(rows_of(arena.test)[0]))
    audit = export(experiment, arena.train, bare)
    assert audit["test_rows_in_train"] == 5 == audit["exported"]["test"]
    assert any(line.startswith("warning: 5 of 5 rows") for line in warnings_of(audit))


def test_another_test_set_is_no_reason_for_words(experiment, arena):
    audit = export(experiment, arena.train, arena.test)
    assert audit["test_rows_in_train"] == 0 and warnings_of(audit) == []
    assert "test_rows_in_train" not in export(experiment, arena.train)


def test_many_shortened_battles_are_told_with_the_key(experiment, arena, tmp_path):
    rows, told = rows_of(arena.train), {}
    for long in (29, 31):  # of 60
        turns = [["a longer answer " * 300] * len(json.loads(row["response_a"])) for row in rows[:long]]
        changed = [{**row, "response_a": json.dumps(answer)} for row, answer in zip(rows, turns, strict=False)]
        votes = write(tmp_path / "long.csv", [*changed, *rows[long:]], list(rows[0]))
        audit = export(experiment, votes)
        told[long] = warnings_of(audit)
    assert told[29] == []
    (line,) = told[31]
    assert line.startswith("note: 51.7% of the battles do not fit into cutoff_len 300")
    assert "factory_configs/exam/experiment.yaml" in line
