"""A judge is loaded as it was written, asks as training asked, answers as when it was merged, or is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from chain import call

from common.battle import Battle, swap
from common.errors import ArenaError
from common.experiment import load_experiment
from common.files import only_run
from data_prep.truncation import Fitter
from factory.stage_context import StageContext
from factory.state import StageState
from scoring.judge import GOLDEN_PROMPTS, load_judge, require_golden_answers, write_golden_answers, write_judge

BATTLES = [
    Battle("1", ("hi",), ("Hello!",), ("Hey, what's up?",), "b"),
    Battle("2", ("naïve 日本語 😀", "and then?"), ("x" * 3, "é"), ("", "<|im_end|>"), "tie"),
    Battle("3", ("one", "two " * 150), ("long " * 200, "a"), ("b", "word " * 300), None),
]
SOURCE = {"stage": "sft", "recipe": "sha256:aa"}
ANSWERS = np.tile([0.5, 0.3, 0.2], (len(GOLDEN_PROMPTS), 1))


@pytest.fixture
def experiment(make_experiment):
    """An experiment whose keys that a judge keeps differ from their defaults."""
    return make_experiment(cutoff_len=300, prompt_share=0.4)


@pytest.fixture
def folder(tmp_path, experiment, small_tokenizer, small_frame, judge_prompt) -> Path:
    """A merged folder with its judge.json, without weights."""
    small_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_judge(tmp_path, experiment, small_frame, judge_prompt.source, SOURCE)
    return tmp_path


def test_a_judge_is_loaded_as_it_was_written(folder, experiment, small_frame, judge_prompt):
    judge = load_judge(folder)
    assert (judge.folder, judge.frame, judge.labels, judge.source) == (folder, small_frame, experiment.labels, SOURCE)
    assert (judge.cutoff_len, judge.prompt_share) == (300, 0.4)
    assert judge.prompt.message(BATTLES[1]) == judge_prompt.message(BATTLES[1])
    content = json.loads((folder / "judge.json").read_text(encoding="utf-8"))
    assert (content["classes"], content["labels"]) == (["a", "b", "tie"], {"a": "A", "b": "B", "tie": "C"})


@pytest.mark.parametrize("swapped", [False, True])
def test_sequences_are_the_frame_around_each_message(
    folder, experiment, small_frame, small_tokenizer, judge_prompt, swapped
):
    judge = load_judge(folder)
    fitter = Fitter(small_frame, small_tokenizer, judge_prompt, cutoff_len=300, prompt_share=0.4)
    expected = fitter.fit(BATTLES, both_orders=True)
    sequences = judge.sequences([(one.battle, one.dropped) for one in expected], swapped=swapped)
    for one, ids in zip(expected, sequences, strict=True):
        message = judge_prompt.message(swap(one.battle) if swapped else one.battle, one.dropped)
        alone = small_tokenizer.encode(small_frame.wrap(message), add_special_tokens=False).ids
        assert ids == small_frame.surround(alone)
        assert len(ids) + small_frame.answer_len == one.lengths[swapped] <= 300
        told = f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        assert small_tokenizer.decode(ids, skip_special_tokens=False) == told
    assert expected[2].cut, "one battle is longer than the budget"
    exchanged = [(swap(one.battle), one.dropped) for one in expected]
    assert judge.sequences(exchanged, swapped=not swapped) == sequences


def test_a_tokenizer_that_pads_and_cuts_does_neither_here(folder, small_tokenizer):
    from tokenizers import Tokenizer

    expected = load_judge(folder).sequences([(BATTLES[0], 0), (BATTLES[1], 0)])
    careless = Tokenizer.from_str(small_tokenizer.to_str())
    careless.enable_padding(length=700)
    careless.enable_truncation(max_length=9)
    careless.save(str(folder / "tokenizer.json"))
    assert load_judge(folder).sequences([(BATTLES[0], 0), (BATTLES[1], 0)]) == expected


def refused(*arguments: str) -> str:
    done = call(*arguments)
    assert done.exit_code == 1, done.output
    return done.output


def test_a_judge_that_does_not_exist_yet_comes_with_the_command_that_makes_it(place):
    merged, moved = Path("outputs/exam/sft/merged"), Path("elsewhere")
    call = ("score", "-e", "exam", "--stage", "sft")
    (merged / "judge.json").rename("judge.kept")
    assert "judge.json is missing" in (said := refused(*call)), said
    assert "move the folder away and merge again: python run.py sft -e exam --until merge" in said
    merged.rename(moved)
    Path("outputs/exam/sft/state.json").unlink()
    Path("saves").rename("saved")
    assert "outputs/exam/sft/merged: is not a judge yet: sft is not trained" in (said := refused(*call)), said
    assert "remedy: python run.py sft -e exam\n" in said
    with only_run(Path("outputs/exam/sft")):
        inputs = StageContext(load_experiment("exam"), "sft").training_inputs
        StageState(Path("outputs/exam/sft")).begin("train", inputs)
        assert "is not a judge yet: sft is training" in (said := refused(*call)), said
        assert "python run.py watch -e exam --stage sft" in said
    assert "is not a judge yet: sft is interrupted training\n" in refused(*call)
    Path("data/exam/manifest.json").unlink()
    assert "remedy: python run.py prepare -e exam --train FILE; then python run.py sft -e exam\n" in refused(*call)


@pytest.mark.parametrize(
    ("then", "now", "moved", "passes"),
    [
        ("fp32", "fp32", 5e-4, True),
        ("fp32", "fp32", 2e-3, False),
        ("fp32", "bf16", 2e-2, True),
        ("bf16", "fp32", 2e-2, True),
        ("fp32", "bf16", 8e-2, False),
        ("fp32", "q4_k_m", 0.2, True),
        ("fp32", "q4_k_m", 0.3, False),
        ("fp32", "fp32", np.nan, False),
    ],
)
def test_the_coarser_precision_decides_how_far_answers_may_move(folder, then, now, moved, passes):
    write_golden_answers(load_judge(folder), ANSWERS, then)
    answers = ANSWERS + np.eye(*ANSWERS.shape) * moved
    if passes:
        require_golden_answers(folder, now, lambda: answers)
        return
    with pytest.raises(ArenaError, match="does not answer as it did when it was merged") as caught:
        require_golden_answers(folder, now, lambda: answers)
    assert f"({then} then, {now} now)" in caught.value.what and "merge again" in caught.value.remedy


def test_golden_answers_may_be_missing_but_not_damaged(folder):
    judge = load_judge(folder)
    assert judge.golden_sequences() == judge.sequences([(battle, 0) for battle in GOLDEN_PROMPTS]), "none is cut"
    assert len(judge.golden_triples()) == len(GOLDEN_PROMPTS)
    require_golden_answers(folder, "fp32", lambda: pytest.fail("asked"))
    with pytest.raises(ArenaError, match="no finite answer"):
        write_golden_answers(judge, ANSWERS * np.nan, "fp32")
    write_golden_answers(judge, ANSWERS, "fp32")
    content = json.loads((folder / "canaries.json").read_text())
    del content["answers"]["sum"]
    for text in (json.dumps(content), "{", "[]", json.dumps(content | {"format": 9})):
        (folder / "canaries.json").write_text(text)
        with pytest.raises(ArenaError, match="is damaged"):
            require_golden_answers(folder, "fp32", lambda: ANSWERS)
