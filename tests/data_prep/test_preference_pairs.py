"""Preference sets: their content and what is left out."""

import json
import re
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from workbench import write_votes

from common.battle import Battle
from common.errors import ArenaError
from common.files import sha256_of
from data_prep.export import ensure_views, export
from data_prep.export_reader import iter_pairs, read_battles, read_rows
from data_prep.preference_pairs import Pair, flatten, reward_rows, wrong_verdicts
from tests.votes import lines

BOTH = ("judge", "reward")


def answers(row: dict) -> tuple[str, str]:
    assert row["chosen"]["from"] == row["rejected"]["from"] == "gpt"
    return row["chosen"]["value"], row["rejected"]["value"]


@pytest.mark.parametrize("rejected", ["each", "one"])
def test_the_judge_view_is_the_sft_set_with_wrong_labels(experiment, arena, rejected):
    experiment = experiment.model_copy(update={"dpo_rejected": rejected})
    audit = export(experiment, arena.train, views=["judge"])
    per_row = 2 if rejected == "each" else 1
    for split in ("train", "valid"):
        sft, pairs = (lines(experiment.data_folder, f"{name}_{split}") for name in ("sft", "dpo_judge"))
        assert len(pairs) == per_row * len(sft) == audit["pairs"]["judge"][split]
        for i, row in enumerate(sft):
            own = pairs[per_row * i : per_row * (i + 1)]
            assert {p["id"] for p in own} == {row["id"]}
            assert all(p["conversations"] == row["conversations"][:1] for p in own)
            assert all(answers(p)[0] == row["conversations"][1]["value"] for p in own)
            wrong = {answers(p)[1] for p in own}
            assert len(wrong) == per_row and wrong <= set("ABC") - {row["conversations"][1]["value"]}
        if rejected == "one" and split == "train":
            rows, exchanged = [*map(answers, pairs)], {"A": "B", "B": "A", "C": "C"}
            assert [(exchanged[c], exchanged[r]) for c, r in rows[::2]] == rows[1::2], "alike in both orders"
    assert not (experiment.data_folder / "pairs.parquet").exists()
    assert audit["pairs"].keys() == {"judge"}


def test_one_wrong_label_is_drawn_evenly():
    drawn = Counter(wrong_verdicts(str(i), "a", rejected="one", seed=1) for i in range(1000))
    assert drawn.keys() == {("b",), ("tie",)} and min(drawn.values()) > 400
    other = [wrong_verdicts(str(i), "a", rejected="one", seed=2) for i in range(1000)]
    assert other != [wrong_verdicts(str(i), "a", rejected="one", seed=1) for i in range(1000)]


def test_the_reward_view_holds_winners_over_losers_and_no_tie(experiment, arena):
    experiment = experiment.model_copy(update={"cutoff_len": 4000})  # nothing is cut
    audit = export(experiment, arena.train, arena.test, views=BOTH)
    reward = audit["pairs"]["reward"]
    battles = dict.fromkeys(("train", "valid"))
    for split in battles:
        rows = read_rows(experiment.data_folder, split)
        pairs = [pair for pair, _ in iter_pairs(experiment.data_folder, split)]
        assert pairs == [flatten(battle) for battle, _ in read_battles(experiment.data_folder, split)]
        assert [p.id for p in pairs] == rows["id"].tolist() and any("### Assistant" in p.response_a for p in pairs)
        expected = [
            (p.id, p.prompt, *((p.response_a, p.response_b) if v == "a" else (p.response_b, p.response_a)))
            for p, v in zip(pairs, rows["verdict"], strict=True)
            if v != "tie" and p.response_a != p.response_b
        ]
        exported = lines(experiment.data_folder, f"dpo_reward_{split}")
        assert [(r["id"], r["conversations"][0]["value"], *answers(r)) for r in exported] == expected
        assert reward[split] == len(expected)
        battles[split] = rows
    everything = pd.concat(battles.values())
    assert reward["battles"] == len(everything) == 300
    assert reward["ties_left_out"] == (everything["verdict"] == "tie").sum() > 0
    assert reward["pairs"] + reward["ties_left_out"] + reward["identical_left_out"] == 300
    assert len(list(iter_pairs(experiment.data_folder, "test"))) == 20
    assert not set(battles["train"]["group"]) & set(battles["valid"]["group"]), "a prompt is in one fold only"


def test_a_view_can_follow_later(experiment, arena):
    export(experiment, arena.train, arena.test, arena.truth, views=["judge"])
    before = {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()}
    with pytest.raises(ArenaError, match=r"reward view .* was not exported\n.*python run\.py prepare -e exam"):
        next(iter_pairs(experiment.data_folder, "train"))
    ensure_views(experiment, ["judge"])
    assert {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()} == before, "nothing was missing"
    ensure_views(experiment, ["reward"])
    after = {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()}
    changed = {name for name in after if before.get(name) != after[name]}
    assert before.keys() <= after.keys()
    assert changed == {
        *("pairs.parquet", "dpo_reward_train.jsonl", "dpo_reward_valid.jsonl"),
        *("dataset_info.json", "audit.json", "manifest.json"),
    }


def test_a_view_follows_from_the_same_votes_and_settings_only(experiment, arena):
    export(experiment, arena.train, views=[])
    before = {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()}
    with pytest.raises(ArenaError, match=r"battles\.parquet.*sft_train\.jsonl.* would come out otherwise"):
        ensure_views(experiment.model_copy(update={"cutoff_len": 280}), ["reward"])
    assert {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()} == before
    assert ensure_views(experiment.model_copy(update={"swap_tta": True}), ["reward"]), "scoring's keys are free"
    export(experiment, arena.train, views=[])
    with arena.train.open("a") as table:
        table.write("\n")
    with pytest.raises(ArenaError, match=r"train\.csv: is not the table .*\n.*prepare -e exam --train"):
        ensure_views(experiment, ["reward"])


def test_ties_and_equal_responses_make_no_pair(experiment, arena, workplace):
    pair = Pair("1", "p", "x", "y")
    (line,) = reward_rows(pair, "b")
    assert answers(json.loads(line)) == ("y", "x")
    assert reward_rows(pair, "tie") == reward_rows(Pair("1", "p", "x", "x"), "a") == []
    others = [Battle(f"x{i}", (f"q{i}",), ("a",), ("b",), "ab"[i % 2]) for i in range(60)]
    two = {"prompts": ("q", "and"), "responses_a": ("x", "x"), "verdict": "b"}
    same, tie = Battle("same", responses_b=("x", "x"), **two), Battle("tie", responses_b=("y", "y"), **two)
    battles = [same, replace(tie, verdict="tie"), replace(tie, id="decided"), *others]
    audit = export(experiment, write_votes(workplace / "votes.csv", battles), views=["reward"])
    reward = audit["pairs"]["reward"]
    assert (reward["pairs"], reward["ties_left_out"], reward["identical_left_out"]) == (61, 1, 1)


PIECES = ["### User", "### Assistant", "\\### User", "\\\\### Assistant", "\n", "\n\n", "\\", "x", " ", "\t", "\r", "#"]
TEXT = st.text(max_size=20) | st.lists(st.sampled_from(PIECES), max_size=8).map("".join)


def turns_of(response: str) -> list[str]:
    """Return the answers and the user's turns between them, as a reader of a response tells them apart."""
    parts = re.split(r"\n\n### (?:User|Assistant)\n", response)
    return [re.sub(r"^\\(?=\\*### (?:User|Assistant)[ \t\r]*$)", "", part, flags=re.MULTILINE) for part in parts]


@given(st.lists(st.tuples(TEXT, TEXT, TEXT), min_size=1, max_size=4))
def test_every_battle_can_be_read_back_and_headers_mark_the_turns_alone(turns):
    prompts, *answers = zip(*turns, strict=True)
    pair = flatten(Battle("7", prompts, *answers))
    assert pair.prompt == prompts[0]
    for response, own in zip((pair.response_a, pair.response_b), answers, strict=True):
        assert turns_of(response)[::2] == list(own) and turns_of(response)[1::2] == list(prompts[1:])
        lines = [line.rstrip(" \t\r") for line in response.split("\n")]
        headers = [line for line in lines if line in ("### User", "### Assistant")]
        assert headers == ["### User", "### Assistant"] * (len(turns) - 1)
