"""Settings that changed since prepare, and reports of an earlier judge: told, and mixed with nothing."""

import json
from pathlib import Path

import pytest
from chain import call

from common.experiment import load_experiment
from factory.stage_context import StageContext
from factory.state import StageState
from scoring.judge import MANIFEST
from scoring.scorer import ScorerSpec
from scoring.show import show_battle

DATA, OUT = Path("data/exam"), Path("outputs/exam/sft")
MERGED = OUT / "merged"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("valid_share: 0.5", "valid_share 0.3 -> 0.5"),
        ("swap_copies: false", "swap_copies true -> false"),
        ("labels: {a: B, b: A, tie: C}", 'labels: a "A" -> "B"'),
        ("prompt_template: other.j2", "prompt_template has other content"),
    ],
)
def test_a_setting_that_the_rows_were_made_with_may_not_change_under_them(place, text, line):
    template = Path("templates/judge_prompt.j2").read_text(encoding="utf-8")
    Path("other.j2").write_text(template.replace("Which", "Say which"), encoding="utf-8")
    place.edit_experiment(text)
    before = place.snapshot()
    for arguments in (["sft"], ["score", "--fresh"]):
        told = call(arguments[0], "-e", "exam", *arguments[1:])
        assert told.exit_code == 1 and "data/exam: was exported with other settings" in told.output, told.output
        assert f"  - {line}" in told.output
        assert "python run.py prepare -e exam --train votes.csv --test test.csv" in told.output
    after = place.snapshot()
    assert {name: after[name] for name in before} == before


def test_what_shapes_no_row_may_change(place):
    Path("copy.j2").write_bytes(Path("templates/judge_prompt.j2").read_bytes())
    for text in ("prompt_template: copy.j2", "swap_tta: true", "target_prior: {a: 0.4, b: 0.3, tie: 0.3}"):
        place.edit_experiment(text)
    assert StageContext(load_experiment("exam"), "sft").changed_settings() == []


@pytest.mark.parametrize("part", ["train", "merge", "score"])
def test_a_report_of_an_earlier_judge_is_used_by_nobody(place, part):
    exam = load_experiment("exam")
    shown = show_battle(StageContext(exam, "sft"), "9000")
    assert StageContext(exam, "sft").earlier_scores() is None and "final" in shown.probabilities and shown.stale is None
    StageState(OUT).begin(part, {})
    assert f"({part} began)" in StageContext(exam, "sft").earlier_scores()
    for arguments in (["compare"], ["score", "--input", "test.csv", "--output", "mine.csv"]):
        told = call(arguments[0], "-e", "exam", *arguments[1:])
        assert told.exit_code == 1 and "was not scored since" in told.output, told.output
        assert "python run.py sft -e exam" in told.output and not Path("mine.csv").exists()
    shown = show_battle(StageContext(exam, "sft"), "9000")
    assert shown.probabilities == {} and "was not scored since" in shown.stale
    told = call("show", "9000", "-e", "exam")
    assert told.exit_code == 0 and "probabilities: none; sft was started again" in told.output


def test_a_judge_that_was_put_in_the_place_of_the_scored_one_is_told(place):
    changed = json.loads((MERGED / MANIFEST).read_text()) | {"cutoff_len": 310}
    (MERGED / MANIFEST).write_text(json.dumps(changed))
    told = call("score", "-e", "exam", "--input", "test.csv", "--output", "mine.csv")
    assert told.exit_code == 1 and "the judge is not the one that was scored" in told.output, told.output
    assert "judge.json has other content" in told.output and "score -e exam --stage sft --fresh" in told.output


def trained_with(recipe: dict) -> None:
    StageState(Path("outputs/exam/dpo_reward")).begin("train", {"factory_configs/exam/dpo_reward.yaml": recipe})


def test_rewards_are_those_that_the_adapter_was_trained_with(place):
    exam = load_experiment("exam")
    today = StageContext(exam, "dpo_reward").trained_recipe
    adapter = exam.adapter_folder("dpo_reward")
    adapter.mkdir(parents=True)
    (adapter / "adapter_model.safetensors").write_bytes(b"weights")
    trained_with({**today, "pref_beta": 0.5, "output_dir": "elsewhere"})
    found = StageContext(exam, "dpo_reward").trained_recipe
    assert found == {**today, "pref_beta": 0.5}, "where the adapter lies is today's matter"
    assert ScorerSpec(StageContext(exam, "dpo_reward")).scorer().inputs()["pref_beta"] == 0.5
    without = {key: value for key, value in today.items() if key != "pref_beta"}
    trained_with(without)
    assert StageContext(exam, "dpo_reward").trained_recipe == without, "LLaMA-Factory's default ruled"


@pytest.mark.parametrize("text", ["reward_length_normalised: true", "cutoff_len: 310"])
def test_what_rewards_depend_on_is_among_their_inputs(place, text):
    before = ScorerSpec(StageContext(load_experiment("exam"), "dpo_reward")).scorer().inputs()
    place.edit_experiment(text)
    after = ScorerSpec(StageContext(load_experiment("exam"), "dpo_reward")).scorer().inputs()
    assert {name for name in before if before[name] != after[name]} == {text.split(":")[0].removeprefix("reward_")}
    assert "model.safetensors" in before["base"], "a base that is a folder counts by its content"


def declare_prior(experiment: str) -> None:
    with Path(f"factory_configs/{experiment}/experiment.yaml").open("a", encoding="utf-8") as file:
        file.write("target_prior: {a: 0.4, b: 0.3, tie: 0.3}\n")


@pytest.mark.parametrize("stage", ["sft", "rm", "dpo_reward", "base", "probe"])
def test_a_declared_prior_needs_a_new_report_and_no_new_scores(scored, stage):
    """Nothing answers with the earlier report; the new one equals that of a scoring from the beginning."""
    folder, names = Path(f"outputs/exam/{stage}"), ("report.json", "probabilities_test.csv", "probabilities_valid.csv")
    declare_prior("exam")
    for arguments in (["score", "--stage", stage, "--input", "test.csv", "--output", "mine.csv"], ["compare"]):
        told = call(*arguments, "-e", "exam")
        assert told.exit_code == 1 and "target_prior: a (absent) -> 0.4" in told.output, told.output
        named = "sft" if arguments == ["compare"] else stage
        assert told.output.rstrip().endswith(f"python run.py score -e exam --stage {named}"), "the command that follows"
    assert not Path("mine.csv").exists()
    scores, before = (folder / "scores_test.parquet").read_bytes(), (folder / names[1]).read_bytes()
    made = []
    for again in ([], ["--fresh"]):
        told = call("score", "-e", "exam", "--stage", stage, *again)
        assert told.exit_code == 0 and ("loading the model" in told.output) == bool(again), told.output
        found = [(folder / name).read_text(encoding="utf-8") for name in names]
        report = json.loads(found[0])
        del report["provenance"]["scoring_seconds"]
        made.append((report, found[1:]))
    assert made[0] == made[1]
    assert (folder / names[1]).read_bytes() != before and report["target_prior"]
    assert (folder / "scores_test.parquet").read_bytes() == scores
    assert call("score", "-e", "exam", "--stage", stage, "--input", "test.csv", "--output", "mine.csv").exit_code == 0


def test_a_declared_prior_reaches_the_report_of_all_folds_and_its_answers(scored):
    before = Path("outputs/folded/sft/probabilities_test.csv").read_bytes()
    declare_prior("folded")
    told = call("score", "-e", "folded", "--input", "test.csv", "--output", "mine.csv")
    assert told.exit_code == 1 and "target_prior: a (absent) -> 0.4" in told.output, told.output
    told = call("score", "-e", "folded")
    assert told.exit_code == 0 and "loading the model" not in told.output, told.output
    assert Path("outputs/folded/sft/probabilities_test.csv").read_bytes() != before
    assert call("score", "-e", "folded", "--input", "test.csv", "--output", "mine.csv").exit_code == 0


def test_scores_that_are_not_those_of_the_report_are_not_reported_again(scored):
    declare_prior("exam")
    path = Path("outputs/exam/sft/scores_test.parquet")
    path.write_bytes(path.read_bytes()[:-100])
    told = call("score", "-e", "exam")
    assert told.exit_code == 1 and "--fresh" in told.output and "Traceback" not in told.output, told.output
