"""How far every experiment and each of its stages is, and the command that goes on from there.

Reads files only and takes no lock, so that it may look on while runs are at work.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path

import psutil
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.errors import ArenaError, UsageError
from common.experiment import Experiment, load_experiment, require_project
from common.files import read_json
from common.stages import STEPS, TRAININGS, merge_of
from factory.recipe_checks import OLDER, check_recipe
from factory.stage_context import StageContext, prepare_again, some
from factory.state import PARTS, Standing, flag_to_go_on
from factory.trainer_log import TrainerLog

# What a part is called while it runs and when it is done.
_RUNNING = {"train": "training", "merge": "merging", "score": "scoring"}
_DONE = {"train": "trained", "merge": "merged", "score": "scored"}
INTERRUPTED, FAILED, OUTDATED = "interrupted", "failed", "outdated"
_STYLES = {INTERRUPTED: "yellow", OUTDATED: "yellow", FAILED: "red", "unreadable": "red", "training": "cyan"}
# The order in which the methods are worth a try; docs/methods.md has the figures behind it.
_WORTH_TRYING = ("sft", "dpo_reward", "rm", "dpo_judge")
_MOSTLY_CUT = 0.5  # of the battles; from here on what was cut away is the first suspect


@dataclass(frozen=True)
class StageStatus:
    """How far one stage is.

    `state`: new, training, merging, scoring, interrupted, failed, trained, merged, scored, unreadable, or outdated:
    made from another export or recipe than today's. `beats_prior` and `cut_share` (of battles that were shortened) are
    what its report says. `next` is a command, or "fix FILE: …" where run.py would refuse every command.
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
    cut_share: float | None = None


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
    changed: list[str] = field(default_factory=list)

    @property
    def untouched(self) -> bool:
        """Whether nothing was done with it yet."""
        return not (self.prepared or self.fault) and all(stage.state == "new" for stage in self.stages)


def experiment_names(root: Path = Path()) -> list[str]:
    """Return the experiments of a checkout, sorted; raises UsageError outside of one."""
    require_project(root)
    return sorted(path.parent.name for path in (root / "factory_configs").glob("*/experiment.yaml"))


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
    if name in TRAININGS:
        return name
    views = [stage for stage in TRAININGS if STEPS[stage].stage == name]
    begun = [stage for stage in views if stage_status(StageContext(experiment, stage)).state != "new"]
    if len(begun) == 1:
        return begun[0]
    if begun:
        remedy = f"say which: {' or '.join(f'--stage {stage}' for stage in views)}"
        raise UsageError(f"{' and '.join(views)} were both trained", where=f"--stage {name}", remedy=remedy)
    calls = " or ".join(StageContext(experiment, stage).command for stage in views)
    raise UsageError(f"neither {' nor '.join(views)} was trained", where=f"--stage {name}", remedy=calls)


def running_stages(experiment: Experiment) -> list[str]:
    """Return the stages of an experiment on which a run is at work on this machine."""
    return [stage for stage in TRAININGS if is_at_work(experiment.output_folder(stage))]


def refuse_while_at_work(experiment: Experiment) -> None:
    """Raise ArenaError while a stage runs on this machine: it reads the export until its report is written."""
    if running := running_stages(experiment):
        raise ArenaError(
            f"{' and '.join(running)} of this experiment is running, and reads the export until its report is written",
            where=str(experiment.data_folder),
            remedy="wait for it or end it; or prepare these votes for another experiment (run.py new)",
        )


def is_at_work(folder: Path) -> bool:
    """Return whether a living process of this machine holds a stage's lock, by what its holder wrote into it.

    The lock itself is not tried: that would hold it for a moment, and refuse a run that starts then.
    """
    try:
        owner = read_json(folder.with_name(f".{folder.name}.lock"))
        begun = psutil.Process(int(owner["pid"])).create_time()
        # A process number that the system gave away again belongs to a younger process.
        is_ours = begun <= datetime.fromisoformat(owner["started_at"]).timestamp() + 1
        return owner["host"] == socket.gethostname() and is_ours
    except (OSError, ValueError, KeyError, TypeError, psutil.Error):
        return False


def experiment_status(context: StageContext) -> ExperimentStatus:
    """Return how far the experiment of a stage is, with all its stages."""
    experiment, context = context.experiment, context.other("sft")
    prepared = (experiment.data_folder / "manifest.json").is_file()
    stages = [stage_status(context.other(stage), prepared) for stage in TRAININGS]
    changed = _changed_settings(context)
    following = ""
    if not prepared:
        following = "python run.py demo" if experiment.name == "demo" else _prepare(experiment.name)
    elif changed and not running_stages(experiment):
        following = prepare_again(context.manifest, experiment.name)
    about = (experiment.name, experiment.description, experiment.model, prepared, _battles(experiment), stages)
    return ExperimentStatus(*about, next=following, changed=changed)


def stage_status(context: StageContext, prepared: bool = True) -> StageStatus:
    """Return how far a stage is; state.json decides, and an adapter without one was trained by hand."""
    points = TrainerLog(context.adapter / "trainer_log.jsonl").read_new()
    step, steps = (points[-1].step, points[-1].total) if points else (None, None)
    so_far = StageStatus(context.name, "new", step=step, steps=steps)
    try:
        parts = [part for part in PARTS if context.state.record(part)]
    except ArenaError as error:
        return StageStatus(context.name, "unreadable", str(error).splitlines()[0], next=f"{context.command} --fresh")
    if is_at_work(context.folder):
        part = parts[-1] if parts else "train"
        detail = "starting" if not parts else f"step {step}/{steps}" if part == "train" and step else ""
        watch = f"python run.py watch -e {context.experiment.name} --stage {context.name}"
        return replace(so_far, state=_RUNNING[part], detail=detail, next=watch)
    if changed := _changed_settings(context):
        again = prepare_again(context.manifest, context.experiment.name)
        detail = f"experiment.yaml changed since prepare: {some(changed)}"
        begun = parts or (context.adapter / "adapter_model.safetensors").is_file()
        return replace(so_far, state=OUTDATED, detail=detail, next=again) if begun else replace(so_far, next=again)
    found = _as_left(context, parts, so_far, prepared)
    if found.next and found.state != "scored" and (fix := _fix_of_recipes(context)):
        return replace(found, next=fix)
    return found


def _as_left(context: StageContext, parts: list[str], so_far: StageStatus, prepared: bool) -> StageStatus:
    """Return the status of a stage on which nobody works, its settings as they were exported."""
    if not parts:
        if not (context.adapter / "adapter_model.safetensors").is_file():
            return StageStatus(context.name, "new", next=context.command if prepared else "")
        detail = f"not by run.py: {context.adapter}"
        return replace(so_far, state="trained", detail=detail, next=f"{context.command} --fresh")
    part, record = parts[-1], context.state.record(parts[-1])
    outdated = _outdated(context, parts)
    flag = flag_to_go_on(context.adapter, context.step.stage) if part == "train" else ""
    call = f"{context.command} {flag}".rstrip()
    if record.finished_at is None:
        where = f" at step {so_far.step}/{so_far.steps}" if part == "train" and so_far.step else ""
        detail = f"{_RUNNING[part]}{where}{f'; {_DONE[parts[-2]]}' if len(parts) > 1 else ''}"
        if outdated and (part != "train" or flag == "--resume"):  # going on would be refused
            detail, call = f"{detail}; {outdated[0]}", outdated[1]
        if record.failed:
            log = context.folder / f"{part}.log"
            detail, call = f"{detail}: {record.failed} ({log})", f"{call}   (it failed: fix that first, see {log})"
        return replace(so_far, state=FAILED if record.failed else INTERRUPTED, detail=detail, next=call)
    if record.missing:
        detail = f"gone: {', '.join(record.missing)}"
        return replace(so_far, state=INTERRUPTED, detail=detail, next=outdated[1] if outdated else call)
    when = record.finished_at[:16].replace("T", " ")
    if outdated:
        return replace(so_far, state=OUTDATED, detail=f"{_DONE[part]} on {when}, {outdated[0]}", next=outdated[1])
    if part != "score":
        return replace(so_far, state=_DONE[part], detail=f"on {when}", next=context.command)
    return _scored(context, replace(so_far, state="scored", detail=f"on {when}"))


def _outdated(context: StageContext, parts: list[str]) -> tuple[str, str] | None:
    """Return why a stage is outdated and the command that makes it again, None where it is up to date."""
    remedies = {
        "train": f"{context.command} --fresh",
        "merge": f"{context.command}   (after moving {context.merged} away)",
        "score": f"python run.py score -e {context.experiment.name} --stage {context.name} --fresh",
    }
    for part in parts:
        try:
            standing: Standing = context.standing(part)
        except ArenaError:  # nothing is exported, or a recipe is missing: another line says so
            continue
        if standing.changes:
            other_data = any(line.startswith("data: ") for line in standing.changes)
            why = f"from another export than {context.experiment.data_folder}" if other_data else ""
            return why or f"since then changed: {some(list(standing.changes))}", remedies[part]
    return None


def _scored(context: StageContext, found: StageStatus) -> StageStatus:
    report, name = context.folder / "report.json", context.experiment.name
    try:
        content = read_json(report)
        loss, prior = float(content["log_loss"]), float(content["baselines"]["prior"])
        judged = (content.get("truncation") or {}).get("judged") or {}
        share = float(judged.get("rows_cut_share") or 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        again = f"python run.py score -e {name} --stage {context.name} --fresh"
        return StageStatus(context.name, INTERRUPTED, f"{report} is unreadable", next=again)
    return replace(
        found,
        log_loss=loss,
        prior=prior,
        beats_prior=bool(content.get("beats_prior", loss < prior)),
        report=report.with_suffix(".html").as_posix(),
        next=f"python run.py compare -e {name}",
        cut_share=share,
    )


def _changed_settings(context: StageContext) -> list[str]:
    try:
        return context.changed_settings()
    except ArenaError:  # nothing is exported
        return []


def _fix_of_recipes(context: StageContext) -> str | None:
    """Return what to fix in the recipes of a stage where its training would refuse them, None where they are sound."""
    try:
        steps = [step for step in (context.name, merge_of(context.name)) if context.experiment.recipe(step).is_file()]
        faults = [fault for step in steps for fault in check_recipe(context.experiment, step)]
        if faults and all(fault.endswith(OLDER) for fault in faults):  # they follow experiment.yaml at `prepare`
            return prepare_again(context.manifest, context.experiment.name)
    except ArenaError:
        return None
    return f"fix {faults[0]}{f'   (and {len(faults) - 1} more)' if len(faults) > 1 else ''}" if faults else None


def _battles(experiment: Experiment) -> int | None:
    try:
        return int(read_json(experiment.data_folder / "audit.json")["sources"]["train"]["rows_kept"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _prepare(name: str) -> str:
    return f"python run.py prepare -e {name} --train FILE"


def print_status(console: Console, found: list[ExperimentStatus]) -> None:
    """Print one table: every experiment, its stages that began, and what to do next.

    Of several experiments those that nothing was done with share one line, so that the others are seen.
    """
    table = Table(min_width=72)
    for heading, justify in (("experiment", "left"), ("stage", "left"), ("state", "left"), ("log loss", "right")):
        table.add_column(heading, justify=justify, no_wrap=heading != "state")
    table.add_column("prior", justify="right", no_wrap=True)
    untouched = [each for each in found if each.untouched]
    folded = untouched if len(untouched) > 1 else []
    shown = [each for each in found if each not in folded]
    for each in shown:
        rows = _table_rows(each)
        for number, (cells, style) in enumerate(rows):
            name, last = each.name if number == 0 else "", number == len(rows) - 1
            # Text, for a fault may hold brackets that rich would take for its own markup.
            table.add_row(*map(Text, (name, *cells)), style=style, end_section=last)
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


def _table_rows(found: ExperimentStatus) -> list[tuple[tuple[str, ...], str | None]]:
    if found.fault:
        return [(("", f"faulty: {found.fault}", "", ""), "red")]
    known = f", {found.battles:,} battles" if found.battles is not None else ""
    changed = f"; experiment.yaml changed since: {some(found.changed)}" if found.changed else ""
    prepared = f"prepared{known}{changed}" if found.prepared else "not prepared"
    rows: list[tuple[tuple[str, ...], str | None]] = [(("", prepared, "", ""), "yellow" if changed else None)]
    for stage in found.stages:
        if stage.state == "new":
            continue
        losses = ("" if value is None else f"{value:.4f}" for value in (stage.log_loss, stage.prior))
        flag = ", not better than the prior" if stage.beats_prior is False else ""
        style = {True: "green", False: "red"}.get(stage.beats_prior, _STYLES.get(stage.state))
        rows.append(((stage.stage, f"{stage.state} {stage.detail}".rstrip() + flag, *losses), style))
    return rows


def next_commands(found: ExperimentStatus) -> list[str]:
    """Return what to run next: the first step, what unfinished stages need, another method, or the comparison."""
    if found.next:
        return [found.next]
    begun = [stage.next for stage in found.stages if stage.state not in ("new", "scored") and stage.next]
    scored = [stage for stage in found.stages if stage.state == "scored"]
    if begun or len(scored) > 1:
        return begun or [scored[-1].next]
    if scored and scored[0].beats_prior is False:  # another method would fail for the same reason
        share, base = scored[0].cut_share or 0, "another base: python run.py new EXP --model ID"
        where = f"cutoff_len in factory_configs/{found.name}/experiment.yaml"
        longer = f"after a larger {where}: {share:.0%} of these battles were shortened"
        return [f"{_prepare(found.name)}   ({longer if share > _MOSTLY_CUT else 'with more votes'}; or {base})"]
    new = {stage.stage: stage.next for stage in found.stages if stage.state == "new"}
    why = "   (another method on the same votes)" if scored else ""
    return [f"{new[name]}{why}" for name in _WORTH_TRYING if name in new][:1]
