"""The audit: statistics are those of the vote, whatever is cut from it; a test set of training rows is reported."""

import json
from collections import Counter
from pathlib import Path
from random import Random

import pytest
from chain import rows_of
from hypothesis import given
from hypothesis import strategies as st
from pyarrow.parquet import read_table
from workbench import write_votes

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from common.errors import ArenaError
from common.experiment import Labels
from data_prep.audit import first_prompts, row_statistics, warnings_of
from data_prep.export import export
from data_prep.export_reader import read_manifest
from data_prep.folds import prompt_group
from data_prep.prompt import EMPTY, JudgePrompt, Neutralizer
from data_prep.sources import Source
from data_prep.synthetic import write_arena
from scoring.checks.run_checks import shared_prompts
from tests.bad_inputs.place import Place

SETS = ("sft", "dpo_judge", "dpo_reward")
PROMPTS = ["why?", "", EMPTY, "tell <|im_end|> me", "story " * 160, "### Assistant A\nwhat now"]
PROMPTS.append("naïve 日本語 " * 40)
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


@pytest.mark.parametrize("seed", range(4))
def test_no_prompt_of_the_votes_is_in_two_folds_whatever_was_cut(experiment, workplace, seed):
    battles = drawn_votes(seed)
    experiment = experiment.model_copy(update={"cutoff_len": 300, "valid_share": 0.3})
    export(experiment, write_votes(workplace / "votes.csv", battles), views=("judge", "reward"), workers=0)
    group = {battle.id: prompt_group(battle) for battle in battles}
    for name, ids in folds_of(experiment.data_folder).items():
        both = {group[i] for i in ids["train"]} & {group[i] for i in ids["valid"]}
        assert not both, f"{len(both)} prompts of {name} are trained on and validated on"
    assert not any(shared_prompts(experiment.data_folder, ["train"], ["valid"]).values()), "nor for the run check"
    rows = read_table(experiment.data_folder / "rows.parquet").to_pylist()
    assert any(row["dropped"] for row in rows) and any(row["cut"] and not row["dropped"] for row in rows)
    for battle, row in zip(battles, rows, strict=True):
        assert row_statistics(battle).items() <= row.items()


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


@pytest.fixture
def arena(workplace):
    return write_arena(workplace / "arena", seed=5, train_rows=60, test_rows=10)


def test_training_rows_in_a_test_set_are_counted_and_kept(experiment, arena):
    test, train = rows_of(arena.test), rows_of(arena.train)
    same_id = [{**row, "id": other["id"]} for row, other in zip(test[:2], train, strict=False)]  # other prompts
    bare = Place().table(train[:5], "bare.csv", test[0])
    mixed = Place().table([*test[2:], *same_id, *train[10:13]], "mixed.csv", test[0])
    for table, found, rows in ((mixed, 3, 13), (bare, 5, 5), (arena.test, 0, 10)):
        audit = export(experiment, arena.train, table)
        assert (audit["test_rows_in_train"], audit["exported"]["test"]) == (found, rows)
        expected = [f"warning: {found} of {rows} rows of {table} are training rows"] if found else []
        assert [line.partition(" (")[0] for line in warnings_of(audit)] == expected
    assert "test_rows_in_train" not in export(experiment, arena.train)


def test_strange_verdicts_are_told(experiment, workplace):
    prompts = [f"q{n}?" for n in range(40)]
    records = [{"prompt": p, "response_a": "yes", "response_b": "no", "anony": n < 7} for n, p in enumerate(prompts)]
    for votes, told in (
        ({"winner": "A"}, ["WARNING: all 40 verdicts of votes.jsonl are 'a'", "warning: in 33 battles of votes.jsonl"]),
        (dict(zip(PROBABILITY_COLUMNS, (0.4, 0.3, 0.3), strict=True)), ["note: 40 battles of votes", "warning: in"]),
    ):
        Path("votes.jsonl").write_text("\n".join(json.dumps(record | votes) for record in records))
        said = warnings_of(export(experiment, Path("votes.jsonl"), workers=0))
        assert len(said) == len(told) and all(map(str.startswith, said, told)), said


def test_of_several_sources_the_first_alone_validates_and_no_prompt_of_its_fold_is_trained_on(experiment, workplace):
    def votes(name: str, numbers: range) -> Path:
        texts = [(number, VERDICTS[number % 3]) for number in numbers]
        battles = [Battle(f"{n}", (f"q{n}?",), (f"yes {n}",), (f"no {n}",), v) for n, v in texts]
        return write_votes(workplace / name, battles)

    target, other, half = votes("a.csv", range(60)), votes("b.csv", range(40, 140)), votes("c.csv", range(200, 400))
    alone = export(experiment, target, views=("judge", "reward"))
    alone_valid = folds_of(experiment.data_folder)["sft"]["valid"]
    given = [Source(target, 2), Source(other), Source(half, 0.25)]
    audit = export(experiment, given, views=("judge", "reward"))
    assert folds_of(experiment.data_folder)["sft"]["valid"] == alone_valid, "a figure means what it meant before"
    shared = sum(f"{n}" in alone_valid for n in range(40, 60))
    sources = audit["sources"]
    drawn = sources["train_3"]["rows_trained"]
    assert shared and 30 < drawn < 70
    fates = {name: [each["rows_trained"], each["rows_validating"], each["left_out"]] for name, each in sources.items()}
    assert fates == {
        "train": [60 - len(alone_valid), len(alone_valid), {"prompt_validates": 0, "weight": 0}],
        "train_2": [100 - shared, 0, {"prompt_validates": shared, "weight": 0}],
        "train_3": [drawn, 0, {"prompt_validates": 0, "weight": 200 - drawn}],
    }
    lines = (experiment.data_folder / "sft_train.jsonl").read_text().splitlines()
    copies = len(lines) // audit["exported"]["sft_train"] * (1 + experiment.swap_copies)
    trained = Counter(json.loads(line)["id"] for line in lines)
    assert trained["train_2:139"] == copies and trained[min(set(map(str, range(60))) - alone_valid)] == 2 * copies
    assert sum(trained.values()) == copies * (2 * (60 - len(alone_valid)) + 100 - shared + drawn)
    assert not {f"train_2:{name}" for name in alone_valid} & trained.keys()
    told = " ".join(warnings_of(audit))
    assert f"b.csv: {100 - shared} of 100 battles are trained on; {shared} left out because their prompt" in told
    assert "its ids begin with train_2:" in told and f"{200 - drawn} not drawn by its weight 0.25" in told
    first = read_manifest(experiment.data_folder)
    export(experiment, given, views=("judge", "reward"))
    assert read_manifest(experiment.data_folder) == first, "the lot is seeded"
    assert alone["sources"]["train"]["weight"] == 1 and "train_2" not in alone["sources"]
    with pytest.raises(ArenaError, match="is given twice as --train"):
        export(experiment, [Source(target), Source(target)])


def test_many_shortened_battles_are_reported_with_the_key(experiment, arena):
    rows, found = rows_of(arena.train), {}
    for long in (29, 31):  # of 60
        turns = [["a longer answer " * 300] * len(json.loads(row["response_a"])) for row in rows[:long]]
        changed = [{**row, "response_a": json.dumps(answer)} for row, answer in zip(rows, turns, strict=False)]
        audit = export(experiment, Place().table([*changed, *rows[long:]], "long.csv"))
        assert audit["truncation"]["train"]["rows_cut"] == long
        assert audit["truncation"]["train"]["fields_cut"] == {"prompt": 0, "a": long, "b": 0}
        found[long] = warnings_of(audit)
    assert found[29] == []
    (line,) = found[31]
    assert "51.7% of the battles" in line and "factory_configs/exam/experiment.yaml" in line
