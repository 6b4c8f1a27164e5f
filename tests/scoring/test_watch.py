"""Watching a run: its status from its files, baselines and scored checkpoints beside it, in terminal and page."""

import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from chain import ROOT, call
from starlette.testclient import TestClient

from common.errors import ArenaError, UsageError
from common.experiment import load_experiment
from common.files import only_run
from common.progress import Show
from data_prep.export import export
from data_prep.synthetic import write_arena
from factory import status as factory_status
from factory.recipes import write_recipe
from factory.stage_context import StageContext
from factory.state import StageState
from factory.status import next_commands
from scoring import watch as watching
from scoring.run_status import in_words, run_status
from scoring.watch import CheckpointScorer, Watcher, baseline_losses, experiment_at_work, follow, stage_to_watch
from tests.scoring.places import configured

KEYS = (  # what programs read
    "experiment stage state detail next point seconds_left curve evaluations why_no_log_loss evaluates start_step "
    "measured ladder faults reached"
)


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """A folder with an exported synthetic arena and rendered recipes."""
    keys = ("valid_share: 0.2", "quantization_bit: null", "recipes: {sft: {bf16: false}}")
    folder = configured(tmp_path_factory.mktemp("watching"), tiny_base, *keys)
    arena = write_arena(folder / "arena", seed=5, train_rows=300, test_rows=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        experiment = load_experiment("exam")
        export(experiment, arena.train, arena.test, arena.truth)
        write_recipe(experiment, "sft")
        write_recipe(experiment, "rm")
    return folder


@pytest.fixture
def exam(place, monkeypatch):
    monkeypatch.chdir(place)
    return load_experiment("exam")


def log(experiment, stage, *points):
    folder = experiment.adapter_folder(stage)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"current_steps": step, "total_steps": 10, **values}) for step, values in points]
    (folder / "trainer_log.jsonl").write_text("".join(f"{line}\n" for line in lines))


def status_of(experiment, stage="sft"):
    return run_status(StageContext(experiment, stage))


def score(exam, stage, **report):
    """Make a stage look scored, by a report."""
    context = StageContext(exam, stage)
    shutil.rmtree(context.folder, ignore_errors=True)  # what another test began there
    context.state.begin("score", context.scoring_inputs)
    context.state.finish("score", [], 1.0)
    (context.folder / "report.json").write_text(json.dumps(report))


def test_an_evaluation_loss_becomes_an_upper_bound_of_the_log_loss(exam):
    log(exam, "sft", (2, {"loss": 0.5, "lr": 1e-3}), (4, {"loss": 0.4}), (4, {"eval_loss": 0.3}))
    status = status_of(exam)
    assert status.evaluations == [{"step": 4, "eval_loss": 0.3, "log_loss": pytest.approx(0.9)}], "3 tokens an answer"
    text = "\n".join(in_words(status))
    assert "validation loss 0.3000, so a log loss of the verdict of at most 0.9000" in text
    assert "step 4/10  training loss 0.4000" in text, "an evaluation's line keeps the last loss in sight"


@pytest.mark.parametrize(
    ("key", "value"),
    [("label_smoothing_factor", 0.1), ("train_on_prompt", True), ("max_samples", 10), ("eval_dataset", "other")],
)
def test_where_the_bound_does_not_hold_there_is_none(exam, key, value):
    log(exam, "sft", (4, {"eval_loss": 0.3}))
    path = exam.recipe("sft")
    sound = path.read_text()
    path.write_text("\n".join([*(s for s in sound.splitlines() if s.split(":")[0] != key), f"{key}: {value}"]))
    status = status_of(exam)
    path.write_text(sound)
    assert status.evaluations[0]["log_loss"] is None
    assert key in status.why_no_log_loss or "validation fold" in status.why_no_log_loss
    assert "a coin has 0.6931" in status_of(exam, "rm").why_no_log_loss


def save_checkpoint(experiment, name) -> Path:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    folder = experiment.adapter_folder("sft") / name
    model = AutoModelForCausalLM.from_pretrained("models/arena-tiny")
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    return folder


def test_a_checkpoint_is_scored_once_on_the_same_rows(exam):
    losses, folder = baseline_losses(StageContext(exam, "sft")), save_checkpoint(exam, "checkpoint-7")
    assert list(losses.columns) == ["uniform", "prior", "length", "tfidf", "bayes"] and losses.index.is_unique
    assert losses["uniform"].mean() == pytest.approx(math.log(3)) and losses["bayes"].mean() < losses["prior"].mean()
    watcher = Watcher(exam, "sft", 20).finish().finish()
    shutil.rmtree(folder)
    (measured,) = watcher.status().measured
    ids = CheckpointScorer(StageContext(exam, "sft"), 20).ids
    assert (measured["step"], measured["rows"], len(ids)) == (7, 20, 20)
    assert measured["ladder"]["tfidf"] == pytest.approx(losses["tfidf"].loc[ids].mean())
    # an untrained adapter is the random base: near a third for each label
    assert measured["log_loss"] == pytest.approx(math.log(3), abs=0.15)


def test_the_stage_that_runs_is_watched(exam):
    with pytest.raises(UsageError, match="no stage of this experiment runs now") as caught:
        stage_to_watch(exam, None)
    assert "python run.py sft -e exam" in caught.value.remedy and "--stage sft" in caught.value.remedy
    assert stage_to_watch(exam, "rm") == "rm"
    with pytest.raises(UsageError, match="no run is at work here"):
        experiment_at_work()
    with only_run(exam.output_folder("sft")):
        assert stage_to_watch(exam, None) == "sft" and experiment_at_work() == "exam"
        with only_run(exam.output_folder("rm")), pytest.raises(UsageError, match="sft and rm run"):
            stage_to_watch(exam, None)
    with only_run(exam.output_folder("rm")), pytest.raises(UsageError, match="no labels"):
        stage_to_watch(exam, None, score_rows=20)


class Scripted(Watcher):
    """A run whose states are given, each for one look; the last one stays."""

    def __init__(self, experiment, *states):
        super().__init__(experiment, "sft")
        self._states, self.looks = list(states), 0

    def status(self):
        self.looks += 1
        state = self._states.pop(0) if len(self._states) > 1 else self._states[0]
        return replace(status_of(self._experiment), state=state, ladder={"uniform": 1.0986, "prior": 1.0956})


def test_the_terminal_prints_each_evaluation_once_beside_the_baselines(exam, capsys):
    points = (2, {"loss": 0.5}), (2, {"eval_loss": 0.35}), (5, {"loss": 0.4}), (5, {"eval_loss": 0.3})
    log(exam, "sft", *points, (10, {"loss": 0.35}))
    # the third look falls between two steps of the run, where no process holds its lock
    watcher = Scripted(exam, "training", "training", "trained", "training", "training", "trained")
    status = follow(watcher, Show(attended=False), pause=0.01)
    printed = capsys.readouterr().err
    assert status.state == "trained" and watcher.looks == 8
    assert printed.count("step 2: validation loss 0.3500, so a log loss of the verdict of at most 1.0500") == 1
    assert printed.count("step 5: validation loss 0.3000") == 1 and "Class prior 1.0956" in printed
    assert "exam sft: training" in printed and printed.count("step 10/10") == 1


@pytest.mark.slow
def test_ctrl_c_in_a_terminal_is_no_failure(exam):
    """As a user does it: the command is interrupted while a run is at work, and ends with exit code 0."""
    log(exam, "sft", (4, {"loss": 0.4}))
    StageState(exam.output_folder("sft")).begin("train", {})
    call = [sys.executable, str(ROOT / "run.py"), "watch", "-e", "exam", "--terminal"]
    with only_run(exam.output_folder("sft")):
        process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            first = process.stderr.readline()
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=60)
        finally:
            process.kill()
    assert first == "exam sft: training\n" and process.returncode == 0, err
    assert "watching ended; the training goes on" in err and "Error" not in err
    assert "exam sft: training\nstep 4/10" in out


def test_a_fault_of_the_baselines_is_printed_and_does_not_end_the_watch(exam):
    log(exam, "sft", (4, {"loss": 0.4}))
    path = exam.data_folder / "truth.csv"
    sound = path.read_bytes()
    path.write_text("id\n")
    once, done = (call("watch", "-e", "exam", "--stage", "sft", how) for how in ("--once", "--json"))
    path.write_bytes(sound)
    assert once.exit_code == done.exit_code == 0 and "truth.csv" in once.output
    status = json.loads(done.stdout)
    assert len(status["faults"]) == 1 and status["ladder"] is None and "truth.csv" in done.stderr
    assert list(status) == KEYS.split()


@pytest.mark.parametrize("error", [RuntimeError("out of memory.\nlong advice"), ArenaError("is damaged", where="x")])
def test_whatever_ends_the_scoring_is_reported(exam, monkeypatch, error):
    """torch.OutOfMemoryError is no ArenaError; a traceback in a thread reaches no user."""
    folder = save_checkpoint(exam, "checkpoint-7")

    def fail(*_):
        raise error

    monkeypatch.setattr(CheckpointScorer, "losses", fail)
    (fault,) = Watcher(exam, "sft", 20).finish().status().faults
    shutil.rmtree(folder)
    assert str(error).splitlines()[0] in fault and "long advice" not in fault


def test_the_page_compares_a_measured_point_with_the_baselines_on_its_own_rows(exam, monkeypatch):
    log(exam, "sft", (4, {"eval_loss": 0.3}))
    watcher = Watcher(exam, "sft")
    now = replace(status_of(exam), ladder={"uniform": 1.0986, "prior": 1.05})
    monkeypatch.setattr(watcher, "status", lambda: now)
    page = TestClient(watching.build_app(StageContext(exam, "sft"), watcher, "127.0.0.1"), "http://127.0.0.1")
    shown = page.get("/").text
    assert "Uniform, 1/3 each 1.0986" in shown and "Class prior 1.0500" in shown and "step 4: 0.9000" in shown
    measured = {"step": 4, "log_loss": 1.0, "rows": 30, "ladder": {"prior": 1.02}}
    now = replace(now, measured=[measured])
    shown = page.post("/score").text
    assert watcher.score_rows == 200 and "<button" not in shown
    assert "Uniform" not in shown.partition("<svg")[2] and "Class prior 1.0200" in shown and "step 4: 1.0000" in shown
    assert "measured on 30 validation battles" in shown


@pytest.mark.parametrize("see", [lambda watcher: watcher.finish().status(), lambda w: follow(w, Show(), pause=0)])
def test_a_scored_stage_is_shown_with_what_it_reached(exam, monkeypatch, see):
    """The log loss that `status` has, beside the baselines of the same report: nothing is fitted for it."""
    monkeypatch.setattr(watching, "baseline_losses", None)
    baselines = {"uniform": 1.0986, "prior": 1.0956, "length": 1.0994, "tfidf": 0.8535}
    score(exam, "sft", log_loss=1.1061, rows=60, baselines=baselines, bayes=0.8187, beats_prior=False)
    log(exam, "sft", (10, {"loss": 0.35}))
    status = see(Watcher(exam, "sft"))
    expected = next_commands(factory_status.status_of(["exam"])[0])[0]
    shutil.rmtree(exam.output_folder("sft"))
    lines = in_words(status)
    assert status.faults == [] and status.reached["log_loss"] == 1.1061 and status.next == expected
    assert "log loss of the verdict 1.1061 on 60 held-out battles: not better than the class prior" in lines
    (to_beat,) = (line for line in lines if line.startswith("to beat:"))
    assert "Class prior 1.0956" in to_beat and "Bayes: the best possible 0.8187" in to_beat
    assert not any("evaluation" in line or "no log loss" in line for line in lines)
