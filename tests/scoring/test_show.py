import csv
import io
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from click.testing import CliRunner
from pyarrow import parquet
from rich.console import Console

import run
from common.errors import ArenaError, UsageError
from common.experiment import load_experiment
from data_prep.export import export
from data_prep.truncation import MARKER
from factory.train_config import workload_of
from scoring.predictions import write_probabilities
from scoring.show import exhibit, print_exhibit

ROOT = Path(__file__).resolve().parents[2]
NASTY = "Hi \x1b]0;owned\x07\x1b[2J\u202e [bold]not markup[/bold] <|im_end|>"
LONG = "many words of an answer that nobody will read to its end " * 60


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """A folder with an exported experiment: a nasty battle, a long one, one of three turns, and plain ones."""
    folder = tmp_path_factory.mktemp("exhibit")
    (folder / "templates").symlink_to(ROOT / "templates")
    (folder / "models").mkdir()
    (folder / "models" / "arena-tiny").symlink_to(tiny_base)
    configs = folder / "factory_configs" / "exam"
    configs.mkdir(parents=True)
    keys = ["model: models/arena-tiny", "template: qwen3_nothink", "cutoff_len: 300", "valid_share: 0.3"]
    (configs / "experiment.yaml").write_text("\n".join(keys))
    battles = {"nasty": ([NASTY], ["sure"], ["no"]), "long": (["tell"], [LONG], ["short"])}
    battles["wide"] = (["tell"], ["yes word " * 30], ["no word " * 30])
    words = ["word " * 70]
    battles["turns"] = (["first", *words, "last"], ["one", *words, "ONE"], ["two", *words, "TWO"])
    battles |= {f"plain{i}": ([f"question {i}"], ["yes"], ["no"]) for i in range(9)}
    table(folder / "votes.csv", battles, labelled=True)
    table(folder / "test.csv", {"t1": (["ask"], ["x"], ["y"]), "nasty": (["ask"], ["x"], ["y"])}, labelled=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        experiment = load_experiment("exam")
        export(experiment, Path("votes.csv"), Path("test.csv"), views=("judge", "reward"))
    return folder


def table(path, battles, *, labelled):
    verdicts = ["winner_model_a", "winner_model_b", "winner_tie"] if labelled else []
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b", *verdicts])
        for i, (name, texts) in enumerate(battles.items()):
            writer.writerow([name, *map(json.dumps, texts), *([int(i % 3 == k) for k in range(3)] if labelled else [])])


@pytest.fixture
def experiment(place, monkeypatch):
    monkeypatch.chdir(place)
    return load_experiment("exam")


def printed(shown, **options) -> str:
    stream = io.StringIO()
    print_exhibit(Console(file=stream, width=120), shown, **options)
    return stream.getvalue()


def test_the_prompt_is_the_one_that_was_exported(experiment):
    rows = {}
    for split in ("train", "valid"):
        for line in (experiment.data_folder / f"sft_{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["id"], []).append(row["conversations"][0]["value"])
    for name in ("nasty", "long", "turns", "plain3"):
        shown = exhibit(
            experiment, "sft", name, None if name != "nasty" else "train" if len(rows[name]) == 2 else "valid"
        )
        fed = list(shown.prompts.values())
        expected = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in rows[name]]
        assert fed[: len(expected)] == expected and len(fed) == 2


def test_cut_places_and_dropped_turns_are_named(experiment):
    long = exhibit(experiment, "sft", "long")
    (cut,) = long.cuts
    prompt = long.prompts["prompt"]
    kept = prompt.split("### Assistant A\n")[1].split(MARKER)
    assert cut.startswith(f"turn 1, response A: {len(kept[0]):,} characters kept before the cut")
    assert long.cut and long.tokens <= 300 < long.tokens_full
    turns = exhibit(experiment, "sft", "turns")
    assert turns.turns == 3 and turns.dropped >= 1
    text = printed(turns)
    assert f"left out: the {turns.dropped} oldest turn(s)" in text and "the whole texts are in votes.csv" in text
    assert "first" not in turns.prompts["prompt"] and "TWO" in turns.prompts["prompt"]


def test_a_hostile_text_cannot_move_the_terminal(experiment):
    with pytest.raises(UsageError, match="--split"):
        exhibit(experiment, "sft", "nasty")
    split = next(
        s for s in ("train", "valid") if s in str(CliRunner().invoke(run.cli, ["show", "nasty", "-e", "exam"]).output)
    )
    text = printed(exhibit(experiment, "sft", "nasty", split))
    assert "\x1b" not in text and "\x07" not in text and "\u202e" not in text
    assert "␛]0;owned␇␛[2J\\u202e [bold]not markup[/bold]" in text
    result = CliRunner().invoke(run.cli, ["show", "nasty", "-e", "exam", "--split", split, "--json"])
    assert result.exit_code == 0 and "\x1b" not in result.output
    assert NASTY.split(" <")[0] in json.loads(result.output)["prompts"]["prompt"], "a program gets the text itself"


def test_probabilities_stand_in_both_orders_and_as_submitted(experiment):
    folder = experiment.output_folder("sft")
    folder.mkdir(parents=True, exist_ok=True)
    logits = {"ab_a": 2.0, "ab_b": 0.0, "ab_tie": 0.0, "ba_a": 0.0, "ba_b": 1.0, "ba_tie": 0.0}
    test = pd.DataFrame([{"id": "t1", **logits}, {"id": "nasty", **dict.fromkeys(logits, 0.0), "ba_a": math.nan}])
    test.to_parquet(folder / "scores_test.parquet")
    write_probabilities(folder / "probabilities_test.csv", ["t1", "nasty"], [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    shown = exhibit(experiment, "sft", "t1")
    assert (shown.split, shown.verdict, shown.source) == ("test", None, "test.csv")
    first, second, final = shown.probabilities.values()
    assert first["a"] == pytest.approx(math.exp(2) / (math.exp(2) + 2)) and second["b"] == pytest.approx(
        math.e / (math.e + 2)
    )
    assert final == {"a": 0.5, "b": 0.3, "tie": 0.2}
    text = printed(shown)
    assert "final, as submitted" in text and "0.7870" in text and "verdict: not known" in text
    assert list(exhibit(experiment, "sft", "nasty", "test").probabilities) == ["A first", "final"]
    swapped = printed(shown, swapped=True)
    assert swapped.index("### Assistant A\ny") < swapped.index("### Assistant B\nx")


def test_pairs_are_shown_as_they_were_fed(experiment):
    folder = experiment.output_folder("rm")
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([{"id": "t1", "reward_a": 0.5, "reward_b": -1.25}]).to_parquet(folder / "scores_test.parquet")
    shown = exhibit(experiment, "rm", "t1")
    assert shown.rewards == {"a": 0.5, "b": -1.25} and shown.probabilities == {}
    assert shown.prompts["prompt and answer B"] == (
        "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    )
    assert "rewards: A +0.5000, B -1.2500" in printed(shown)
    assert any("response A" in cut for cut in exhibit(experiment, "rm", "long").cuts)


def test_cuts_and_lengths_of_a_pair_are_its_own(experiment):
    """The judge prompt holds both answers and is cut where the pair, one answer at a time, is whole."""
    judge, pair = exhibit(experiment, "sft", "wide"), exhibit(experiment, "rm", "wide")
    rows = {row["id"]: row for row in parquet.read_table(experiment.data_folder / "pairs.parquet").to_pylist()}
    a, b = rows["wide"]["tokens_a"], rows["wide"]["tokens_b"]
    assert judge.cut and judge.cuts and judge.tokens_with == {}
    assert (pair.dropped, pair.cut, pair.cuts, pair.tokens) == (0, False, [], max(a, b))
    text = printed(pair)
    assert f"turns: 1; pair: of 300 tokens {a} with answer A and {b} with answer B" in text
    assert "judge prompt" not in text and "cut:" not in text and "the whole texts" not in text
    turns = exhibit(experiment, "dpo_reward", "turns")
    assert turns.dropped == rows["turns"]["dropped"] > 0
    assert f"left out: the {turns.dropped} oldest turn(s)" in printed(turns)


def test_what_is_not_there_is_told(experiment, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="'none' is not an id of train, valid or test"):
        exhibit(experiment, "sft", "none")
    with pytest.raises(UsageError, match="it is one of test"):
        exhibit(experiment, "sft", "t1", "train")
    assert "probabilities: none" in printed(exhibit(experiment, "dpo_judge", "plain1"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArenaError, match="there is no exported data") as caught:
        exhibit(experiment, "sft", "t1")
    assert caught.value.remedy == f"python run.py prepare -e {experiment.name} --train FILE"


def test_where_nothing_is_exported_the_experiments_that_have_data_are_named(experiment, monkeypatch, tmp_path):
    """Who leaves -e out gets the default, which may never have been prepared."""
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "arena"):
        (tmp_path / "data" / name).mkdir(parents=True)
    (tmp_path / "data" / "demo" / "manifest.json").touch()
    with pytest.raises(ArenaError) as caught:
        exhibit(experiment, "sft", "t1")
    assert caught.value.remedy.endswith("--train FILE; demo holds exported data: -e demo")
    (tmp_path / "data" / "arena" / "manifest.json").touch()
    with pytest.raises(ArenaError) as caught:
        workload_of(experiment, "sft")
    assert caught.value.remedy.endswith("; arena, demo hold exported data: -e arena")
