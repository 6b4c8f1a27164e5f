"""A survey: every experiment, how far each of its stages is, and the command that goes on from there.

Reads files only and takes no lock, so that it may look on while runs are at work.
"""

from __future__ import annotations

import shlex
import socket
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ArenaError, UsageError
from common.experiment import Experiment, load_experiment, require_project
from common.files import read_json
from common.stages import STEPS, TRAININGS, merge_of
from factory.recipe_checks import OLDER, check_recipe
from factory.state import StageState, changed_recipe, changed_settings, flag_to_go_on, outdated_files, prepare_again
from factory.trainer_log import TrainerLog

if TYPE_CHECKING:
    from rich.console import Console

# What a part is called while it runs, when it was left in the middle, and when it is done.
_RUNNING = {"train": "training", "merge": "merging", "score": "scoring"}
_DONE = {"train": "trained", "merge": "merged", "score": "scored"}
INTERRUPTED = "interrupted"
FAILED = "failed"
OUTDATED = "outdated"
_NAMED = 3  # so many changes are told, the others counted
# The order in which the methods are worth a try; docs/methods.md has the figures behind it.
_WORTH_TRYING = ("sft", "dpo_reward", "rm", "dpo_judge")
_MOSTLY_CUT = 0.5  # of the battles; from here on what was cut away is the first suspect


@dataclass(frozen=True)
class StageView:
    """How far one stage is.

    `state`: new, training, merging, scoring, interrupted, failed, trained, merged, scored, or
    outdated: made from another export or recipe than today's. `beats_prior` is what its report says, None where there
    is none. `next` is a command, or "mend FILE: …" where run.py would refuse every command.
    `cut_share` is the share of its report's battles that were shortened.
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
class ExperimentView:
    """One folder of factory_configs; `fault` says why its experiment.yaml cannot be read.

    `changed` are the settings that the exported rows depend on and that are other ones since `prepare`.
    """

    name: str
    description: str = ""
    model: str = ""
    prepared: bool = False
    battles: int | None = None
    stages: list[StageView] = field(default_factory=list)
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
            f"python run.py {STEPS[stage].command} -e {shlex.quote(experiment.name)}" for stage in views
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
    changed = _settings_changed(experiment, "sft")  # what all stages share
    if changed and not running_stages(experiment):
        prepare = prepare_again(experiment)
    about = (experiment.description, experiment.model, prepared, _battles(experiment))
    return ExperimentView(name, *about, stages, next=prepare, changed=changed)


def stage_view(experiment: Experiment, stage: str, prepared: bool = True) -> StageView:
    """Return how far a stage is; what state.json holds rules, and an adapter without one was trained by hand."""
    view = _as_left(experiment, stage, prepared)
    if is_at_work(experiment.output_folder(stage)) or view.state == "unreadable":
        return view
    if changed := _settings_changed(experiment, stage):
        again = prepare_again(experiment)
        if view.state == "new":
            return replace(view, next=again)
        detail = f"experiment.yaml changed since prepare: {_some(changed)}"
        return StageView(stage, OUTDATED, detail, view.step, view.steps, next=again)
    if view.next and view.state != "scored" and (mend := _recipes_mended(experiment, stage)):
        return replace(view, next=mend)
    return view


def _as_left(experiment: Experiment, stage: str, prepared: bool) -> StageView:
    """Return how far a stage is and what goes on from there, where its export and its recipes are sound."""
    folder, adapter = experiment.output_folder(stage), experiment.adapter_folder(stage)
    call = f"python run.py {STEPS[stage].command} -e {shlex.quote(experiment.name)}"
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
    others = _made_from_others(experiment, stage)
    if record.finished_at is None:
        return _left_in_the_middle(experiment, stage, list(parts), others, record.failed)
    if record.missing:
        flag = flag_to_go_on(adapter, STEPS[stage].stage) if part == "train" else ""
        again = others[1] if others else f"{call} {flag}".rstrip()
        return StageView(stage, INTERRUPTED, f"gone: {', '.join(record.missing)}", step, steps, next=again)
    if others:
        why, again = others
        detail = f"{_DONE[part]} on {_day(record.finished_at)}, {why}"
        return StageView(stage, OUTDATED, detail, step, steps, next=again)
    if part != "score":
        return StageView(stage, _DONE[part], f"on {_day(record.finished_at)}", step, steps, next=call)
    return _scored(experiment, stage, record.finished_at, step, steps)


def _left_in_the_middle(
    experiment: Experiment, stage: str, parts: list[str], others: tuple[str, str] | None, failed: str | None
) -> StageView:
    """Return the view of a stage whose last part began and did not end, or `failed`."""
    adapter, part, its = experiment.adapter_folder(stage), parts[-1], STEPS[stage]
    step, steps = _steps(adapter)
    call = f"python run.py {its.command} -e {shlex.quote(experiment.name)}"
    where = f" at step {step}/{steps}" if part == "train" and step else ""
    earlier = f"; {_DONE[parts[-2]]}" if part != "train" and len(parts) > 1 else ""
    flag = flag_to_go_on(adapter, its.stage) if part == "train" else ""
    detail, following = f"{_RUNNING[part]}{where}{earlier}", f"{call} {flag}".rstrip()
    if others and (part != "train" or flag == "--resume"):  # what was begun is refused when its inputs are others
        detail, following = f"{detail}; {others[0]}", others[1]
    if failed:
        log = experiment.output_folder(stage) / f"{part}.log"
        detail = f"{detail}: {failed} ({log})"
        following += "" if others else f"   (it failed: mend that first, see {log})"
    return StageView(stage, FAILED if failed else INTERRUPTED, detail, step, steps, next=following)


def _made_from_others(experiment: Experiment, stage: str) -> tuple[str, str] | None:
    """Return why a stage is outdated and the command that makes it anew, None where it is up to date."""
    name, anew = shlex.quote(experiment.name), f"python run.py {STEPS[stage].command} -e "
    export = f"from another export than {experiment.data_folder}"
    try:
        if outdated_files(experiment, stage, ("train",)):
            return export, f"{anew}{name} --fresh"
        if changed := changed_recipe(experiment, stage):
            return f"since then changed: {_some(changed)}", f"{anew}{name} --fresh"
        if outdated_files(experiment, stage, ("score",)):
            return export, f"python run.py score -e {name} --stage {stage} --fresh"
    except ArenaError:  # nothing is exported, or not by this version: another line tells it
        pass
    return None


def _settings_changed(experiment: Experiment, stage: str) -> list[str]:
    try:
        return changed_settings(experiment, stage)
    except ArenaError:  # nothing is exported
        return []


def _recipes_mended(experiment: Experiment, stage: str) -> str | None:
    """Return what mends the recipes of a stage where its training would refuse them, None where they are sound.

    A recipe without hand edits follows experiment.yaml at the next `prepare`; a missing one is told by the training.
    """
    try:
        steps = [step for step in (stage, merge_of(stage)) if experiment.recipe(step).is_file()]
        faults = [fault for step in steps for fault in check_recipe(experiment, step)]
        if not faults:
            return None
        if all(fault.endswith(OLDER) for fault in faults):
            return prepare_again(experiment)
    except ArenaError:
        return None
    more = f"   (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"mend {faults[0]}{more}"


def _some(changes: list[str]) -> str:
    more = f", and {len(changes) - _NAMED} more" if len(changes) > _NAMED else ""
    return ", ".join(changes[:_NAMED]) + more


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
        share = float(((content.get("truncation") or {}).get("judged") or {}).get("rows_cut_share") or 0)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
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
        cut_share=share,
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
    changed = f"; experiment.yaml changed since: {_some(view.changed)}" if view.changed else ""
    rows: list[tuple[tuple[str, str, str, str], str | None]] = [
        (("", f"prepared{known}{changed}" if view.prepared else "not prepared", "", ""), "yellow" if changed else None)
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
    return {INTERRUPTED: "yellow", OUTDATED: "yellow", FAILED: "red", "unreadable": "red", "training": "cyan"}.get(
        stage.state
    )


def next_commands(view: ExperimentView) -> list[str]:
    """Return what to run next: the first step, what unfinished stages need, another method, or the comparison."""
    if view.next:
        return [view.next]
    begun = [stage.next for stage in view.stages if stage.state not in ("new", "scored") and stage.next]
    scored = [stage.next for stage in view.stages if stage.state == "scored"]
    if begun or len(scored) > 1:
        return begun or scored[-1:]
    useless = [stage for stage in view.stages if stage.state == "scored" and stage.beats_prior is False]
    if useless:  # another method would fail for the same reason
        return [_instead(view.name, useless[0].cut_share or 0)]
    new = {stage.stage: stage.next for stage in view.stages if stage.state == "new"}
    why = "   (another method on the same votes)" if scored else ""
    return [f"{new[name]}{why}" for name in _WORTH_TRYING if name in new][:1]


def _instead(name: str, cut_share: float) -> str:
    """Return what may help where a judge is not better than the class prior: whole texts, more votes, another base."""
    prepare = f"python run.py prepare -e {shlex.quote(name)} --train FILE"
    base = "another base: python run.py new EXP --model ID"
    if cut_share > _MOSTLY_CUT:
        where = f"cutoff_len in factory_configs/{name}/experiment.yaml"
        return f"{prepare}   (after a larger {where}: {cut_share:.0%} of these battles were shortened; or {base})"
    return f"{prepare}   (with more votes; or {base})"


def _first_commands(untouched: list[ExperimentView]) -> list[str]:
    """Return how to begin where nothing was done: the demo, and votes of one's own."""
    own = "python run.py prepare -e EXP --train FILE   (votes of your own; EXP is one of these)"
    demo = [view.next for view in untouched if view.name == "demo"]
    return [*demo, own] if untouched else []
