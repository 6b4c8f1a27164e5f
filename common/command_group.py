"""How every command of run.py behaves: errors with a remedy and an exit code, only in the project's own folder."""

from __future__ import annotations

import shlex
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from common.console import printable
from common.errors import ArenaError, UsageError, stop_signals, user_error

VERSION = "0.1.0"
# One call of each command, as its --help shows it.
EXAMPLES = {
    "audit-labels": "-e qwen3-4b --stage sft --rows 50",
    "board": "--no-open",
    "clean": "",
    "compare": "-e qwen3-4b -e qwen3-8b",
    "completion": "bash",
    "demo": "--seed 2",
    "doctor": "",
    "dpo": "-e qwen3-4b --view judge",
    "ensemble": "-e qwen3-4b:sft -e qwen3-4b:tfidf --name both",
    "export": "-e qwen3-4b --stage sft --quantization q4_k_m",
    "forecast": "-e qwen3-4b --gpu-memory 12",
    "kaggle-pack": "-e qwen3-4b --stage sft --user NAME",
    "new": "longer --from qwen3-4b",
    "prepare": "-e qwen3-4b --train llm-classification-finetuning.zip --test llm-classification-finetuning.zip",
    "probe": "-e smollm2-135m",
    "publish": "-e qwen3-4b --stage sft --repo OWNER/NAME --dry-run",
    "rank": "--votes votes.csv --style",
    "render": "-e qwen3-4b",
    "rm": "-e qwen3-4b --until train",
    "score": "-e qwen3-4b --stage sft --input test.csv --time-limit 8h",
    "serve": "-e qwen3-4b --stage sft --agree 0.8",
    "sft": "-e qwen3-4b --resume",
    "show": "30192 -e qwen3-4b --swapped",
    "status": "-e qwen3-4b",
    "verify": "-e qwen3-4b --stage sft",
    "watch": "-e qwen3-4b --terminal",
}


class OwnFolder(click.Command):
    """Refuses to run in another folder, and an option given twice, of which click would silently use the last."""

    def invoke(self, ctx: click.Context) -> Any:
        if self.name not in ("completion", "doctor") and not ctx.find_root().params["here"]:
            require_own_folder()
        return super().invoke(ctx)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        if self.name in EXAMPLES:
            formatter.write(f"\nExample: python run.py {self.name} {EXAMPLES[self.name]}".rstrip() + "\n")

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for each in given:
            if isinstance(each, click.Option) and not (each.multiple or each.is_flag) and given.count(each) > 1:
                raise click.UsageError(f"{each.opts[-1]} is given {given.count(each)} times: give it once", ctx)
        return super().parse_args(ctx, args)


class ErrorsWithRemedy(click.Group):
    """Turns our errors into a message with its remedy and an exit code; -v shows where they come from."""

    command_class = OwnFolder

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with stop_signals():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except BaseException as raised:
            error = raised if isinstance(raised, ArenaError) else user_error(raised, ctx.invoked_subcommand)
            if error is None:
                raise
            if is_verbose(ctx):
                click.echo(printable(traceback.format_exc()), err=True, nl=False)
            failure = click.ClickException(str(error))
            failure.exit_code = error.exit_code
            raise failure from None


def say(text: str, *, err: bool = False) -> None:
    """Print a result; control characters in it do not reach the terminal."""
    click.echo(printable(text), err=err)


def is_verbose(ctx: click.Context) -> bool:
    return bool(ctx.find_root().ensure_object(dict).get("verbose"))


def require_own_folder() -> None:
    """Raise UsageError where the current folder does not hold this project."""
    here = Path.cwd()
    # On Kaggle the project's files are links in a folder of the user's.
    roots = Path(__file__).resolve().parents[1], Path(sys.argv[0]).absolute().parent
    if here not in roots and here not in [root.resolve() for root in roots]:
        raise UsageError(
            "is not this project's folder: experiments, recipes and settings of libraries are read from it",
            where=str(here),
            remedy=f"cd {shlex.quote(str(roots[0]))}; or, where all files here are yours, "
            "`run.py --here COMMAND` or ARENA_FACTORY_HERE=1",
        )
