"""How far every experiment and each of its stages is, and the command that goes on from there.

Reads files only and takes no lock, so that it may look on while runs are at work.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.console import printable
from common.errors import ArenaError, UsageError, first_line
from common.experiment import Experiment, load_experiment, require_project
from common.files import read_json
from common.stages import STAGES, TRAININGS
from factory.devices import may_have_gpu
from factory.stage_context import StageContext, prepare_again, some
from factory.state import PARTS, flag_to_go_on
from factory.trainer_log import TrainerLog
from factory.workload import time_on_cpu

# What a part is called while it runs and when it is done.
_RUNNING = {"train": "training", "merge": "merging", "score": "scoring"}
_DONE = {"train": "trained", "merge": "merged", "score": "scored"}
INTERRUPTED, FAILED, OUTDATED = "interrupted", "failed", "outdated"
_STYLES = {INTERRUPTED: "yellow", OUTDATED: "yellow", FAILED: "red", "unreadable": "red"}
# The order in which the methods are worth a try; docs/methods.md has the figures.
_WORTH_TRYING = ("sft", "dpo_reward", "rm", "dpo_judge")


@dataclass(frozen=True)
class StageStatus:
    """How far one stage is.

    `state`: new, training, merging, scoring, interrupted, failed, trained, merged, scored, unreadable, or outdated:
    made from another export or recipe than today's. `beats_prior` is what its report says; `next` is the command that
    goes on.
    """

    stage: str
    state: str
    detail: str = ""
    step: int | None = None
    steps: int | None = None
    log_loss: float | None = None
    prior: float | None = None
    beats_prior: bool | None = None
    report: str | None = None
    next: str = ""


@dataclass(frozen=True)
class ExperimentStatus:
    """One folder of factory_configs; `fault` says why its experiment.yaml cannot be read.

    `changed` lists the settings that the exported rows depend on and that changed since `prepare`.
    """

    name: str
    description: str = ""
    model: str = ""
    prepared: bool = False
    battles: int | None = None
    stages: list[StageStatus] = field(default_factory=list)
    fault: str | None = None
    next: str = ""
    folds: int = 1
    changed: list[str] = field(default_factory=list)

    @property
    def untouched(self) -> bool:
        """Whether nothing was done with it yet."""
        return not (self.prepared or self.fault) and all(stage.state == "new" for stage in self.stages)


def experiment_names() -> list[str]:
    """Return the experiments of a checkout, sorted; raises UsageError outside of one."""
    require_project()
    return sorted(path.parent.name for path in Path("factory_configs").glob("*/experiment.yaml"))


def status_of(names: Sequence[str]) -> list[ExperimentStatus]:
    """Return the status of each experiment; a faulty one has its fault in its place and does not hide the others."""
    found = []
    for name in names:
        try:
            found.append(experiment_status(StageContext(load_experiment(name), "sft")))
        except ArenaError as error:
            found.append(ExperimentStatus(name, fault=str(error)))
    return found


def stage_named(experiment: Experiment, name: str) -> str:
    """Return the stage that a name means: `dpo` is that one of DPO's two views on which a training began.

    Raises UsageError, which names both, where that was none of them or both.
    """
    if name in STAGES:
        return name
    views = {stage: StageContext(experiment, stage) for stage in TRAININGS if STAGES[stage].stage == name}
    begun = [s for s, context in views.items() if any(stage_status(each).state != "new" for each in context.trainings)]
    if len(begun) == 1:
        return begun[0]
    if begun:
        what, calls = f"{' and '.join(views)} were both trained", [f"--stage {stage}" for stage in views]
    else:
        what, calls = f"neither {' nor '.join(views)} was trained", [context.command for context in views.values()]
    raise UsageError(what, where=f"--stage {name}", remedy=f"choose {' or '.join(calls)}")


def readable_experiments() -> tuple[list[Experiment], list[str]]:
    """Return the experiments of the current folder, and a sentence for each that cannot be read."""
    found, faults = [], []
    for name in experiment_names():
        try:
            found.append(load_experiment(name))
        except ArenaError as error:
            faults.append(f"experiment {name} is left out: {first_line(error)}")
    return found, faults


def running_stages(experiment: Experiment) -> list[str]:
    """Return the stages of an experiment, or their folds, on which a run is at work on this machine."""
    return [context.label for context, _ in _at_work(experiment)]


def _at_work(experiment: Experiment) -> Iterator[tuple[StageContext, psutil.Process]]:
    for stage in STAGES:
        context = StageContext(experiment, stage)
        for each in dict.fromkeys([context, *context.trainings]):
            if process := holder_of(each.folder):
                yield each, process


def beside_on_the_card(context: StageContext) -> list[str]:
    """Name the other runs at work here that can see a card which this process sees: all, without CUDA_VISIBLE_DEVICES.

    Where there is no card they share the processor.
    """
    own = set(filter(None, os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")))
    found = []
    for other, process in (each for experiment in readable_experiments()[0] for each in _at_work(experiment)):
        with suppress(psutil.Error):
            theirs = set(filter(None, process.environ().get("CUDA_VISIBLE_DEVICES", "").split(",")))
            if other.folder != context.folder and (not own or not theirs or own & theirs):
                found.append(f"{other.experiment.name} {other.label}")
    return found


def refuse_while_at_work(experiment: Experiment) -> None:
    """Raise ArenaError while a stage runs on this machine: it reads the export until its report is written."""
    if running := running_stages(experiment):
        raise ArenaError(
            f"{' and '.join(running)} of this experiment is running, and reads the export until its report is written",
            where=str(experiment.data_folder),
            remedy="wait for it or end it; or prepare these votes for another experiment (run.py new)",
        )


def holder_of(folder: Path) -> psutil.Process | None:
    """Return the living process of this machine that holds a stage's lock, by what it wrote into it.

    The lock itself is not tried: that would hold it for a moment, and refuse a run that starts then.
    """
    try:
        owner = read_json(folder.with_name(f".{folder.name}.lock"))
        process = psutil.Process(int(owner["pid"]))
        # A process number that the system gave away again belongs to a younger process.
        is_ours = process.create_time() <= datetime.fromisoformat(owner["started_at"]).timestamp() + 1
        return process if owner["host"] == socket.gethostname() and is_ours else None
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return None


def experiment_status(context: StageContext) -> ExperimentStatus:
    """Return how far the experiment of a stage is, with all its stages."""
    experiment, context = context.experiment, context.other("sft")
    name = experiment.name
    prepared = (experiment.data_folder / "manifest.json").is_file()
    stages = [each for stage in STAGES for each in _statuses(context.other(stage), prepared)]
    changed, following = _changed_settings(context), ""
    if not prepared:
        following = "python run.py demo" if name == "demo" else _prepare(name)
    elif changed and not running_stages(experiment):
        following = prepare_again(context.manifest, name)
    try:
        sources = read_json(experiment.data_folder / "audit.json")["sources"]
        battles = sum(int(source["rows_kept"]) for name, source in sources.items() if name != "test")
    except (OSError, ValueError, KeyError, TypeError):
        battles = None
    about = (name, experiment.description, experiment.model, prepared, battles, stages)
    return ExperimentStatus(*about, next=following, folds=experiment.folds, changed=changed)


def _statuses(context: StageContext, prepared: bool) -> list[StageStatus]:
    """Return how far a stage is, and each of its folds that began."""
    own = stage_status(context, prepared)
    folds = [stage_status(each, prepared) for each in context.trainings] if context.of_folds else []
    # What follows a scored fold is the stage's own matter.
    again = "" if own.state == "scored" else context.command
    return [own, *(replace(f, next=again) if f.state == "scored" else f for f in folds if f.state != "new")]


def stage_status(context: StageContext, prepared: bool = True) -> StageStatus:
    """Return how far a stage is; state.json decides, and an adapter without one was trained by hand."""
    points = TrainerLog(context.adapter / "trainer_log.jsonl").read_new()
    step, steps = (points[-1].step, points[-1].total) if points else (None, None)
    so_far = StageStatus(context.label, "new", step=step, steps=steps)
    try:
        parts = [part for part in PARTS if context.state.record(part)]
    except ArenaError as error:
        return StageStatus(context.label, "unreadable", first_line(error), next=f"{context.command} --fresh")
    by_hand = not parts and (context.adapter / "adapter_model.safetensors").is_file()
    if holder_of(context.folder):
        part = parts[-1] if parts else "train"
        detail = "starting" if not parts else f"step {step}/{steps}" if part == "train" and step else ""
        watch = f"python run.py watch -e {context.experiment.name} --stage {context.name}{context.fold_option}"
        return replace(so_far, state=_RUNNING[part], detail=detail, next=watch)
    if changed := _changed_settings(context):
        again = replace(so_far, next=prepare_again(context.manifest, context.experiment.name))
        detail = f"experiment.yaml changed since prepare: {some(changed)}"
        return replace(again, state=OUTDATED, detail=detail) if parts or by_hand else again
    if parts:
        return _as_left(context, parts, so_far)
    if by_hand:
        detail = f"not by run.py: {context.adapter}"
        return replace(so_far, state="trained", detail=detail, next=f"{context.command} --fresh")
    return StageStatus(context.label, "new", next=context.command if prepared else "")


def _as_left(context: StageContext, parts: list[str], so_far: StageStatus) -> StageStatus:
    """Return the status of a stage that began and on which no run is at work, its settings as they were exported."""
    part, record = parts[-1], context.state.record(parts[-1])
    flag = flag_to_go_on(context.adapter, context.step.stage) if part == "train" else ""
    why, again = _outdated(context, parts) or ("", f"{context.command} {flag}".rstrip())
    if record.finished_at is None or record.missing:
        where = f" at step {so_far.step}/{so_far.steps}" if part == "train" and so_far.step else ""
        failed = f": {record.failed} ({context.folder / part}.log)" if record.failed else ""
        detail = f"gone: {', '.join(record.missing)}" if record.missing else f"{_RUNNING[part]}{where}{failed}"
        detail += f"; {why}" if why else ""
        return replace(so_far, state=FAILED if record.failed else INTERRUPTED, detail=detail, next=again)
    when = f"on {record.finished_at[:16].replace('T', ' ')}"
    if why:
        return replace(so_far, state=OUTDATED, detail=f"{_DONE[part]} {when}, {why}", next=again)
    found = replace(so_far, state=_DONE[part], detail=when, next=context.command)
    return _scored(context, found) if part == "score" and context.scores("valid") else found


def _outdated(context: StageContext, parts: list[str]) -> tuple[str, str] | None:
    """Return why a stage is outdated and the command that makes it again, None where it is up to date."""
    for part in parts:
        try:
            standing = context.glance(part)
        except ArenaError:  # nothing is exported, or a recipe is missing: the next command says so
            continue
        if changes := standing.changes:
            remedies = {
                "train": f"{context.command} --fresh",
                "merge": f"{context.command}   (after moving {context.merged} away)",
                "score": context.report_again(standing.only_prior_changed),
            }
            elsewhere = any(line.startswith("data: ") for line in changes)
            export = f"from another export than {context.experiment.data_folder}"
            return export if elsewhere else f"since then changed: {some(list(changes))}", remedies[part]
    return None


def _scored(context: StageContext, found: StageStatus) -> StageStatus:
    report = context.folder / "report.json"
    try:
        content = read_json(report)
        loss, prior = float(content["log_loss"]), float(content["baselines"]["prior"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return StageStatus(context.label, INTERRUPTED, f"{report} is unreadable", next=context.report_again())
    return replace(
        found,
        log_loss=loss,
        prior=prior,
        beats_prior=bool(content.get("beats_prior", loss < prior)),
        report=report.with_suffix(".html").as_posix(),
        next=f"python run.py compare -e {context.experiment.name}",
    )


def _changed_settings(context: StageContext) -> list[str]:
    try:
        return context.changed_settings()
    except ArenaError:  # nothing is exported
        return []


def _prepare(name: str) -> str:
    return f"python run.py prepare -e {name} --train FILE"


def print_status(console: Console, found: list[ExperimentStatus]) -> None:
    """Print one table: every experiment, its stages that began, and what to do next.

    Of several experiments those that nothing was done with share one line, so that the others are seen.
    """
    untouched = [each for each in found if each.untouched]
    folded = untouched if len(untouched) > 1 else []
    shown = [each for each in found if each not in folded]
    table = Table(min_width=72)
    for heading in ("experiment", "stage", "state", "log loss", "prior"):
        number = heading in ("log loss", "prior")
        table.add_column(heading, justify="right" if number else "left", no_wrap=heading != "state")
    for each in shown:
        _add_rows(table, each)
    if shown:
        console.print(table)
    if folded:
        more = f"{len(folded)} {'more ' if shown else ''}experiments"
        console.print(Text(f"{more}, nothing done yet: {', '.join(each.name for each in folded)}"), soft_wrap=True)
    commands = [command for each in shown for command in next_commands(each)]
    if not commands and folded:
        own = f"{_prepare('EXP')}   (votes of your own; EXP is one of these)"
        commands = [*(each.next for each in folded if each.name == "demo"), own]
    for command in dict.fromkeys(commands):
        console.print(Text(f"next: {command}"), soft_wrap=True)


def archived_lines(found: Mapping[Path, int]) -> list[str]:
    """Return a line for each run that was put aside, the largest last but one, and how much disk all of them take."""
    lines = [
        printable(f"{size / 1e6:10,.1f} MB  {path}") for path, size in sorted(found.items(), key=lambda each: each[1])
    ]
    total = f"earlier runs: {len(found)}, {sum(found.values()) / 1e6:,.1f} MB; python run.py clean deletes them"
    return [*lines, total] if found else []


def _add_rows(table: Table, found: ExperimentStatus) -> None:
    known = f", {found.battles:,} battles" if found.battles is not None else ""
    changed = f"; experiment.yaml changed since: {some(found.changed)}" if found.changed else ""
    state = f"prepared{known}{changed}" if found.prepared else "not prepared"
    # Text, for a fault may hold brackets that rich would take for its own markup.
    first = Text(f"faulty: {found.fault}" if found.fault else state)
    table.add_row(Text(found.name), "", first, style="red" if found.fault else "yellow" if changed else None)
    for stage in found.stages:
        if stage.state == "new":
            continue
        losses = ("" if value is None else f"{value:.4f}" for value in (stage.log_loss, stage.prior))
        flag = ", not better than the prior" if stage.beats_prior is False else ""
        style = {True: "green", False: "red"}.get(stage.beats_prior, _STYLES.get(stage.state))
        table.add_row("", stage.stage, Text(f"{stage.state} {stage.detail}".rstrip() + flag), *losses, style=style)
    table.add_section()


def next_commands(found: ExperimentStatus) -> list[str]:
    """Return what to run next: the first step, what unfinished stages need, another method, or the comparison."""
    if found.next:
        return [found.next]
    begun = [stage.next for stage in found.stages if stage.state not in ("new", "scored") and stage.next]
    scored = [stage for stage in found.stages if stage.state == "scored" and stage.stage in STAGES]
    if begun or len(scored) > 1:
        return begun or [scored[-1].next]
    trained = [stage for stage in scored if stage.stage in TRAININGS]
    if trained and trained[0].beats_prior is False:  # another method would fail for the same reason
        base = "another base: python run.py new EXP --model ID"
        return [f"{_prepare(found.name)}   (with more votes or a larger cutoff_len; or {base})"]
    new = {stage.stage: stage.next for stage in found.stages if stage.state == "new"}
    first, why = next((name for name in _WORTH_TRYING if name in new), None), ""
    takes = "" if trained or may_have_gpu() else time_on_cpu(found.model)
    if trained:
        why = "another method on the same votes: docs/methods.md"
    elif takes == "hours" and "probe" in new and found.folds == 1:
        first, why = "probe", "no GPU here: this reads each battle once, a training takes hours"
    elif takes == "hours":
        why = f"hours, for no GPU is here: python run.py forecast -e {found.name} --card cpu"
    elif takes == "days":
        why = "days, for no GPU is here; made for a CPU: -e smollm2-135m, see README.md"
    return [f"{new[first]}{f'   ({why})' if why else ''}"] if first else []
