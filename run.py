#!/usr/bin/env python
"""arena-factory: pairwise human votes in, a fine-tuned judge and honest class probabilities out.

Heavy imports stay inside the commands, so that every --help answers at once.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

from common.errors import require_packages

require_packages()  # before click: another Python lacks it, or has one that fails with a traceback

import click  # noqa: E402

from common.console import make_output_safe  # noqa: E402
from common.stages import TRAININGS  # noqa: E402
from factory import DEFAULT_EXPERIMENT  # noqa: E402

VIEWS = ("judge", "reward")
# A stage by its own name, or as the command that trains it is called.
STAGES = (*TRAININGS, "dpo")


class ErrorsWithRemedy(click.Group):
    """Turns our errors into a message with its remedy and an exit code; -v shows where they come from."""

    def invoke(self, ctx: click.Context) -> Any:
        from common.console import printable
        from common.errors import ArenaError, stop_signals, user_error

        try:
            with stop_signals():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as raised:
            error = raised if isinstance(raised, ArenaError) else user_error(raised, ctx.invoked_subcommand)
            if error is None:
                raise
            if (ctx.obj or {}).get("verbose"):
                import traceback

                click.echo(printable(traceback.format_exc()), err=True, nl=False)
            failure = click.ClickException(str(error))
            failure.exit_code = error.exit_code
            raise failure from None


def _remember_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.ensure_object(dict)
    ctx.find_root().ensure_object(dict)["verbose"] = value


def _complete_experiment(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Name the experiments for the shell: the folders that hold an experiment.yaml."""
    names = sorted(path.parent.name for path in Path("factory_configs").glob("*/experiment.yaml"))
    return [name for name in names if name.startswith(incomplete)]


def _complete_file(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list:
    """Let the shell complete a file where a value may be something else, too."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="file")]


verbose_option = click.option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_remember_verbose, help="Show details and tracebacks."
)
experiment_option = click.option(
    "-e",
    "--experiment",
    default=DEFAULT_EXPERIMENT,
    show_default=True,
    metavar="EXP",
    shell_complete=_complete_experiment,
    help="A folder of factory_configs/.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output.")
file_argument = click.Path(path_type=Path)


@click.group(cls=ErrorsWithRemedy, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Turn pairwise human votes into a fine-tuned judge and calibrated probabilities of A / B / tie.

    The first steps: `run.py demo`, then `run.py prepare -e EXP --train votes.csv` and `run.py sft -e EXP`.
    """


@cli.command()
@click.option("--seed", default=1, show_default=True, type=click.IntRange(0), help="Draws arena and base model.")
@click.option("--fresh", is_flag=True, help="Train anew; the earlier run is put aside, not deleted.")
@json_option
@verbose_option
def demo(seed: int, fresh: bool, as_json: bool) -> None:
    """The whole chain on synthetic votes and a tiny base, on a CPU.

    In minutes: draws an arena whose true probabilities are known, prepares, trains, merges, scores and reports.
    """
    from factory.demo import demo_arena, refuse_other_votes, trained_on_another
    from factory.status import refuse_while_at_work

    exp, show = _start("demo")
    refuse_while_at_work(exp)
    if not fresh:
        refuse_other_votes(exp)
    arena = demo_arena(exp, seed, show)
    _prepare(exp, arena.train, arena.test, arena.truth, force=False, show=show)
    report = _stage(exp, "sft", until="score", resume=False, fresh=fresh or trained_on_another(exp), show=show)
    _finish(exp, "sft", report, as_json)


@cli.command()
@json_option
@verbose_option
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine can run and what is missing.

    Each fault comes with its remedy; exit code 1 on a fault.
    """
    from factory.doctor import as_lines, as_report, examine

    findings = examine()
    report = as_report(findings)
    click.echo(json.dumps(report, indent=2) if as_json else "\n".join(as_lines(findings)))
    ctx.exit(0 if report["ok"] else 1)


@cli.command()
@click.argument("name", metavar="EXP", help="Its name, a new folder of factory_configs/.")
@click.option("--model", required=True, metavar="ID", help="A Hugging Face hub id, or a folder that holds config.json.")
@click.option("--template", metavar="T", help="LLaMA-Factory's chat template [the model's own, where it is known].")
@click.option(
    "--bits",
    type=click.Choice(["4", "8", "none"]),
    default="4",
    show_default=True,
    help="Of the frozen base in training.",
)
@click.option("--cutoff", type=click.IntRange(32), help="Token budget of prompt and label [2048].")
@json_option
@verbose_option
def new(name: str, model: str, template: str | None, bits: str, cutoff: int | None, as_json: bool) -> None:
    """Make another experiment, for one model.

    It is factory_configs/EXP with experiment.yaml and all its recipes.
    """
    from factory.new_experiment import BITS, CUTOFF_LEN, Wish, new_experiment

    exp = new_experiment(Wish(name, model, template, BITS[bits], cutoff or CUTOFF_LEN))
    made = {"folder": str(exp.folder), "model": exp.model, "template": exp.template}
    line = f"{exp.folder}: {exp.model} with template {exp.template}; next: python run.py prepare -e {name} --train FILE"
    click.echo(json.dumps(made) if as_json else line)


@cli.command()
@experiment_option
@click.option(
    "--train",
    required=True,
    shell_complete=_complete_file,
    help="Votes: a table, a folder, Kaggle's zip, or hf://datasets/OWNER/NAME.",
)
@click.option("--test", shell_complete=_complete_file, help="Battles without votes, for the submission; as --train.")
@click.option("--truth", type=file_argument, help="Known probabilities of all votes (synthetic arenas only).")
@click.option("--force", is_flag=True, help="Replace recipes that were edited by hand.")
@click.option("--pairs", is_flag=True, help="Write the pairs of responses now, not when dpo or rm first needs them.")
@click.option(
    "--workers", type=click.IntRange(0, 256), help="Processes that fit the votes; 0: a thread [by the number of cores]."
)
@json_option
@verbose_option
def prepare(
    experiment: str,
    train: str,
    test: str | None,
    truth: Path | None,
    force: bool,
    pairs: bool,
    workers: int | None,
    as_json: bool,
) -> None:
    """Read votes, check, fold and fit them; write data and recipes.

    What is fitted to the token budget goes to data/EXP, with an audit of what was read, cut and rejected. An
    earlier export there is replaced; files of anybody else in that folder are never deleted, but must be moved first.
    """
    from factory.status import experiment_view, next_commands

    exp, show = _start(experiment)
    views = VIEWS if pairs else VIEWS[:1]
    audit = _prepare(exp, train, test, truth, force=force, views=views, workers=workers, show=show)
    if as_json:
        click.echo(json.dumps(audit, indent=2))
    else:
        click.echo(f"data: {exp.data_folder}   (what was read, cut and rejected: audit.json)")
        for command in next_commands(experiment_view(exp)):
            click.echo(f"next: {command}")


# The view that measured better; docs/methods.md has the figures.
DEFAULT_VIEW = "reward"
_VIEW_HELP = "judge: the true verdict's label over a wrong one; reward: the winning response over the losing one."
_UNTIL = click.Choice(["train", "merge", "score"])


def stage_options(command):
    """Add the options that all trainings share."""
    for option in (
        verbose_option,
        json_option,
        click.option("--fresh", is_flag=True, help="Train anew; the earlier run is put aside, not deleted."),
        click.option(
            "--resume",
            is_flag=True,
            help="Go on from the last checkpoint of an unfinished run; anew where none is whole.",
        ),
        click.option("--until", type=_UNTIL, default="score", show_default=True, help="Stop after this step."),
        experiment_option,
    ):
        command = option(command)
    return command


@cli.command()
@stage_options
def sft(experiment: str, until: str, resume: bool, fresh: bool, as_json: bool) -> None:
    """Fine-tune on the verdicts' labels, merge, score, report. What is finished is kept and not repeated."""
    exp, show = _start(experiment)
    report = _stage(exp, "sft", until=until, resume=resume, fresh=fresh, show=show)
    _finish(exp, "sft", report, as_json)


@cli.command()
@click.option("--view", type=click.Choice(VIEWS), default=DEFAULT_VIEW, show_default=True, help=_VIEW_HELP)
@stage_options
def dpo(view: str, experiment: str, until: str, resume: bool, fresh: bool, as_json: bool) -> None:
    """Train on preferences, of labels or of responses.

    Of labels in the judge view, of responses in the reward view; then score and report.
    """
    exp, show = _start(experiment)
    report = _stage(exp, f"dpo_{view}", until=until, resume=resume, fresh=fresh, show=show)
    _finish(exp, f"dpo_{view}", report, as_json)


@cli.command()
@stage_options
def rm(experiment: str, until: str, resume: bool, fresh: bool, as_json: bool) -> None:
    """Train a reward model on winning and losing responses.

    Then merge it with its value head, score and report.
    """
    exp, show = _start(experiment)
    report = _stage(exp, "rm", until=until, resume=resume, fresh=fresh, show=show)
    _finish(exp, "rm", report, as_json)


@cli.command()
@experiment_option
@json_option
@verbose_option
def compare(experiment: str, as_json: bool) -> None:
    """Put all scored stages side by side, on the same battles.

    With paired intervals, and a blend of them.
    """
    from scoring.compare import compare_stages

    exp, _ = _start(experiment)
    result = compare_stages(exp)
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console

    from scoring.report.console import print_comparison

    print_comparison(Console(), exp, result)


@cli.command()
@click.option(
    "-e", "--experiment", metavar="EXP", shell_complete=_complete_experiment, help="Only this one [all of them]."
)
@json_option
@verbose_option
def status(experiment: str | None, as_json: bool) -> None:
    """List the experiments, their stages and what to do next.

    Each scored stage has its log loss beside that of the class prior.
    """
    from dataclasses import asdict

    from factory.status import experiment_names, print_survey, survey

    if experiment:
        _start(experiment)  # an unknown name is wrong use
    views = survey([experiment] if experiment else experiment_names())
    if as_json:
        click.echo(json.dumps({"experiments": [asdict(view) for view in views]}, indent=2))
        return
    from rich.console import Console

    print_survey(Console(), views)


# Those of scoring.engines.protocol; its import would cost --help its speed, a test compares them.
ENGINES = ("torch", "llama.cpp")


def engine_options(command):
    """Add the options that say what computes the scores, how often side by side, and how long."""
    for option in (
        click.option(
            "--fresh",
            is_flag=True,
            help="Score anew, also what an interrupted call left; an earlier report is put aside.",
        ),
        click.option(
            "--time-limit",
            metavar="9h",
            help="Score all rows once within 9h (90m, 1h30m, 3600s), then the most uncertain ones in the other order.",
        ),
        click.option(
            "--ray",
            is_flag=False,
            flag_value="local",
            metavar="[ADDRESS]",
            help="Score with Ray's actors: here, or on the cluster at ray://… (make extra-ray).",
        ),
        click.option(
            "--workers",
            type=click.IntRange(1),
            help="Processes with a model each [one a visible GPU; 1 on a CPU]. With --ray: actors.",
        ),
        click.option(
            "--precision",
            metavar="P",
            help="auto, fp32, bf16, fp16, 8bit, 4bit, adapter (not merged); a GGUF file's own [experiment.yaml].",
        ),
        click.option(
            "--engine", type=click.Choice(ENGINES), default="torch", show_default=True, help="What runs the model."
        ),
    ):
        command = option(command)
    return command


def stage_option(which: str):
    """Return the option that chooses a trained stage; `which` says what for."""
    text = f"{which}; dpo: its trained view."
    return click.option("--stage", type=click.Choice(STAGES), default="sft", show_default=True, help=text)


@cli.command()
@click.argument("battle_id", metavar="ID", help="The battle, as the votes name it.")
@experiment_option
@stage_option("The stage whose judge answered")
@click.option("--split", type=click.Choice(["train", "valid", "test"]), help="Where an id stands twice.")
@click.option("--swapped", is_flag=True, help="Print the prompt with A and B exchanged.")
@json_option
@verbose_option
def show(battle_id: str, experiment: str, stage: str, split: str | None, swapped: bool, as_json: bool) -> None:
    """Print one battle, its probabilities and the exact prompt.

    The verdict, the probabilities in both orders, and what was fed, with its cut places marked.
    """
    from factory.stage_context import StageContext
    from scoring.show import print_battle, show_battle

    exp, stage, _ = _start_stage(experiment, stage)
    shown = show_battle(StageContext(exp, stage), battle_id, split)
    if as_json:
        click.echo(json.dumps(shown.to_json(), indent=2))
        return
    from rich.console import Console

    print_battle(Console(), shown, swapped=swapped)


@cli.command()
@experiment_option
@click.option(
    "--stage", "stages", multiple=True, type=click.Choice(TRAININGS), help="Only this stage (may be repeated)."
)
@click.option("--card", "cards", multiple=True, metavar="CARD", help="Only this card: T4, RTX-4090, H100, cpu, …")
@json_option
@verbose_option
def forecast(experiment: str, stages: tuple[str, ...], cards: tuple[str, ...], as_json: bool) -> None:
    """Tell memory and hours of every stage on named cards.

    Of training and scoring, from the exported rows' token lengths.
    """
    from factory.forecast import forecast as make_forecast
    from factory.forecast import print_forecast

    exp, _ = _start(experiment)
    found = make_forecast(exp, stages, cards)
    if as_json:
        click.echo(json.dumps(found, indent=2))
        return
    from rich.console import Console

    print_forecast(Console(), found)


@cli.command()
@experiment_option
@stage_option("The stage whose judge answers")
@click.option(
    "--input",
    "source",
    metavar="FILE",
    shell_complete=_complete_file,
    help="Battles: a table, a folder, Kaggle's zip (its test.csv), or hf://datasets/OWNER/NAME; without it the fold "
    "and the test set.",
)
@click.option(
    "--output",
    type=file_argument,
    help="Where --input's probabilities go [outputs/EXP/STAGE/scored/NAME.csv]; only an earlier output is replaced.",
)
@engine_options
@json_option
@verbose_option
def score(experiment: str, stage: str, source: str | None, output: Path | None, as_json: bool, **how: Any) -> None:
    """Write the probabilities of A / B / tie for any battles.

    Without --input again those of the fold and the test set. What is scored is kept: after an interruption the
    same command goes on, without --fresh.
    """
    from scoring.pipeline import ScoreOptions, score_input, score_stage
    from scoring.predictions import scored_file
    from scoring.report.console import input_lines

    if output is not None and source is None:
        raise click.UsageError("--output is where the probabilities of --input go: give both, or leave it out")
    exp, stage, show = _start_stage(experiment, stage)
    options = ScoreOptions.of(**how)
    if source is None:
        _finish(exp, stage, score_stage(exp, stage, show=show, options=options), as_json)
        return
    output = output or scored_file(exp, stage, source)
    rows = score_input(exp, stage, source, output, show=show, options=options)
    made = {"rows": rows, "output": str(output)}
    click.echo(json.dumps(made) if as_json else "\n".join(input_lines(rows, output)))


host_option = click.option("--host", default="127.0.0.1", show_default=True, help="The address to listen on.")
port_option = click.option("--port", type=click.IntRange(1, 65535), help="[the first free one from 7860 on]")
open_option = click.option("--no-open", is_flag=True, help="Do not open a browser.")


@cli.command()
@host_option
@port_option
@open_option
@verbose_option
def board(host: str, port: int | None, no_open: bool) -> None:
    """LLaMA-Factory's web UI with these experiments, on 127.0.0.1.

    It is LLaMA Board, with our data sets and every trained adapter in it.
    """
    from common.progress import Show
    from factory.board import serve_board

    serve_board(host, port, open_browser=not no_open, show=Show())


@cli.command()
@experiment_option
@stage_option("The judge to export")
@click.option(
    "--format", "file_format", type=click.Choice(["gguf"]), default="gguf", show_default=True, help="Its file."
)
@click.option(
    "--quantization",
    type=click.Choice(["f16", "bf16", "q8_0", "q4_k_m"], case_sensitive=False),  # llama.cpp writes Q8_0
    default="q8_0",
    show_default=True,
    help="Bits of the weights; docs/edge.md has what each costs.",
)
@click.option("--output", type=file_argument, help="The file [outputs/EXP/STAGE/judge-Q.gguf, Q the quantization].")
@click.option("--converter", type=file_argument, help="A folder of llama.cpp [ARENA_LLAMA_CPP, .venv/llama.cpp].")
@json_option
@verbose_option
def export(
    experiment: str,
    stage: str,
    file_format: str,
    quantization: str,
    output: Path | None,
    converter: Path | None,
    as_json: bool,
) -> None:
    """Write a merged judge as one file for a small machine.

    And prove that it is still the same judge.
    """
    from factory.stage_context import StageContext
    from scoring.engines.gguf import export_gguf
    from scoring.report.console import export_lines

    exp, stage, show = _start_stage(experiment, stage)
    manifest = export_gguf(StageContext(exp, stage), quantization, output=output, converter=converter, show=show)
    click.echo(json.dumps(manifest, indent=2) if as_json else "\n".join(export_lines(exp, stage, manifest)))


@cli.command()
@experiment_option
@click.option(
    "--stage", type=click.Choice(STAGES), help="The stage to watch [the one that runs]; dpo: the view that began."
)
@click.option("--terminal", is_flag=True, help="Here instead of in a browser, until the run ends.")
@click.option("--once", is_flag=True, help="Print how far the run is, and end.")
@click.option("--tensorboard", is_flag=True, help="TensorBoard over all runs on this base model.")
@click.option(
    "--score", type=click.IntRange(0), default=0, metavar="ROWS", help="Ask every checkpoint about ROWS battles, too."
)
@host_option
@port_option
@open_option
@json_option
@verbose_option
def watch(
    experiment: str,
    stage: str | None,
    terminal: bool,
    once: bool,
    tensorboard: bool,
    score: int,
    host: str,
    port: int | None,
    no_open: bool,
    as_json: bool,
) -> None:
    """Watch a run: progress, losses, log loss beside the baselines.

    A run of the command line, in the browser or in the terminal.
    """
    from factory.serve_page import serve_tensorboard
    from scoring.run_status import in_words
    from scoring.watch import Watcher, follow, serve_watch_page, stage_to_watch

    exp, stage, show = _start_stage(experiment, stage)
    if tensorboard:
        if once or terminal or as_json or score:
            raise click.UsageError("--tensorboard has its own page: leave out --terminal, --once, --score and --json")
        serve_tensorboard(exp, host, port, open_browser=not no_open, show=show)
        return
    stage = stage_to_watch(exp, stage, score)
    if not (once or terminal or as_json):
        serve_watch_page(exp, stage, score, host, port, open_browser=not no_open, show=show)
        return
    watcher = Watcher(exp, stage, score)
    status = watcher.finish().status() if once or as_json else follow(watcher.start(), show)
    if not as_json:
        click.echo("\n".join(in_words(status)))
        return
    click.echo(json.dumps(status.to_json(), indent=2))
    for fault in status.faults:
        show.note(fault)


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="The shell to print it for.")
@verbose_option
def completion(shell: str) -> None:
    """Print a script that lets bash, zsh or fish complete `run.py`.

    It puts run.py on the PATH: source <(python run.py completion bash), then run.py sft -e and the Tab key.
    """
    from click.shell_completion import get_completion_class

    folder = shlex.quote(str(Path(__file__).resolve().parent))
    click.echo(f"set -gx PATH {folder} $PATH" if shell == "fish" else f'export PATH={folder}:"$PATH"')
    click.echo(get_completion_class(shell)(cli, {}, "run.py", "_RUN_PY_COMPLETE").source())


@cli.command()
@click.argument("output", type=file_argument, help="A scored stage's folder, outputs/EXP/STAGE.")
@json_option
@verbose_option
def verify(output: Path, as_json: bool) -> None:
    """Check a result again: every hash, every row, the versions.

    OUTPUT is a scored stage's folder, outputs/EXP/STAGE. Exit code 1: something changed.
    """
    from scoring.checks.verify import verify
    from scoring.report.console import print_verification

    result = verify(output)
    if as_json:
        click.echo(json.dumps(result.to_json(), indent=2))
    else:
        print_verification(result)
    click.get_current_context().exit(0 if result.sound else 1)


def _start(name: str):
    """Load the experiment and open the place where progress is shown."""
    from common.experiment import load_experiment
    from common.progress import Show

    verbose = (click.get_current_context().find_root().obj or {}).get("verbose", False)
    exp, show = load_experiment(name), Show(verbose=verbose)
    for text in exp.warnings:
        show.note(text)
    return exp, show


def _start_stage(name: str, stage: str | None):
    """As `_start`, with the stage that the user's word for it means."""
    from factory.status import stage_named

    exp, show = _start(name)
    return exp, stage and stage_named(exp, stage), show


def _prepare(
    exp,
    train: Path | str,
    test: Path | str | None,
    truth: Path | None,
    *,
    force: bool,
    views=VIEWS[:1],
    workers=None,
    show,
) -> dict[str, Any]:
    from common.stages import STEPS
    from data_prep.audit import warnings_of
    from data_prep.export import export
    from data_prep.export_reader import earlier_manifest, read_manifest
    from data_prep.overwrite_check import check_overwrite
    from data_prep.readers import VoteReader
    from data_prep.sources import votes_at
    from factory.demo import ensure_embedded_base
    from factory.recipes import check_first_values, write_recipe
    from factory.state import replaced
    from factory.status import refuse_while_at_work

    check_first_values(exp)
    refuse_while_at_work(exp)
    check_overwrite(exp.data_folder, (train, test, truth))
    train = votes_at(train, labelled=True)
    test = votes_at(test, labelled=False) if test else None
    for table, labelled in ((train, True), (test, False)):
        if table is not None:
            VoteReader(table, labelled=labelled)  # a file that is none is told before a base is built
    ensure_embedded_base(exp, show)
    before = earlier_manifest(exp.data_folder)
    with show.line(f"prepare {exp.name}") as line:
        audit = export(exp, train, test, truth, progress=line.update, views=views, workers=workers)
    change = replaced(before, read_manifest(exp.data_folder))
    for text in (_audit_line(exp, audit), *warnings_of(audit), *([f"{exp.data_folder}: {change}"] if change else [])):
        show.note(text)
    for outcome in (write_recipe(exp, step, force=force) for step in STEPS):
        if outcome.state == "hand-edited" and outcome.diff:
            show.note(f"{outcome.path}: edited by hand, kept; --force would replace it by:\n{outcome.diff}")
        elif outcome.state != "unchanged":
            show.note(f"{outcome.path}: {outcome.state}")
    return audit


def _audit_line(exp, audit: dict[str, Any]) -> str:
    read, rows = audit["sources"]["train"], audit["exported"]
    cut = audit["truncation"]["train"]["rows_cut_share"]
    rejected = f", {read['rows_rejected']} rejected (data/{exp.name}/audit.json)" if read["rows_rejected"] else ""
    lost = audit["sources"].get("test", {}).get("rows_rejected")
    unanswered = f" ({lost} rejected: the submission will lack them, see data/{exp.name}/audit.json)" if lost else ""
    return (
        f"prepare {exp.name}: {read['rows_kept']:,} battles kept{rejected}; "
        f"{rows['sft_train']:,} training rows, {rows['sft_valid']:,} for validation, {rows['test']:,} to submit"
        f"{unanswered}; {cut:.1%} shortened to {exp.cutoff_len} tokens"
    )


def _stage(exp, stage: str, *, until: str, resume: bool, fresh: bool, show) -> dict[str, Any] | None:
    """Train, merge and score one stage as far as asked; return its report, None before scoring."""
    from common.experiment import read_yaml
    from common.stages import STEPS
    from data_prep.export import ensure_views
    from factory.recipe_checks import check_device, check_recipes
    from factory.stage_context import StageContext
    from factory.state import require_own_settings
    from factory.train import merge, train
    from scoring.checks.merge_check import check_merge
    from scoring.judge import write_judge_manifest
    from scoring.pipeline import score_stage

    if STEPS[stage].data == "dpo_reward":
        check_recipes(exp, [stage])  # before the time that the pairs take
        require_own_settings(exp, stage)
        check_device(exp.recipe(stage), read_yaml(exp.recipe(stage)))
        with show.line(f"prepare {exp.name}") as line:
            ensure_views(exp, ("reward",), line.update)
    adapter = train(exp, stage, resume=resume, fresh=fresh, show=show)
    if adapter is None or until == "train":  # None: a node that only trains along
        return None
    if stage != "dpo_reward" or until == "merge":  # an implicit reward needs the adapter on and off, not a merge
        merge(exp, stage, complete=lambda folder: write_judge_manifest(folder, StageContext(exp, stage)), show=show)
        check_merge(StageContext(exp, stage), show=show)
    return None if until == "merge" else score_stage(exp, stage, show=show)


def _finish(exp, stage: str, report: dict[str, Any] | None, as_json: bool) -> None:
    """Print what was reached: for people a table, for programs the report."""
    if report is None:
        from common.stages import STEPS

        made = {"adapter": exp.adapter_folder(stage)}
        if exp.merged_folder(stage).is_dir():
            made["merged"] = exp.merged_folder(stage)
        if as_json:
            click.echo(json.dumps({name: str(folder) for name, folder in made.items()}))
            return
        for name, folder in made.items():
            click.echo(f"{name + ':':8} {folder}")
        click.echo(f"next:    python run.py {STEPS[stage].command} -e {exp.name}   (goes on from here to the report)")
    elif as_json:
        click.echo(json.dumps(report, indent=2))
    else:
        from rich.console import Console

        from scoring.report.console import print_summary

        print_summary(Console(), exp, stage, report)


if __name__ == "__main__":
    make_output_safe()
    sys.exit(cli())
