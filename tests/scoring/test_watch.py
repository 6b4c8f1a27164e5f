import json
import math
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from click.testing import CliRunner

import run
import scoring.watch as watching
from common.errors import UsageError
from common.experiment import load_experiment
from common.files import only_run
from common.progress import Show
from data_prep.export import export
from data_prep.synthetic import write_arena
from factory.recipes import write_recipe
from factory.state import StageState
from scoring.watch import CheckpointScorer, Ladder, Watcher, answer_tokens, follow, in_words, look, stage_to_watch

ROOT = watching.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_base):
    """A folder with an exported synthetic arena and rendered recipes."""
    folder = tmp_path_factory.mktemp("watching")
    (folder / "templates").symlink_to(ROOT / "templates")
    (folder / "models").mkdir()
    (folder / "models" / "arena-tiny").symlink_to(tiny_base)
    configs = folder / "factory_configs" / "exam"
    configs.mkdir(parents=True)
    keys = ["model: models/arena-tiny", "template: qwen3_nothink", "cutoff_len: 300", "valid_share: 0.2"]
    keys += ["quantization_bit: null", "recipes: {sft: {bf16: false}}"]
    (configs / "experiment.yaml").write_text("\n".join(keys))
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


def test_an_evaluation_loss_becomes_an_upper_bound_of_the_log_loss(exam):
    log(exam, "sft", (2, {"loss": 0.5, "lr": 1e-3}), (4, {"loss": 0.4}), (4, {"eval_loss": 0.3}))
    seen = look(exam, "sft")
    (evaluation,) = seen.evaluations
    assert (evaluation.step, evaluation.eval_loss) == (4, 0.3)
    tokens = json.loads((exam.data_folder / "manifest.json").read_text())["frame"]["answer_len"]
    assert tokens == 3 and evaluation.log_loss == pytest.approx(0.9)
    text = "\n".join(in_words(seen))
    assert "step 4: evaluation loss 0.3000, so a log loss of at most 0.9000" in text
    assert "step 4/10  loss 0.4000" in text, "an evaluation's line keeps the last loss in sight"


@pytest.mark.parametrize(
    ("recipe", "when"),
    [
        ("eval_strategy: steps\neval_steps: 20", "every 20 steps"),
        ("eval_strategy: steps\neval_steps: 0.1", "every 10% of the steps"),
        ("eval_strategy: steps\nlogging_steps: 5", "every 5 steps"),
        ("eval_strategy: epoch", "after each epoch"),
        ("eval_steps: 20", None),
        ("eval_strategy: 'no'", None),
        ("eval_strategy: steps\neval_steps: often", "at 'often', which is no number of steps"),
        ("eval_strategy: steps\neval_steps: [1]", "at [1], which is no number of steps"),
        ("eval_strategy: [steps]", None),
    ],
)
def test_it_is_told_when_the_recipe_evaluates(exam, tmp_path, recipe, when):
    path = tmp_path / "sft.yaml"
    path.write_text(recipe)
    assert watching.evaluation_times(path) == when
    log(exam, "sft", (2, {"loss": 0.5}))
    told = "\n".join(in_words(replace(look(exam, "sft"), evaluates=when)))
    assert (f"the recipe evaluates {when}" if when else "set eval_strategy: steps in the recipe") in told


def test_the_bound_holds_for_any_judge():
    """log loss <= tokens x mean loss, for random logits of three answer tokens over a vocabulary."""
    random = np.random.default_rng(0)
    for scale in (0.1, 1.0, 10.0):
        logits = random.normal(0, scale, (200, 3, 50))
        answers = random.integers(0, 3, 200), random.integers(0, 50, 200), random.integers(0, 50, 200)
        losses = np.log(np.exp(logits).sum(axis=2)) - np.stack(
            [logits[np.arange(200), i, answer] for i, answer in enumerate(answers)], axis=1
        )
        labels = logits[:, 0, :3]
        own = np.log(np.exp(labels).sum(axis=1)) - labels[np.arange(200), answers[0]]
        assert own.mean() <= 3 * losses.mean()


@pytest.mark.parametrize(
    ("key", "value"),
    [("label_smoothing_factor", 0.1), ("train_on_prompt", True), ("max_samples", 10), ("eval_dataset", "other")],
)
def test_where_the_bound_does_not_hold_none_is_told(exam, key, value, monkeypatch):
    recipe = watching.read_yaml(exam.recipe("sft"))
    monkeypatch.setattr(watching, "read_yaml", lambda _: {**recipe, key: value})
    tokens, why = answer_tokens(exam, "sft")
    assert tokens is None and (key in why or "does not evaluate on the validation fold" in why)
    assert "a coin has 0.6931" in answer_tokens(exam, "rm")[1]


def test_the_ladder_is_that_of_the_report_and_can_be_read_off_for_some_rows(exam):
    ladder = Ladder(exam)
    whole = ladder.at()
    assert list(whole) == ["uniform", "prior", "length", "tfidf", "bayes"]
    assert whole["uniform"] == pytest.approx(math.log(3)) and whole["bayes"] < whole["prior"]
    halves = [ladder.at(ladder.ids[::2]), ladder.at(ladder.ids[1::2])]
    sizes = len(ladder.ids[::2]), len(ladder.ids[1::2])
    for name, loss in whole.items():
        joined = sum(size * half[name] for size, half in zip(sizes, halves, strict=True)) / sum(sizes)
        assert joined == pytest.approx(loss)


def test_a_checkpoint_is_asked_once_and_answers_as_the_model_does(exam, monkeypatch):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained("models/arena-tiny")
    folder = exam.adapter_folder("sft") / "checkpoint-7"
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    (folder / "trainer_state.json").write_text("{}")
    ladder, scorer = Ladder(exam), CheckpointScorer(exam, "sft", 20)
    assert len(scorer.ids) == 20 and scorer.ids == CheckpointScorer(exam, "sft", 20).ids
    found = scorer.newest(ladder)
    assert (found.step, found.rows) == (7, 20) and found.ladder == ladder.at(scorer.ids)
    # an untrained adapter is the random base: near a third for each label
    assert found.log_loss == pytest.approx(math.log(3), abs=0.15)
    assert scorer.newest(ladder) is None
    with pytest.raises(UsageError, match="rewards and no labels"):
        CheckpointScorer(exam, "rm", 20)


def test_the_stage_that_runs_is_watched(exam):
    with pytest.raises(UsageError, match="no stage of this experiment runs now") as caught:
        stage_to_watch(exam, None)
    assert "start one in another terminal: python run.py sft -e exam" in caught.value.remedy
    assert stage_to_watch(exam, "rm") == "rm"
    with only_run(exam.output_folder("sft")):
        assert stage_to_watch(exam, None) == "sft"
        with only_run(exam.output_folder("rm")), pytest.raises(UsageError, match="sft and rm run"):
            stage_to_watch(exam, None)


def test_the_terminal_tells_each_evaluation_once_beside_the_ladder(exam, capsys):
    state = StageState(exam.output_folder("sft"))
    points = (2, {"loss": 0.5}), (2, {"eval_loss": 0.35}), (5, {"loss": 0.4}), (5, {"eval_loss": 0.3})
    log(exam, "sft", *points, (10, {"loss": 0.35}))
    looks = []

    class Acted(Watcher):
        def look(self):
            seen = replace(look(exam, "sft"), ladder={"uniform": 1.0986, "prior": 1.0956})
            looks.append(seen)
            # the third look falls between two steps of the run, where nobody holds its lock
            return replace(seen, state="training") if len(looks) in (1, 2, 4, 5) else seen

    state.begin("train", {})
    adapter = exam.adapter_folder("sft") / "adapter_config.json"
    adapter.touch()
    state.finish("train", [adapter], 1.0)
    seen = follow(Acted(exam, "sft"), Show(attended=False), pause=0.01)
    said = capsys.readouterr().err
    assert seen.state == "trained" and len(looks) == 8
    assert said.count("step 2: evaluation loss 0.3500, so a log loss of at most 1.0500") == 1
    assert said.count("step 5: evaluation loss 0.3000") == 1 and "class prior 1.0956" in said
    assert "exam sft: training" in said
    assert said.count("step 10/10") == 1, "the last step is told once, however often it is looked at"
    assert in_words(seen)[-1] == "next: python run.py sft -e exam"


def test_the_time_left_of_a_resumed_run_is_that_of_its_own_steps(exam):
    path = exam.adapter_folder("sft") / "trainer_log.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    first = [
        {"current_steps": n, "total_steps": 675, "loss": 1.0, "elapsed_time": f"0:0{n // 60}:{n % 60:02}"}
        for n in (395, 400)
    ]
    on = [{"current_steps": n, "total_steps": 675, "loss": 1.0, "elapsed_time": f"0:00:{n - 400}"} for n in (410, 420)]
    path.write_text("".join(json.dumps(line) + "\n" for line in first + on))
    StageState(exam.output_folder("sft")).begin("train", {})
    with only_run(exam.output_folder("sft")):
        seen = look(exam, "sft")
    assert seen.start_step == 400 and seen.seconds_left == 255


def test_a_fault_of_the_ladder_is_told_and_does_not_end_the_watch(exam, monkeypatch, capsys):
    def broken(_):
        raise watching.ArenaError("is damaged", where="rows.parquet")

    monkeypatch.setattr(watching, "Ladder", broken)
    watcher = Watcher(exam, "sft").finish()
    assert watcher.faults == ["rows.parquet: is damaged"] and watcher.look().ladder is None
    assert "rows.parquet: is damaged" in in_words(watcher.look())
    follow(watcher, Show(attended=False), pause=0.01)
    assert "rows.parquet: is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("state", ["trained", watching.OUTDATED])
def test_a_program_reads_what_failed_and_a_person_beside_it(exam, monkeypatch, state):
    def broken(_):
        raise watching.ArenaError("is damaged", where="truth.csv", remedy="prepare again")

    real = watching.look
    monkeypatch.setattr(watching, "look", lambda *about: replace(real(*about), state=state))
    monkeypatch.setattr(watching, "Ladder", broken)
    told = CliRunner().invoke(run.cli, ["watch", "-e", "exam", "--stage", "sft", "--json"])
    assert told.exit_code == 0, "how far the run is was told"
    seen, fault = json.loads(told.stdout), "truth.csv: is damaged\n  remedy: prepare again"
    assert (seen["faults"], seen["ladder"]) == ([fault], None)
    assert fault in told.stderr


@pytest.mark.parametrize("how", ["--json", "--once", "--terminal", "--no-open"])
@pytest.mark.parametrize("given", [True, False])
def test_a_stage_without_labels_is_not_asked_for_them(exam, monkeypatch, how, given):
    for name in ("serve_page", "follow"):
        monkeypatch.setattr(watching, name, lambda *_, **__: pytest.fail("nothing is shown"))
    command = ["watch", "-e", "exam", *(["--stage", "rm"] if given else []), "--score", "20", how]
    with only_run(exam.output_folder("rm")):
        told = CliRunner().invoke(run.cli, command)
    assert told.exit_code == 2 and told.stdout == ""
    assert "rm has rewards and no labels" in told.stderr and "leave --score out" in told.stderr


def test_the_chart_puts_a_measured_point_beside_the_baselines_on_its_own_rows(exam):
    from scoring.watch import Measured
    from scoring.watch_page import ladder_plot

    log(exam, "sft", (4, {"eval_loss": 0.3}))
    whole = replace(look(exam, "sft"), ladder={"uniform": 1.0986, "prior": 1.05})
    axes = ladder_plot(whole).axes[0]
    assert {text.get_text() for text in axes.texts} == {"uniform, 1/3 each 1.0986", "class prior 1.0500"}
    assert axes.get_xlabel() == "step (baselines on all validation battles)"
    sample = replace(whole, measured=[Measured(4, 1.0, 30, {"prior": 1.02})])
    axes = ladder_plot(sample).axes[0]
    assert [text.get_text() for text in axes.texts] == ["class prior 1.0200"]
    assert axes.get_xlabel() == "step (baselines on these 30 validation battles)"
    bound, measured = (line for line in axes.lines if len(line.get_xdata()) == 1)
    assert list(bound.get_ydata()) == [pytest.approx(0.9)] and list(measured.get_ydata()) == [1.0]


def test_an_evaluation_that_may_corrupt_the_training_is_not_advised(exam, tmp_path, monkeypatch):
    recipe = tmp_path / "sft.yaml"
    recipe.write_text("quantization_bit: 4\n")
    advice = watching.how_to_evaluate(recipe)
    assert advice.startswith("ask checkpoints with --score 200; on a GPU") and "corrupts the 4-bit training" in advice
    recipe.write_text("quantization_bit: 8\n")
    assert watching.how_to_evaluate(recipe).startswith("set eval_strategy: steps")
    recipe.write_text("quantization_bit: 4\n")
    monkeypatch.setattr(type(exam), "recipe", lambda self, step: recipe)
    log(exam, "sft", (2, {"loss": 0.5}))
    seen = replace(look(exam, "sft"), why_no_log_loss=None)
    assert f"no evaluation on the way: {advice}" in in_words(seen)


def test_after_a_scored_stage_watch_names_the_same_command_as_status(exam):
    from factory.status import next_commands, survey

    folder = exam.output_folder("rm")
    folder.mkdir(parents=True, exist_ok=True)
    state = StageState(folder)
    for part in ("train", "merge", "score"):
        state.begin(part, {})
        state.finish(part, [], 1.0)
    content = {"log_loss": 1.0061, "baselines": {"prior": 1.09}}
    (folder / "report.json").write_text(json.dumps(content))
    seen = look(exam, "rm")
    assert seen.state == "scored" and seen.next == next_commands(survey(["exam"])[0])[0]
    assert not seen.next.startswith("python run.py compare"), "one stage alone is not compared"
    assert "log loss 1.0061: better than the class prior" in in_words(seen)
    shutil.rmtree(folder)  # others find the place as it was


def test_whatever_ends_the_scoring_thread_is_told(exam, monkeypatch):
    """torch.OutOfMemoryError is neither an ArenaError nor an OSError; the thread's own traceback nobody sees."""

    class OutOfMemoryError(RuntimeError):
        pass

    class Full:
        rungs = 0

        def __init__(self, *_):
            pass

        def newest(self, _):
            Full.rungs += 1
            if Full.rungs > 1:
                raise OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nlong advice")

    monkeypatch.setattr(watching, "Ladder", lambda _: object())
    monkeypatch.setattr(watching, "CheckpointScorer", Full)
    monkeypatch.setattr(watching.time, "sleep", lambda _: None)
    watcher = Watcher(exam, "sft", 20)
    watcher._work()
    told = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    assert watcher.faults == [f"no more checkpoints are scored: {told}"] and Full.rungs == 2
    first = Watcher(exam, "sft", 20)
    first._work()  # and where it is the first checkpoint
    assert first.faults == [told]


class _Scripted(Watcher):
    """A run that is at work for some looks at the same point, and then does what `end` says."""

    def __init__(self, experiment, looks, end=None, each=lambda: None):
        super().__init__(experiment, "sft")
        self._left, self._end, self._each = looks, end, each

    def look(self):
        self._each()
        self._left -= 1
        seen = replace(look(self._experiment, "sft"), ladder={"prior": 1.0956})
        if self._left >= 0:
            return replace(seen, state="training")
        if self._end:
            raise self._end
        return replace(seen, state="trained")


def test_ctrl_c_ends_the_watching_alone(exam, capsys):
    log(exam, "sft", (4, {"loss": 0.4}))
    seen = follow(_Scripted(exam, 2, KeyboardInterrupt()), Show(attended=False), pause=0.01)
    assert seen.at_work and in_words(seen)[1].startswith("step 4/10")
    assert capsys.readouterr().err.splitlines()[-1] == "watching ended; the training goes on"


def test_ctrl_c_in_a_terminal_is_no_failure(exam):
    """As a user does it: the command is asked to stop while a run is at work, and says so with exit code 0."""
    log(exam, "sft", (4, {"loss": 0.4}))
    StageState(exam.output_folder("sft")).begin("train", {})
    call = [sys.executable, str(ROOT / "run.py"), "watch", "-e", "exam", "--terminal"]
    with only_run(exam.output_folder("sft")):
        process = subprocess.Popen(call, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            first = process.stderr.readline()
            process.send_signal(signal.SIGINT)
            said, more = process.communicate(timeout=60)
        finally:
            process.kill()
    assert first == "exam sft: training\n" and process.returncode == 0, more
    assert "watching ended; the training goes on" in more and "Error" not in more
    assert "exam sft: training step 4/10" in said


@pytest.mark.parametrize("look_at", [lambda watcher: watcher.finish().look(), lambda w: follow(w, Show(), pause=0)])
def test_a_scored_stage_is_told_with_what_it_reached(exam, monkeypatch, capsys, look_at):
    """The log loss that `status` has, beside the baselines of the same report: nothing is fitted for it."""
    monkeypatch.setattr(watching, "Ladder", None)
    folder = exam.output_folder("sft")
    state = StageState(folder)
    for part in ("train", "merge", "score"):
        state.begin(part, {})
        state.finish(part, [], 1.0)
    log(exam, "sft", (10, {"loss": 0.35}))
    baselines = {"uniform": 1.0986, "prior": 1.0956, "length": 1.0994, "tfidf": 0.8535}
    report = {"log_loss": 1.1061, "rows": 60, "baselines": baselines, "bayes": 0.8187, "beats_prior": False}
    (folder / "report.json").write_text(json.dumps(report))
    watcher = Watcher(exam, "sft")
    said = in_words(look_at(watcher))
    assert watcher.faults == []
    assert "log loss 1.1061 on 60 held-out battles: not better than the class prior" in said
    (beaten,) = (line for line in said if line.startswith("to beat:"))
    assert "class prior 1.0956" in beaten and "Bayes: the best possible 0.8187" in beaten
    assert not any("evaluation" in line or "no log loss" in line for line in said)
    assert json.loads(json.dumps(watcher.look().to_json()))["reached"]["log_loss"] == 1.1061
    shutil.rmtree(folder)


def test_where_nothing_runs_the_experiment_that_is_at_work_is_named(exam, place):
    """`watch` without -e means the default, while the demo trains."""
    configs = place / "factory_configs"
    for name, text in (("other", (configs / "exam" / "experiment.yaml").read_text()), ("broken", "model: [")):
        (configs / name).mkdir()
        (configs / name / "experiment.yaml").write_text(text)
    other = load_experiment("other")
    with pytest.raises(UsageError) as caught:
        stage_to_watch(exam, None)
    assert "at work" not in caught.value.remedy
    with only_run(other.output_folder("sft")), pytest.raises(UsageError) as caught:
        stage_to_watch(exam, None)
    assert caught.value.remedy.startswith("other is at work: python run.py watch -e other; or start one")
    for name in ("other", "broken"):
        shutil.rmtree(configs / name)
