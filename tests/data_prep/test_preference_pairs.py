"""Preference sets: their content, what is left out, and their parity with what LLaMA-Factory trains on."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trained import trained_pairs

from common.battle import VERDICTS, Battle
from common.errors import ArenaError
from common.files import sha256_of
from data_prep.chat_template import load_frame
from data_prep.export import ensure_views, export
from data_prep.export_reader import read_battles, read_pairs, read_rows
from data_prep.preference_pairs import (
    Pair,
    flatten,
    pair_sequences,
    reward_rows,
    wrong_verdicts,
)
from data_prep.synthetic import write_arena
from tests.votes import write_votes

LABEL = dict(zip(VERDICTS, "ABC", strict=True))
BOTH = ("judge", "reward")


@pytest.fixture
def arena(workplace):
    return write_arena(workplace / "arena", seed=5, train_rows=200, test_rows=20)


def lines(experiment, name: str) -> list[dict]:
    text = (experiment.data_folder / f"{name}.jsonl").read_text(encoding="ascii")
    return [json.loads(line) for line in text.splitlines()]


def answers(row: dict) -> tuple[str, str]:
    assert row["chosen"]["from"] == row["rejected"]["from"] == "gpt"
    return row["chosen"]["value"], row["rejected"]["value"]


@pytest.mark.parametrize("rejected", ["each", "one"])
def test_the_judge_view_is_the_sft_set_with_wrong_labels(experiment, arena, rejected):
    experiment = experiment.model_copy(update={"dpo_rejected": rejected})
    audit = export(experiment, arena.train, views=["judge"])
    per_row = 2 if rejected == "each" else 1
    for split in ("train", "valid"):
        sft, pairs = lines(experiment, f"sft_{split}"), lines(experiment, f"dpo_judge_{split}")
        assert len(pairs) == per_row * len(sft) == audit["pairs"]["judge"][split]
        for i, row in enumerate(sft):
            own = pairs[per_row * i : per_row * (i + 1)]
            assert {p["id"] for p in own} == {row["id"]}
            assert all(p["conversations"] == row["conversations"][:1] for p in own)
            assert all(answers(p)[0] == row["conversations"][1]["value"] for p in own)
            wrong = {answers(p)[1] for p in own}
            assert len(wrong) == per_row and wrong <= set("ABC") - {row["conversations"][1]["value"]}
    assert not (experiment.data_folder / "pairs.parquet").exists()
    assert audit["pairs"].keys() == {"judge"}


def test_one_wrong_label_is_drawn_evenly_and_alike_in_both_orders(experiment, arena):
    export(experiment.model_copy(update={"dpo_rejected": "one"}), arena.train, views=["judge"])
    rows = [answers(row) for row in lines(experiment, "dpo_judge_train")]
    exchanged = {"A": "B", "B": "A", "C": "C"}
    assert [(exchanged[c], exchanged[r]) for c, r in rows[::2]] == rows[1::2]
    drawn = Counter(wrong_verdicts(str(i), "a", rejected="one", seed=1) for i in range(1000))
    assert drawn.keys() == {("b",), ("tie",)} and min(drawn.values()) > 400
    other = [wrong_verdicts(str(i), "a", rejected="one", seed=2) for i in range(1000)]
    assert other != [wrong_verdicts(str(i), "a", rejected="one", seed=1) for i in range(1000)]


def test_the_reward_view_holds_winners_over_losers_and_no_tie(experiment, arena):
    audit = export(experiment, arena.train, arena.test, views=BOTH)
    reward = audit["pairs"]["reward"]
    battles = dict.fromkeys(("train", "valid"))
    for split in battles:
        rows, pairs = read_rows(experiment.data_folder, split), read_pairs(experiment.data_folder, split)
        assert (
            [p.id for p in pairs]
            == rows["id"].tolist()
            == [b.id for b, _ in read_battles(experiment.data_folder, split)]
        )
        expected = [
            (p.id, p.prompt, *((p.response_a, p.response_b) if v == "a" else (p.response_b, p.response_a)))
            for p, v in zip(pairs, rows["verdict"], strict=True)
            if v != "tie" and p.response_a != p.response_b
        ]
        exported = lines(experiment, f"dpo_reward_{split}")
        assert [(r["id"], r["conversations"][0]["value"], *answers(r)) for r in exported] == expected
        assert reward[split] == len(expected)
        battles[split] = rows
    everything = pd.concat(battles.values())
    assert reward["battles"] == len(everything) == 200
    assert reward["ties_left_out"] == (everything["verdict"] == "tie").sum() > 0
    assert reward["pairs"] + reward["ties_left_out"] + reward["identical_left_out"] == 200
    assert reward["multi_turn"]["battles"] == (everything["turns"] > 1).sum() > 0
    decided = everything[everything["verdict"] != "tie"]
    lost = reward["single_turn_only_would_lose"]
    assert lost["pairs"] == (decided["turns"] > 1).sum() and lost["share"] == round(lost["pairs"] / reward["pairs"], 6)
    assert len(read_pairs(experiment.data_folder, "test")) == 20
    assert not set(battles["train"]["group"]) & set(battles["valid"]["group"]), "a prompt is in one fold only"


def test_uncut_pairs_are_the_battles_that_were_read(experiment, arena):
    experiment = experiment.model_copy(update={"cutoff_len": 4000})
    export(experiment, arena.train, views=BOTH)
    pairs = read_pairs(experiment.data_folder, "train")
    assert any("### Assistant" in pair.response_a for pair in pairs)
    for pair, (battle, dropped) in zip(pairs, read_battles(experiment.data_folder, "train"), strict=True):
        assert pair == flatten(battle) and not dropped
    assert not pq.read_table(experiment.data_folder / "pairs.parquet")["cut"].to_pylist().count(True)


def test_a_view_can_follow_later(experiment, arena):
    export(experiment, arena.train, arena.test, arena.truth, views=["judge"])
    before = {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()}
    with pytest.raises(ArenaError, match=r"reward view .* was not exported\n.*python run\.py prepare -e exam"):
        read_pairs(experiment.data_folder, "train")
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


def test_a_view_does_not_follow_from_other_votes(experiment, arena):
    export(experiment, arena.train, views=[])
    with arena.train.open("a") as table:
        table.write("\n")
    with pytest.raises(ArenaError, match=r"train\.csv: is not the table .*\n.*prepare -e exam --train"):
        ensure_views(experiment, ["reward"])


def test_a_view_does_not_follow_when_it_would_change_what_was_trained_on(experiment, arena):
    export(experiment, arena.train, views=[])
    before = {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()}
    with pytest.raises(ArenaError, match=r"battles\.parquet.*sft_train\.jsonl.* would come out otherwise"):
        ensure_views(experiment.model_copy(update={"cutoff_len": 280}), ["reward"])
    assert {p.name: sha256_of(p) for p in experiment.data_folder.iterdir()} == before
    assert ensure_views(experiment.model_copy(update={"swap_tta": True}), ["reward"]), "scoring's keys are free"


def test_only_ties_have_no_reward_view(experiment, arena):
    table = pd.read_csv(arena.train, dtype=str, keep_default_na=False)
    winners = ["winner_model_a", "winner_model_b", "winner_tie"]
    table[winners] = ["0", "0", "1"]
    table.to_csv("ties.csv", index=False)
    with pytest.raises(ArenaError, match="no row is left for dpo_reward_train, dpo_reward_valid"):
        export(experiment, Path("ties.csv"), views=BOTH)
    assert not experiment.data_folder.exists()


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
    assert reward["multi_turn"] == {"battles": 3, "share": round(3 / 63, 6)}
    assert reward["single_turn_only_would_lose"] == {"pairs": 1, "share": round(1 / 61, 6)}


def test_sequences_end_with_the_turns_end(small_frame, small_tokenizer):
    ((prompt, a, b),) = pair_sequences(small_frame, small_tokenizer, [flatten(Battle("1", ("hi",), ("x",), ("yy",)))])
    assert (
        small_tokenizer.decode(prompt, skip_special_tokens=False)
        == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert small_tokenizer.decode(a, skip_special_tokens=False) == "x<|im_end|>\n"
    assert small_tokenizer.decode(b, skip_special_tokens=False) == "yy<|im_end|>\n"


@pytest.mark.slow
@pytest.mark.parametrize("source", ["synthetic", "real"])
def test_exported_trained_and_scored_ids_are_the_same(experiment, arena, source, request, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("hf_cache").absolute()))
    table = arena.train
    if source == "real":
        real = request.getfixturevalue("real_data") / "arena" / "train_natural.csv"
        table = Path("real.csv")
        pd.read_csv(real, dtype=str, keep_default_na=False).head(500).to_csv(table, index=False)
        experiment = experiment.model_copy(update={"cutoff_len": 512})
    export(experiment, table, views=BOTH)
    folder, (frame, tokenizer) = experiment.data_folder, load_frame(experiment)

    trained = trained_pairs(experiment, "dpo_reward")
    rows, pairs = read_rows(folder, "train"), read_pairs(folder, "train")
    scored = [
        (prompt, a, b) if verdict == "a" else (prompt, b, a)
        for (prompt, a, b), pair, verdict in zip(
            pair_sequences(frame, tokenizer, pairs), pairs, rows["verdict"], strict=True
        )
        if verdict != "tie" and pair.response_a != pair.response_b
    ]
    assert len(trained) == len(scored) == len(lines(experiment, "dpo_reward_train"))
    assert trained == scored
    longest = max(len(p) + max(len(c), len(r)) for p, c, r in trained)
    assert longest <= experiment.cutoff_len
    end = frame.answer(tokenizer.encode(frame.wrap_answer("x"), add_special_tokens=False).ids)[1:]
    assert all(answer[-len(end) :] == end for _, *both in trained for answer in both), "no answer loses its end"
    written = pq.read_table(folder / "pairs.parquet", columns=["id", "tokens_a", "tokens_b"]).to_pylist()
    tokens = {row["id"]: (row["tokens_a"], row["tokens_b"]) for row in written}
    for pair, (prompt, a, b) in zip(pairs, pair_sequences(frame, tokenizer, pairs), strict=True):
        assert tokens[pair.id] == (len(prompt) + len(a), len(prompt) + len(b))

    label_id = dict(zip("ABC", frame.label_ids, strict=True))
    exported = lines(experiment, "dpo_judge_train")
    trained = trained_pairs(experiment, "dpo_judge")
    assert len(trained) == len(exported)
    messages = [row["conversations"][0]["value"] for row in exported]
    encodings = tokenizer.encode_batch_fast([frame.wrap(m) for m in messages], add_special_tokens=False)
    for (prompt, chosen, rejected), row, encoding in zip(trained, exported, encodings, strict=True):
        assert prompt == frame.surround(encoding.ids)
        assert (chosen[0], rejected[0]) == tuple(label_id[label] for label in answers(row))
        assert chosen[1:] == rejected[1:] and len(chosen) == frame.answer_len
        assert len(prompt) + len(chosen) <= experiment.cutoff_len


@pytest.mark.slow
@pytest.mark.parametrize(
    ("template", "changed"),
    [("llama3", {}), ("default", {}), ("gemma2", {}), ("qwen3", {"enable_thinking": False}), ("vicuna", {})],
)
def test_the_frame_of_other_templates_is_found(experiment, arena, template, changed, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(Path("hf_cache").absolute()))
    # The tiny tokenizer has Qwen's tokens alone, so that LLaMA-Factory adds those of the others, which is refused.
    monkeypatch.setattr("data_prep.chat_template._require_tokens", lambda *_: None)
    experiment = experiment.model_copy(update={"template": template, "cutoff_len": 400, **changed})
    table = pd.read_csv(arena.train, dtype=str, keep_default_na=False)
    thoughtful = next(i for i, cell in enumerate(table["prompt"]) if len(json.loads(cell)) == 1)
    table.loc[thoughtful, "response_a"] = json.dumps(["<think>\nhm\n</think>\n\nyes"])
    table.head(60).to_csv("some.csv", index=False)
    export(experiment, Path("some.csv"), views=["reward"])
    sequences = pair_sequences(*load_frame(experiment), read_pairs(experiment.data_folder, "train"))
    known = {(tuple(p), frozenset((tuple(a), tuple(b)))) for p, a, b in sequences}
    trained = trained_pairs(experiment, "dpo_reward")
    assert trained and all((tuple(p), frozenset((tuple(c), tuple(r)))) in known for p, c, r in trained)


# --- several turns as one response ------------------------------------------------------------------------------

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


@pytest.mark.parametrize(
    ("text", "flat"),
    [
        *((text, text) for text in ("", "plain", "a\nb\n", "## User", "### Users", "see ### User", "\\ ### User")),
        ("### User", "\\### User"),
        ("\\### User \t", "\\\\### User \t"),
        ("a\n### Assistant\r\nb", "a\n\\### Assistant\r\nb"),
    ],
)
def test_a_line_like_a_header_gets_a_backslash(text, flat):
    assert flatten(Battle("7", ("p",), (text,), ("b",))).response_a == flat


def test_the_form():
    battle = Battle("7", ("one?", "two?"), ("1", "2"), ("I", "### User\nII"), "a", "English")
    b = "I\n\n### User\ntwo?\n\n### Assistant\n\\### User\nII"
    assert flatten(battle) == Pair("7", "one?", "1\n\n### User\ntwo?\n\n### Assistant\n2", b)
