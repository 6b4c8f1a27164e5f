"""The export, from a table to files, and its parity with what LLaMA-Factory trains on and scoring feeds."""

import json
import pickle
from collections import Counter
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from common.battle import VERDICTS, swap, swap_verdict
from common.errors import ArenaError
from common.files import sha256_of
from data_prep import export as export_module
from data_prep import export_writer as writer_module
from data_prep.chat_template import load_frame
from data_prep.export import ensure_views, export
from data_prep.export_reader import read_battles, read_manifest, read_rows
from data_prep.export_writer import Spool
from data_prep.synthetic import write_arena
from factory.state import training_rows
from scoring.judge import load_judge, write_judge


@pytest.fixture
def arena(workplace):
    return write_arena(workplace / "arena", seed=5, train_rows=300, test_rows=20)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]


def test_the_exported_rows_are_the_battles(experiment, arena):
    audit = export(experiment, arena.train, arena.test, arena.truth)
    folder = experiment.data_folder
    train, valid = lines(folder / "sft_train.jsonl"), lines(folder / "sft_valid.jsonl")
    rows = {split: read_rows(folder, split) for split in ("train", "valid", "test")}
    assert {k: v for k, v in audit["exported"].items() if "dpo" not in k} == {
        "sft_train": len(train),
        "sft_valid": len(valid),
        "test": 20,
    }
    assert len(train) == 2 * len(rows["train"]) and len(valid) == len(rows["valid"])
    assert len(rows["train"]) + len(rows["valid"]) == 300
    assert abs(len(rows["valid"]) - 60) < 10
    assert not set(rows["train"]["group"]) & set(rows["valid"]["group"]), "a prompt is in one fold only"
    battles = read_battles(folder, "train")
    _, _, prompt = parts(experiment)
    label = dict(zip(VERDICTS, "ABC", strict=True))
    for (battle, dropped), straight, swapped in zip(battles, train[::2], train[1::2], strict=True):
        assert straight["id"] == swapped["id"] == battle.id
        assert straight["conversations"] == [
            {"from": "human", "value": prompt.message(battle, dropped)},
            {"from": "gpt", "value": label[battle.verdict]},
        ]
        assert swapped["conversations"] == [
            {"from": "human", "value": prompt.message(swap(battle), dropped)},
            {"from": "gpt", "value": label[swap_verdict(battle.verdict)]},
        ]
    assert read_rows(folder, "test")["id"].tolist() == [b.id for b, _ in read_battles(folder, "test")]
    shares = Counter(rows["valid"]["verdict"]), Counter(rows["train"]["verdict"])
    assert all(abs(shares[0][v] / len(valid) - shares[1][v] / len(rows["train"])) < 0.08 for v in VERDICTS)


def parts(experiment):
    from data_prep.prompt import JudgePrompt

    frame, tokenizer = load_frame(experiment)
    return frame, tokenizer, JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)


def test_files_describe_themselves(experiment, arena):
    export(experiment, arena.train, arena.test, arena.truth)
    folder = experiment.data_folder
    manifest = read_manifest(folder)
    assert manifest["files"] == {p.name: sha256_of(p) for p in folder.iterdir() if p.name != "manifest.json"}
    own = json.loads((folder / "dataset_info.json").read_text())
    shared = json.loads(Path("data/dataset_info.json").read_text())
    names = ("sft", "dpo_judge")
    assert set(own) == set(shared) == {f"exam_{name}_{split}" for name in names for split in ("train", "valid")}
    assert all(entry.get("ranking", False) == ("dpo" in name) for name, entry in own.items())
    assert (folder / own["exam_sft_train"]["file_name"]).is_file()
    assert (Path("data") / shared["exam_sft_train"]["file_name"]).is_file()
    assert json.loads(Path("data/audit.json").read_text()) == json.loads((folder / "audit.json").read_text())
    assert pq.read_metadata(folder / "battles.parquet").num_rows == 320


def test_entries_of_a_person_stay_in_the_list_of_all_sets(experiment, arena):
    export(experiment, arena.train)
    path = Path("data/dataset_info.json")
    (path.parent / "mine.json").write_text("[]")
    theirs = {
        "hub": {"hf_hub_url": "somebody/something"},
        "hub_first": {"hf_hub_url": "somebody/something", "file_name": "x.json"},
        "exam_dpo_hub": {"ms_hub_url": "o/n", "file_name": "exam/sft_train.jsonl"},
        "script": {"script_url": "loader"},
        "local": {"file_name": "mine.json"},
        "later": {"file_name": "later.json"},
        "ours_otherwise": {"file_name": "exam/sft_train.jsonl", "num_samples": 10},
        "in_our_folder": {"file_name": "exam/own.jsonl"},
        "another_sft_train": {"file_name": "another/own.jsonl"},
        "odd": "what is this",
    }
    # Of experiments that are gone, and of views that this export has not.
    gone = {"old_sft_train": {"file_name": "old/sft_train.jsonl"}, "exam_dpo_reward_train": {"file_name": "exam/x"}}
    own = json.loads(path.read_text())
    path.write_text(json.dumps({**theirs, **gone, **own}))
    export(experiment, arena.train)
    assert json.loads(path.read_text()) == {**theirs, **own}


@pytest.mark.parametrize("content", ['{"mine": {"hf_hub_url": "a/b"},}', "[]", "[" * 100_000])
def test_a_slip_in_the_list_of_all_sets_is_told_before_the_work_and_nothing_is_lost(experiment, content):
    path = Path("data/dataset_info.json")
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(ArenaError, match=r"data/dataset_info\.json: is not .*\n.*mend it, or move it away"):
        export(experiment, Path("a_table_that_is_not_even_there.csv"))
    assert path.read_text() == content


def test_the_same_input_gives_the_same_bytes(experiment, arena):
    def digest():
        export(experiment, arena.train, arena.test, arena.truth)
        return {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()}

    assert digest() == digest()


def test_a_failed_export_leaves_the_earlier_one(experiment, arena, workplace):
    export(experiment, arena.train)
    before = {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()}
    broken = workplace / "broken.csv"
    text = arena.train.read_text().splitlines(keepends=True)
    broken.write_text("".join(text) + text[1])  # a duplicate id in the last row
    with pytest.raises(ArenaError, match=r"broken\.csv.*row 301"):
        export(experiment, broken)
    assert {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()} == before
    names = sorted(p.name for p in Path("data").iterdir() if p.suffix != ".lock")
    assert names == [".frames", "audit.json", "dataset_info.json", "exam"]


def test_a_bad_row_is_named_in_the_audit_and_the_rest_goes_on(experiment, arena, workplace):
    text = arena.train.read_text().splitlines(keepends=True)
    text[7] = text[7].replace('"[""', '"(""', 1)
    damaged = workplace / "damaged.csv"
    damaged.write_text("".join(text))
    audit = export(experiment, damaged)
    assert audit["sources"]["train"]["rows_kept"] == 299
    (rejected,) = audit["rejected"]
    assert (rejected["file"], rejected["row"], rejected["id"]) == (str(damaged), 7, text[7].split(",")[0])
    assert "JSON" in rejected["reason"]


def test_a_truth_that_is_none_is_refused_before_the_export(experiment, arena):
    with pytest.raises(ArenaError, match=r"absent\.csv: does not exist"):
        export(experiment, arena.train, truth=Path("absent.csv"))
    with pytest.raises(ArenaError, match="lacks the column"):
        export(experiment, arena.train, truth=arena.test)
    assert not experiment.data_folder.exists()


def test_a_truth_of_other_votes_leaves_the_earlier_export(experiment, arena, workplace):
    export(experiment, arena.train, arena.test, arena.truth)
    before = digests(experiment.data_folder)
    part = workplace / "part.csv"
    part.write_text("".join(arena.truth.read_text().splitlines(keepends=True)[:101]))
    with pytest.raises(ArenaError, match=r"part\.csv: has no true probabilities of 200 of the 300 battles"):
        export(experiment, arena.train, arena.test, part)
    assert digests(experiment.data_folder) == before


def test_no_swapped_copies_without_being_asked(make_experiment, experiment, arena):
    plain = experiment.model_copy(update={"swap_copies": False})
    export(plain, arena.train)
    assert len(lines(plain.data_folder / "sft_train.jsonl")) == len(read_rows(plain.data_folder, "train"))


def llamafactory_rows(experiment) -> list[tuple[list[int], list[int]]]:
    """Return (prompt ids, label ids) of each row exactly as LLaMA-Factory trains on them."""
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args
    from llamafactory.model import load_tokenizer

    recipe = {
        "model_name_or_path": experiment.model,
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "template": experiment.template,
        "dataset": f"{experiment.name}_sft_train",
        "dataset_dir": str(experiment.data_folder),
        "cutoff_len": experiment.cutoff_len,
        "output_dir": "saves/unused",
        "use_cpu": True,
        "report_to": "none",
    }
    model_args, data_args, training_args, _, _ = get_train_args(recipe)
    module = load_tokenizer(model_args)
    template = get_template_and_fix_tokenizer(module["tokenizer"], data_args)
    rows = get_dataset(template, model_args, data_args, training_args, stage="sft", **module)["train_dataset"]
    split = [sum(label == -100 for label in row["labels"]) for row in rows]
    return [(row["input_ids"][:n], row["input_ids"][n:]) for row, n in zip(rows, split, strict=True)]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["synthetic", "real"])
def test_fitted_trained_and_scored_ids_are_the_same(experiment, arena, source, request, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("hf_cache").absolute()))
    table = arena.train
    if source == "real":
        table = request.getfixturevalue("real_data") / "arena" / "train_natural.csv"
        experiment = experiment.model_copy(update={"cutoff_len": 512})
    export(experiment, table)
    frame, _, prompt = parts(experiment)
    write_judge(Path(experiment.model).resolve(), experiment, frame, prompt.source, source={})
    judge = load_judge(Path(experiment.model))
    battles = read_battles(experiment.data_folder, "train")
    straight, swapped = judge.sequences(battles), judge.sequences(battles, swapped=True)
    scored = [ids for pair in zip(straight, swapped, strict=True) for ids in pair]
    trained = llamafactory_rows(experiment)
    exported = lines(experiment.data_folder / "sft_train.jsonl")
    assert len(trained) == len(exported) == len(scored)
    label_id = dict(zip("ABC", frame.label_ids, strict=True))
    for (prompt_ids, answer_ids), row, fed in zip(trained, exported, scored, strict=True):
        assert prompt_ids == fed
        assert answer_ids[0] == label_id[row["conversations"][1]["value"]]
        assert len(prompt_ids) + len(answer_ids) <= experiment.cutoff_len
        assert len(answer_ids) == frame.answer_len
    fitted = read_rows(experiment.data_folder, "train")["tokens"].tolist()
    assert [len(p) + len(a) for p, a in trained[::2]] == fitted


def digests(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*") if p.is_file()}


def test_processes_write_the_same_bytes_as_a_thread(experiment, arena, monkeypatch):
    monkeypatch.setattr(export_module, "_CHUNK", 64)
    export(experiment, arena.train, arena.test, views=("judge", "reward"), workers=0)
    before = digests(experiment.data_folder)
    export(experiment, arena.train, arena.test, views=("judge", "reward"), workers=2)
    assert digests(experiment.data_folder) == before
    monkeypatch.setattr(export_module, "_CHUNK", 512)
    export(experiment, arena.train, arena.test, views=("judge", "reward"), workers=0)
    assert digests(experiment.data_folder) == before, "nor does it matter how many are fitted at once"


def in_parts(table: Path, folder: Path, sizes: list[int]) -> Path:
    """Write a table's rows as a folder of parts, the last of them parquet."""
    import csv

    import pyarrow as pa

    folder.mkdir()
    with table.open(newline="", encoding="utf-8") as file:
        header, *rows = csv.reader(file)
    for number, size in enumerate(sizes):
        part, rows = rows[:size], rows[size:]
        if rows:
            with (folder / f"{number}.csv").open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([header, *part])
        else:
            columns = {name: [row[i] for row in part] for i, name in enumerate(header)}
            pq.write_table(pa.table(columns), folder / f"{number}.parquet")
    return folder


def test_a_folder_of_parts_is_one_table(experiment, arena, workplace):
    export(experiment, arena.train)
    before = digests(experiment.data_folder)
    parts = in_parts(arena.train, workplace / "parts", [120, 1, 179])
    (parts / "_SUCCESS").touch()
    audit = export(experiment, parts)
    after = digests(experiment.data_folder)
    told = {"audit.json", "manifest.json"}  # they name the file
    assert {k: v for k, v in after.items() if k not in told} == {k: v for k, v in before.items() if k not in told}
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
    with pytest.raises(ArenaError, match=r"stands in .*0\.csv row 7 and again in row 101") as caught:
        export(experiment, parts)
    assert caught.value.where.endswith("1.csv row 101")
    (parts / "1.csv").write_text("".join([text[0].replace("response_b", "answer_b"), *text[1:]]))
    with pytest.raises(ArenaError, match=r"1\.csv header: lacks 1 column\(s\) \['response_b'\]"):
        export(experiment, parts)
    (parts / "1.csv").write_text("".join([text[0], text[1].replace('"[""', '"(""', 1), *text[2:]]))
    audit = export(experiment, parts)
    (rejected,) = audit["rejected"]
    assert rejected["file"].endswith("parts/1.csv") and rejected["row"] == 1
    (parts / "notes.txt").write_text("x")
    with pytest.raises(ArenaError, match=r"holds more than parts of a table: notes\.txt"):
        export(experiment, parts)


@pytest.mark.slow
def test_llamafactory_reads_a_set_in_parts(experiment, arena, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("hf_cache").absolute()))
    export(experiment, arena.train)
    whole = llamafactory_rows(experiment)
    monkeypatch.setattr(writer_module, "Spool", partial(Spool, part=100))
    export(experiment, arena.train)
    folder = experiment.data_folder
    assert len(list((folder / "sft_train").iterdir())) > 3 and not (folder / "sft_train.jsonl").exists()
    assert (folder / "sft_valid.jsonl").is_file(), "a small set stays one file"
    entry = json.loads((folder / "dataset_info.json").read_text())["exam_sft_train"]
    assert entry["file_name"] == "sft_train"
    assert json.loads(Path("data/dataset_info.json").read_text())["exam_sft_train"]["file_name"] == "exam/sft_train"
    assert training_rows({"dataset": "exam_sft_train", "dataset_dir": str(folder)}) == len(whole)
    assert sorted(llamafactory_rows(experiment)) == sorted(whole)


def test_an_error_comes_whole_out_of_a_process():
    error = pickle.loads(pickle.dumps(ArenaError("cannot be fitted", where="battle 7", remedy="raise cutoff_len")))
    assert (error.what, error.where, error.remedy) == ("cannot be fitted", "battle 7", "raise cutoff_len")
