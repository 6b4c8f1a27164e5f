"""The options of run.py's commands."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import click

from common.errors import UsageError
from common.stages import DEFAULT_EXPERIMENT, STAGES, TRAININGS

# Those of scoring.engines; its import would cost --help its speed, a test compares them.
ENGINES = ("torch", "llama.cpp")


def _remember_verbose(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    ctx.find_root().ensure_object(dict)["verbose"] = value


def complete_experiment(_ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Name the experiments for the shell: the folders that hold an experiment.yaml."""
    names = sorted(path.parent.name for path in Path("factory_configs").glob("*/experiment.yaml"))
    # another name is no experiment's, and might be a command to the shell
    return [name for name in names if name.startswith(incomplete) and re.fullmatch(r"[\w.-]+", name, re.ASCII)]


def several(*options):
    """Return one decorator of several options, in the order in which --help lists them."""

    def decorate(command):
        for each in reversed(options):
            command = each(command)
        return command

    return decorate


FILE = click.Path(path_type=Path)
SOURCE = click.Path(readable=False)  # or hf://…; the shell completes files
option = click.option
verbose_option = option(
    "-v", "--verbose", is_flag=True, expose_value=False, callback=_remember_verbose, help="Show details and tracebacks."
)
output_options = several(
    option("--json", "as_json", is_flag=True, help="Print the result as JSON on standard output."), verbose_option
)


def experiment_or(default: str | None, what: str):
    """Return the option that chooses an experiment."""
    words = {"default": default, "metavar": "EXP", "shell_complete": complete_experiment, "help": what}
    return option("-e", "--experiment", **words)


experiment_option = experiment_or(DEFAULT_EXPERIMENT, "A folder of factory_configs/.")


def stage_option(which: str):
    """Return the option that chooses a stage; `which` says what for."""
    text = f"{which}; dpo: its trained view; base: untrained; probe: on its states."
    return option("--stage", type=click.Choice((*STAGES, "dpo")), default="sft", help=text)


fold_option = option("--fold", metavar="N", help="With folds: the judge of this one (0, 1, …), or full.")


def judge_options(which: str):
    """Return the options that choose a judge: experiment, stage and fold; `which` says what for."""
    return several(experiment_option, stage_option(which), fold_option)


def fold_named(text: str | None, experiment: Any, usual: str | None = "all") -> Any:
    """Return the fold that --fold means: a number, full, all; `usual` without one; None where there are no folds.

    Raises UsageError for a fold that the experiment does not have.
    """
    where = str(experiment.folder / "experiment.yaml")
    if experiment.folds == 1:
        if text is not None:
            raise UsageError("--fold: this experiment has no folds", where=where, remedy="write folds: 5, then prepare")
        return None
    text = usual if text is None else text
    if text in (None, "full") or (text == "all" and usual):
        return text
    if text.isdecimal() and int(text) < experiment.folds:
        return int(text)
    remedy = f"give 0 to {experiment.folds - 1}, full{' or all' if usual else ''}"
    raise UsageError(f"--fold {text}: there is no such fold", where=where, remedy=remedy)


engine_choice = (
    option("--engine", type=click.Choice(ENGINES), default="torch", help="What runs the model."),
    option(
        "--precision",
        metavar="P",
        help="auto, fp32, bf16, fp16, 8bit, 4bit, adapter (not merged), a GGUF's own.  [default: experiment.yaml's]",
    ),
    option(
        "--workers",
        type=click.IntRange(1),
        help="Processes with a model each; with --ray: actors.  [default: one a visible GPU, 1 on a CPU]",
    ),
)
training_options = several(
    experiment_option,
    option(
        "--fold",
        metavar="N",
        help="With folds: only this one (0, 1, …), full (all votes), or all.  [default: all that answer]",
    ),
    option(
        "--checkpoint",
        metavar="S",
        help="Merge the best (by held-out log loss), the last, or a step's.  [default: as before]",
    ),
    option("--until", type=click.Choice(["train", "merge", "score"]), default="score", help="Stop after this step."),
    option("--resume", is_flag=True, help="Go on from the last checkpoint; from the beginning where none is whole."),
    option("--fresh", is_flag=True, help="Train from the beginning; the earlier run is put aside, not deleted."),
    option(
        "--allow",
        multiple=True,
        metavar="NAME",
        help="A hub id, tracker, address or path that a recipe may reach beyond the project (may be repeated).",
    ),
    output_options,
)
probe_options = several(
    experiment_option,
    option(
        "--layer",
        "layers",
        type=click.IntRange(1),
        multiple=True,
        help="A layer that may be chosen; may be repeated.  [default: at 1/2 and 2/3 of the depth]",
    ),
    option(
        "--precision",
        type=click.Choice(["fp32", "bf16", "fp16"]),
        help="What it computes in.  [default: experiment.yaml's]",
    ),
    option("--fresh", is_flag=True, help="Fit again; what was read of these votes is kept."),
    output_options,
)
engine_options = several(
    *engine_choice,
    option(
        "--ray",
        is_flag=False,
        flag_value="local",
        metavar="[ADDRESS]",
        help="Score with Ray's actors: here, or on the cluster at ray://… (make extra-ray).",
    ),
    option(
        "--time-limit",
        metavar="9h",
        help="Score all rows once within 9h (90m, 1h30m, 3600s), and in the other order too where that fits.",
    ),
    option(
        "--fresh", is_flag=True, help="Score again, also what an interrupted call left; an earlier report is put aside."
    ),
)


address_options = several(
    option("--host", default="127.0.0.1", help="The address to listen on."),
    option("--port", type=click.IntRange(1, 65535), help="The port.  [default: the first free one from 7860 on]"),
)
page_options = several(
    address_options,
    option("--no-open", is_flag=True, help="Do not open a browser."),
)
agree_option = option(
    "--agree",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    metavar="0.9",
    help="Abstain from battles, so that the first choice agrees with people in this share of the others.",
)
serve_options = several(
    judge_options("The stage whose judge answers"),
    agree_option,
    option("--token-file", type=FILE, help="Answer only requests with the bearer token in this file."),
    address_options,
    *engine_choice,
    verbose_option,
)
new_options = several(
    click.argument("name", metavar="EXP", help="Its name, a new folder of factory_configs/."),
    option("--model", metavar="ID", help="A Hugging Face hub id, or a folder that holds config.json."),
    option("--from", "source", metavar="EXP", shell_complete=complete_experiment, help="Copy this one instead."),
    option(
        "--template", metavar="T", help="LLaMA-Factory's chat template.  [default: the model's own, where it is known]"
    ),
    option("--bits", type=click.Choice(["4", "8", "none"]), help="Of the frozen base.  [default: 4]"),
    option("--cutoff", type=click.IntRange(32), help="Token budget of prompt and label.  [default: 2048]"),
    output_options,
)
render_options = several(
    experiment_option, option("--force", is_flag=True, help="Replace recipes that were edited by hand."), output_options
)
clean_options = several(option("--yes", is_flag=True, help="Do not ask."), output_options)


def _pairs(_ctx: click.Context, param: click.Parameter, given: str | None) -> dict[str, str]:
    """Return OURS=THEIRS,… as a mapping."""
    pairs = [pair.partition("=")[::2] for pair in (given or "").split(",") if pair.strip()]
    if wrong := [ours for ours, theirs in pairs if not (ours.strip() and theirs.strip())]:
        raise click.BadParameter(f"{wrong[0]!r} is no pair: write prompt=question,response_a=left", param=param)
    for names in zip(*pairs, strict=True):
        if double := sorted({name.strip() for name in names if names.count(name) > 1}):
            raise click.BadParameter(f"{double[0]} is named twice", param=param)
    return {ours.strip(): theirs.strip() for ours, theirs in pairs}


columns_option = option(
    "--columns",
    metavar="OURS=THEIRS,…",
    callback=_pairs,
    help="What your tables call our columns: prompt=question,response_a=left,winner=label.",
)
prepare_options = several(
    experiment_option,
    option(
        "--train",
        required=True,
        multiple=True,
        type=SOURCE,
        metavar="FILE[:WEIGHT]",
        help="Votes: a table, a folder, Kaggle's zip, or hf://datasets/OWNER/NAME; may be repeated, the target first.",
    ),
    option("--test", type=SOURCE, help="Battles without votes, for the submission; as --train."),
    columns_option,
    option("--truth", type=FILE, help="Known probabilities of all votes (synthetic arenas only)."),
    option("--folds-from", type=FILE, help="A table (id, fold) of given folds; see docs/folds.md."),
    option("--drop-ids", type=FILE, help="A table (id) of battles not to train on; they are still judged."),
    option("--soft", type=FILE, help="Soft labels of battles of --train, as score writes them; see docs/folds.md."),
    option(
        "--soft-share",
        type=click.FloatRange(0, 1, min_open=True),
        default=0.9,
        help="Of a soft label; the verdict has the rest.",
    ),
    option("--force", is_flag=True, help="Replace recipes that were edited by hand."),
    option("--pairs", is_flag=True, help="Write the pairs of responses now, not when dpo or rm first needs them."),
    option(
        "--workers",
        type=click.IntRange(0, 256),
        help="Processes that fit the votes; 0: a thread.  [default: by the number of cores]",
    ),
    output_options,
)
audit_options = several(
    experiment_option,
    stage_option("The stage whose judge looks"),
    option("--rows", type=click.IntRange(1), default=100, help="How many to write."),
    output_options,
)
verify_options = several(
    click.argument("output", required=False, type=FILE, help="A scored stage's folder, outputs/EXP/STAGE."),
    option("-e", "--experiment", metavar="EXP", shell_complete=complete_experiment, help="Instead of OUTPUT."),
    stage_option("The stage, with -e"),
    fold_option,
    output_options,
)
compare_options = several(
    option(
        "-e",
        "--experiment",
        "names",
        multiple=True,
        default=[DEFAULT_EXPERIMENT],
        metavar="EXP",
        shell_complete=complete_experiment,
        help="A folder of factory_configs/; again for one to be compared with it.",
    ),
    output_options,
)
ensemble_options = several(
    option(
        "-e", "members", multiple=True, required=True, metavar="EXP:STAGE", help="A member; STAGE may be tfidf, length."
    ),
    option("--name", required=True, help="Its results go to outputs/NAME/ensemble."),
    option(
        "--weights", default="fitted", metavar="W", help="fitted (cross-fitted), mean, or one for each -e: 0.7,0.3."
    ),
    output_options,
)
rank_options = several(
    option("--votes", type=FILE, help="A table of votes with the columns model_a and model_b."),
    option("--judged", type=FILE, help="Battles of these models that `score --input` has judged."),
    experiment_option,
    stage_option("The stage whose judge scored --judged"),
    option("--style", is_flag=True, help="Take the effect of longer answers off the ratings."),
    columns_option,
    option("--output", type=FILE, default="outputs/rank", help="The folder of ratings.csv and ratings.html."),
    output_options,
)
show_options = several(
    click.argument("battle_id", metavar="ID", help="The battle, as the votes name it."),
    experiment_option,
    stage_option("The stage whose judge answered"),
    option("--split", type=click.Choice(["train", "valid", "test"]), help="Where an id stands twice."),
    option("--swapped", is_flag=True, help="Print the prompt with A and B exchanged."),
    output_options,
)
forecast_options = several(
    experiment_option,
    option("--stage", "stages", multiple=True, type=click.Choice(TRAININGS), help="Only this stage (may be repeated)."),
    option("--card", "cards", multiple=True, metavar="CARD", help="Only this card: T4, 4090, H100, cpu, …"),
    option("--gpu-memory", type=click.FloatRange(1, 1024), metavar="GB", help="A card of so many GB."),
    option(
        "--rows",
        type=click.IntRange(10),
        help="Votes, as long as the competition's.  [default: those exported, else 57,477]",
    ),
    option("--test-rows", type=click.IntRange(0), help="Battles to score.  [default: those exported, else 25,000]"),
    output_options,
)
score_options = several(
    judge_options("The stage whose judge answers"),
    option(
        "--input",
        "source",
        metavar="FILE",
        type=SOURCE,
        help="Battles: a table, a folder, Kaggle's zip (its test.csv), or hf://datasets/OWNER/NAME; without it the "
        "fold and the test set.",
    ),
    columns_option,
    option(
        "--output",
        type=FILE,
        help="For --input's probabilities; only such a file is replaced.  [default: outputs/EXP/STAGE/scored/NAME.csv]",
    ),
    agree_option,
    option(
        "--cascade",
        metavar="EXP:STAGE",
        help="With --input and --agree: a second judge, who answers the battles that the first abstains from.",
    ),
    engine_options,
    output_options,
)
export_options = several(
    judge_options("The judge to export"),
    option(
        "--quantization",
        type=click.Choice(["f16", "bf16", "q8_0", "q4_k_m"], case_sensitive=False),
        default="q8_0",
        help="Bits of the weights; docs/edge.md has what each costs.",
    ),
    option("--output", type=FILE, help="The file; Q is the quantization.  [default: outputs/EXP/STAGE/judge-Q.gguf]"),
    option("--converter", type=FILE, help="A folder of llama.cpp.  [default: .venv/llama.cpp]"),
    output_options,
)
publish_options = several(
    judge_options("The judge to publish"),
    option("--repo", required=True, metavar="OWNER/NAME", help="A model repository of the hub; made if there is none."),
    option("--adapter", is_flag=True, help="The adapter instead of the merged model."),
    option("--private", is_flag=True, help="Only its owner can read it, and whom they allow."),
    option("--dry-run", is_flag=True, help="List every file and its size, and send nothing."),
    output_options,
)
kaggle_options = several(
    judge_options("The judge to pack: sft, dpo_judge or rm"),
    option("--competition", default="llm-classification-finetuning", metavar="SLUG", help="As in its page's address."),
    option(
        "--user", envvar="KAGGLE_USERNAME", metavar="NAME", help="Who owns the data set.  [default: KAGGLE_USERNAME]"
    ),
    option(
        "--precision", type=click.Choice(["fp32", "fp16", "8bit", "4bit"]), default="fp16", help="T4s have no bf16."
    ),
    option("--time-limit", default="8h", metavar="8h", help="As for score: below what the competition allows."),
    option("--output", type=FILE, help="The folder.  [default: outputs/EXP/STAGE/kaggle]"),
    output_options,
)
watch_options = several(
    experiment_or(None, "A folder of factory_configs/.  [default: the one that is at work]"),
    option(
        "--stage",
        type=click.Choice((*STAGES, "dpo")),
        help="The stage to watch; dpo: its view.  [default: the one that runs]",
    ),
    fold_option,
    option("--terminal", is_flag=True, help="Here instead of in a browser, until the run ends."),
    option("--once", is_flag=True, help="Print how far the run is, and end."),
    option("--tensorboard", is_flag=True, help="TensorBoard over all runs on this base model."),
    option(
        "--score", type=click.IntRange(0), default=0, metavar="ROWS", help="Ask each checkpoint about ROWS battles."
    ),
    page_options,
    output_options,
)
