"""scoring.judge: what is written is what is loaded, it asks as training asked, and a wrong folder is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from common.battle import Battle, swap
from common.errors import ArenaError
from common.files import only_run
from data_prep.truncation import Fitter
from factory.state import StageState
from scoring.judge import MANIFEST, load_judge, write_judge

BATTLES = [
    Battle("1", ("hi",), ("Hello!",), ("Hey, what's up?",), "b"),
    Battle("2", ("naïve 日本語 😀", "and then?"), ("x" * 3, "é"), ("", "<|im_end|>"), "tie"),
    Battle("3", ("one", "two " * 150), ("long " * 200, "a"), ("b", "word " * 300), None),
]
SOURCE = {"stage": "sft", "recipe": "sha256:aa"}


@pytest.fixture
def experiment(make_experiment):
    """An experiment whose every key that a judge keeps differs from what is usual."""
    return make_experiment(cutoff_len=300, swap_tta=True, budget_shares={"prompt": 0.4, "a": 0.3, "b": 0.3})


@pytest.fixture
def folder(tmp_path, experiment, small_tokenizer, small_frame, judge_prompt) -> Path:
    """A merged folder with its judge.json, without weights."""
    small_tokenizer.save(str(tmp_path / "tokenizer.json"))
    write_judge(tmp_path, experiment, small_frame, judge_prompt.source, SOURCE)
    return tmp_path


def edit(folder: Path, **changed) -> None:
    path = folder / MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changed), encoding="utf-8")


def test_a_judge_is_loaded_as_it_was_written(folder, experiment, small_frame, judge_prompt):
    judge = load_judge(folder)
    assert judge.folder == folder
    assert judge.frame == small_frame
    assert judge.labels == experiment.labels
    assert judge.cutoff_len == 300
    assert judge.shares == experiment.budget_shares
    assert judge.swap_tta is True
    assert judge.source == SOURCE
    assert judge.prompt.message(BATTLES[1]) == judge_prompt.message(BATTLES[1])


def test_the_manifest_tells_the_order_of_the_classes(folder):
    content = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    assert content["classes"] == ["a", "b", "tie"]
    assert content["labels"] == {"a": "A", "b": "B", "tie": "C"}


@pytest.mark.parametrize("swapped", [False, True])
def test_sequences_are_the_frame_around_each_message(
    folder, experiment, small_frame, small_tokenizer, judge_prompt, swapped
):
    judge = load_judge(folder)
    fitter = Fitter(small_frame, small_tokenizer, judge_prompt, cutoff_len=300, shares=experiment.budget_shares)
    expected = fitter.fit(BATTLES, both_orders=True)
    sequences = judge.sequences([(one.battle, one.dropped) for one in expected], swapped=swapped)
    for one, ids in zip(expected, sequences, strict=True):
        message = judge_prompt.message(swap(one.battle) if swapped else one.battle, one.dropped)
        alone = small_tokenizer.encode(small_frame.wrap(message), add_special_tokens=False).ids
        assert ids == small_frame.surround(alone)
        assert len(ids) + small_frame.answer_len == one.lengths[swapped] <= 300
        assert small_tokenizer.decode(ids, skip_special_tokens=False) == (
            f"<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
        )
    assert expected[2].cut, "one battle is longer than the budget"


def test_swapped_sequences_are_those_of_the_swapped_battles(folder):
    judge = load_judge(folder)
    fitted = [(one.battle, one.dropped) for one in judge.fit(BATTLES)]
    swapped = [(swap(battle), dropped) for battle, dropped in fitted]
    assert judge.sequences(fitted, swapped=True) == judge.sequences(swapped)
    assert judge.sequences(fitted) == judge.sequences(swapped, swapped=True)
    assert judge.sequences(fitted) != judge.sequences(swapped)


def test_a_tokenizer_that_pads_and_cuts_is_asked_not_to(folder, small_tokenizer):
    from tokenizers import Tokenizer

    expected = load_judge(folder).sequences([(BATTLES[0], 0), (BATTLES[1], 0)])
    careless = Tokenizer.from_str(small_tokenizer.to_str())
    careless.enable_padding(length=700)
    careless.enable_truncation(max_length=9)
    careless.save(str(folder / "tokenizer.json"))
    assert load_judge(folder).sequences([(BATTLES[0], 0), (BATTLES[1], 0)]) == expected


def test_another_tokenizer_is_refused(folder, small_tokenizer):
    content = json.loads(small_tokenizer.to_str())
    vocabulary = content["model"]["vocab"]
    one, other = small_tokenizer.encode("Verdict:").tokens[:2]
    vocabulary[one], vocabulary[other] = vocabulary[other], vocabulary[one]
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ArenaError, match="tokenizer in this folder is not the one") as caught:
        load_judge(folder)
    assert "'Verdict:'" in caught.value.what
    assert "merge" in caught.value.remedy


def test_a_folder_without_a_manifest_is_no_judge(tmp_path):
    with pytest.raises(ArenaError, match=r"judge\.json is missing") as caught:
        load_judge(tmp_path)
    assert caught.value.where == str(tmp_path)
    assert "--until merge" in caught.value.remedy


@pytest.mark.parametrize("action", [load_judge, lambda f: write_judge(f, None, None, "", {})])
def test_a_folder_without_a_tokenizer_is_named(folder, action):
    (folder / "tokenizer.json").unlink()
    with pytest.raises(ArenaError, match=r"tokenizer\.json is missing") as caught:
        action(folder)
    assert caught.value.where == str(folder)


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"format": 1}', '"judge"', '{"format": 1, "classes": ["a", "b", "tie"]}']
)
def test_a_damaged_manifest_is_an_error_with_a_remedy(folder, content):
    (folder / MANIFEST).write_text(content, encoding="utf-8")
    with pytest.raises(ArenaError, match="is damaged") as caught:
        load_judge(folder)
    assert caught.value.where == str(folder / MANIFEST)
    assert "merge" in caught.value.remedy


@pytest.mark.parametrize(
    "changed",
    [
        {"frame": {}},
        {"frame": None},
        {"frame": {"template": "x", "unknown": 1}},
        {"labels": {"a": "A", "b": "A", "tie": "C"}},
        {"labels": {"win": "A"}},
        {"budget_shares": {"prompt": 0.9, "a": 0.4, "b": 0.4}},
        {"canaries": ["Verdict:"]},
    ],
)
def test_a_manifest_with_a_broken_part_is_damaged(folder, changed):
    edit(folder, **changed)
    with pytest.raises(ArenaError, match="is damaged"):
        load_judge(folder)


@pytest.mark.parametrize("changed", [{"format": 2}, {"classes": ["a", "tie", "b"]}])
def test_a_manifest_of_another_version_is_not_guessed_at(folder, changed):
    edit(folder, **changed)
    with pytest.raises(ArenaError, match="another version"):
        load_judge(folder)


def test_a_manifest_in_another_encoding_is_damaged(folder):
    (folder / MANIFEST).write_bytes('{"format": "é"}'.encode("latin-1"))
    with pytest.raises(ArenaError, match="is damaged"):
        load_judge(folder)


def test_a_broken_tokenizer_is_an_error_with_a_remedy(folder):
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ArenaError) as caught:
        load_judge(folder)
    assert "merge" in caught.value.remedy


def told(*arguments: str) -> str:
    done = CliRunner().invoke(run.cli, arguments)
    assert done.exit_code == 1, done.output
    return done.output


def test_a_judge_that_is_not_made_yet_comes_with_the_command_that_makes_it(place):
    merged, moved = Path("outputs/exam/sft/merged"), Path("elsewhere")
    call = ("score", "-e", "exam", "--stage", "sft")
    (merged / MANIFEST).rename("judge.kept")
    assert "judge.json is missing" in (said := told(*call)), said
    assert "move the folder away and merge again: python run.py sft -e exam --until merge" in said
    merged.rename(moved)
    Path("outputs/exam/sft/state.json").unlink()
    Path("saves").rename("saved")
    assert "outputs/exam/sft/merged: is not a judge yet: sft is not trained" in (said := told(*call)), said
    assert "remedy: train, merge and score: python run.py sft -e exam\n" in said
    with only_run(Path("outputs/exam/sft")):
        StageState(Path("outputs/exam/sft")).begin("train", {})
        assert "is not a judge yet: sft is at work (training)" in (said := told(*call)), said
        assert "python run.py watch -e exam --stage sft" in said
    assert "is not a judge yet: sft is interrupted (training)\n" in told(*call)
    Path("data/exam/manifest.json").unlink()
    assert "remedy: python run.py prepare -e exam --train FILE; then python run.py sft -e exam\n" in told(*call)
