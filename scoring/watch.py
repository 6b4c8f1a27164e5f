"""Watching a run: what its own files tell while it trains, beside what a judge must beat.

An SFT run's evaluation loss is not the competition's log loss. It is the mean over the answer's tokens (the label and
what closes the turn) of −log p over the whole vocabulary. A row's label costs at most the sum over its tokens, and
−log p of the label among the three labels is at most that among all tokens, so

    log loss  <=  evaluation loss x tokens of an answer

on the same rows in the same order (A first), without calibration. The bound is nearly met once the judge has learned
the form of an answer. A measured figure comes from `CheckpointScorer`: the checkpoint itself, asked for its labels.
"""

from __future__ import annotations

import shlex
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from common.console import duration
from common.errors import ArenaError, UsageError
from common.experiment import Experiment, load_experiment, read_yaml
from common.files import read_json
from common.progress import Show
from common.stages import STEPS, TRAININGS
from data_prep.chat_template import ChatFrame, load_frame
from data_prep.export_reader import read_battles, read_manifest, truth_of
from data_prep.ground_truth import probabilities_of
from data_prep.prompt import JudgePrompt
from factory.board import serve_page
from factory.state import last_checkpoint, names
from factory.status import (
    OUTDATED,
    StageView,
    experiment_names,
    experiment_view,
    next_commands,
    running_stages,
    stage_view,
)
from factory.trainer_log import LogPoint, TrainerLog, describe, loss_curve, resumed_at, seconds_left, show_points

RUNG_NAMES = {
    "uniform": "uniform, 1/3 each",
    "prior": "class prior",
    "length": "length features",
    "tfidf": "TF-IDF",
    "bayes": "Bayes: the best possible",
}
UNIFORM = 1.0986  # log 3: a third for each class
COIN = 0.6931  # −log 1/2: what a pair of responses costs a judge that throws a coin
# With any of these the evaluation loss is another quantity, and the bound does not hold.
_OTHER_LOSS = (
    *("label_smoothing_factor", "train_on_prompt", "packing", "neat_packing", "use_dft_loss", "use_asft_loss"),
    *("use_eaft_loss", "max_samples", "val_size"),
)


@dataclass(frozen=True)
class Evaluation:
    """One evaluation in the middle of a run. `log_loss` is an upper bound on the validation fold, None without one."""

    step: int
    eval_loss: float
    log_loss: float | None


@dataclass(frozen=True)
class Measured:
    """A checkpoint's log loss (plain softmax, A first) on `rows` validation battles, and the ladder on these rows."""

    step: int
    log_loss: float
    rows: int
    ladder: dict[str, float]


@dataclass(frozen=True)
class Reached:
    """What the report of a scored stage says: its final log loss on `rows` held-out battles, and the ladder on them."""

    log_loss: float
    rows: int | None
    beats_prior: bool
    ladder: dict[str, float]


@dataclass(frozen=True)
class Look:
    """What a run shows at one moment; `seconds_left` is None while nobody can tell.

    `evaluates` says when the recipe evaluates on the way, None where it does not; `start_step` is where the run goes on
    from, 0 where it began anew. `faults` are why the ladder or a checkpoint's score is missing,
    `reached` is None until the stage is scored.
    """

    experiment: str
    stage: str
    state: str
    detail: str
    next: str
    point: LogPoint | None
    seconds_left: float | None
    curve: list[dict[str, float | None]]
    evaluations: list[Evaluation]
    why_no_log_loss: str | None
    evaluates: str | None = None
    start_step: int = 0
    measured: list[Measured] = field(default_factory=list)
    ladder: dict[str, float] | None = None
    how_to_evaluate: str = ""
    faults: list[str] = field(default_factory=list)
    reached: Reached | None = None

    @property
    def at_work(self) -> bool:
        """Whether a run of this machine is training, merging or scoring."""
        return self.state in ("training", "merging", "scoring")

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def stage_to_watch(experiment: Experiment, stage: str | None, score_rows: int = 0) -> str:
    """Return `stage`, or the only one that runs; raises UsageError where there is none or more than one, or where
    `score_rows` battles are to be asked of a stage that answers none."""
    running = [stage] if stage else running_stages(experiment)
    if len(running) == 1:
        if score_rows:
            _require_labels(running[0])
        return running[0]
    what = f"{' and '.join(running)} run" if running else "no stage of this experiment runs now"
    remedy = f"python run.py watch -e {experiment.name} --stage {running[0] if running else TRAININGS[0]}"
    if not running:
        start = f"python run.py {TRAININGS[0]} -e {experiment.name}"
        remedy = f"start one in another terminal: {start}; or wait for one, or look at an earlier one: {remedy}"
        if at_work := _at_work_elsewhere(experiment):
            names = f"{' and '.join(at_work)} {'is' if len(at_work) == 1 else 'are'} at work"
            remedy = f"{names}: python run.py watch -e {shlex.quote(at_work[0])}; or {remedy}"
    raise UsageError(what, where=experiment.name, remedy=remedy)


def _at_work_elsewhere(experiment: Experiment) -> list[str]:
    """Return the checkout's other experiments on which a run is at work; one with a faulty yaml has none."""
    found = []
    for name in experiment_names():
        with suppress(ArenaError):
            if name != experiment.name and running_stages(load_experiment(name)):
                found.append(name)
    return found


def _require_labels(stage: str) -> None:
    if STEPS[stage].data == "dpo_reward":
        raise UsageError(f"{stage} has rewards and no labels", remedy="leave --score out: scoring fits their link")


def look(experiment: Experiment, stage: str) -> Look:
    """Return what the files of a run tell now; nothing is loaded and nothing locked."""
    view = stage_view(experiment, stage)
    path = experiment.adapter_folder(stage) / "trainer_log.jsonl"
    points, curve = TrainerLog(path).read_new(), loss_curve(path)
    tokens, why = answer_tokens(experiment, stage)
    evaluations = [
        Evaluation(int(row["step"]), row["eval_loss"], row["eval_loss"] * tokens if tokens else None)
        for row in curve
        if row["eval_loss"] is not None
    ]
    point, start = points[-1] if points else None, resumed_at(points)
    left = seconds_left(point, start) if point and view.state == "training" else None
    # A scored stage has nothing left to do: what is next is then a matter of the whole experiment.
    following = next_commands(experiment_view(experiment))[:1] if view.state == "scored" else [view.next]
    recipe = experiment.recipe(stage)
    told = (experiment.name, stage, view.state, view.detail, "".join(following))
    seen = Look(*told, point, left, curve, evaluations, why, evaluation_times(recipe), start)
    reached = what_was_reached(experiment, view)
    ladder = reached.ladder if reached else None
    return replace(seen, how_to_evaluate=how_to_evaluate(recipe), reached=reached, ladder=ladder)


def what_was_reached(experiment: Experiment, view: StageView) -> Reached | None:
    """Return what the report of a scored stage says, None where the stage is not scored."""
    if view.log_loss is None or view.prior is None:
        return None
    known, rows = {"prior": view.prior}, None
    try:
        content = read_json(experiment.output_folder(view.stage) / "report.json")
        known, rows = {**content["baselines"], "bayes": content.get("bayes")}, content.get("rows")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        pass  # put aside since the survey read it: what the survey has is shown
    ladder = {name: float(known[name]) for name in RUNG_NAMES if isinstance(known.get(name), int | float)}
    return Reached(view.log_loss, rows if isinstance(rows, int) else None, bool(view.beats_prior), ladder)


def evaluation_times(recipe_path: Path) -> str | None:
    """Return in words when a recipe evaluates on the way, None where it does not or is not there."""
    recipe = read_yaml(recipe_path) if recipe_path.is_file() else {}
    every = recipe.get("eval_steps") or recipe.get("logging_steps", 500)  # as transformers chooses
    if not isinstance(every, int | float):  # nobody has checked the recipe of a run that is only looked at
        steps = f"at {every!r}, which is no number of steps"
    else:
        steps = f"every {every} steps" if every >= 1 else f"every {every:.0%} of the steps"
    return {"steps": steps, "epoch": "after each epoch"}.get(str(recipe.get("eval_strategy", "no")))


def how_to_evaluate(recipe_path: Path) -> str:
    """Return how to see a log loss on the way, where a recipe does not evaluate."""
    recipe = read_yaml(recipe_path) if recipe_path.is_file() else {}
    if recipe.get("quantization_bit") == 4:
        return (
            "ask checkpoints with --score 200; on a GPU eval_strategy: steps in the recipe does it, too (on some CPUs "
            "an evaluation corrupts the 4-bit training that goes on after it)"
        )
    return "set eval_strategy: steps in the recipe, or ask checkpoints with --score 200"


def answer_tokens(experiment: Experiment, stage: str) -> tuple[int | None, str | None]:
    """Return the tokens of an answer where the bound holds, else None and why it does not."""
    if stage != "sft":
        return None, f"the loss of {stage} is that of pairs (a coin has {COIN}); its log loss is measured by scoring"
    path = experiment.recipe(stage)
    if not path.is_file():
        return None, f"{path} is not there"
    recipe = read_yaml(path)
    changed = [key for key in _OTHER_LOSS if recipe.get(key)]
    if changed:
        return None, f"with {', '.join(changed)} the evaluation loss says nothing about the log loss"
    if names(recipe.get("eval_dataset")) != [f"{experiment.name}_sft_valid"]:
        return None, f"{path} does not evaluate on the validation fold"
    try:
        return ChatFrame.from_dict(read_manifest(experiment.data_folder)["frame"]).answer_len, None
    except ArenaError as error:
        return None, str(error).splitlines()[0]


class Ladder:
    """The baselines on the validation fold: made once from the training rows, then read off for any of its rows."""

    def __init__(self, experiment: Experiment):
        """Fit the baselines; seconds for thousands of battles, up to a minute for 60,000."""
        from scoring.baselines import baseline_ladder
        from scoring.metrics import row_losses, verdict_codes
        from scoring.pipeline import texts

        data = experiment.data_folder
        valid = texts(data, "valid")
        truth = verdict_codes(valid["verdict"])
        self.ids = list(valid["id"])
        found = baseline_ladder(texts(data, "train"), valid, experiment.seed)
        self._losses = {name: row_losses(shares, truth) for name, shares in found.items()}
        known = truth_of(data)
        if known is not None:
            self._losses["bayes"] = row_losses(probabilities_of(known, self.ids, str(data / "truth.csv")), truth)

    def at(self, ids: list[str] | None = None) -> dict[str, float]:
        """Return the log loss of each rung on some validation rows, or on all of them."""
        places = range(len(self.ids))
        if ids is not None:
            place = {name: number for number, name in enumerate(self.ids)}
            places = [place[name] for name in ids]
        return {name: float(losses[list(places)].mean()) for name, losses in self._losses.items()}


class CheckpointScorer:
    """Asks a run's newest checkpoint about some validation battles, on its base as it was trained.

    A second copy of the model: on a GPU it shares the training's memory.
    """

    def __init__(self, experiment: Experiment, stage: str, rows: int):
        """Choose the rows, the same for every checkpoint; raises UsageError for a stage without labels."""
        _require_labels(stage)
        self._experiment, self._stage = experiment, stage
        manifest = read_manifest(experiment.data_folder)
        frame, tokenizer = load_frame(experiment)
        source = (experiment.data_folder / "judge_prompt.j2").read_text(encoding="utf-8")
        prompt = JudgePrompt(source, experiment.labels, where="judge_prompt.j2")
        battles = read_battles(experiment.data_folder, "valid")
        chosen = np.sort(np.random.default_rng(experiment.seed).permutation(len(battles))[:rows])
        picked = [battles[i] for i in chosen]
        self.ids = [battle.id for battle, _ in picked]
        self._verdicts = [battle.verdict for battle, _ in picked]
        self._label_ids = tuple(manifest["frame"]["label_ids"])
        wrapped = [frame.wrap(prompt.message(battle, dropped)) for battle, dropped in picked]
        encoded = tokenizer.encode_batch_fast(wrapped, add_special_tokens=False)
        self._sequences = [frame.surround(each.ids) for each in encoded]
        self._done: set[Path] = set()

    def newest(self, ladder: Ladder) -> Measured | None:
        """Score the last whole checkpoint if it was not scored yet; raises ArenaError if it cannot be loaded."""
        checkpoint = last_checkpoint(self._experiment.adapter_folder(self._stage))
        if checkpoint is None or checkpoint in self._done:
            return None
        self._done.add(checkpoint)
        step = int(checkpoint.name.rsplit("-", 1)[1])
        try:
            loss = self.log_loss(checkpoint)
        except ArenaError:
            if checkpoint.is_dir():
                raise
            return None  # the trainer replaced it by a newer one while it was read
        return Measured(step, loss, len(self.ids), ladder.at(self.ids))

    def log_loss(self, adapter: Path) -> float:
        """Return the log loss of an adapter's folder on the chosen rows."""
        from scoring.engines.torch_engine import device_name, score_labels
        from scoring.links import log_softmax
        from scoring.metrics import log_loss, verdict_codes
        from scoring.scorer import trained_adapter

        model = replace(trained_adapter(self._experiment, self._stage), folder=adapter).load(device_name())
        logits = score_labels(model, self._sequences, self._label_ids)
        return log_loss(np.exp(log_softmax(logits)), verdict_codes(self._verdicts))


class Watcher:
    """Looks at a run again and again; the ladder and the checkpoints' scores follow from a thread behind it."""

    def __init__(self, experiment: Experiment, stage: str, score_rows: int = 0):
        self._experiment, self._stage, self._rows = experiment, stage, score_rows
        self.ladder: Ladder | None = None
        self.measured: list[Measured] = []
        self.faults: list[str] = []
        self._thread: threading.Thread | None = None

    def start(self) -> Watcher:
        """Begin the work behind; the thread ends with the process."""
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()
        return self

    def finish(self) -> Watcher:
        """Do that work now, once."""
        self._prepare()
        return self

    def look(self) -> Look:
        """Return the run as it is now, with what the thread has found out.

        Today's baselines and today's validation rows say nothing about a run on another export: none stand beside it.
        """
        seen = replace(look(self._experiment, self._stage), faults=list(self.faults))
        if seen.state == OUTDATED:
            return seen
        return replace(seen, measured=list(self.measured), ladder=self.ladder.at() if self.ladder else seen.ladder)

    def _prepare(self) -> CheckpointScorer | None:
        if not self._rows and look(self._experiment, self._stage).ladder:
            return None  # its report has the baselines: nothing is left to find out
        try:
            self.ladder = Ladder(self._experiment)
            scorer = CheckpointScorer(self._experiment, self._stage, self._rows) if self._rows else None
            self._score(scorer)
        except Exception as error:  # whatever it is (a GPU's memory, say), nobody else sees it in this thread
            self.faults.append(_told(error))
            return None
        return scorer

    def _score(self, scorer: CheckpointScorer | None) -> None:
        if look(self._experiment, self._stage).state == OUTDATED:
            return
        if scorer and self.ladder and (found := scorer.newest(self.ladder)):
            self.measured.append(found)

    def _work(self) -> None:
        scorer = self._prepare()
        while scorer:
            try:
                self._score(scorer)
            except (ArenaError, OSError) as error:  # a checkpoint that the trainer removed while it was read
                self.faults.append(str(error))
            except Exception as error:  # a GPU's memory that two models do not fit into: the next one would not either
                self.faults.append(f"no more checkpoints are scored: {_told(error)}")
                return
            time.sleep(2)


def _told(error: Exception) -> str:
    """Return what one of our errors says, of any other its kind and its first line."""
    if isinstance(error, (ArenaError, OSError)):
        return str(error)
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no more is known'])[0]}"


def serve_watch_page(
    experiment: Experiment, stage: str, score_rows: int, host: str, port: int | None, *, open_browser: bool, show: Show
) -> None:
    """Serve the watch page of one stage until Ctrl-C."""
    label = f"watch {experiment.name} {stage}"
    arguments = ["--experiment", experiment.name, "--stage", stage, "--score", str(score_rows)]
    log = experiment.output_folder(stage).with_name(f"{stage}_watch.log")
    serve_page("scoring.watch_page", arguments, label, log, host, port, open_browser=open_browser, show=show)


def follow(watcher: Watcher, show: Show, *, pause: float = 1.0) -> Look:
    """Show a run in the terminal until it is not at work any more, or until Ctrl-C; return the last look."""
    seen: Look | None = None
    try:
        for now in _looks(watcher, show, pause):
            seen = now
    except KeyboardInterrupt:  # the run is a process of another terminal: Ctrl-C here does not reach it
        seen = seen or watcher.look()
        show.note(f"watching ended; {f'the {seen.state} goes on' if seen.at_work else 'nothing was at work'}")
    return seen


def _looks(watcher: Watcher, show: Show, pause: float) -> Iterator[Look]:
    """Yield each look at a run after showing it, until the run is over.

    Between two steps of one run nobody holds its lock for a moment: a run that was at work is over when it is not at
    work three times in a row.
    """
    seen = watcher.look()
    idle, patience = 0, 3 if seen.at_work else 1
    told: set[tuple] = set()
    shown: LogPoint | None = None
    with show.line(f"{seen.experiment} {seen.stage}") as line:
        show_point = show_points(line, seen.start_step)
        while True:
            line.update(seen.state)
            if seen.point and seen.point != shown:
                shown = seen.point
                show_point(_last_loss(seen))
            for key, sentence in sentences(seen, seen.ladder):
                # An evaluation waits for the ladder that it is told beside.
                if key not in told and (seen.ladder or watcher.faults or not seen.at_work):
                    told.add(key)
                    show.note(sentence)
            for fault in watcher.faults[:]:
                if ("fault", fault) not in told:
                    told.add(("fault", fault))
                    show.note(fault)
            yield seen
            idle = 0 if seen.at_work else idle + 1
            if idle >= patience:
                return
            time.sleep(pause)
            seen = watcher.look()


def _last_loss(seen: Look) -> LogPoint:
    """Return the newest point; that of an evaluation gets the loss that was logged last."""
    losses = [row for row in seen.curve if row["loss"] is not None]
    if seen.point.loss is not None or not losses:
        return seen.point
    return replace(seen.point, loss=losses[-1]["loss"], lr=losses[-1]["lr"])


def sentences(seen: Look, ladder: dict[str, float] | None = None) -> list[tuple[tuple, str]]:
    """Return one sentence for every evaluation and scored checkpoint, each with a key to tell it once.

    An evaluation stands beside `ladder`, a checkpoint beside the ladder on its own rows.
    """
    found: list[tuple[tuple, str]] = []
    for each in seen.evaluations:
        text = f"step {each.step}: evaluation loss {each.eval_loss:.4f}"
        if each.log_loss is not None:
            far = ", which says nothing yet" if each.log_loss > UNIFORM else ""
            text += f", so a log loss of at most {each.log_loss:.4f}{far}{_beside(ladder)}"
        found.append((("evaluation", each.step), text))
    for each in seen.measured:
        text = f"checkpoint {each.step}: log loss {each.log_loss:.4f} on {each.rows} validation battles"
        found.append((("measured", each.step), text + _beside(each.ladder)))
    return sorted(found, key=lambda item: item[0][1])


def _beside(ladder: dict[str, float] | None) -> str:
    if not ladder:
        return ""
    return " (" + ", ".join(f"{RUNG_NAMES[name]} {loss:.4f}" for name, loss in ladder.items()) + ")"


def _log_loss_in_words(seen: Look) -> list[str]:
    """Return what the stage reached, or how a log loss is to be had while it is not scored."""
    if seen.reached:
        rows = "" if seen.reached.rows is None else f" on {seen.reached.rows} held-out battles"
        than = "better" if seen.reached.beats_prior else "not better"
        return [f"log loss {seen.reached.log_loss:.4f}{rows}: {than} than the class prior"]
    if seen.why_no_log_loss:
        return [f"no log loss yet: {seen.why_no_log_loss}"]
    if seen.evaluations or seen.measured:
        return []
    if seen.evaluates:
        return [f"no evaluation yet: the recipe evaluates {seen.evaluates}"]
    return [f"no evaluation {'yet' if seen.at_work else 'on the way'}: {seen.how_to_evaluate}"]


def in_words(seen: Look) -> list[str]:
    """Return a run as lines: how far it is, its losses, the ladder, and the command that comes next."""
    lines = [f"{seen.experiment} {seen.stage}: {seen.state} {seen.detail}".rstrip()]
    if seen.point:
        left = f"  {duration(seen.seconds_left)} left" if seen.seconds_left is not None else ""
        losses = describe(_last_loss(seen))
        lines.append(f"step {seen.point.step}/{seen.point.total}  {losses}{left}")
    lines += [sentence for _, sentence in sentences(seen)]
    lines += _log_loss_in_words(seen)
    if seen.ladder:
        lines.append("to beat:" + _beside(seen.ladder)[1:].replace("(", " ").rstrip(")"))
    lines += seen.faults
    if seen.next and not seen.at_work:
        lines.append(f"next: {seen.next}")
    return lines
