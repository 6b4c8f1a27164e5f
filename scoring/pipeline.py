"""The chain of one stage, and the demo of all of it.

prepare    factory.prepare               votes -> data/EXP and recipes
train      factory.train                 recipe -> adapter
merge      factory.merge                 adapter -> merged model, made a judge by scoring.judge
check      scoring.checks.merge_check    the merged model answers as the adapter does
score      scoring.score_stage           judge -> probabilities, report, submission
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from common.errors import ArenaError
from common.progress import Show
from common.stages import Fold, merge_of
from data_prep.export import ensure_views
from factory.demo import demo_arena, refuse_other_votes, trained_on_another
from factory.merge import merge
from factory.prepare import prepare
from factory.recipe_checks import check_device, check_recipes
from factory.stage_context import StageContext
from factory.status import refuse_while_at_work
from factory.train import train
from scoring.checks.merge_check import check_merge
from scoring.judge import write_judge_manifest
from scoring.out_of_fold import out_of_fold_report
from scoring.score_stage import score_stage
from scoring.workers import visible_gpus

_RUN_PY = Path(__file__).resolve().parents[1] / "run.py"
_POLL = 0.5  # seconds between two looks at the processes


def demo(context: StageContext, seed: int, *, fresh: bool, show: Show) -> dict[str, Any] | None:
    """Draw the synthetic arena and the embedded base, then prepare, train, merge and score; return the report."""
    experiment = context.experiment
    refuse_while_at_work(experiment)
    if not fresh:
        refuse_other_votes(experiment)
    arena = demo_arena(experiment, seed, show)
    prepare(experiment, [arena.train], arena.test, arena.truth, show=show)
    options = {"until": "score", "resume": False, "fresh": fresh or trained_on_another(experiment), "show": show}
    return run_folds(context, "all", **options)[1] if context.of_folds else run_stage(context, **options)


def run_folds(
    context: StageContext, fold: Fold | Literal["all"], *, show: Show, **options: Any
) -> tuple[StageContext, dict[str, Any] | None]:
    """Run what was asked of a stage with folds; return the report with what it is of: all folds once they are there.

    `options` are those of `run_stage`.

    Several visible GPUs train a fold each. Interrupted anywhere, the same call goes on; what is finished is kept.
    """
    chosen = context.scored_one_by_one if fold == "all" else [context.of(fold)]
    gpus = visible_gpus() if len(chosen) > 1 and context.experiment.distributed == "auto" else []
    if len(gpus) > 1:
        run_side_by_side(chosen, gpus, options, show)
    own = [run_stage(each, **options, show=show) for each in chosen] if len(gpus) < 2 else [None]
    report = out_of_fold_report(context, show=show) if options["until"] == "score" else None
    return (context, report) if report else (chosen[-1], own[-1] or None)


def run_side_by_side(
    contexts: Sequence[StageContext], gpus: Sequence[str], options: Mapping[str, Any], show: Show
) -> None:
    """Run each training in a process of its own, one on each GPU at a time; raises ArenaError that names who failed.

    Ctrl-C reaches all of them; the first failure lets the others end.
    """
    flags = [f"--{name}" for name in ("resume", "fresh") if options[name]] + ["--until", options["until"]]
    flags += [word for name in options.get("allow", ()) for word in ("--allow", name)]
    waiting, running, failed = list(contexts), {}, []
    try:
        while waiting or running:
            for gpu in gpus if waiting and not failed else ():
                if waiting and gpu not in running:
                    running[gpu] = _start_on(gpu, waiting.pop(0), flags, show)
            for gpu, (context, process) in list(running.items()):
                if process.poll() is not None:
                    failed += [context] if process.returncode else []
                    del running[gpu]
                    show.note(f"{context.label}: {'failed' if process.returncode else 'done'} on GPU {gpu}")
            if failed and not running:
                break
            time.sleep(_POLL)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    if failed:
        logs = ", ".join(str(_log_of(context)) for context in failed)
        raise ArenaError(
            f"{len(failed)} of {len(contexts)} trainings failed; what is finished is kept",
            where=logs,
            remedy=f"the end of the log says why; then {failed[0].command}",
        )


def _start_on(gpu: str, context: StageContext, flags: list[str], show: Show) -> tuple[StageContext, subprocess.Popen]:
    log = _log_of(context)
    log.parent.mkdir(parents=True, exist_ok=True)
    show.note(f"{context.label}: on GPU {gpu}, its log is {log}")
    command = [sys.executable, str(_RUN_PY), *context.command.split()[2:], *flags]
    with log.open("ab") as output:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "ARENA_FACTORY_HERE": "1"}
        return context, subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)


def _log_of(context: StageContext) -> Path:
    return context.folder.with_name(f"{context.folder.name}.log")


def run_stage(
    context: StageContext,
    *,
    until: str = "score",
    resume: bool = False,
    fresh: bool = False,
    allow: Collection[str] = (),
    show: Show,
) -> dict[str, Any] | None:
    """Train, merge and score one stage as far as asked; return its report, None before scoring.

    `allow` names what its recipes may reach beyond the project.
    """
    experiment, stage = context.experiment, context.name
    merges = until != "train" and (stage != "dpo_reward" or until == "merge")  # implicit rewards need no merge
    read = {stage: context.written} if context.recipe_path.is_file() else {}
    if merges and context.merge_recipe_path.is_file():
        read[merge_of(stage)] = context.merge_written
    check_recipes(experiment, [stage, *([merge_of(stage)] if merges else [])], read=read, allowed=allow)
    check_device(context.recipe_path, context.recipe)
    if context.step.data == "dpo_reward" and "pairs.parquet" not in context.manifest["files"]:
        context.require_current_settings()
        with show.line(f"prepare {experiment.name}") as line:
            ensure_views(experiment, ("reward",), line.update)
        context.forget_export()  # the manifest lists the pairs now
    adapter = train(context, resume=resume, fresh=fresh, show=show)
    if adapter is None or until == "train":  # None: another node keeps the results
        return None
    if merges:
        merge(context, lambda folder: write_judge_manifest(folder, context), show)
    if until == "merge":
        check_merge(context, show=show)
        return None
    return score_stage(context, show=show)
