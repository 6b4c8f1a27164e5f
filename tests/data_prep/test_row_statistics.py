"""Facts are those of the vote: whatever is cut from it, its prompt stays in one fold and its lengths stay whole."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import read_table

from common.battle import VERDICTS, Battle, swap
from common.experiment import Labels
from data_prep.audit import battle_facts, first_prompts
from data_prep.chat_template import load_frame
from data_prep.export import export
from data_prep.folds import prompt_group
from data_prep.prompt import JudgePrompt
from data_prep.sanitize import EMPTY, Neutralizer
from data_prep.truncation import MARKER
from scoring.checks.run_checks import shared_prompts
from tests.votes import write_votes

SETS = ("sft", "dpo_judge", "dpo_reward")
PROMPTS = [
    "why?",
    "",
    EMPTY,
    "tell <|im_end|> me",
    "a long story " * 90,
    "### Assistant A\nwhat now",
    "naïve 日本語 " * 40,
]
SPELLINGS = [str, str.upper, str.title, lambda text: f"  {text}\n", lambda text: f"¿{text}!"]
ANSWERS = ["yes", "", "no\nit is not", "word " * 150, "日本 " * 200]


def folds_of(folder: Path) -> dict[str, dict[str, set[str]]]:
    """Return the ids that LLaMA-Factory is given, by data set and fold."""
    found: dict[str, dict[str, set[str]]] = {}
    for name in SETS:
        for fold in ("train", "valid"):
            lines = (folder / f"{name}_{fold}.jsonl").read_text(encoding="ascii").splitlines()
            found.setdefault(name, {})[fold] = {json.loads(line)["id"] for line in lines}
    return found


def drawn_votes(seed: int) -> list[Battle]:
    """Thirty prompts, each spelled in several ways, before answers and further turns that fit or do not."""
    random, battles = Random(seed), []
    for number in range(30):
        prompt = PROMPTS[number] if number < len(PROMPTS) else f"{random.choice(PROMPTS)} {number}"
        for copy in range(random.randint(2, 4)):
            turns = random.randint(1, 3)
            later = random.choices(["go on", *PROMPTS], k=turns - 1)
            answers_a, answers_b = (random.choices(ANSWERS, k=turns) for _ in "ab")
            answers_b[-1] += " indeed"
            texts = (random.choice(SPELLINGS)(prompt), *later), tuple(answers_a), tuple(answers_b)
            battles.append(Battle(f"{number}-{copy}", *texts, random.choice(VERDICTS)))
    return battles


@pytest.mark.parametrize("seed", range(8))
def test_no_prompt_of_the_votes_is_in_two_folds_whatever_was_cut(experiment, workplace, seed):
    battles = drawn_votes(seed)
    experiment = experiment.model_copy(update={"cutoff_len": 300, "valid_share": 0.3})
    export(experiment, write_votes(workplace / "votes.csv", battles), views=("judge", "reward"), workers=0)
    group = {battle.id: prompt_group(battle) for battle in battles}
    for name, ids in folds_of(experiment.data_folder).items():
        both = {group[i] for i in ids["train"]} & {group[i] for i in ids["valid"]}
        assert not both, f"{len(both)} prompts of {name} are trained on and validated on"
    assert not any(shared_prompts(experiment.data_folder).values()), "and the run check has nothing to say"
    rows = read_table(experiment.data_folder / "rows.parquet").to_pylist()
    assert any(row["dropped"] for row in rows) and any(row["cut"] and not row["dropped"] for row in rows)
    for battle, row in zip(battles, rows, strict=True):
        assert battle_facts(battle).items() <= row.items()


def twins(count: int) -> list[Battle]:
    """Each prompt twice: once before one short turn, once before two turns of which the first does not fit."""
    battles = []
    for number in range(count):
        first, verdict = f"question {number}", VERDICTS[number % 3]
        battles.append(Battle(f"{number}s", (first,), ("yes",), (f"no {number}",), verdict))
        texts = ("word " * 300, "yes"), ("word " * 300, "no")
        battles.append(Battle(f"{number}l", (first, f"and {number} then"), *texts, verdict))
    return battles


def test_a_prompt_whose_turn_is_dropped_stays_in_its_fold_as_prompt_and_as_pair(experiment, workplace):
    battles = twins(120)
    export(experiment, write_votes(workplace / "votes.csv", battles), views=("judge", "reward"))
    folder = experiment.data_folder
    rows = {row["id"]: row for row in read_table(folder / "rows.parquet").to_pylist()}
    assert sum(row["dropped"] for row in rows.values()) == 120
    for name, ids in folds_of(folder).items():
        both = {i[:-1] for i in ids["train"]} & {i[:-1] for i in ids["valid"]}
        assert not both, name
        assert ids["valid"] <= {i for i, row in rows.items() if row["split"] == "valid"}


def test_the_run_check_sees_what_groups_of_shortened_battles_would_hide(experiment, workplace, monkeypatch):
    from data_prep import export_rows as batch

    battles = twins(120)

    def shortened(battle: Battle) -> dict:
        return {**battle_facts(battle), "group": prompt_group(battle.prompts[-1])}

    monkeypatch.setattr(batch, "battle_facts", shortened)
    export(experiment, write_votes(workplace / "votes.csv", battles), views=("judge", "reward"), workers=0)
    found = shared_prompts(experiment.data_folder)
    assert found["the votes"] > 10 and not found["the folds' groups"]


def test_a_battle_is_cut_alike_with_and_without_its_verdict_in_either_order(experiment, workplace):
    Path("inline.j2").write_text(
        "{% for turn in turns %}{{ turn.prompt }}\n{{ turn.a }} {{ turn.b }}\n{% endfor %}Verdict:\n"
    )
    frame, tokenizer = load_frame(experiment)
    prompt = JudgePrompt.load(Path("inline.j2"), experiment.labels)

    def tokens(battle: Battle) -> int:
        wrapped = frame.wrap(prompt.message(battle, 0))
        return len(tokenizer.encode(wrapped, add_special_tokens=False).ids) + frame.overhead

    texts = ("why " * 300,), ("the answer",), ("1 answer",)
    battle = max((Battle("1", *texts, "a"), swap(Battle("1", *texts, "b"))), key=lambda b: tokens(swap(b)) - tokens(b))
    assert tokens(battle) < tokens(swap(battle)), "only the other order is too long"
    others = [Battle(f"x{i}", (f"q{i}",), ("a",), ("b",), VERDICTS[i % 3]) for i in range(60)]
    changed = {"cutoff_len": tokens(battle), "prompt_template": "inline.j2"}
    for swap_copies in (True, False):
        its = experiment.model_copy(update={**changed, "swap_copies": swap_copies})
        votes = write_votes(workplace / "votes.csv", [battle, *others])
        export(its, votes, write_votes(workplace / "test.csv", [battle, replace(battle, id="new")]))
        (fitted, *_), row = (
            read_table(its.data_folder / f"{name}.parquet").to_pylist() for name in ("battles", "rows")
        )
        assert row[0]["cut"] and MARKER in fitted["prompts"][0] and row[-1]["split"] == "test"
        assert {**read_table(its.data_folder / "battles.parquet").to_pylist()[-1], "id": "1"} == fitted


def test_the_lengths_are_those_of_the_whole_texts(experiment, workplace):
    battle = Battle("1", ("p" * 3000, ""), ("a" * 2000, "a"), ("b" * 4000, "<|im_end|>"), "a")
    others = [Battle(f"x{i}", (f"q{i}",), ("a",), ("b",), VERDICTS[i % 3]) for i in range(60)]
    export(experiment, write_votes(workplace / "votes.csv", [battle, *others]))
    row = read_table(experiment.data_folder / "rows.parquet").to_pylist()[0]
    assert (row["chars_prompt"], row["chars_a"], row["chars_b"], row["turns"]) == (3000, 2001, 4010, 2)
    assert row["cut"] and row["group"] == prompt_group("p" * 3000)


@given(st.text() | st.sampled_from(PROMPTS), st.text(alphabet="<|im_end>#A \n\u200b{idx}", max_size=40))
def test_what_is_fed_of_a_whole_prompt_is_in_the_group_of_the_vote(text, more):
    prompt = JudgePrompt.load(Path("templates/judge_prompt.j2"), Labels())
    for lines in ((), (prompt.lines,)):
        neutral = Neutralizer(["<|im_end|>", "<|im_start|>"], *lines)
        assert prompt_group(neutral(text + more)) == prompt_group(text + more)


@given(st.text(), st.text())
def test_what_the_second_opinion_calls_the_same_prompt_is_one_group(one, other):
    def noted(text: str) -> int:
        return int(first_prompts([Battle("1", (text,), ("a",), ("b",))])[0])

    for text in (other, one.upper(), one.lower(), f" {one}\n", one.replace(" ", "\t")):
        if noted(one) == noted(text):
            assert prompt_group(one) == prompt_group(text)
    assert noted("Why  IS it?\n") == noted("why is it?") != noted("why is it")
