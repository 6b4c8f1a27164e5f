"""The status of a run: what its own files hold while it trains.

An SFT run's validation loss is not the competition's log loss. It is the mean over the answer's tokens (the label and
what closes the turn) of −log p over the whole vocabulary. A row's label costs at most the sum over its tokens, and
−log p of the label among the three labels is at most that among all tokens, so

    log loss  <=  validation loss x tokens of an answer

on the same rows in the same order (A first), without calibration. The bound is nearly reached once the judge has
learned the form of an answer. scoring.watch.CheckpointScorer measures instead: it asks the checkpoint for its labels.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from common.console import duration, printable
from common.errors import ArenaError, first_line
from common.files import read_json
from data_prep.chat_template import ChatFrame
from factory.fingerprint import names
from factory.stage_context import StageContext
from factory.status import StageStatus, experiment_status, next_commands, stage_status
from factory.trainer_log import LogPoint, TrainerLog, describe, loss_curve, resumed_at, seconds_left
from scoring.report.findings import BASELINE_NAMES

_HOW_TO_EVALUATE = (
    "score checkpoints with --score 200, or set eval_strategy: steps in the recipe "
    "(not for a 4-bit training on a CPU, which an evaluation may corrupt)"
)
# With any of these the validation loss is another quantity, and the bound does not hold.
_OTHER_LOSS = (
    *("label_smoothing_factor", "train_on_prompt", "packing", "neat_packing", "use_dft_loss", "use_asft_loss"),
    *("use_eaft_loss", "max_samples", "val_size"),
)


@dataclass(frozen=True)
class RunStatus:
    """A run at one moment; `watch --json` prints these fields."""

    experiment: str
    stage: str
    state: str
    detail: str
    next: str  # the command that comes next
    point: LogPoint | None  # the newest line of the trainer's log
    seconds_left: float | None
    curve: list[dict[str, float | None]]  # step, loss, lr, eval_loss
    evaluations: list[dict[str, Any]]  # step, eval_loss, log_loss: its upper bound, None without one
    why_no_log_loss: str | None
    evaluates: bool = False  # whether the recipe asks for evaluations
    start_step: int = 0  # the step from which a resumed run goes on
    measured: list[dict[str, Any]] = field(default_factory=list)  # checkpoints: step, log_loss, rows, ladder on these
    ladder: dict[str, float] | None = None  # the log loss of each baseline
    faults: list[str] = field(default_factory=list)  # why the ladder or a checkpoint's score is missing
    reached: dict[str, Any] | None = None  # a scored stage's report: log_loss, rows, beats_prior, ladder

    @property
    def at_work(self) -> bool:
        """Whether a run on this machine is training, merging or scoring."""
        return self.state in ("training", "merging", "scoring")

    @property
    def last_loss(self) -> LogPoint | None:
        """The newest point; that of an evaluation gets the loss that was logged last."""
        losses = [row for row in self.curve if row["loss"] is not None]
        if self.point is None or self.point.loss is not None or not losses:
            return self.point
        return replace(self.point, loss=losses[-1]["loss"], lr=losses[-1]["lr"])


def run_status(context: StageContext) -> RunStatus:
    """Return what a run's files say now; nothing is loaded and nothing locked."""
    view = stage_status(context)
    recipe = context.recipe if context.recipe_path.is_file() else {}
    path = context.adapter / "trainer_log.jsonl"
    points, curve = TrainerLog(path).read_new(), loss_curve(path)
    tokens, why = answer_tokens(context)
    point, start = points[-1] if points else None, resumed_at(points)
    # What follows a scored stage depends on the whole experiment.
    following = next_commands(experiment_status(context))[:1] if view.state == "scored" else [view.next]
    reached = _reached(context, view)
    return RunStatus(
        experiment=context.experiment.name,
        stage=context.label,
        state=view.state,
        detail=view.detail,
        next="".join(following),
        point=point,
        seconds_left=seconds_left(point, start) if point and view.state == "training" else None,
        curve=curve,
        evaluations=[
            {"step": int(row["step"]), "eval_loss": loss, "log_loss": loss * tokens if tokens else None}
            for row in curve
            if (loss := row["eval_loss"]) is not None
        ],
        why_no_log_loss=why,
        evaluates=recipe.get("eval_strategy", "no") != "no",
        start_step=start,
        ladder=reached["ladder"] if reached else None,
        reached=reached,
    )


def _reached(context: StageContext, view: StageStatus) -> dict[str, Any] | None:
    """Return what the report of a scored stage says, None where the stage is not scored."""
    if view.log_loss is None or view.prior is None:
        return None
    report = read_json(context.folder / "report.json")
    known = {**report["baselines"], "bayes": report.get("bayes")}
    ladder = {name: float(known[name]) for name in BASELINE_NAMES if isinstance(known.get(name), int | float)}
    beats = bool(view.beats_prior)
    return {"log_loss": view.log_loss, "rows": report.get("rows"), "beats_prior": beats, "ladder": ladder}


def answer_tokens(context: StageContext) -> tuple[int | None, str | None]:
    """Return the tokens of an answer where the bound holds, else None and why it does not."""
    if not context.is_trained:
        return None, "nothing is trained; scoring measures it"
    if context.name != "sft":
        return None, f"the loss of {context.name} is that of pairs (a coin has 0.6931); scoring measures its log loss"
    try:
        recipe = context.recipe
        if changed := [key for key in _OTHER_LOSS if recipe.get(key)]:
            return None, f"with {', '.join(changed)} the validation loss says nothing about the log loss"
        if names(recipe.get("eval_dataset")) != [
            f"{context.experiment.name}_sft_{part}" for part in context.parts("valid")
        ]:
            return None, f"{context.recipe_path} does not evaluate on the validation fold"
        return ChatFrame.from_dict(context.manifest["frame"]).answer_len, None
    except ArenaError as error:
        return None, first_line(error)


def events(status: RunStatus, ladder: dict[str, float] | None) -> list[tuple[str, str]]:
    """Return each evaluation and each scored checkpoint as (name, sentence), in order of steps.

    With a `ladder` an evaluation is compared with it, a checkpoint with the baselines on its own rows.
    """
    found: list[tuple[int, str, str]] = []
    for each in status.evaluations:
        what, bound = f"step {each['step']}", each["log_loss"]
        text = f"{what}: validation loss {each['eval_loss']:.4f}"
        if bound is not None:
            text += f", so a log loss of the verdict of at most {bound:.4f}{_compared(ladder)}"
        found.append((each["step"], what, text))
    for each in status.measured:
        what = f"checkpoint {each['step']}"
        text = f"{what}: log loss of the verdict {each['log_loss']:.4f} on {each['rows']} validation battles"
        found.append((each["step"], what, text + (_compared(each["ladder"]) if ladder else "")))
    return [(what, text) for _, what, text in sorted(found, key=lambda event: event[0])]


def _compared(ladder: dict[str, float] | None) -> str:
    return f" ({_listed(ladder)})" if ladder else ""


def _listed(ladder: dict[str, float]) -> str:
    return "; ".join(f"{BASELINE_NAMES[name]} {loss:.4f}" for name, loss in ladder.items())


def in_words(status: RunStatus) -> list[str]:
    """Return a run as lines: how far it is, its losses, the baselines, and the command that comes next."""
    head = f"{status.experiment} {status.stage}: {state_in_words(status)}"
    lines = [head, *filter(None, [step_in_words(status)]), *remarks(status)]
    return [printable(" ".join(line.splitlines())) for line in lines]


def state_in_words(status: RunStatus) -> str:
    """Return how far a run is; `step_in_words` names its step."""
    return status.state if status.point and status.state == "training" else f"{status.state} {status.detail}".rstrip()


def step_in_words(status: RunStatus) -> str:
    """Return step, losses and the time left, nothing before the first step."""
    if not status.point:
        return ""
    left = f"  {duration(status.seconds_left)} left" if status.seconds_left is not None else ""
    return f"step {status.point.step}/{status.point.total}  {describe(status.last_loss)}{left}"


def remarks(status: RunStatus) -> list[str]:
    """Return what is known of the log loss, the baselines to beat, faults, and the command that comes next."""
    lines = [text for _, text in events(status, None)]
    if reached := status.reached:
        than = "better" if reached["beats_prior"] else "not better"
        rows = f"on {reached['rows']} held-out battles"
        lines.append(f"log loss of the verdict {reached['log_loss']:.4f} {rows}: {than} than the class prior")
    elif status.why_no_log_loss:
        lines.append(f"no log loss yet: {status.why_no_log_loss}")
    elif not (status.evaluations or status.measured):
        lines.append("no evaluation yet" + ("" if status.evaluates else f": {_HOW_TO_EVALUATE}"))
    if status.measured:
        lines.append(f"to beat on these {status.measured[-1]['rows']}: {_listed(status.measured[-1]['ladder'])}")
    elif status.ladder:
        lines.append(f"to beat: {_listed(status.ladder)}")
    lines += status.faults
    if status.next and not status.at_work:
        lines.append(f"next: {status.next}")
    return lines
