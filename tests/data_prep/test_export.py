"""The export, from a table to files."""

import json
from collections import Counter
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from common.battle import VERDICTS, swap
from common.errors import ArenaError
from common.files import sha256_of
from data_prep.export import ensure_views, export
from data_prep.export_reader import read_battles, read_manifest, read_rows
from data_prep.prompt import JudgePrompt
from tests.votes import lines

BOTH = ("judge", "reward")


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*") if p.is_file()}


def test_the_exported_rows_are_the_battles(experiment, arena):
    audit = export(experiment, arena.train, arena.test, arena.truth)
    folder = experiment.data_folder
    train, valid = lines(folder, "sft_train"), lines(folder, "sft_valid")
    rows = {split: read_rows(folder, split) for split in ("train", "valid", "test")}
    counted = {"sft_train": len(train), "sft_valid": len(valid), "test": 20}
    assert counted.items() <= audit["exported"].items()
    assert len(train) == 2 * len(rows["train"]) and len(valid) == len(rows["valid"])
    assert len(rows["train"]) + len(rows["valid"]) == 300 and abs(len(rows["valid"]) - 60) < 10
    assert not set(rows["train"]["group"]) & set(rows["valid"]["group"]), "a prompt is in one fold only"
    prompt = JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)
    label = dict(zip(VERDICTS, "ABC", strict=True))
    expected = []
    for battle, dropped in read_battles(folder, "train"):
        for each in (battle, swap(battle)):
            turns = (("human", prompt.message(each, dropped)), ("gpt", label[each.verdict]))
            told = [{"from": role, "value": text} for role, text in turns]
            expected.append({"id": battle.id, "conversations": told})
    assert train == expected
    assert read_rows(folder, "test")["id"].tolist() == [b.id for b, _ in read_battles(folder, "test")]
    shares = Counter(rows["valid"]["verdict"]), Counter(rows["train"]["verdict"])
    assert all(abs(shares[0][v] / len(valid) - shares[1][v] / len(rows["train"])) < 0.08 for v in VERDICTS)
    plain = experiment.model_copy(update={"swap_copies": False})
    export(plain, arena.train)
    assert lines(folder, "sft_train") == train[::2], "no swapped copies without being asked"


def test_columns_of_other_names_are_kept_for_a_view_that_follows(experiment, arena):
    text = arena.train.read_text(encoding="utf-8")
    arena.train.write_text(text.replace("prompt,response_a", "question,left", 1), encoding="utf-8")
    names = {"prompt": "question", "response_a": "left"}
    audit = export(experiment, arena.train, arena.test, columns=names)  # whose columns are called as ours
    train, test = audit["sources"]["train"], audit["sources"]["test"]
    assert (train["columns"], test["columns"]) == (names, {})
    assert (train["texts"], train["verdicts"], test["verdicts"]) == ("JSON lists of turns", "one-hot", "none")
    assert sum(train["verdict_counts"].values()) == 300
    before = digests(experiment.data_folder)
    assert ensure_views(experiment, BOTH) and lines(experiment.data_folder, "dpo_reward_train")
    assert digests(experiment.data_folder)["sft_train.jsonl"] == before["sft_train.jsonl"]


def test_files_describe_themselves(experiment, arena):
    export(experiment, arena.train, arena.test, arena.truth)
    folder = experiment.data_folder
    manifest = read_manifest(folder)
    assert manifest["files"] == {p.name: sha256_of(p) for p in folder.iterdir() if p.name != "manifest.json"}
    own = json.loads((folder / "dataset_info.json").read_text())
    shared = json.loads(Path("data/dataset_info.json").read_text())
    names = {f"exam_{name}_{split}" for name in ("sft", "dpo_judge") for split in ("train", "valid")}
    assert set(own) == set(shared) == names
    assert all(entry.get("ranking", False) == ("dpo" in name) for name, entry in own.items())
    assert (folder / own["exam_sft_train"]["file_name"]).is_file()
    assert (Path("data") / shared["exam_sft_train"]["file_name"]).is_file()
    assert pq.read_metadata(folder / "battles.parquet").num_rows == 320


@pytest.mark.parametrize("folder", ["data", "data/exam"])
def test_entries_of_a_person_stay_in_the_lists_of_sets(experiment, arena, folder):
    export(experiment, arena.train)
    path = Path(folder, "dataset_info.json")
    theirs = {
        "hub": {"hf_hub_url": "somebody/something"},
        "exam_dpo_hub": {"ms_hub_url": "o/n", "file_name": "exam/sft_train.jsonl"},
        "local": {"file_name": "mine.json"},
        "ours_otherwise": {"file_name": "exam/sft_train.jsonl", "num_samples": 10},
        "another_sft_train": {"file_name": "another/own.jsonl"},
        "odd": "what is this",
    }
    gone = {"exam_dpo_reward_train": {"file_name": "exam/x"}}  # of a view that this export has not
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**theirs, **gone, **own}))
    export(experiment, arena.train)
    assert json.loads(path.read_text()) == {**theirs, **own}


def test_the_same_input_gives_the_same_bytes_in_a_thread_and_in_processes(experiment, arena):
    found = []
    for workers in (0, 0, 2):
        export(experiment, arena.train, arena.test, views=BOTH, workers=workers)
        found.append(digests(experiment.data_folder))
    assert found[0] == found[1] == found[2]


def in_parts(table: Path, folder: Path, sizes: list[int]) -> Path:
    """Write a table's rows as a folder of parts, the last of them parquet."""
    folder.mkdir()
    rows = pd.read_csv(table, dtype=str, keep_default_na=False)
    for number, size in enumerate(sizes):
        part, rows = rows[:size], rows[size:]
        if len(rows):
            part.to_csv(folder / f"{number}.csv", index=False)
        else:
            part.to_parquet(folder / f"{number}.parquet", index=False)
    return folder


def test_a_folder_of_parts_is_one_table(experiment, arena, workplace):
    export(experiment, arena.train)
    before = digests(experiment.data_folder)
    parts = in_parts(arena.train, workplace / "parts", [120, 1, 179])
    (parts / "_SUCCESS").touch()
    audit = export(experiment, parts)
    after = digests(experiment.data_folder)
    assert {name for name in after if after[name] != before[name]} == {"audit.json", "manifest.json"}, "they name it"
    assert audit["sources"]["train"]["rows_kept"] == 300
    assert ensure_views(experiment, ("reward",))
    export(experiment, parts)
    (parts / "1.csv").rename(parts / "7.csv")
    with pytest.raises(ArenaError, match="is not the table"):
        ensure_views(experiment, ("reward",))


def test_faults_of_a_folder_name_the_part(experiment, arena, workplace):
    parts = in_parts(arena.train, workplace / "parts", [100, 100, 100])
    text = (parts / "1.csv").read_text().splitlines(keepends=True)
    (parts / "1.csv").write_text("".join([*text, (parts / "0.csv").read_text().splitlines(keepends=True)[7]]))
    with pytest.raises(ArenaError, match=r"is in .*0\.csv row 7 and again in row 101") as caught:
        export(experiment, parts)
    assert caught.value.where.endswith("1.csv row 101")
    (parts / "1.csv").write_text("".join([text[0].replace("response_b", "answer_b"), *text[1:]]))
    with pytest.raises(ArenaError, match=r"1\.csv header: lacks 1 column\(s\) \['response_b'\]"):
        export(experiment, parts)
    (parts / "1.csv").write_text("".join([text[0], text[1].replace('"[""', '"(""', 1), *text[2:]]))
    (rejected,) = export(experiment, parts)["rejected"]
    assert rejected["file"].endswith("parts/1.csv") and rejected["row"] == 1
    (parts / "notes.txt").write_text("x")
    with pytest.raises(ArenaError, match=r"holds more than parts of a table: notes\.txt"):
        export(experiment, parts)


def test_each_fold_is_a_data_set_and_given_folds_rule(experiment, arena, workplace):
    its = experiment.model_copy(update={"folds": 3})
    export(its, arena.train, arena.test)
    names = {f"exam_{name}_fold{number}" for name in ("sft", "dpo_judge") for number in range(3)}
    assert set(json.loads((its.data_folder / "dataset_info.json").read_text())) == names
    texts = [line["id"] for number in range(3) for line in lines(its.data_folder, f"sft_fold{number}")]
    assert len(texts) == 600 and len(set(texts)) == 300, "every battle once, in both orders"
    folds = [set(read_rows(its.data_folder, its.parts("valid", number))["group"]) for number in range(3)]
    assert not folds[0] & folds[1] | folds[0] & folds[2] | folds[1] & folds[2]
    others = read_rows(its.data_folder, its.parts("train", 1))
    assert len(others) + len(read_rows(its.data_folder, its.parts("valid", 1))) == 300
    ids = read_rows(its.data_folder, its.parts("valid"))["id"].tolist()
    own = {identity: place % 3 for place, identity in enumerate(ids)}
    given = workplace / "own.csv"
    given.write_text("id,fold\n" + "".join(f"{identity},{fold}\n" for identity, fold in own.items()))
    audit = export(its, arena.train, arena.test, folds=given, views=("judge", "reward"))
    rows = read_rows(its.data_folder, its.parts("valid"))
    assert [f"fold{own[identity]}" for identity in rows["id"]] == rows["split"].tolist()
    assert audit["prompts_in_several_folds"] == rows.groupby("group")["split"].nunique().sum() - rows["group"].nunique()
    assert read_manifest(its.data_folder)["sources"]["folds"]["file"] == str(given)
    given.write_text(f"id,fold\n{ids[0]},0\n{ids[1]},1\n{ids[2]},2\n")
    with pytest.raises(ArenaError, match="has no fold for the battle"):
        export(its, arena.train, folds=given)
