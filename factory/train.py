"""The running half of a stage: train the adapter, merge it, and keep what is finished."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.console import duration
from common.errors import ArenaError, UsageError, same_command
from common.experiment import Experiment, read_yaml
from common.files import atomic_folder, only_run, read_json
from common.progress import Line, Show
from common.stages import STEPS, merge_of
from data_prep.export_reader import MANIFEST, SPLITS, require_intact
from factory.distributed import Launch, plan_launch
from factory.merge import DequantisedBase, MergeProgress, dequantised_base
from factory.process import llamafactory, run_child
from factory.recipe_checks import check_device, check_recipes
from factory.state import (
    StageState,
    archive,
    checkpoints,
    flag_to_go_on,
    inputs_of,
    is_occupied,
    last_checkpoint,
    require_own_settings,
    require_own_votes,
    training_rows,
)
from factory.trainer_log import LogPoint, TrainerLog, loss_curve, show_points

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
_VALUE_HEAD = "value_head.safetensors"
# What the child's log says when it comes to something new, and what the live line says then.
_PHASES = (
    (re.compile(r"Loading dataset|Converting format|Running tokenizer"), "reading the data"),
    (
        re.compile(r"loading (weights|configuration) file|Loading checkpoint shards|Loading weights"),
        "loading the model",
    ),
    (re.compile(r"\*\*\*\*\* Running training"), "training"),
    (re.compile(r"\*\*\*\*\* Running [Ee]valuation"), "validating"),
    (re.compile(r"Saving model checkpoint"), "saving"),
    (re.compile(r"Merged \d+ adapter"), "merging"),
)
_PHASES_OF_TRAINING = tuple(pair for pair in _PHASES if pair[1] in ("validating", "saving"))
_ROWS = re.compile(r"Num examples = ([\d,]+)")


@dataclass(frozen=True)
class _Start:
    """Where a training starts: anew, or from a checkpoint."""

    checkpoint: Path | None = None

    @property
    def step(self) -> int:
        return int(self.checkpoint.name.rsplit("-", 1)[1]) if self.checkpoint else 0


def train(
    experiment: Experiment,
    stage_step: str,
    *,
    resume: bool = False,
    fresh: bool = False,
    show: Show | None = None,
) -> Path | None:
    """Train the adapter of `stage_step` (sft, dpo_judge, …) by its recipe and return the adapter's folder.

    A finished training with the same inputs is kept; `resume` goes on from the last checkpoint of an unfinished
    one; `fresh` first renames the earlier run (adapter and outputs) to '<name>.earlier-N'. On a node that only trains
    along (see factory.distributed) nothing is kept and None is returned.
    Raises ArenaError for faults in the recipe, changed inputs, an earlier run in the way, an error of the child, a
    loss or weights that are not finite, or if the child trains on other rows than were exported.
    """
    if resume and fresh:
        raise UsageError("--resume and --fresh exclude each other", remedy="give one of them")
    show = show or Show()
    check_recipes(experiment, [stage_step])
    _require_start(experiment, stage_step)
    recipe_path = experiment.recipe(stage_step)
    recipe = read_yaml(recipe_path)
    check_device(recipe_path, recipe)
    adapter, folder = Path(recipe["output_dir"]), experiment.output_folder(stage_step)
    launch = plan_launch(experiment.distributed, recipe, recipe_path)
    if not launch.is_main_process:
        return _train_along(stage_step, recipe_path, adapter, folder, launch, resume, show)
    with only_run(folder):
        if fresh:
            _put_aside(show, adapter, folder, places=(adapter, folder))
        state, inputs = StageState(folder), {**inputs_of(recipe_path, recipe), **launch.inputs}
        remedy = "--fresh archives the earlier run and trains anew"
        damaged = state.damaged("train")
        for name in damaged:
            show.note(f"{name} is not what the training wrote: it counts as unfinished")
        if state.finished("train", inputs, fresh_remedy=remedy) and not damaged:
            show.note(f"{stage_step}: training kept, finished {state.record('train').finished_at}")
            return adapter
        start = _start(state, inputs, recipe, adapter, folder, resume, show)
        state.begin("train", inputs)
        rows = _Rows(training_rows(recipe), recipe_path, lambda: _refuse_new_inputs(state, recipe_path, launch))
        with state.failures_of("train"):
            seconds = _run_training(stage_step, recipe_path, rows, adapter, folder / "train.log", start, launch, show)
        state.finish("train", [adapter / name for name in _ADAPTER_FILES], seconds)
    show.note(f"{stage_step}: trained in {duration(seconds)}{_summary(adapter)}")
    return adapter


def merge(
    experiment: Experiment,
    stage_step: str,
    *,
    complete: Callable[[Path], None] | None = None,
    show: Show | None = None,
) -> Path:
    """Merge the adapter of `stage_step` into its base model, or into the dequantised copy of it, and return the
    merged folder.

    The folder appears when it is whole: `complete` may still add files to it. A finished merge with the same
    inputs is kept; an earlier folder that was made from another training is renamed, not deleted.
    Raises ArenaError as `train` does.
    """
    show = show or Show()
    step = merge_of(stage_step)
    check_recipes(experiment, [stage_step, step])
    recipe_path = experiment.recipe(step)
    recipe = read_yaml(recipe_path)
    folder = experiment.output_folder(stage_step)
    merged = experiment.merged_folder(stage_step)
    with only_run(folder):
        state = StageState(folder)
        _require_adapter(Path(recipe["adapter_name_or_path"]), stage_step)
        base = dequantised_base(experiment, stage_step)
        inputs = _merge_inputs(recipe_path, recipe, base)
        remedy = f"move {merged} away to merge again (--fresh would also train again)"
        if state.finished("merge", inputs, fresh_remedy=remedy):
            show.note(f"{stage_step}: merge kept, finished {state.record('merge').finished_at}")
            return merged
        for old in archive(merged, places=(experiment.adapter_folder(stage_step), folder)):
            show.note(f"{stage_step}: the earlier merge is now {old}")
        state.begin("merge", inputs)
        with state.failures_of("merge"):
            if base:
                base.ensure(show)
            seconds = _run_merge(stage_step, recipe_path, recipe, merged, folder / "merge.log", complete, show)
        state.finish("merge", [merged / "config.json"], seconds)
    show.note(f"{stage_step}: merged in {duration(seconds)}")
    return merged


def trained_rows(log: Path) -> int | None:
    """Return on how many rows a training's log says that LLaMA-Factory trained, None where it does not say it."""
    found, training = None, False
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            for text in lines:
                if "***** Running " in text:
                    training = "Running training" in text
                elif training and (told := _ROWS.search(text)):
                    found = int(told[1].replace(",", ""))
    except OSError:
        return None
    return found


def _merge_inputs(recipe_path: Path, recipe: dict[str, Any], base: DequantisedBase | None) -> dict[str, Any]:
    """Return what a merge depends on; of a dequantised copy its source, so that the copy itself may be deleted."""
    if base is None:
        return inputs_of(recipe_path, recipe)
    return {**inputs_of(recipe_path, recipe, without=("model_name_or_path",)), "dequantised": base.source()}


def _require_start(experiment: Experiment, stage_step: str) -> None:
    """Raise ArenaError where nothing was exported or the merged judge to start from is missing: the child tells it
    late, and takes the missing folder for a misspelt name on the hub."""
    if not (experiment.data_folder / "dataset_info.json").is_file():
        raise ArenaError(
            "there is no exported data",
            where=str(experiment.data_folder),
            remedy=f"python run.py prepare -e {experiment.name} --train FILE",
        )
    if (experiment.data_folder / MANIFEST).is_file():  # else somebody else's data sets
        sets = [f"{STEPS[stage_step].data}_{split}" for split in SPLITS[:2]]
        require_intact(experiment.data_folder, [*sets, *(f"{name}.jsonl" for name in sets)])
        require_own_settings(experiment, stage_step)
        require_own_votes(experiment, stage_step, trained=False)
    start = experiment.start_model(stage_step)
    if start != experiment.model and not (Path(start) / "config.json").is_file():
        raise ArenaError(
            f"{stage_step} starts from the merged SFT judge, which is not there",
            where=start,
            remedy=f"python run.py sft -e {experiment.name} --until merge; or start_from: {{{stage_step}: base}} in "
            "experiment.yaml, then prepare again",
        )


def _put_aside(show: Show, *paths: Path, places: tuple[Path, ...]) -> None:
    for old in archive(*paths, places=places):
        show.note(f"the earlier run is now {old}")


def _start(
    state: StageState,
    inputs: dict[str, Any],
    recipe: dict[str, Any],
    adapter: Path,
    folder: Path,
    resume: bool,
    show: Show,
) -> _Start:
    """Decide whether a training that is not finished starts anew or goes on; archive or refuse what is in the way."""
    if not is_occupied(adapter):
        if resume:
            show.note(f"nothing to resume in {adapter}: training starts at the beginning")
        return _Start()
    checkpoint = last_checkpoint(adapter)
    if not resume:
        has = f"its last whole checkpoint is {checkpoint.name}" if checkpoint else "it has no whole checkpoint"
        raise ArenaError(
            f"an unfinished run, or one that `run.py` did not start, lies here; {has}",
            where=str(adapter),
            remedy=("--resume goes on from it; " if flag_to_go_on(adapter, recipe.get("stage")) == "--resume" else "")
            + "--fresh archives that run and begins anew",
        )
    if checkpoint is None:
        show.note(f"{adapter} holds no whole checkpoint: training starts at the beginning")
        _put_aside(show, adapter, places=(adapter, folder))
        return _Start()
    if recipe.get("stage") == "rm":
        raise ArenaError(
            "LLaMA-Factory 0.9.5 cannot resume a reward model (its value head is not read back)",
            where=str(checkpoint),
            remedy="--fresh archives that run and begins anew",
        )
    if state.record("train") is None:
        show.note(f"`run.py` did not start the run in {adapter}: whether its inputs were the same is unknown")
    state.refuse_changes("train", inputs, fresh_remedy="--fresh archives that run and begins anew")
    for later in checkpoints(adapter):
        if later == checkpoint:
            break
        show.note(f"{later} is not whole (a kill or a full disk while it was saved): passed over")
    show.note(f"going on from {checkpoint}")
    return _Start(checkpoint)


def _train_along(
    stage_step: str, recipe_path: Path, adapter: Path, folder: Path, launch: Launch, resume: bool, show: Show
) -> None:
    """Train as another node than the first, which keeps state, log and adapter; here only a log of our own."""
    checkpoint = last_checkpoint(adapter) if resume else None  # on a disk that the nodes share
    options = [*launch.options, *([f"resume_from_checkpoint={checkpoint}"] if checkpoint else [])]
    log = folder / f"train.node-{launch.node}.log"
    with show.line(f"{stage_step}, node {launch.node}") as line:
        line.update("starting LLaMA-Factory")
        command = llamafactory("train", str(recipe_path), *options)
        what = f"training {stage_step} on node {launch.node}"
        seconds = run_child(command, log, what=what, on_line=_Reader(line, None, show), environment=launch.environment)
    show.note(f"{stage_step}: node {launch.node} trained along in {duration(seconds)}; node 0 goes on")


def _run_training(
    stage_step: str,
    recipe_path: Path,
    rows: _Rows,
    adapter: Path,
    log: Path,
    start: _Start,
    launch: Launch,
    show: Show,
) -> float:
    # Named, for LLaMA-Factory itself would also take a checkpoint that was only half written.
    options = [*launch.options, *([f"resume_from_checkpoint={start.checkpoint}"] if start.checkpoint else [])]
    if rows.expected is None:
        show.note(f"{stage_step}: this recipe leaves open how many rows are trained, so they are not compared")
    with show.line(stage_step) as line:
        line.update("starting LLaMA-Factory")
        command = llamafactory("train", str(recipe_path), *options)
        what = f"training {stage_step}"
        seconds = run_child(
            command,
            log,
            what=what,
            on_line=_Reader(line, rows.read, show),
            on_look=_points_checked(adapter, show_points(line, start.step)),
            interrupted_remedy=lambda: _way_on(adapter, stage_step, recipe_path.parent.name),
            environment=launch.environment,
        )
    _require(adapter, _ADAPTER_FILES, log, f"training {stage_step}")
    rows.require_seen(log)
    _require_finite(adapter, log)
    return seconds


def _way_on(adapter: Path, stage_step: str, name: str) -> str:
    """Say how an interrupted training goes on: that depends on what it had saved."""
    step, checkpoint = STEPS[stage_step], last_checkpoint(adapter)
    flag = flag_to_go_on(adapter, step.stage)
    if flag == "--resume":  # the whole call: `demo`, too, was a training, and has no --resume
        return f"go on from {checkpoint.name}: python run.py {step.command} -e {name} --resume"
    if checkpoint:
        return "LLaMA-Factory 0.9.5 cannot resume a reward model: begin anew with --fresh"
    when = "no checkpoint was saved so far (save_strategy and save_steps in the recipe say when one is)"
    return f"{when}: begin anew with {flag or 'the same command'}"


def _run_merge(
    stage_step: str,
    recipe_path: Path,
    recipe: dict[str, Any],
    merged: Path,
    log: Path,
    complete: Callable[[Path], None] | None,
    show: Show,
) -> float:
    with atomic_folder(merged) as temporary, show.line(stage_step) as line:
        line.update("starting LLaMA-Factory")
        command = llamafactory("export", str(recipe_path), f"export_dir={temporary}")
        what, again = f"merging {stage_step}", f"start {same_command()} again; the training is kept"
        progress = MergeProgress(line, recipe, temporary)
        seconds = run_child(
            command,
            log,
            what=what,
            on_line=_Reader(line, progress.read, show),
            on_look=progress.look,
            interrupted_remedy=again,
        )
        _require(temporary, ("config.json", "tokenizer_config.json", *_head(recipe)), log, what)
        if not any(temporary.glob("*.safetensors")):
            raise _without("any weights (*.safetensors)", temporary, log, what)
        if complete:
            complete(temporary)
    return seconds


class _Reader:
    """Reads the child's output as it comes: phases for the live line, everything for a verbose user."""

    def __init__(self, line: Line, then: Callable[[str], None] | None, show: Show):
        self._line, self._then, self._show = line, then, show
        self._phases = _PHASES

    def __call__(self, text: str) -> None:
        if self._show.verbose and text.strip():
            self._show.note(text)
        phase = next((name for pattern, name in self._phases if pattern.search(text)), None)
        if phase:
            self._line.update(phase)
        if phase == "training":  # from now on a file that is loaded is no model
            self._phases = _PHASES_OF_TRAINING
        if self._then:
            self._then(text)


class _Rows:
    """Compares the rows that the child says it trains on with those that were exported, before any time is spent."""

    def __init__(self, expected: int | None, recipe_path: Path, begins: Callable[[], None]):
        """Take the number of exported rows, None for any; `begins` is called when all inputs were read."""
        self.expected, self._recipe_path, self._begins = expected, recipe_path, begins
        self._training, self._seen = False, False

    def read(self, text: str) -> None:
        """Take one line of the log; raises ArenaError if it tells another number of rows."""
        if "***** Running " in text:
            self._training = "Running training" in text
            if self._training:
                self._begins()
        told = _ROWS.search(text)
        if not (told and self._training) or self.expected is None:
            return
        self._seen, trained = True, int(told[1].replace(",", ""))
        if trained != self.expected:
            raise ArenaError(
                f"LLaMA-Factory trains on {trained:,} rows, but {self.expected:,} were exported: it drops rows that it "
                "cannot read with no more than a warning",
                where=str(self._recipe_path),
                remedy="run `run.py prepare` again; look for 'Dropped' in the log, and at `max_samples` and "
                "`tokenized_path` in the recipe",
            )

    def require_seen(self, log: Path) -> None:
        """Raise ArenaError if a number was expected and never told."""
        if self.expected is not None and not self._seen:
            raise ArenaError(
                "the log does not say on how many rows LLaMA-Factory trained, so that dropped rows would go unnoticed",
                where=str(log),
                remedy="remove `log_level` from the recipe, then --fresh",
            )


def _refuse_new_inputs(state: StageState, recipe_path: Path, launch: Launch) -> None:
    """Raise ArenaError where recipe or data changed between our look at them and the child's."""
    now = {**inputs_of(recipe_path, read_yaml(recipe_path)), **launch.inputs}
    state.refuse_changes("train", now, fresh_remedy="start again with --fresh")


def _points_checked(adapter: Path, show_point: Callable[[LogPoint], None]) -> Callable[[], None]:
    """Return a callback that shows the points a training has logged since the last call; raises ArenaError for NaN."""
    log = TrainerLog(adapter / "trainer_log.jsonl", skip_existing=True)

    def look() -> None:
        for point in log.read_new():
            if not point.finite:
                raise _not_finite(f"the loss is NaN or infinite at step {point.step}", adapter)
            show_point(point)

    return look


def _require_finite(adapter: Path, log: Path) -> None:
    """Raise ArenaError if a loss or a trained weight is not finite; the trainer hides a NaN loss from its own log."""
    try:
        history = read_json(adapter / "trainer_state.json")["log_history"]
    except (OSError, ValueError, KeyError) as error:
        raise ArenaError(f"cannot read the losses: {error}", where=str(adapter / "trainer_state.json")) from None
    for entry in history:
        values = [v for k, v in entry.items() if k in ("loss", "eval_loss", "train_loss") and isinstance(v, float)]
        if not all(math.isfinite(value) for value in values):
            raise _not_finite(f"the loss is NaN or infinite at step {entry.get('step')}", log)
    import torch
    from safetensors import SafetensorError, safe_open

    path = adapter / _ADAPTER_FILES[1]
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


def _require_adapter(adapter: Path, stage_step: str) -> None:
    missing = [name for name in _ADAPTER_FILES if not (adapter / name).is_file()]
    if missing:
        raise ArenaError(
            f"there is no finished adapter to merge: {', '.join(missing)} missing",
            where=str(adapter),
            remedy=f"train {stage_step} first (`--until train`), or go on with it by --resume",
        )


def _require(folder: Path, files: tuple[str, ...], log: Path, what: str) -> None:
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise _without(", ".join(missing), folder, log, what)


def _without(missing: str, folder: Path, log: Path, what: str) -> ArenaError:
    return ArenaError(
        f"{what} ended without an error, but did not write {missing}",
        where=str(folder),
        remedy=f"read the end of {log}, then --fresh",
    )


def _head(recipe: dict[str, Any]) -> tuple[str, ...]:
    return (_VALUE_HEAD,) if recipe.get("stage") == "rm" else ()


def _summary(adapter: Path) -> str:
    """Return first and last loss for the closing line, nothing if none was logged."""
    curve = loss_curve(adapter / "trainer_log.jsonl")
    losses = [row["loss"] for row in curve if row["loss"] is not None]
    judged = [row["eval_loss"] for row in curve if row["eval_loss"] is not None]
    parts = [f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"] if losses else []
    parts += [f"validation loss {judged[-1]:.4f}"] if judged else []
    return "".join(f", {part}" for part in parts)
