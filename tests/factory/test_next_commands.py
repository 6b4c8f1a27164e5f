"""What `status` and `prepare` say is next is never refused; results of other votes, recipes and settings are told."""

import json
import re
import shlex
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
from chain import call, status, whole_checkpoint

from common.errors import ArenaError, Interrupted
from common.experiment import load_experiment
from common.files import only_run
from common.stages import STEPS, TRAININGS
from data_prep.export import ensure_views
from factory.fingerprint import local_models
from factory.stage_context import StageContext
from factory.state import StageState

DATA = Path("data/exam")
ADAPTER, OUT = Path("saves/tiny/lora/exam_sft"), Path("outputs/exam/sft")
RECIPE = Path("factory_configs/exam/sft.yaml")


class Started(Exception):
    """LLaMA-Factory would have been started."""


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    monkeypatch.setattr("factory.train.run_child", Mock(side_effect=Started))
    monkeypatch.setattr("factory.merge.run_child", Mock(side_effect=Started))


def next_of(said: str) -> list[str]:
    return re.findall(r"^next: (.*)$", said, re.MULTILINE)


def inputs() -> dict:
    context = StageContext(load_experiment("exam"), "sft")
    return {**context.training_inputs, **local_models(context.recipe)}


def trained(*, checkpoint: str | None = None) -> None:
    """Write down that today's recipe was trained on today's export; with a checkpoint that it was left there."""
    state = StageState(OUT)
    state.begin("train", inputs())
    if checkpoint:
        whole_checkpoint(ADAPTER / checkpoint)
    else:
        state.finish("train", [ADAPTER / "adapter_config.json"], 1.0)


def prepare(votes: str = "votes.csv", *more: str) -> list[str]:
    done = call("prepare", "-e", "exam", "--train", votes, *more)
    assert done.exit_code == 0, done.output
    told = next_of(done.output)
    assert told == next_of(call("status", "-e", "exam").output), "one place decides"
    return told


def starts_by(command: str) -> bool:
    """Tell whether a recommended command of run.py is accepted: LLaMA-Factory would start."""
    words = shlex.split(command.split("   (")[0])
    assert words[:2] == ["python", "run.py"], command
    done = call(*words[2:])
    assert done.exception is not None and not isinstance(done.exception, SystemExit), done.output
    return isinstance(done.exception, Started)


def test_prepare_after_a_run_that_was_left_recommends_what_is_not_refused(place):
    trained(checkpoint="checkpoint-4")
    told = prepare()
    assert told == ["python run.py sft -e exam --resume"] and starts_by(told[0])
    told = prepare(str(place.table(place.rows(44, start=5000), "others.csv")))
    assert told == ["python run.py sft -e exam --fresh"] and starts_by(told[0])


@pytest.mark.parametrize(
    ("folds", "checkpoint", "goes_on"),
    [
        (1, True, "python run.py sft -e exam OPTIONS --resume"),
        (1, False, "python run.py sft -e exam OPTIONS --fresh"),
        (2, True, "python run.py sft -e exam OPTIONS --resume"),
        (2, False, "python run.py sft -e exam --fold 0 OPTIONS --fresh, then the same command"),
    ],
)
def test_what_goes_on_after_an_interruption_keeps_the_options_that_change_the_work(
    place, monkeypatch, folds, checkpoint, goes_on
):
    def interrupted(command, log, *, interrupted_remedy, **_):
        adapter = StageContext(load_experiment("exam"), "sft").of(0 if folds > 1 else None).adapter
        saved = whole_checkpoint(adapter / "checkpoint-4")
        if not checkpoint:
            (saved / "optimizer.pt").unlink()
        raise Interrupted("training was interrupted", remedy=interrupted_remedy())

    place.edit_experiment(f"folds: {folds}")
    shutil.rmtree(ADAPTER)
    prepare()
    monkeypatch.setattr("factory.train.run_child", interrupted)
    options = ["--until", "train", "--checkpoint", "best", "--allow", "my tracker"]
    said = call("sft", "-e", "exam", *options).output
    told = goes_on.replace("OPTIONS", shlex.join(options))
    assert f"remedy: go on with {told}\n" in said, said
    monkeypatch.setattr("factory.train.run_child", Mock(side_effect=Started))
    assert starts_by(told.split(", then")[0])


@pytest.mark.parametrize(
    ("gpu", "takes", "told"),
    [
        (False, "minutes", "python run.py sft -e exam"),
        (False, "hours", "python run.py probe -e exam   (no GPU here"),
        (False, "days", "python run.py sft -e exam   (days, for no GPU is here; made for a CPU: -e smollm2-135m"),
        (True, "hours", "python run.py sft -e exam"),
    ],
)
def test_without_a_gpu_what_a_cpu_can_do_comes_first(place, monkeypatch, gpu, takes, told):
    monkeypatch.setattr("factory.status.may_have_gpu", lambda: gpu)
    monkeypatch.setattr("factory.status.time_on_cpu", lambda model: takes)
    shutil.rmtree(OUT)
    shutil.rmtree(ADAPTER)
    (found,) = prepare()
    assert found.startswith(told) and ("(" in found) == ("(" in told)


def test_a_changed_recipe_makes_a_stage_outdated(place):
    place.edit_recipe("sft", "optim: adamw_torch_fused\nlogging_steps: 7")
    trained()
    assert status(load_experiment("exam"), "sft").state == "trained"
    place.edit_recipe("sft", "logging_steps: 8")
    assert status(load_experiment("exam"), "sft").state == "trained", "no weight depends on it"
    place.edit_recipe("sft", "optim: adamw_torch")
    seen = status(load_experiment("exam"), "sft")
    assert seen.state == "outdated" and seen.next == "python run.py sft -e exam --fresh"
    assert 'sft.yaml: optim "adamw_torch_fused" -> "adamw_torch"' in seen.detail and starts_by(seen.next)
    place.edit_experiment("distributed: ddp")
    assert 'distributed (absent) -> "ddp"' in status(load_experiment("exam"), "sft").detail


def test_a_changed_recipe_is_not_resumed(place):
    trained(checkpoint="checkpoint-4")
    place.edit_recipe("sft", "learning_rate: 0.005")
    seen = status(load_experiment("exam"), "sft")
    assert (seen.state, seen.next) == ("interrupted", "python run.py sft -e exam --fresh")
    assert "learning_rate" in seen.detail and starts_by(seen.next)


def test_settings_that_changed_since_prepare_are_told(place):
    trained()
    place.edit_experiment("seed: 8")
    said = call("status", "-e", "exam").output
    assert "experiment.yaml changed" in said and "seed 7 -> 8" in said and "outdated" in said
    assert next_of(said) == ["python run.py prepare -e exam --train votes.csv --test test.csv"]
    assert call(*shlex.split(next_of(said)[0])[2:]).exit_code == 0
    told = next_of(call("status", "-e", "exam").output)
    assert told == ["python run.py sft -e exam --fresh"] and starts_by(told[0])


def test_a_setting_of_one_stage_makes_no_other_outdated(place):
    trained()
    place.edit_experiment("dpo_rejected: one")
    exam = load_experiment("exam")
    assert status(exam, "sft").state == "trained"
    assert status(exam, "dpo_judge").next == "python run.py prepare -e exam --train votes.csv --test test.csv"
    assert next_of(call("status", "-e", "exam").output) == ["python run.py sft -e exam"]


def trained_on_today(place) -> None:
    """Write down a training as run.py does: the miniature place has none."""
    state = json.loads((OUT / "state.json").read_text())
    inputs = StageContext(load_experiment("exam"), "sft").training_inputs
    train = {**state["parts"]["score"], "inputs": inputs}
    state["parts"] = {"train": {**train, "outputs": [], "sha256": {}}, **state["parts"]}
    (OUT / "state.json").write_text(json.dumps(state))


def prepare_others(place):
    place.table(place.rows(40, start=5000)[::-1], "others.csv")
    return call("prepare", "-e", "exam", "--train", "others.csv", "--test", "test.csv", "--pairs")


@pytest.mark.parametrize("pairs", [["--pairs"], []], ids=["with --pairs", "without"])
@pytest.mark.parametrize("stage", TRAININGS)
def test_nothing_is_outdated_while_the_export_is_the_same(place, stage, pairs):
    shutil.rmtree(DATA)
    again = ["prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv"]
    assert call(*again).exit_code == 0
    ensure_views(load_experiment("exam"), [STEPS[stage].data.removeprefix("dpo_")])  # as the stage's own command does
    context = StageContext(load_experiment("exam"), stage)
    state = StageState(context.folder)
    for part in ("train", "merge", "score"):
        state.begin(part, context.training_inputs if part == "train" else context.scoring_inputs)
        state.finish(part, [RECIPE], 1.0)
    for _ in range(2):
        assert call(*again, *pairs).exit_code == 0
        context = StageContext(load_experiment("exam"), stage)
        assert context.outdated_files() == []
        context.require_current_training()
        assert [context.glance(part).changes for part in ("train", "score")] == [(), ()]
        assert (DATA / "pairs.parquet").is_file() == (bool(pairs) or "dpo_reward" in STEPS[stage].data)


@pytest.mark.parametrize("changed", ["sft_train.jsonl", "sft_valid.jsonl", None])
def test_each_file_that_was_trained_on_counts_and_no_other(place, changed):
    trained_on_today(place)
    manifest = json.loads((DATA / "manifest.json").read_text())
    manifest["files"][changed or "dpo_judge_train.jsonl"] = "0" * 64
    gone = {name: digest for name, digest in manifest["files"].items() if name != changed}
    for files in (manifest["files"], gone):
        (DATA / "manifest.json").write_text(json.dumps({**manifest, "files": files}))
        found = StageContext(load_experiment("exam"), "sft").outdated_files(("train",))
        assert found == ([changed] if changed else [])


def test_another_export_is_refused_by_scoring_comparing_and_what_starts_from_the_judge(place):
    trained_on_today(place)
    report, submission = (OUT / "report.json").read_bytes(), (OUT / "submission.csv").read_bytes()
    done = prepare_others(place)
    assert done.exit_code == 0, done.output
    assert "next: python run.py sft -e exam --fresh" in done.output
    scored = call("score", "-e", "exam", "--fresh")
    assert scored.exit_code == 1 and "sft was trained on another export than data/exam holds now" in scored.output
    assert "python run.py sft -e exam --fresh" in scored.output and "sft_train.jsonl" in scored.output
    compared = call("compare", "-e", "exam")
    assert compared.exit_code == 1 and "sft was trained or scored on another export" in compared.output
    exam = load_experiment("exam")
    with pytest.raises(ArenaError, match="sft was trained on another export"):
        StageContext(exam, "dpo_judge").require_current_training()
    StageContext(exam, "dpo_reward").require_current_training()  # starts from the base
    view = status(exam, "sft")
    assert view.state == "outdated" and view.next == "python run.py sft -e exam --fresh"
    seen = call("watch", "-e", "exam", "--stage", "sft", "--once").output
    assert "outdated" in seen and "to beat" not in seen and "sft -e exam --fresh" in seen
    assert ((OUT / "report.json").read_bytes(), (OUT / "submission.csv").read_bytes()) == (report, submission)


def test_the_rows_are_compared_where_no_state_tells_what_they_were(place):
    (OUT / "state.json").unlink()
    assert call("compare", "-e", "exam").exit_code == 0
    assert prepare_others(place).exit_code == 0
    compared = call("compare", "-e", "exam")
    assert compared.exit_code == 1 and "not among the exported" in compared.output, compared.output


def test_another_test_set_outdates_the_scores_alone(place):
    trained_on_today(place)
    place.table(place.rows(7, start=9500), "later.csv")
    done = call("prepare", "-e", "exam", "--train", "votes.csv", "--test", "later.csv", "--pairs")
    assert "next: python run.py score -e exam --stage sft --fresh" in done.output
    view = status(load_experiment("exam"), "sft")
    assert view.state == "outdated" and view.next == "python run.py score -e exam --stage sft --fresh"
    StageContext(load_experiment("exam"), "sft").require_current_training()


@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_prepare_waits_for_no_run_and_replaces_nothing_under_one(place, stage):
    before = place.snapshot()
    with only_run(load_experiment("exam").output_folder(stage)):
        refused = prepare_others(place)
    assert refused.exit_code == 1 and f"{stage} of this experiment is running" in refused.output
    assert {name: digest for name, digest in place.snapshot().items() if name != "others.csv"} == before
