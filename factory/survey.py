"""A survey: every experiment, how far each of its stages is, and the command that goes on from there.

Reads files only and takes no lock, so that it may look on while runs are at work.
"""

from __future__ import annotations

import shlex
import socket
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import ArenaError, UsageError
from data_prep.files import read_json
from factory.experiment import Experiment, load_experiment, require_project
from factory.outdated import outdated_files
from factory.progress import TrainerLog
from factory.state import StageState, flag_to_go_on
from factory.step import STEPS, TRAININGS

if TYPE_CHECKING:
    from rich.console import Console

# What a part is called while it runs, when it was left in the middle, and when it is done.
_RUNNING = {"train": "training", "merge": "merging", "score": "scoring"}
_DONE = {"train": "trained", "merge": "merged", "score": "scored"}
INTERRUPTED = "interrupted"
OUTDATED = "outdated"
# The order in which the methods are worth a try; docs/methods.md has the figures behind it.
_WORTH_TRYING = ("sft", "dpo_reward", "rm", "dpo_judge")


@dataclass(frozen=True)
class StageView:
    """How far one stage is.

    `state`: new, training, merging, scoring, interrupted, trained, merged, scored, or
    outdated: made from another export than today's. `beats_prior` is what its report says, None where there is none.
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
class ExperimentView:
    """One folder of factory_configs; `fault` says why its experiment.yaml cannot be read."""

    name: str
    description: str = ""
    model: str = ""
    prepared: bool = False
    battles: int | None = None
    stages: list[StageView] = field(default_factory=list)
    fault: str | None = None
    next: str = ""

    @property
    def untouched(self) -> bool:
        """Whether nothing was done with it yet."""
        return not (self.prepared or self.fault) and all(stage.state == "new" for stage in self.stages)


def experiment_names(root: Path = Path()) -> list[str]:
    """Return the experiments of a checkout, sorted; raises UsageError outside of one."""
    require_project(root)
    return sorted(path.parent.name for path in (root / "factory_configs").glob("*/experiment.yaml"))


def survey(names: list[str]) -> list[ExperimentView]:
    """Return a view of each experiment; a faulty one has its fault in its place and does not hide the others."""
    return [_experiment_view(name) for name in names]


def stage_named(experiment: Experiment, name: str) -> str:
    """Return the stage that a name means: `dpo` is that one of DPO's two views on which a training began.

    Raises UsageError, which names both, where that was none of them or both.
    """
    if name in TRAININGS:
        return name
    views = [stage for stage in TRAININGS if STEPS[stage].stage == name]
    begun = [stage for stage in views if stage_view(experiment, stage).state != "new"]
    if len(begun) == 1:
        return begun[0]
    if not begun:
        calls = " or ".join(
            f"python run.py {STEPS[stage].asked_by} -e {shlex.quote(experiment.name)}" for stage in views
        )
        raise UsageError(f"neither {' nor '.join(views)} was trained", where=f"--stage {name}", remedy=calls)
    remedy = f"say which: {' or '.join(f'--stage {stage}' for stage in views)}"
    raise UsageError(f"{' and '.join(views)} were both trained", where=f"--stage {name}", remedy=remedy)


def running_stages(experiment: Experiment) -> list[str]:
    """Return the stages of an experiment on which a run is at work on this machine."""
    return [stage for stage in TRAININGS if is_at_work(experiment.output_folder(stage))]


def refuse_while_at_work(experiment: Experiment) -> None:
    """Raise ArenaError while a stage runs on this machine: it reads the export until its report is written."""
    if running := running_stages(experiment):
        raise ArenaError(
            f"{' and '.join(running)} of this experiment is at work, and reads the export until its report is written",
            where=str(experiment.data_folder),
            remedy="wait for it or end it; or prepare these votes for another experiment (run.py new)",
        )


def is_at_work(folder: Path) -> bool:
    """Tell whether a living process of this machine holds a stage's lock, by what the lock's owner wrote into it.

    The lock itself is not tried: a try would hold it for a moment, and a run that starts then would be refused.
    """
    import psutil

    try:
        owner = read_json(folder.with_name(f".{folder.name}.lock"))
        if owner["host"] != socket.gethostname():
            return False
        begun = psutil.Process(int(owner["pid"])).create_time()
        # A number that the system gave to another process since then belongs to a younger one.
        return begun <= datetime.fromisoformat(owner["started_at"]).timestamp() + 1
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


def _experiment_view(name: str) -> ExperimentView:
    try:
        experiment = load_experiment(name)
    except ArenaError as error:
        return ExperimentView(name, fault=str(error))
    return experiment_view(experiment)


def experiment_view(experiment: Experiment) -> ExperimentView:
    """Return how far an experiment is, with all its stages."""
    name = experiment.name
    prepared = (experiment.data_folder / "manifest.json").is_file()
    stages = [stage_view(experiment, stage, prepared) for stage in TRAININGS]
    prepare = "" if prepared else f"python run.py prepare -e {shlex.quote(name)} --train FILE"
    if not prepared and name == "demo":
        prepare = "python run.py demo"
    return ExperimentView(
        name, experiment.description, experiment.model, prepared, _battles(experiment), stages, next=prepare
    )


def stage_view(experiment: Experiment, stage: str, prepared: bool = True) -> StageView:
    """Return how far a stage is; what state.json holds rules, and an adapter without one was trained by hand."""
    folder, adapter = experiment.output_folder(stage), experiment.adapter_folder(stage)
    call = f"python run.py {STEPS[stage].asked_by} -e {shlex.quote(experiment.name)}"
    at_work = is_at_work(folder)
    try:
        state = StageState(folder)
    except ArenaError as error:
        return StageView(stage, "unreadable", detail=str(error).splitlines()[0], next=f"{call} --fresh")
    parts = {part: record for part in _DONE if (record := state.record(part))}
    if not parts:
        return _without_state(stage, adapter, call, at_work, prepared)
    part, record = list(parts.items())[-1]
    step, steps = _steps(adapter)
    if at_work:
        detail = f"step {step}/{steps}" if part == "train" and step else ""
        return StageView(stage, _RUNNING[part], detail, step, steps, next=_watching(experiment, stage))
    if record.finished_at is None:
        earlier = "" if part == "train" else f"; {_DONE[list(parts)[-2]]}" if len(parts) > 1 else ""
        where = f" at step {step}/{steps}" if part == "train" and step else ""
        flag = flag_to_go_on(adapter, STEPS[stage].stage) if part == "train" else ""
        return StageView(
            stage, INTERRUPTED, f"{_RUNNING[part]}{where}{earlier}", step, steps, next=f"{call} {flag}".rstrip()
        )
    if record.missing:
        return StageView(stage, INTERRUPTED, f"gone: {', '.join(record.missing)}", step, steps, next=call)
    if others := _made_from_others(experiment, stage):
        detail = f"{_DONE[part]} on {_day(record.finished_at)}, from another export than {experiment.data_folder}"
        return StageView(stage, OUTDATED, detail, step, steps, next=f"python run.py {others} --fresh")
    if part != "score":
        return StageView(stage, _DONE[part], f"on {_day(record.finished_at)}", step, steps, next=call)
    return _scored(experiment, stage, record.finished_at, step, steps)


def _made_from_others(experiment: Experiment, stage: str) -> str | None:
    """Return the command that makes a stage anew from today's export, None where it is up to date."""
    name = shlex.quote(experiment.name)
    try:
        if outdated_files(experiment, stage, ("train",)):
            return f"{STEPS[stage].asked_by} -e {name}"
        return f"score -e {name} --stage {stage}" if outdated_files(experiment, stage, ("score",)) else None
    except ArenaError:  # nothing is exported, or not by this version: another line tells it
        return None


def _without_state(stage: str, adapter: Path, call: str, at_work: bool, prepared: bool) -> StageView:
    step, steps = _steps(adapter)
    if at_work:
        return StageView(stage, "training", "starting", step, steps)
    if (adapter / "adapter_model.safetensors").is_file():
        return StageView(stage, "trained", f"not by run.py: {adapter}", step, steps, next=f"{call} --fresh")
    return StageView(stage, "new", next=call if prepared else "")


def _scored(experiment: Experiment, stage: str, finished_at: str, step: int | None, steps: int | None) -> StageView:
    report = experiment.output_folder(stage) / "report.json"
    name = shlex.quote(experiment.name)
    try:
        content = read_json(report)
        loss, prior = float(content["log_loss"]), float(content["baselines"]["prior"])
        beats = bool(content.get("beats_prior", loss < prior))
    except (OSError, ValueError, KeyError, TypeError):
        again = f"python run.py score -e {name} --stage {stage} --fresh"
        return StageView(stage, INTERRUPTED, f"{report} is unreadable", next=again)
    return StageView(
        stage,
        "scored",
        f"on {_day(finished_at)}",
        step,
        steps,
        loss,
        prior,
        beats,
        report.with_suffix(".html").as_posix(),
        next=f"python run.py compare -e {name}",
    )


def _watching(experiment: Experiment, stage: str) -> str:
    return f"python run.py watch -e {shlex.quote(experiment.name)} --stage {stage}"


def _steps(adapter: Path) -> tuple[int | None, int | None]:
    points = TrainerLog(adapter / "trainer_log.jsonl").read_new()
    return (points[-1].step, points[-1].total) if points else (None, None)


def _battles(experiment: Experiment) -> int | None:
    try:
        audit = read_json(experiment.data_folder / "audit.json")
        return int(audit["sources"]["train"]["rows_kept"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _day(moment: str) -> str:
    return moment[:16].replace("T", " ")


def print_survey(console: Console, views: list[ExperimentView]) -> None:
    """Print one table: every experiment, its stages that began, and what to do next.

    Of several experiments those that nothing was done with share one line, so that the others are seen.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(min_width=72)
    for heading, justify in (("experiment", "left"), ("stage", "left"), ("state", "left"), ("log loss", "right")):
        table.add_column(heading, justify=justify, no_wrap=heading != "state")
    table.add_column("prior", justify="right", no_wrap=True)
    untouched = [view for view in views if view.untouched]
    folded = untouched if len(untouched) > 1 else []
    shown = [view for view in views if view not in folded]
    for view in shown:
        rows = _table_rows(view)
        for number, (cells, style) in enumerate(rows):
            # Text, for a fault may hold brackets that rich would take for its own markup.
            table.add_row(
                *(Text(cell) for cell in (view.name if number == 0 else "", *cells)),
                style=style,
                end_section=number == len(rows) - 1,
            )
    if shown:
        console.print(table)
    if folded:
        more = f"{len(folded)} {'more ' if shown else ''}experiments"
        console.print(Text(f"{more}, nothing done yet: {', '.join(view.name for view in folded)}"), soft_wrap=True)
    commands = [command for view in shown for command in next_commands(view)] or _first_commands(folded)
    for command in dict.fromkeys(commands):
        console.print(Text(f"next: {command}"), soft_wrap=True)


def _table_rows(view: ExperimentView) -> list[tuple[tuple[str, str, str, str], str | None]]:
    if view.fault:
        return [(("", f"faulty: {view.fault}", "", ""), "red")]
    known = f", {view.battles:,} battles" if view.battles is not None else ""
    rows: list[tuple[tuple[str, str, str, str], str | None]] = [
        (("", f"prepared{known}" if view.prepared else "not prepared", "", ""), None)
    ]
    for stage in view.stages:
        if stage.state == "new":
            continue
        loss = "" if stage.log_loss is None else f"{stage.log_loss:.4f}"
        prior = "" if stage.prior is None else f"{stage.prior:.4f}"
        flag = ", not better than the prior" if stage.beats_prior is False else ""
        state = f"{stage.state} {stage.detail}".rstrip() + flag
        rows.append(((stage.stage, state, loss, prior), _style(stage)))
    return rows


def _style(stage: StageView) -> str | None:
    if stage.beats_prior is not None:
        return "green" if stage.beats_prior else "red"
    return {INTERRUPTED: "yellow", OUTDATED: "yellow", "unreadable": "red", "training": "cyan"}.get(stage.state)


def next_commands(view: ExperimentView) -> list[str]:
    """Return what to run next: the first step, what unfinished stages need, another method, or the comparison."""
    if view.next:
        return [view.next]
    begun = [stage.next for stage in view.stages if stage.state not in ("new", "scored") and stage.next]
    scored = [stage.next for stage in view.stages if stage.state == "scored"]
    if begun or len(scored) > 1:
        return begun or scored[-1:]
    new = {stage.stage: stage.next for stage in view.stages if stage.state == "new"}
    why = "   (another method on the same votes)" if scored else ""
    return [f"{new[name]}{why}" for name in _WORTH_TRYING if name in new][:1]


def _first_commands(untouched: list[ExperimentView]) -> list[str]:
    """Return how to begin where nothing was done: the demo, and votes of one's own."""
    own = "python run.py prepare -e EXP --train FILE   (votes of your own; EXP is one of these)"
    demo = [view.next for view in untouched if view.name == "demo"]
    return [*demo, own] if untouched else []
