"""What `status` and `prepare` say is next is never refused: changed votes, recipes and settings, hand edits."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

import run
from common.experiment import load_experiment
from factory.fingerprint import local_models
from factory.stage_context import StageContext
from factory.state import StageState
from factory.status import stage_status

ADAPTER, OUT = Path("saves/tiny/lora/exam_sft"), Path("outputs/exam/sft")
RECIPE = Path("factory_configs/exam/sft.yaml")


def status(experiment, stage):
    return stage_status(StageContext(experiment, stage))


class Started(Exception):
    """LLaMA-Factory would have been started."""


@pytest.fixture(autouse=True)
def starts(monkeypatch):
    def started(*_, **__):
        raise Started

    monkeypatch.setattr("factory.train.run_child", started)
    monkeypatch.setattr("factory.merge.run_child", started)


def call(*arguments: str):
    return CliRunner().invoke(run.cli, arguments)


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
        (ADAPTER / checkpoint).mkdir()
        (ADAPTER / checkpoint / "trainer_state.json").write_text("{}")
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


def test_a_changed_recipe_makes_a_stage_outdated(place):
    place.edit_recipe("sft", "optim: adamw_torch_fused\nlogging_steps: 7")
    trained()
    assert status(load_experiment("exam"), "sft").state == "trained"
    place.edit_recipe("sft", "logging_steps: 8")
    assert status(load_experiment("exam"), "sft").state == "trained", "no weight depends on it"
    place.edit_recipe("sft", "optim: adamw_torch")
    seen = status(load_experiment("exam"), "sft")
    assert seen.state == "outdated" and seen.next == "python run.py sft -e exam --fresh"
    assert 'sft.yaml: optim "adamw_torch_fused" -> "adamw_torch"' in seen.detail
    assert starts_by(seen.next)
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
