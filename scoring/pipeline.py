"""The chain of one stage, and the demo of all of it.

prepare    factory.prepare               votes -> data/EXP and recipes
train      factory.train                 recipe -> adapter
merge      factory.merge                 adapter -> merged model, made a judge by scoring.judge
check      scoring.checks.merge_check    the merged model answers as the adapter does
score      scoring.score_stage           judge -> probabilities, report, submission
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from common.progress import Show
from common.stages import merge_of
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
from scoring.score_stage import score_stage


def demo(context: StageContext, seed: int, *, fresh: bool, show: Show) -> dict[str, Any] | None:
    """Draw the synthetic arena and the embedded base, then prepare, train, merge and score; return the report."""
    experiment = context.experiment
    refuse_while_at_work(experiment)
    if not fresh:
        refuse_other_votes(experiment)
    arena = demo_arena(experiment, seed, show)
    prepare(experiment, [arena.train], arena.test, arena.truth, show=show)
    return run_stage(context, fresh=fresh or trained_on_another(experiment), show=show)


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
    read = {stage: context.recipe} if context.recipe_path.is_file() else {}
    if merges and context.merge_recipe_path.is_file():
        read[merge_of(stage)] = context.merge_recipe
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
