"""The commands that read what was scored; and how every command of run.py begins and ends.

Imports of our own packages stay inside the commands, as in run.py, so that every --help answers at once.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from common import command_line as cl
from common.command_group import OwnFolder, is_verbose, say

_command = partial(click.command, cls=OwnFolder)


def start(name: str, stage: str | None = None, fold: str | None = None, *, judge: bool = False) -> tuple[Any, Any]:
    """Load the experiment, with stage and fold that the user's words mean, and open the place for progress.

    With `judge` they must name one judge: a stage with folds has several.
    """
    from common.experiment import load_experiment
    from common.progress import Show
    from factory.stage_context import StageContext
    from factory.status import stage_named

    experiment, show = load_experiment(name), Show(verbose=is_verbose(click.get_current_context()))
    for text in experiment.warnings:
        show.note(text)
    context = StageContext(experiment, stage_named(experiment, stage or "sft"))
    context = context.of(cl.fold_named(fold, experiment, usual=None))
    if judge:
        context.require_one_judge()
    return context, show


def finish(context: Any, report: dict[str, Any] | None, as_json: bool) -> None:
    from scoring.report.console import print_reached

    print_reached(context, report, as_json)


@_command()
@cl.compare_options
def compare(names: tuple[str, ...], as_json: bool) -> None:
    """Put all scored stages side by side, on the same battles.

    With paired intervals, and a blend of them. Of several experiments, with the settings in which they differ.
    """
    from common.progress import PlainConsole
    from scoring.compare import compare_folder, compare_stages
    from scoring.report.console import print_comparison

    experiments = [start(name)[0].experiment for name in dict.fromkeys(names)]
    result = compare_stages(*experiments)
    if as_json:
        say(json.dumps(result, indent=2))
    else:
        print_comparison(PlainConsole(), compare_folder(experiments), result)


@_command()
@cl.ensemble_options
def ensemble(members: tuple[str, ...], name: str, weights: str, as_json: bool) -> None:
    """Blend scored stages of any experiments into one submission.

    And simple baselines (tfidf, length), which read the whole texts. Battles are matched by id.
    """
    from scoring.compare import ensemble
    from scoring.report.console import print_ensemble

    report = ensemble(members, name, weights)
    say(json.dumps(report, indent=2)) if as_json else print_ensemble(report)


@_command("audit-labels")
@cl.audit_options
def audit_labels(experiment: str, stage: str, rows: int, as_json: bool) -> None:
    """List the votes that the judge finds least likely.

    They are written to a table that `prepare --drop-ids` takes.
    """
    from scoring.show import audit_in_words, audit_labels

    found = audit_labels(start(experiment, stage)[0], rows)
    say(json.dumps(found, indent=2) if as_json else "\n".join(audit_in_words(found)))


@_command()
@cl.show_options
def show(battle_id: str, experiment: str, stage: str, split: str | None, swapped: bool, as_json: bool) -> None:
    """Print one battle, its probabilities and the exact prompt.

    The verdict, the probabilities in both orders, and what the judge read, with its cut places marked.
    """
    from common.progress import PlainConsole
    from scoring.show import print_battle, show_battle

    context, _ = start(experiment, stage)
    shown = show_battle(context, battle_id, split)
    if as_json:
        say(json.dumps(asdict(shown), indent=2))
    else:
        print_battle(PlainConsole(), shown, swapped=swapped)


@_command()
@cl.score_options
def score(
    experiment: str, stage: str, fold: str | None, source: str | None, output: Path | None, as_json: bool, **how: Any
) -> None:
    """Write the probabilities of A / B / tie for any battles.

    Without --input again those of the fold and the test set. What is scored is kept: after an interruption the
    same command goes on, without --fresh.
    """
    from scoring.agreement import note_choices, stage_agreement
    from scoring.out_of_fold import out_of_fold_report
    from scoring.predictions import scored_file
    from scoring.report.console import input_lines
    from scoring.score_input import Cascade, score_input
    from scoring.score_stage import ScoreOptions, score_stage

    agree, columns, cascade = how.pop("agree"), how.pop("columns"), how.pop("cascade")
    if (output is not None or columns) and source is None:
        raise click.UsageError("--output and --columns belong to --input: give it, too, or leave them out")
    if cascade and (source is None or not agree or how["time_limit"] or ":" not in cascade):
        raise click.UsageError("--cascade EXP:STAGE belongs to --input with --agree, and has no --time-limit")
    context, show = start(experiment, stage, fold)
    options = ScoreOptions.of(**how)
    if source is None:
        reports = [score_stage(each, show=show, options=options) for each in context.scored_one_by_one]
        finish(context, out_of_fold_report(context, show=show) if context.of_folds else reports[0] or None, as_json)
        output = context.folder / "probabilities_test.csv"
    else:
        output = output or scored_file(context.folder, source)
        then = cascade and Cascade(start(*cascade.split(":", 1))[0], stage_agreement(context, agree))
        made = score_input(context, source, output, columns, show=show, options=options, cascade=then)
        say(json.dumps(made) if as_json else "\n".join(input_lines(made)))
        output = Path(made.get("probabilities", output))
    if agree and not cascade:
        note_choices(context, output, agree, show)


@_command()
@cl.export_options
def export(
    experiment: str, stage: str, fold: str | None, quantization: str, as_json: bool, **places: Path | None
) -> None:
    """Write a merged judge as one file for a small machine.

    And prove that it is still the same judge.
    """
    from scoring.engines.gguf import export_gguf
    from scoring.report.console import export_lines

    context, show = start(experiment, stage, fold, judge=True)
    manifest = export_gguf(context, quantization, **places, show=show)
    say(
        json.dumps(manifest, indent=2)
        if as_json
        else "\n".join(export_lines(context.experiment, context.name, manifest))
    )


@_command()
@cl.verify_options
def verify(output: Path | None, experiment: str | None, stage: str, fold: str | None, as_json: bool) -> None:
    """Check a result again: every hash, every row, the versions.

    OUTPUT is a scored stage's folder, outputs/EXP/STAGE, unless -e names it. Exit code 1: something changed.
    """
    from scoring.checks.provenance import verify
    from scoring.report.console import print_verification

    if (output is None) == (experiment is None):
        raise click.UsageError("give a folder outputs/EXP/STAGE, or -e EXP --stage S")
    output = output or start(str(experiment), stage, fold)[0].folder
    result = verify(output)
    say(json.dumps(result.to_json(), indent=2)) if as_json else print_verification(result)
    click.get_current_context().exit(0 if result.sound else 1)


@_command()
@cl.rank_options
def rank(experiment: str, stage: str, as_json: bool, **options: Any) -> None:
    """Rate models by votes, a judge's opinions or both.

    Bradley-Terry ratings with 95% intervals. With both the judge's error is measured on its validation fold, and taken
    off.
    """
    from common.progress import PlainConsole
    from scoring.rank import print_ratings, rank

    context = start(experiment, stage)[0] if options["judged"] else None
    ranked = rank(context, **options)
    if as_json:
        say(ranked.table.to_json(orient="records", indent=2))
    else:
        print_ratings(PlainConsole(), ranked, options["output"])


@_command()
@cl.publish_options
def publish(experiment: str, stage: str, fold: str | None, as_json: bool, **how: Any) -> None:
    """Send a judge or its adapter to the Hugging Face hub.

    With its model card and calibration, in one commit; no vote, log or checkpoint goes with it.
    """
    from scoring.publish import publish, published_lines

    context, show = start(experiment, stage, fold, judge=True)
    made = publish(context, **how, show=show)
    say(json.dumps(made, indent=2) if as_json else "\n".join(published_lines(made)))


@_command("kaggle-pack")
@cl.kaggle_options
def kaggle_pack(experiment: str, stage: str, fold: str | None, as_json: bool, **how: Any) -> None:
    """Pack a judge for a Kaggle code competition, with its notebook.

    Code, judge, notebook and the list of wheels in one folder; prints the commands and clicks that submit it.
    """
    from scoring.kaggle_pack import kaggle_pack, pack_lines

    context, show = start(experiment, stage, fold, judge=True)
    made = kaggle_pack(context, **how, show=show)
    say(json.dumps(made, indent=2) if as_json else "\n".join(pack_lines(made)))


COMMANDS = (audit_labels, compare, ensemble, show, score, export, publish, kaggle_pack, rank, verify)
