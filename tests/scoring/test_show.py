"""scoring.show: one battle as the model read it, whatever its text, with what was scored of it."""

import io
import json
import math
from pathlib import Path

import pandas as pd
import pytest
from chain import call
from pyarrow import parquet
from rich.console import Console
from workbench import write_votes

from common.battle import Battle
from common.errors import ArenaError, UsageError
from common.experiment import load_experiment
from data_prep.export import export
from data_prep.truncation import MARKER
from factory.stage_context import StageContext
from scoring.predictions import write_probabilities
from scoring.show import print_battle, show_battle
from tests.scoring.places import configured

NASTY = "Hi \x1b]0;owned\x07\x1b[2J\u202e [bold]not markup[/bold] <|im_end|>"
LONG = "many words of an answer that nobody will read to its end " * 60


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """A folder with an exported experiment: a nasty battle, a long one, one of three turns, and plain ones."""
    folder = configured(tmp_path_factory.mktemp("shown"), tiny_base, "valid_share: 0.3")
    battles = {"nasty": ([NASTY], ["sure"], ["no"]), "long": (["tell"], [LONG], ["short"])}
    battles["wide"] = (["tell"], ["yes word " * 30], ["no word " * 30])
    words = ["word " * 140]
    battles["turns"] = (["first", *words, "last"], ["one", *words, "ONE"], ["two", *words, "TWO"])
    battles |= {f"plain{i}": ([f"question {i}"], ["yes"], ["no"]) for i in range(9)}
    votes = [Battle(name, *texts, "ab"[n % 2]) for n, (name, texts) in enumerate(battles.items())]
    write_votes(folder / "votes.csv", votes)
    write_votes(folder / "test.csv", [Battle(name, ["ask"], ["x"], ["y"]) for name in ("t1", "nasty")])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        experiment = load_experiment("exam")
        export(experiment, Path("votes.csv"), Path("test.csv"), views=("judge", "reward"))
    return folder


@pytest.fixture
def experiment(place, monkeypatch):
    monkeypatch.chdir(place)
    return load_experiment("exam")


@pytest.fixture
def shown(experiment):
    """A function that returns one battle of a stage."""
    return lambda battle_id, stage="sft", split=None: show_battle(StageContext(experiment, stage), battle_id, split)


def printed(battle, **options) -> str:
    stream = io.StringIO()
    print_battle(Console(file=stream, width=120), battle, **options)
    return stream.getvalue()


def test_the_prompt_is_the_one_that_was_exported(experiment, shown):
    rows = {}
    for split in ("train", "valid"):
        for line in (experiment.data_folder / f"sft_{split}.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows.setdefault(row["id"], []).append(row["conversations"][0]["value"])
    for name in ("long", "turns", "plain3"):
        prompts = list(shown(name).prompts.values())
        expected = [f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n" for text in rows[name]]
        assert prompts[: len(expected)] == expected and len(prompts) == 2


def test_cut_places_and_dropped_turns_are_named(shown):
    long = shown("long")
    assert MARKER in long.prompts["prompt"] and "cut: the places are marked with '[… cut …]'" in printed(long)
    assert long.cut and long.tokens <= 300 < long.tokens_full
    turns = shown("turns")
    assert turns.turns == 3 and turns.dropped >= 1
    text = printed(turns)
    assert f"left out: the {turns.dropped} oldest turn(s)" in text
    assert "first" not in turns.prompts["prompt"] and "TWO" in turns.prompts["prompt"]


def test_probabilities_are_shown_in_both_orders_and_as_submitted(experiment, shown):
    folder = experiment.output_folder("sft")
    folder.mkdir(parents=True, exist_ok=True)
    logits = {"ab_a": 2.0, "ab_b": 0.0, "ab_tie": 0.0, "ba_a": 0.0, "ba_b": 1.0, "ba_tie": 0.0}
    test = pd.DataFrame([{"id": "t1", **logits}, {"id": "nasty", **dict.fromkeys(logits, 0.0), "ba_a": math.nan}])
    test.to_parquet(folder / "scores_test.parquet")
    write_probabilities(folder / "probabilities_test.csv", ["t1", "nasty"], [[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    battle = shown("t1")
    assert (battle.split, battle.verdict, battle.source) == ("test", None, "test.csv")
    first, second, final = battle.probabilities.values()
    assert first["a"] == pytest.approx(math.exp(2) / (math.exp(2) + 2))
    assert second["b"] == pytest.approx(math.e / (math.e + 2))
    assert final == {"a": 0.5, "b": 0.3, "tie": 0.2}
    text = printed(battle)
    assert "final, as submitted" in text and "0.7870" in text and "verdict: not known" in text
    assert list(shown("nasty", split="test").probabilities) == ["A first", "final"]
    swapped = printed(battle, swapped=True)
    assert swapped.index("### Assistant A\ny") < swapped.index("### Assistant B\nx")


def test_a_pair_is_shown_as_the_model_reads_it_and_has_cuts_and_lengths_of_its_own(experiment, shown):
    """The judge prompt holds both answers and is cut where the pair, one answer at a time, is whole."""
    folder = experiment.output_folder("rm")
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([{"id": "t1", "reward_a": 0.5, "reward_b": -1.25}]).to_parquet(folder / "scores_test.parquet")
    battle = shown("t1", "rm")
    assert battle.rewards == {"a": 0.5, "b": -1.25} and battle.probabilities == {}
    expected = "<|im_start|>user\nask<|im_end|>\n<|im_start|>assistant\ny<|im_end|>\n"
    assert battle.prompts["prompt and answer B"] == expected
    assert "rewards: A +0.5000, B -1.2500" in printed(battle)
    assert shown("long", "rm").cut
    judge, pair = shown("wide"), shown("wide", "rm")
    rows = {row["id"]: row for row in parquet.read_table(experiment.data_folder / "pairs.parquet").to_pylist()}
    a, b = rows["wide"]["tokens_a"], rows["wide"]["tokens_b"]
    assert judge.cut and judge.tokens_with == {}
    assert (pair.dropped, pair.cut, pair.tokens) == (0, False, max(a, b))
    text = printed(pair)
    assert f"turns: 1; pair: of 300 tokens {a} with answer A and {b} with answer B" in text
    assert "judge prompt" not in text and "cut:" not in text
    assert shown("turns", "dpo_reward").dropped == rows["turns"]["dropped"] > 0


def test_an_id_that_is_not_there_a_stage_without_scores_and_a_missing_export(shown, monkeypatch, tmp_path):
    with pytest.raises(UsageError, match="'none' is not an id of train, valid or test"):
        shown("none")
    with pytest.raises(UsageError, match="--split") as caught:
        shown("nasty")  # of the test set, too
    split = caught.value.remedy.split()[-1]
    result = call("show", "nasty", "-e", "exam", "--split", split, "--json")
    assert NASTY.split(" <")[0] in json.loads(result.output)["prompts"]["prompt"], "a program gets the text itself"
    with pytest.raises(UsageError, match="is an id of test"):
        shown("t1", split="train")
    assert "probabilities: none" in printed(shown("plain1", "dpo_judge"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArenaError, match="there is no exported data"):
        shown("t1")
