"""The chain of one stage, and the demo of all of it.

prepare    factory.prepare               votes -> data/EXP and recipes
train      factory.train                 recipe -> adapter
merge      factory.merge                 adapter -> merged model, made a judge by scoring.judge
check      scoring.checks.merge_check    the merged model answers as the adapter does
score      scoring.score_stage           judge -> probabilities, report, submission
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal

from common.errors import ArenaError
from common.progress import Show
from common.stages import Fold, merge_of
from factory.demo import demo_arena, refuse_other_votes, trained_on_another
from factory.merge import merge
from factory.prepare import ensure_pairs, prepare
from factory.recipe_checks import check_device, check_recipes
from factory.stage_context import StageContext
from factory.status import refuse_while_at_work
from factory.train import train
from scoring.checkpoints import choose
from scoring.checks.merge_check import check_merge
from scoring.executor import visible_gpus
from scoring.judge import write_judge_manifest
from scoring.out_of_fold import out_of_fold_report
from scoring.score_stage import score_stage

_RUN_PY = Path(__file__).resolve().parents[1] / "run.py"


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
    for each in chosen:
        each.called = context if fold == "all" else each
    gpus = visible_gpus() if len(chosen) > 1 and context.experiment.distributed == "auto" else []
    if len(gpus) > 1:
        run_side_by_side(chosen, gpus, options, show)
    own = [run_stage(each, **options, show=show) for each in chosen] if len(gpus) < 2 else [None]
    report = out_of_fold_report(context, show=show) if options["until"] == "score" else None
    return (context, report) if report else (chosen[-1], own[-1] or None)


def run_side_by_side(
    contexts: Sequence[StageContext], gpus: Sequence[str], options: Mapping[str, Any], show: Show
) -> None:
    """Run each training in a process of its own, one on each GPU at a time; raises ArenaError that names who failed."""
    flags, asked = [f"--{name}" for name in ("resume", "fresh") if options.get(name)], _words(**options)
    logs = {context: context.folder.with_name(f"{context.folder.name}.log") for context in contexts}
    free, running = SimpleQueue(), []
    for gpu in gpus:
        free.put(gpu)

    def run(context: StageContext) -> int:
        gpu, log = free.get(), logs[context]
        show.note(f"{context.label}: on GPU {gpu}, its log is {log}")
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(_RUN_PY), *context.command.split()[2:], *asked, *flags]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": gpu, "ARENA_FACTORY_HERE": "1"}
        with log.open("ab") as output:
            running.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment))
            code = running[-1].wait()
        free.put(gpu)
        return code

    pool = ThreadPoolExecutor(len(gpus))
    try:
        codes = list(pool.map(run, contexts))
    except BaseException:  # Ctrl-C reaches the children by itself, SIGTERM does not
        for process in running:
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    if failed := [context for context, code in zip(contexts, codes, strict=True) if code]:
        raise ArenaError(
            f"{len(failed)} of {len(contexts)} trainings failed; what is finished is kept",
            where=", ".join(str(logs[context]) for context in failed),
            remedy=f"the end of the log says why; then {shlex.join([*failed[0].command.split(), *asked])}",
        )


def _words(*, until: str, allow: Collection[str] = (), checkpoint: str | None = None, **_: Any) -> list[str]:
    """Return the options of a command that change what it does, in a command's words."""
    given = {"--until": until != "score" and until, "--checkpoint": checkpoint}
    found = [word for name, value in given.items() if value for word in (name, value)]
    return [*found, *(word for name in allow for word in ("--allow", name))]


def run_stage(
    context: StageContext,
    *,
    until: str = "score",
    resume: bool = False,
    fresh: bool = False,
    allow: Collection[str] = (),
    checkpoint: str | None = None,
    show: Show,
) -> dict[str, Any] | None:
    """Train, merge and score one stage as far as asked; return its report, None before scoring.

    `allow` names what its recipes may reach beyond the project; `checkpoint` is best, last or a step, None as before.
    """
    experiment, stage = context.experiment, context.name
    context.asked = "".join(f" {shlex.quote(word)}" for word in _words(until=until, allow=allow, checkpoint=checkpoint))
    merges = until != "train" and (stage != "dpo_reward" or until == "merge")  # implicit rewards need no merge
    read = {stage: context.written} if context.recipe_path.is_file() else {}
    if merges and context.merge_recipe_path.is_file():
        read[merge_of(stage)] = context.merge_written
    check_recipes(experiment, [stage, *([merge_of(stage)] if merges else [])], read=read, allowed=allow)
    check_device(context.recipe_path, context.recipe)
    if context.step.data == "dpo_reward":
        ensure_pairs(context, show)
    adapter = train(context, resume=resume, fresh=fresh, show=show)
    if adapter is None or until == "train":  # None: another node keeps the results
        return None
    if checkpoint:
        choose(context, checkpoint, show)
    if merges:
        merge(context, lambda folder: write_judge_manifest(folder, context), show)
    if until == "merge":
        check_merge(context, show=show)
        return None
    return score_stage(context, show=show)
