import io
import json
import os
import socket
from datetime import datetime, timedelta

import pytest
from chain import call, status, whole_checkpoint
from rich.console import Console

from common.errors import UsageError
from common.files import only_run
from common.stages import TRAININGS
from factory import status as overview
from factory.stage_context import StageContext
from factory.state import StageState
from factory.status import holder_of, next_commands, print_status, running_stages, stage_named, status_of

SCORED_FROM = {"data": {}, "swap_tta": False, "seed": 42, "target_prior": None}


def began(experiment, stage, *parts, finished=True):
    """Write down the parts as run.py does; only the last one may be unfinished."""
    folder = experiment.output_folder(stage)
    folder.mkdir(parents=True, exist_ok=True)
    state = StageState(folder)
    for part in parts:
        state.begin(part, SCORED_FROM if part == "score" else {})
        if finished or part != parts[-1]:
            made = folder / f"{part}.made"
            made.touch()
            state.finish(part, [made], 1.0)


def log(experiment, stage, step, total=100):
    folder = experiment.adapter_folder(stage)
    folder.mkdir(parents=True, exist_ok=True)
    line = json.dumps({"current_steps": step, "total_steps": total, "loss": 1.0})
    (folder / "trainer_log.jsonl").write_text(f"{line}\n")


def report(experiment, stage, log_loss, prior=1.09):
    content = {"log_loss": log_loss, "baselines": {"prior": prior}}
    (experiment.output_folder(stage) / "report.json").write_text(json.dumps(content))


def prepared(experiment, battles=1234):
    experiment.data_folder.mkdir(parents=True)
    (experiment.data_folder / "manifest.json").write_text("{}")
    (experiment.data_folder / "audit.json").write_text(json.dumps({"sources": {"train": {"rows_kept": battles}}}))


def test_each_state_is_told_with_the_command_that_goes_on(exam):
    prepared(exam)
    log(exam, "sft", 40)
    began(exam, "sft", "train", finished=False)
    checkpoint = whole_checkpoint(exam.adapter_folder("sft") / "checkpoint-40")
    began(exam, "dpo_judge", "train")
    began(exam, "dpo_reward", "train", "merge", finished=False)
    began(exam, "rm", "train", "merge", "score")
    report(exam, "rm", 1.02)
    (view,) = status_of(["exam"])
    assert (view.prepared, view.battles) == (True, 1234)
    states = {stage.stage: (stage.state, stage.next) for stage in view.stages}
    assert states == {
        "sft": ("interrupted", "python run.py sft -e exam --resume"),
        "dpo_judge": ("trained", "python run.py dpo --view judge -e exam"),
        "dpo_reward": ("interrupted", "python run.py dpo --view reward -e exam"),
        "rm": ("scored", "python run.py compare -e exam"),
        "base": ("new", "python run.py score --stage base -e exam"),
        "probe": ("new", "python run.py probe -e exam"),
    }
    (checkpoint / "trainer_state.json").unlink()
    assert status(exam, "sft").next == "python run.py sft -e exam --fresh", "there is nothing to resume from"
    assert view.stages[0].detail == "training at step 40/100"
    rm = view.stages[3]
    assert (rm.log_loss, rm.prior, rm.report) == (1.02, 1.09, "outputs/exam/rm/report.html")


def test_a_run_at_work_is_known_by_its_lock_and_a_dead_one_is_not(exam):
    log(exam, "sft", 7)
    folder = exam.output_folder("sft")
    with only_run(folder):
        began(exam, "sft", "train", finished=False)
        view = status(exam, "sft")
        assert (view.state, view.detail, view.step) == ("training", "step 7/100", 7)
        assert view.next == "python run.py watch -e exam --stage sft"
        assert running_stages(exam) == ["sft"]
        assert overview.beside_on_the_card(StageContext(exam, "rm")) == ["exam sft"]
        assert overview.beside_on_the_card(StageContext(exam, "sft")) == []
    assert status(exam, "sft").state == "interrupted"
    lock = folder.with_name(".sft.lock")
    now = datetime.now().astimezone()
    here = {"pid": os.getpid(), "host": socket.gethostname(), "started_at": now.isoformat()}
    for owner, expected in (
        (here, True),
        ({**here, "host": "elsewhere"}, False),
        ({**here, "started_at": (now - timedelta(days=9)).isoformat()}, False),  # the number was given again
        ({**here, "pid": 2**22 + 1}, False),
        ({"pid": os.getpid()}, False),
    ):
        lock.write_text(json.dumps(owner))
        assert bool(holder_of(folder)) is expected, owner
    lock.write_text('{"pid": 1')
    assert not holder_of(folder)


def test_what_is_gone_or_damaged_or_made_by_hand_is_named(exam):
    began(exam, "sft", "train", "merge")
    (exam.output_folder("sft") / "merge.made").unlink()
    assert status(exam, "sft").detail.startswith("gone: outputs/exam/sft/merge.made")
    began(exam, "rm", "train", "merge", "score")
    for content in ("", '{"log_loss": 1, "baselines": [1]}'):
        (exam.output_folder("rm") / "report.json").write_text(content)
        assert status(exam, "rm").detail == "outputs/exam/rm/report.json is unreadable"
        assert status(exam, "rm").next == "python run.py score -e exam --stage rm --fresh"
    (exam.output_folder("rm") / "state.json").write_text("{")
    assert status(exam, "rm").state == "unreadable"
    folder = exam.adapter_folder("dpo_judge")
    folder.mkdir(parents=True)
    (folder / "adapter_model.safetensors").touch()
    view = status(exam, "dpo_judge")
    assert (view.state, view.detail) == ("trained", f"not by run.py: {folder}")


def test_a_faulty_experiment_hides_no_other(exam, workplace):
    broken = workplace / "factory_configs" / "broken"
    broken.mkdir()
    (broken / "experiment.yaml").write_text("modle: x\n")
    result = call("status")
    assert result.exit_code == 0
    assert "faulty" in result.output and "exam" in result.output and "not prepared" in result.output
    (first, second) = json.loads(call("status", "--json").output)["experiments"]
    assert "there is no such key; did you mean model?" in first["fault"] and second["fault"] is None


@pytest.mark.parametrize(("beats", "colour"), [(True, "\x1b[32m"), (False, "\x1b[31m")])
def test_the_table_has_losses_and_no_colour_where_none_is_wanted(exam, monkeypatch, beats, colour):
    monkeypatch.delenv("NO_COLOR", raising=False)
    prepared(exam)
    began(exam, "sft", "train", "merge", "score")
    content = {"log_loss": 0.987654, "baselines": {"prior": 1.09}, "beats_prior": beats}  # False: within chance
    (exam.output_folder("sft") / "report.json").write_text(json.dumps(content))
    views = status_of(["exam"])
    coloured, plain = io.StringIO(), io.StringIO()
    print_status(Console(file=coloured, force_terminal=True, width=140, color_system="standard"), views)
    monkeypatch.setenv("NO_COLOR", "1")
    print_status(Console(file=plain, force_terminal=True, width=140), views)
    assert colour in coloured.getvalue() and "\x1b[3" not in plain.getvalue()
    assert all(words in plain.getvalue() for words in ("0.9877", "1.0900", "prepared, 1,234 battles"))
    assert ("not better than the prior" in plain.getvalue()) is not beats
    following = "dpo --view reward -e exam" if beats else "new EXP --model ID"  # another method would fail alike
    assert following in plain.getvalue()


def test_what_is_next_after_a_report_is_what_status_says(exam):
    from scoring.report import console as summary

    prepared(exam)
    asked = []
    for stage in ("sft", "dpo_reward"):
        began(exam, stage, "train", "merge", "score")
        report(exam, stage, 1.02)
        (view,) = status_of(["exam"])
        assert next_commands(view) == summary.next_commands(StageContext(exam, stage), {})
        asked += [command.partition("   (")[0] for command in next_commands(view)]
    assert asked == ["python run.py dpo --view reward -e exam", "python run.py compare -e exam"]
    began(exam, "rm", "train", finished=False)
    assert summary.next_commands(StageContext(exam, "sft"), {}) == ["python run.py rm -e exam"]


def test_untouched_experiments_share_one_line(exam, workplace):
    source = (workplace / "factory_configs" / "exam" / "experiment.yaml").read_text()
    for name in ("other", "third"):
        (workplace / "factory_configs" / name).mkdir()
        (workplace / "factory_configs" / name / "experiment.yaml").write_text(source)
    fresh = call("status").output
    assert "3 experiments, nothing done yet: exam, other, third" in fresh
    assert "next: python run.py prepare -e EXP --train FILE" in fresh
    prepared(exam)
    begun = call("status").output
    assert "2 more experiments, nothing done yet: other, third" in begun
    assert [line for line in begun.splitlines() if line.startswith("next: ")] == ["next: python run.py sft -e exam"]
    alone = call("status", "-e", "other").output
    assert "not prepared" in alone and "next: python run.py prepare -e other --train FILE" in alone
    assert len(json.loads(call("status", "--json").output)["experiments"]) == 3


def test_dpo_means_the_one_view_that_was_trained(exam):
    assert [stage_named(exam, stage) for stage in TRAININGS] == list(TRAININGS)
    with pytest.raises(UsageError, match="neither dpo_judge nor dpo_reward was trained") as caught:
        stage_named(exam, "dpo")
    assert "python run.py dpo --view judge -e exam or python run.py dpo --view reward -e exam" in caught.value.remedy
    began(exam, "dpo_reward", "train", finished=False)
    assert stage_named(exam, "dpo") == "dpo_reward", "also while it is trained: watch wants it"
    began(exam, "dpo_judge", "train", "merge")
    with pytest.raises(UsageError, match="dpo_judge and dpo_reward were both trained") as caught:
        stage_named(exam, "dpo")
    assert "--stage dpo_judge or --stage dpo_reward" in caught.value.remedy
