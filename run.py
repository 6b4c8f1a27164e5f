#!/usr/bin/env python
"""arena-factory: pairwise human votes in, a fine-tuned judge and honest class probabilities out.

Commands that read what was scored are in scoring/commands.py. Heavy imports stay inside the commands, so that every
--help answers at once.
"""

from __future__ import annotations

import json
import logging
import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

if sys.flags.safe_path:
    sys.path.insert(0, str(Path(__file__).resolve().parent))

from common.errors import require_packages

require_packages()  # before click: another Python lacks it, or has one that fails with a traceback

import click  # noqa: E402
from click.shell_completion import get_completion_class  # noqa: E402

from common import command_line as cl  # noqa: E402
from common.command_group import VERSION, ErrorsWithRemedy, say  # noqa: E402
from common.console import make_output_safe  # noqa: E402
from scoring.commands import COMMANDS, finish, start  # noqa: E402


@click.group(cls=ErrorsWithRemedy, context_settings={"help_option_names": ["-h", "--help"], "show_default": True})
@click.version_option(VERSION, prog_name="arena-factory")
@click.option("--here", is_flag=True, envvar="ARENA_FACTORY_HERE", help="Work in a folder that is not this project's.")
def cli(here: bool) -> None:
    """Turn pairwise human votes into a fine-tuned judge and calibrated probabilities of A / B / tie.

    The first steps: `run.py demo`, then `run.py prepare -e EXP --train votes.csv` and `run.py sft -e EXP`.
    """


@cli.command()
@cl.option("--seed", default=1, type=click.IntRange(0), help="Draws arena and base model.")
@cl.option("--fresh", is_flag=True, help="Train from the beginning; the earlier run is put aside, not deleted.")
@cl.output_options
def demo(seed: int, fresh: bool, as_json: bool) -> None:
    """The whole chain on synthetic votes and a tiny base, on a CPU.

    In minutes: draws an arena whose true probabilities are known, prepares, trains, merges, scores and reports.
    """
    from scoring.pipeline import demo

    context, show = start("demo", "sft")
    finish(context, demo(context, seed, fresh=fresh, show=show), as_json)


@cli.command()
@cl.output_options
@click.pass_context
def doctor(ctx: click.Context, as_json: bool) -> None:
    """Say what this machine can run and what is missing.

    Each fault comes with its remedy; exit code 1 on a fault.
    """
    from factory.doctor import as_lines, as_report, examine

    findings = examine()
    report = as_report(findings)
    say(json.dumps(report, indent=2) if as_json else "\n".join(as_lines(findings)))
    ctx.exit(0 if report["ok"] else 1)


@cli.command()
@cl.new_options
def new(
    name: str,
    model: str | None,
    source: str | None,
    template: str | None,
    bits: str | None,
    cutoff: int | None,
    as_json: bool,
) -> None:
    """Make another experiment, for one model or as a copy.

    It is factory_configs/EXP with experiment.yaml and all its recipes.
    """
    from common.progress import Show
    from factory.new_experiment import BITS, CUTOFF_LEN, NewExperiment, copied_experiment, new_experiment

    if (model is None) == (source is None):
        raise click.UsageError("give --model ID, or --from EXP to copy an experiment")
    if source is not None:
        if template or bits or cutoff:
            raise click.UsageError("--from copies all settings: edit the copy's experiment.yaml, then run.py render")
        exp, following = copied_experiment(name, source, show=Show())
    else:
        wanted = NewExperiment(name, str(model), template, BITS[bits or "4"], cutoff or CUTOFF_LEN)
        exp, following = new_experiment(wanted, show=Show()), f"python run.py prepare -e {name} --train FILE"
    made = {"folder": str(exp.folder), "model": exp.model, "template": exp.template}
    line = f"{exp.folder}: {exp.model} with template {exp.template}; next: {following}"
    say(json.dumps(made) if as_json else line)


@cli.command()
@cl.render_options
def render(experiment: str, force: bool, as_json: bool) -> None:
    """Render the recipes of an experiment anew; needs no votes.

    After a change of experiment.yaml or of a template. Recipes that were edited by hand are kept.
    """
    from factory.prepare import render_recipes

    context, show = start(experiment)
    states = render_recipes(context.experiment, force=force, show=show)
    lines = [f"{path}: {state}" for path, state in states.items() if state in ("unchanged", "hand-edited")]
    say(json.dumps(states) if as_json else "\n".join(lines))


@cli.command()
@cl.clean_options
def clean(yes: bool, as_json: bool) -> None:
    """Delete earlier runs, which --fresh put aside (*.earlier-N).

    Lists them with their sizes and asks first.
    """
    from factory.state import archived, delete
    from factory.status import archived_lines

    found = archived()
    say("\n".join(archived_lines(found)) or "there are no earlier runs", err=as_json)
    if found and not yes:
        click.confirm("Delete them?", abort=True, err=True)
    for path in found:
        delete(path)
    if as_json:
        say(json.dumps({"deleted": {str(path): size for path, size in found.items()}}))


@cli.command()
@cl.prepare_options
def prepare(experiment: str, as_json: bool, **options: Any) -> None:
    """Read votes, check, fold and fit them; write data and recipes.

    What is fitted to the token budget goes to data/EXP, with an audit of what was read, cut and rejected. An
    earlier export there is replaced; files in that folder that no export wrote are never deleted, but must be moved
    first.
    """
    from factory.prepare import prepare
    from factory.status import experiment_status, next_commands

    context, show = start(experiment)
    audit = prepare(context.experiment, **options, show=show)
    if as_json:
        say(json.dumps(audit, indent=2))
        return
    say(f"data: {context.experiment.data_folder}   (what was read, cut and rejected: audit.json)")
    for command in next_commands(experiment_status(context)):
        say(f"next: {command}")


def _train(experiment: str, stage: str, as_json: bool, fold: str | None, **options: Any) -> None:
    from scoring.pipeline import run_folds, run_stage

    context, show = start(experiment, stage)
    fold = cl.fold_named(fold, context.experiment)
    if fold is None:
        finish(context, run_stage(context, **options, show=show), as_json)
        return
    finish(*run_folds(context, fold, **options, show=show), as_json)


@cli.command()
@cl.training_options
def sft(experiment: str, as_json: bool, **options: Any) -> None:
    """Fine-tune on the verdicts' labels, merge, score, report. What is finished is kept and not repeated."""
    _train(experiment, "sft", as_json, **options)


@cli.command()
@cl.option(
    "--view",
    type=click.Choice(["judge", "reward"]),
    default="reward",
    help="judge: the true verdict's label over a wrong one; reward: the winning response over the losing one.",
)
@cl.training_options
def dpo(view: str, experiment: str, as_json: bool, **options: Any) -> None:
    """Train on preferences, of labels or of responses.

    Of labels in the judge view, of responses in the reward view; then score and report.
    """
    _train(experiment, f"dpo_{view}", as_json, **options)


@cli.command()
@cl.training_options
def rm(experiment: str, as_json: bool, **options: Any) -> None:
    """Train a reward model on winning and losing responses.

    Then merge it with its value head, score and report.
    """
    _train(experiment, "rm", as_json, **options)


@cli.command()
@cl.probe_options
def probe(experiment: str, as_json: bool, **options: Any) -> None:
    """Fit a linear probe on the untrained model; no GPU needed.

    On hidden states of both answers; cross-fitting chooses layer and strength. Then score and report.
    """
    from scoring.probe_stage import run_probe

    context, show = start(experiment, "probe")
    finish(context, run_probe(context, **options, show=show), as_json)


@cli.command()
@cl.experiment_or(None, "Only this one.  [default: all of them]")
@cl.output_options
def status(experiment: str | None, as_json: bool) -> None:
    """List the experiments, their stages and what to do next.

    Each scored stage has its log loss beside that of the class prior.
    """

    from common.experiment import load_experiment
    from common.progress import PlainConsole
    from factory.state import archived
    from factory.status import archived_lines, experiment_names, print_status, status_of

    if experiment:
        load_experiment(experiment)  # an unknown name is wrong use
    found = status_of([experiment] if experiment else experiment_names())
    if as_json:
        earlier = {str(path): size for path, size in archived().items()}
        say(json.dumps({"experiments": [asdict(each) for each in found], "earlier_runs": earlier}, indent=2))
    else:
        print_status(PlainConsole(), found)
        for line in archived_lines(archived())[-1:]:
            say(line)


@cli.command()
@cl.forecast_options
def forecast(experiment: str, as_json: bool, **what: Any) -> None:
    """Forecast memory and hours of every stage on cards.

    Of training and scoring, from the exported rows' token lengths; before any votes or model are on disk, from the
    competition's.
    """
    from common.progress import PlainConsole
    from factory.forecast import forecast, print_forecast

    found = forecast(start(experiment)[0].experiment, **what)
    say(json.dumps(found, indent=2)) if as_json else print_forecast(PlainConsole(), found)


@cli.command()
@cl.serve_options
def serve(experiment: str, stage: str, fold: str | None, **options: Any) -> None:
    """Answer battles over HTTP with calibrated probabilities.

    POST /v1/judge; a page to try it at /. It ends with Ctrl-C or SIGTERM, after what it took is answered.
    """
    from scoring.service_app import serve_stage

    context, show = start(experiment, stage, fold, judge=True)
    serve_stage(context, **options, show=show)


@cli.command()
@cl.page_options
@cl.verbose_option
def board(host: str, port: int | None, no_open: bool) -> None:
    """LLaMA-Factory's web UI with these experiments, on 127.0.0.1.

    It is LLaMA Board, with our data sets and every trained adapter in it.
    """
    from common.progress import Show
    from factory.board import serve_board

    serve_board(host, port, open_browser=not no_open, show=Show())


@cli.command()
@cl.watch_options
def watch(experiment: str | None, stage: str | None, fold: str | None, as_json: bool, **options: Any) -> None:
    """Watch a run: progress, losses, log loss beside the baselines.

    A run of the command line, in the browser or in the terminal.
    """
    from scoring.run_status import in_words
    from scoring.watch import experiment_at_work, watch

    one = bool(stage) and not options["tensorboard"]
    context, show = start(experiment or experiment_at_work(), stage, fold, judge=one)
    seen = watch(context.experiment, stage and context.label, as_json=as_json, **options, show=show)
    if seen is not None:
        say(json.dumps(asdict(seen), indent=2) if as_json else "\n".join(in_words(seen)))


@cli.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]), help="The shell to print it for.")
@cl.verbose_option
def completion(shell: str) -> None:
    """Print a script that lets bash, zsh or fish complete `run.py`.

    It puts run.py on the PATH: source <(python run.py completion bash), then run.py sft -e and the Tab key.
    """
    folder = shlex.quote(str(Path(__file__).resolve().parent))
    click.echo(f"set -gx PATH {folder} $PATH" if shell == "fish" else f'export PATH={folder}:"$PATH"')
    click.echo(get_completion_class(shell)(cli, {}, "run.py", "_RUN_PY_COMPLETE").source())


for each in COMMANDS:
    cli.add_command(each)


if __name__ == "__main__":
    os.environ["PYTHONSAFEPATH"] = "1"  # workers import nothing from the current folder
    # Beside another busy process, threads that spin while they wait for each other lose time: of llama.cpp two were
    # twenty times slower than one. torch and llama.cpp read this when they are loaded, here and in every child.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    for name in ("bitsandbytes.backends.cpu.ops", "transformers.integrations.bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)  # their advice (another package, a type) reads like a fault
    make_output_safe()
    sys.exit(cli())
