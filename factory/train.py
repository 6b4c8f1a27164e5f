"""The training of one stage's adapter by llamafactory-cli: kept when it is finished, gone on with when it was left."""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.console import duration
from common.errors import ArenaError, Interrupted, UsageError
from common.files import only_run, read_json
from common.progress import Line, Show
from data_prep.chat_template import load_frame
from data_prep.export_reader import MANIFEST, SPLITS, readable, require_intact
from factory.devices import may_have_gpu
from factory.distributed import Launch, plan_launch
from factory.fingerprint import local_models, training_rows
from factory.process import llamafactory, run_child
from factory.recipe_reach import ADAPTER_FILES
from factory.stage_context import CHOICE, StageContext
from factory.state import archive, flag_to_go_on, is_occupied, last_checkpoint
from factory.status import beside_on_the_card
from factory.trainer_log import TrainerLog, loss_curve, show_points

# What the child's log says when it comes to something new, and what the live line says then.
_PHASES = {
    "reading the data": re.compile(r"Loading dataset|Converting format|Running tokenizer"),
    "loading the model": re.compile(r"loading weights file|Loading checkpoint shards|Loading weights"),
    "training": re.compile(r"\*\*\*\*\* Running training"),
    "validating": re.compile(r"\*\*\*\*\* Running [Ee]valuation"),
    "saving": re.compile(r"Saving model checkpoint"),
    "merging": re.compile(r"Merged \d+ adapter"),
}
_ROWS = re.compile(r"Num examples = ([\d,]+)")
# LLaMA-Factory prints its first rows, token ids in the line below: "training example:", "input_ids:", "[1, 2, 3]".
_EXAMPLE, _IDS = re.compile(r"\b(training|eval) example:"), re.compile(r"\b(\w*input_ids):$")
_SHOWN = 12  # tokens on either side of the first that differs
_FRESH = "--fresh puts that run aside and trains from the beginning"


def train(context: StageContext, *, resume: bool = False, fresh: bool = False, show: Show) -> Path | None:
    """Train the stage's adapter by its recipe and return the adapter's folder; None on a node other than the first.

    A finished training with the same inputs is kept; `resume` goes on from the last checkpoint of an unfinished one;
    `fresh` first renames the earlier run (adapter and outputs) to '<name>.earlier-N'.
    Raises ArenaError for changed inputs, an earlier run in the way, an error of the child, a loss or weights that are
    not finite, and where the child trains on other rows than were exported.
    """
    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other", remedy="give one of them")
    _require_data(context)
    launch = plan_launch(context.experiment.distributed, context.recipe, context.recipe_path)
    if not launch.is_main_process:
        return _train_along(context, launch, resume, show)
    with only_run(context.folder):
        if fresh:
            _put_aside(show, context.adapter, context.folder)
            vars(context).pop("state", None)  # it was put aside, too
        inputs = {**context.training_inputs, **local_models(context.recipe), **launch.inputs}
        standing = context.state.standing("train", inputs)
        damaged = standing.record.damaged if standing.record else []
        if damaged:
            show.note(f"{', '.join(damaged)}: not what the training wrote; the training counts as unfinished")
        if standing.is_finished:
            standing.require_same_inputs("train", context.folder, _FRESH)
            if not damaged:
                show.note(f"{context.label}: training kept, finished {standing.record.finished_at}")
                return context.adapter
        checkpoint = _checkpoint(context, resume, show)
        if checkpoint:
            standing.require_same_inputs("train", context.folder, _FRESH)
        if others := beside_on_the_card(context):
            shared = "card" if may_have_gpu() else "processor"
            show.note(f"warning: {' and '.join(others)} at work on the same {shared}: both need its memory and time")
        (context.folder / CHOICE).unlink(missing_ok=True)  # of a training before this one
        context.forget_choice()
        context.state.begin("train", inputs)
        with context.state.failures_of("train"):
            seconds = _run(context, checkpoint, launch, show)
        context.state.finish("train", [context.adapter / name for name in ADAPTER_FILES], seconds)
    losses = [row["loss"] for row in loss_curve(context.adapter / "trainer_log.jsonl") if row["loss"] is not None]
    summary = f", training loss {losses[0]:.4f} -> {losses[-1]:.4f}" if losses else ""
    # A mean over an answer's tokens, which only `prepare` counts: the label, and others that the model soon knows.
    if losses and context.name == "sft" and (context.experiment.data_folder / MANIFEST).is_file():
        tokens = context.manifest["frame"]["answer_len"]
        summary += f", the mean of {tokens} tokens: at most {losses[-1] * tokens:.2f} for the label (a guess: 1.10)"
    show.note(f"{context.label}: trained in {duration(seconds)}{summary}")
    return context.adapter


def adopt(
    context: StageContext, recipe: dict[str, Any], folder: Path, log: Path, wait: Callable[[], int], show: Show
) -> None:
    """Follow a training that LLaMA Board runs in `folder` to its end as this stage's; the adapter is a link there.

    `recipe` is what the page started, `wait` returns the exit code. Raises ArenaError where `run.py` trained the stage,
    and where the training ended badly.
    """
    with only_run(context.folder):
        if is_occupied(context.adapter) and not context.adapter.is_symlink():
            raise ArenaError("the stage has a training of its own", where=str(context.adapter))
        _put_aside(show, context.adapter, context.folder)
        vars(context).pop("state", None)
        for link, place in ((context.adapter, folder), (context.folder / "train.log", log)):
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(place, link.parent))
        own = {**local_models(recipe), str(context.recipe_path): recipe}
        context.state.begin("train", {**context.training_inputs, **own})
        began = time.monotonic()
        with context.state.failures_of("train"):
            if code := wait():
                what = f"LLaMA Board's training ended with exit code {code}"
                raise (Interrupted if code < 0 else ArenaError)(what, where=str(log))
            require_files(folder, ADAPTER_FILES, log, "LLaMA Board's training")
            if training_rows(recipe) not in (None, rows := trained_rows(log)):
                raise ArenaError(f"LLaMA-Factory trained on {rows} rows, not on the exported ones", where=str(log))
            _require_sound(folder, log, recipe)
        context.state.finish("train", [context.adapter / name for name in ADAPTER_FILES], time.monotonic() - began)


def trained_rows(log: Path) -> int | None:
    """Return on how many rows a training's log says that LLaMA-Factory trained, None where it does not say it."""
    rows = RowsCheck()
    try:
        for text in log.read_text(encoding="utf-8", errors="replace").splitlines():
            rows.read(text)
    except OSError:
        return None
    return rows.seen


def _require_data(context: StageContext) -> None:
    """Raise ArenaError where nothing was exported, the export changed, or the merged judge to start from is missing:
    LLaMA-Factory notices late, and takes a missing folder for a misspelt name on the hub."""
    experiment, folder = context.experiment, context.experiment.data_folder
    if not (folder / "dataset_info.json").is_file():
        remedy = f"python run.py prepare -e {experiment.name} --train FILE"
        raise ArenaError("there is no exported data", where=str(folder), remedy=remedy)
    if (folder / MANIFEST).is_file():  # else the data sets are the user's own
        sets = [f"{context.step.data}_{part}" for split in SPLITS[:2] for part in context.parts(split)]
        require_intact(folder, [f"{name}.jsonl" for name in sets], context.manifest["files"])
        context.require_current_settings()
        if context.recipe.get("num_train_epochs", 3) > 1 and context.has_soft_labels:
            raise ArenaError(
                "repeats the labels that were drawn from the soft ones in every epoch",
                where=f"{context.recipe_path}: num_train_epochs",
                remedy=f"write 1; and epochs_as_rows: N into {experiment.folder / 'experiment.yaml'} for N epochs with "
                "labels of their own, then prepare again",
            )
    start = context.start
    if start == experiment.model:
        return
    context.other("sft").require_current_training()
    if not (Path(start) / "config.json").is_file():
        raise ArenaError(
            f"{context.label} starts from the merged SFT judge, which does not exist",
            where=start,
            remedy=f"{context.other('sft').command} --until merge; or write start_from: "
            f"{{{context.name}: base}} into experiment.yaml, then prepare again",
        )


def _put_aside(show: Show, *paths: Path) -> None:
    for old in archive(*paths):
        show.note(f"the earlier run is now {old}")


def _checkpoint(context: StageContext, resume: bool, show: Show) -> Path | None:
    """Return the checkpoint that an unfinished training goes on from, None for a start at the beginning.

    Raises ArenaError where an earlier run lies in the adapter's folder and --resume was not given or is not possible.
    """
    adapter, checkpoint = context.adapter, last_checkpoint(context.adapter)
    if not is_occupied(adapter):
        return None
    can_resume = flag_to_go_on(adapter, context.step.stage) == "--resume"
    if not resume or (checkpoint and not can_resume):
        has = f"its last whole checkpoint is {checkpoint.name}" if checkpoint else "it has no whole checkpoint"
        if not checkpoint and any(adapter.glob("checkpoint-*")):
            has += " (one is whole with its optimizer and scheduler, which save_only_model leaves out)"
        if checkpoint and not can_resume:
            has += ", but LLaMA-Factory 0.9.5 cannot resume a reward model: it does not read the value head back"
        raise ArenaError(
            f"holds an unfinished run, or one that `run.py` did not start; {has}",
            where=str(adapter),
            remedy=f"{'--resume goes on from it; ' if can_resume else ''}{_FRESH}",
        )
    if checkpoint is None:
        show.note(f"{adapter} holds no whole checkpoint: training starts at the beginning")
        _put_aside(show, adapter)
        return None
    show.note(f"going on from {checkpoint}")
    return checkpoint


def _train_along(context: StageContext, launch: Launch, resume: bool, show: Show) -> None:
    """Train as another node than the first, which keeps state, log and adapter; this one keeps its own log only."""
    checkpoint = last_checkpoint(context.adapter) if resume else None  # on a disk that the nodes share
    log, what = context.folder / f"train.node-{launch.node}.log", f"{context.label}, node {launch.node}"
    with show.line(what) as line:
        seconds = run_child(
            _command(context, launch, checkpoint),
            log,
            what=f"training {what}",
            on_line=lambda text: show_phase(text, line, show),
            environment=launch.environment,
        )
    show.note(f"{what}: done in {duration(seconds)}; node 0 goes on")


def _run(context: StageContext, checkpoint: Path | None, launch: Launch, show: Show) -> float:
    """Run the child to its end and check what it wrote; return its seconds."""
    adapter, log, what = context.adapter, context.folder / "train.log", f"training {context.label}"
    rows = RowsCheck(training_rows(context.recipe), context.recipe_path)
    if rows.expected is None:
        show.note(f"{context.label}: this recipe leaves open how many rows are trained, so they are not compared")
    example = FirstExample(context)
    points = TrainerLog(adapter / "trainer_log.jsonl", skip_existing=True)
    with show.line(context.label) as line:
        line.update("starting LLaMA-Factory")
        show_point = show_points(line, int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else 0)

        def read(text: str) -> None:
            show_phase(text, line, show)
            example.read(text)
            rows.read(text)

        def look() -> None:
            for point in points.read_new():
                if not point.finite:
                    raise _not_finite(f"the loss is NaN or infinite at step {point.step}", adapter)
                show_point(point)

        seconds = run_child(
            _command(context, launch, checkpoint),
            log,
            what=what,
            on_line=read,
            on_look=look,
            interrupted_remedy=context.way_on,
            environment=launch.environment,
        )
    require_files(adapter, ADAPTER_FILES, log, what)
    if example.expected or (rows.expected is not None and rows.seen is None):
        raise ArenaError(
            "does not say on how many rows LLaMA-Factory trained, or which was first, so that dropped rows and other "
            "prompts would go unnoticed",
            where=str(log),
            remedy="remove `log_level` from the recipe, then --fresh",
        )
    _require_sound(adapter, log, context.recipe)
    return seconds


def _command(context: StageContext, launch: Launch, checkpoint: Path | None) -> list[str]:
    # Named, for LLaMA-Factory itself would also take a checkpoint that was only half written.
    resume = [f"resume_from_checkpoint={checkpoint}"] if checkpoint else []
    return llamafactory("train", str(context.recipe_path), *context.overrides(context.name), *launch.options, *resume)


def show_phase(text: str, line: Line, show: Show) -> None:
    """Show what one line of the child's output says about its work; a verbose user sees the line itself."""
    if show.verbose and text.strip():
        show.note(text)
    if phase := next((name for name, pattern in _PHASES.items() if pattern.search(text)), None):
        line.update(phase)


class RowsCheck:
    """Compares the rows that the child says it trains on with those that were exported, before any time is spent."""

    def __init__(self, expected: int | None = None, recipe_path: Path = Path()):
        self.expected, self.seen = expected, None
        self._recipe_path, self._training = recipe_path, False

    def read(self, text: str) -> None:
        """Take one line of the log; raises ArenaError if it names another number of rows."""
        if text.startswith('"'):  # the text of a row, see factory.launcher
            return
        if "***** Running " in text:
            self._training = "Running training" in text
        elif self._training and self.seen is None and (found := _ROWS.search(text)):  # Ray leaves out repeated lines
            self.seen = int(found[1].replace(",", ""))
            if self.expected not in (None, self.seen):
                raise ArenaError(
                    f"LLaMA-Factory trains on {self.seen:,} rows, but {self.expected:,} were exported: it drops rows "
                    "that it cannot read with only a warning",
                    where=str(self._recipe_path),
                    remedy="run `run.py prepare` again; look for 'Dropped' in the log, and at `max_samples` and "
                    "`tokenized_path` in the recipe",
                )


class FirstExample:
    """Compares the first row that the child tokenized with what prepare wrote and scoring would feed, token by token.

    Whatever changes the prompts of training alone, a key, a variable or another version, stops the run here, before
    its first step. `expected` holds what the child has not shown yet.
    """

    def __init__(self, context: StageContext):
        self._recipe_path, self.expected, self._training, self._key = context.recipe_path, {}, False, ""
        # A shuffled stream begins with any row; so may a data set that `prepare` did not write.
        if (context.experiment.data_folder / MANIFEST).is_file() and not context.recipe.get("streaming"):
            self._tokenizer, self.expected = _first_example(context)

    def read(self, text: str) -> None:
        """Take one line of the log; raises ArenaError where it shows other tokens."""
        if text.startswith('"'):
            return
        if found := _EXAMPLE.search(text):
            self._training = found[1] == "training"
        elif self._key and "[" in text:
            self._compare(self.expected.pop(self._key), json.loads(text[text.index("[") :]))
            self._key = ""
        elif self._training and (found := _IDS.search(text)) and found[1] in self.expected:
            self._key = found[1]

    def _compare(self, ours: list[int], theirs: list[int]) -> None:
        if ours == theirs:
            return
        at = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if len(set(pair)) > 1), len(ours))
        here = slice(max(at - _SHOWN, 0), at + _SHOWN)
        shown = [self._tokenizer.decode(ids[here], skip_special_tokens=False) for ids in (theirs, ours)]
        raise ArenaError(
            f"LLaMA-Factory trains on other prompts than scoring would ask: the first row's {self._key} has "
            f"{len(theirs)} tokens, ours {len(ours)}; from token {at} on it is\n  {shown[0]!r}, not\n  {shown[1]!r}",
            where=str(self._recipe_path),
            remedy="remove the key of the recipe, or the variable of your shell, that changes the prompt; `prepare "
            "--force` renders the recipe again",
        )


def _first_example(context: StageContext) -> tuple[Any, dict[str, list[int]]]:
    """Return the tokenizer, and what the stage's first exported row is as token ids, by LLaMA-Factory's names."""
    frame, tokenizer = load_frame(context.experiment)
    path = context.experiment.data_folder / f"{context.step.data}_{context.parts(SPLITS[0])[0]}.jsonl"
    with readable(path), path.open(encoding="utf-8") as file:
        row = json.loads(file.readline())
        prompt, *answer = (turn["value"] for turn in row["conversations"])
        answers = {"": answer[0]} if answer else {f"{kind}_": row[kind]["value"] for kind in ("chosen", "rejected")}

    def ids(text: str) -> list[int]:
        return tokenizer.encode(text, add_special_tokens=False).ids

    asked = frame.surround(ids(frame.wrap(prompt)))
    found = {kind: [*asked, *frame.answer(ids(frame.wrap_answer(text)))] for kind, text in answers.items()}
    return tokenizer, {f"{kind}input_ids": each for kind, each in found.items()}


def _require_sound(adapter: Path, log: Path, recipe: dict[str, Any]) -> None:
    """Raise ArenaError if steps are missing, or a loss or a trained weight is not finite: the trainer says neither."""
    with readable(adapter / "trainer_state.json", "train again with --fresh"):
        state = read_json(adapter / "trainer_state.json")
        history, steps, planned = state["log_history"], state.get("global_step"), state.get("max_steps")
    if steps != planned and not recipe.get("early_stopping_steps"):
        raise ArenaError(
            f"the training ended at step {steps} of {planned} planned ones, so it is not finished",
            where=str(log),
            remedy="read the end of the log, then --fresh",
        )
    for entry in history:
        if not all(math.isfinite(entry.get(key) or 0) for key in ("loss", "eval_loss", "train_loss")):
            raise _not_finite(f"the loss is NaN or infinite at step {entry.get('step')}", log)
    import torch
    from safetensors import SafetensorError, safe_open

    path = adapter / ADAPTER_FILES[1]
    try:
        with safe_open(path, framework="pt") as weights:
            bad = [name for name in weights.keys() if not torch.isfinite(weights.get_tensor(name)).all()]  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ArenaError(f"is damaged: {error}", where=str(path), remedy="is the disk full? then --fresh") from None
    if bad:
        raise _not_finite(f"{len(bad)} trained weights are NaN or infinite, the first is {bad[0]}", log)


def _not_finite(what: str, where: Path) -> ArenaError:
    remedy = "lower learning_rate (3 to 10 times), prefer bf16 to fp16, set max_grad_norm: 1.0 and warmup; then --fresh"
    return ArenaError(what, where=str(where), remedy=remedy)


def require_files(folder: Path, files: tuple[str, ...], log: Path, what: str) -> None:
    """Raise ArenaError where a child that ended well did not write a file (a name or a pattern)."""
    if missing := [name for name in files if not any(folder.glob(name))]:
        raise ArenaError(
            f"{what} ended without an error, but did not write {', '.join(missing)}",
            where=str(folder),
            remedy=f"read the end of {log}, then --fresh",
        )
