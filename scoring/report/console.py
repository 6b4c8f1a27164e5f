"""What the terminal shows of a result: the result among its baselines, the findings, and what to do next."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from common.battle import PROBABILITY_COLUMNS
from common.console import printable
from common.experiment import Experiment
from common.progress import PlainConsole
from factory import status
from factory.recipes import as_yaml
from factory.stage_context import StageContext
from scoring.checks.provenance import Verification
from scoring.report import figures
from scoring.report.findings import BASELINE_NAMES, LEVELS, findings, headline, main_figures, outcome, percent, points

_STYLES = {"red": "bold red", "amber": "yellow", "info": "dim"}


def print_reached(context: StageContext, report: dict[str, Any] | None, as_json: bool) -> None:
    """Print what a run reached, for people a table, for programs the report; without one what was made so far."""
    if report is not None:
        print(json.dumps(report, indent=2)) if as_json else print_summary(PlainConsole(), context, report)
        return
    made = {"adapter": context.adapter, **({"merged": context.merged} if context.merged.is_dir() else {})}
    if as_json:
        print(json.dumps({name: str(folder) for name, folder in made.items()}))
        return
    for name, folder in made.items():
        print(f"{name + ':':8} {folder}")
    print(f"next:    {context.command}   (goes on from here to the report)")


def print_summary(console: Console, context: StageContext, report: dict[str, Any]) -> None:
    """Print the log losses, worst first, the findings, the flags, and the files that were made."""
    experiment, stage = context.experiment, context.name
    table = _table(f"{experiment.name} / {stage}: log loss of the verdict, {report['rows']} held-out battles", 56)
    for mark in sorted(figures.report_chart(report).marks, key=lambda mark: -mark.value):
        table.add_row(*_cells(mark), style="bold" if mark.kind == "model" else None)
    console.print(table)
    _print(console, headline(report))
    for name, value, meaning in main_figures(report)[1:3]:
        _print(console, f"{name}: {value} ({meaning})")
    found, flagged = findings(report), [flag["text"] for flag in report["flags"]]
    for section, name in {"position": "Position bias", "truncation": "Truncation", "checks": "Run checks"}.items():
        if sentences := [sentence for sentence in found[section] if sentence not in flagged]:
            _print(console, f"{name}: {' '.join(sentences)}")
    for flag in report["flags"]:
        _print(console, f"{LEVELS[flag['level']]}: {flag['text']}", _STYLES[flag["level"]])
    folder = context.folder
    _print(console, f"report:     {folder / 'report.html'}   (numbers: report.json)")
    submission, why_none = folder / "submission.csv", "none: no test set was exported; prepare with --test FILE"
    _print(console, f"submission: {submission if submission.exists() else why_none}")
    for command in next_commands(context, report):
        # A command must stay one line that can be copied.
        console.print(f"next:       {command}", soft_wrap=True)


def next_commands(context: StageContext, report: dict[str, Any]) -> list[str]:
    """Return what to look at or to run after a report: its worst row, a blend with better baselines, another method."""
    commands = status.next_commands(status.experiment_status(context))
    if blended := report.get("with_baselines"):
        own, loss = context.experiment.name, blended["log_loss"]
        members = " ".join(f"-e {own}:{name}" for name in (context.name, *blended["names"]))
        gain = f"log loss {loss:.4f} on these battles, {report['log_loss'] - loss:.4f} lower"
        commands.insert(0, f"python run.py ensemble {members} --name {own}_blend   ({gain})")
    if report.get("worst"):
        worst = shlex.quote(report["worst"][0]["id"])
        where = f"-e {context.experiment.name} --stage {context.name}"
        commands.insert(0, f"python run.py show {worst} {where}   (its worst row)")
    return commands


def print_comparison(console: Console, folder: Path, result: dict[str, Any]) -> None:
    """Print every stage beside the baselines, which differences are more than chance, and what was set differently."""
    _print_compared(console, result)
    for name, lost in result["left_out"].items():
        if lost:
            _print(console, f"{name}: {lost} of its battles are not judged by all")
    for key, values in result["differs"].items():
        _print(console, f"differs: {key}: {', '.join(f'{name} {as_yaml(value)}' for name, value in values.items())}")
    _print(console, f"page: {folder / 'compare.html'}")
    _print_flags(console, result)
    for line in _advice(result):
        _print(console, line)


def print_ensemble(report: dict[str, Any]) -> None:
    """Print an ensemble beside its members and the baselines, its weights, and the files that were made."""
    console, folder = PlainConsole(), Path("outputs") / report["experiment"] / "ensemble"
    _print_compared(console, report)
    for name, weight in report["blend"]["weights"].items():
        lost = f"; {report['left_out'][name]} of its battles are not judged by all" if report["left_out"][name] else ""
        _print(console, f"weight {weight:.3f}: {name}{lost}")
    _print(console, f"weights: {report['blend']['reason']}")
    _print_flags(console, report)
    for each in ("report.html", "submission.csv"):
        _print(console, f"made: {folder / each}") if (folder / each).exists() else None


def _print_compared(console: Console, result: dict[str, Any]) -> None:
    title = f"{result['experiment']}: log loss on the same {result['rows']} held-out battles"
    table = _table(title, 64, "accuracy", "ECE")
    for row in sorted(result["table"], key=lambda row: row["log_loss"]):
        mark = figures.Mark(row["name"], row["log_loss"], row["log_loss_ci95"])
        table.add_row(*_cells(mark), percent(row["accuracy"]), percent(row["ece"]))
    for mark in sorted(figures.log_loss_chart(result, []).marks, key=lambda mark: mark.value):
        table.add_row(*_cells(mark), style="dim")
    console.print(table)
    for pair in result["differences"]:
        ends = pair["ci95"]
        between = f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else ""
        _print(console, f"{pair['first']} - {pair['second']}: {pair['difference']:+.4f}{between}: {outcome(pair)}")


def _print_flags(console: Console, result: dict[str, Any]) -> None:
    for stage, texts in result["flags"].items():
        for text in texts:
            _print(console, f"{LEVELS['red']}: {stage}: {text}", _STYLES["red"])


def _advice(result: dict[str, Any]) -> Iterable[str]:
    """Yield what to do after a comparison: score with the best stage that has no red flag, if there is one."""
    sound = [row for row in result["table"] if result["flags"].get(row["name"]) == []]
    if not sound:
        yield "no stage is fit to score with: its report says why, docs/recipes.md what to change"
        return
    best = min(sound, key=lambda row: row["log_loss"])
    if better := [BASELINE_NAMES[name] for name, loss in result["baselines"].items() if loss <= best["log_loss"]]:
        yield f"as good as the best stage, {best['name']}, or better: {', '.join(better)}"
    experiment, _, stage = best["name"].rpartition(":")
    command = f"python run.py score -e {shlex.quote(experiment or result['experiment'])} --stage {stage} --input FILE"
    yield f"next: {command}   (the best single stage on any battles)"


def input_lines(made: Mapping[str, Any]) -> list[str]:
    """Return what `score --input` made, how good it is where that is known, and what to do with it."""
    rows, columns, judged = f"{made['rows']:,} rows", f"id, {', '.join(PROBABILITY_COLUMNS)}", made.get("judged")
    if beside := made.get("probabilities"):
        lines = [f"submission:    {made['output']}   ({rows}: id, winner)", f"probabilities: {beside}   ({columns})"]
    else:
        lines = [f"probabilities: {made['output']}   ({rows}: {columns})"]
    if cascade := made.get("cascade"):
        shares = [f"{name} {n:,} ({cascade['tokens'][name]:,} tokens read)" for name, n in cascade["answered"].items()]
        lines += [f"answered by:   {', '.join(shares)}", f"choices:       {cascade['choices']}   (abstain: the second)"]
    if judged:
        ends = judged["log_loss_ci95"]
        between = f" [{ends[0]:.4f}, {ends[1]:.4f}]" if ends else ""
        others = ", ".join(f"{BASELINE_NAMES[name]} {loss:.4f}" for name, loss in judged["baselines"].items())
        lines.append(f"log loss:      {judged['log_loss']:.4f}{between} on {judged['rows']:,} labelled rows; {others}")
        if parts := judged.get("parts"):
            lines.append(
                f"               the first alone {parts['first_alone']:.4f}; on the {parts['passed_on']:,} that it "
                f"passed on {parts['first_there']:.4f}, the second {parts['second_there']:.4f}"
            )
        if seen := judged["training_rows"]:
            lines.append(
                f"warning:       {seen:,} of these are training rows (same id, same prompt): it knew the answer"
            )
    then = "hand it in where a submission.csv is asked for; Kaggle's notebook: kaggle-pack, of sft, dpo_judge or rm"
    return [*lines, f"next:          {then}"]


def export_lines(experiment: Experiment, stage: str, manifest: dict[str, Any]) -> list[str]:
    """Return what `export` made, how near it is to the merged judge, and how to score with it."""
    name, kind, checked = shlex.quote(experiment.name), manifest["quantization"], manifest["checked"]
    apart = points(checked["largest_probability_difference"])
    return [
        f"gguf: {manifest['output']}   ({kind}, {manifest['bytes'] / 2**20:,.1f} MiB)",
        f"      largest difference from the merged judge: {apart} percentage points, on {checked['prompts']} prompts",
        f"next: python run.py score -e {name} --stage {stage} --engine llama.cpp --precision {kind} --input FILE",
        "      docs/edge.md has the other programs that read it",
    ]


def print_verification(result: Verification) -> None:
    """Print one line a finding, what is not in order last, and the verdict."""
    order = ("ok", "warning", "changed", "missing", "failed")
    for finding in sorted(result.findings, key=lambda finding: order.index(finding.state)):
        detail = f"  ({finding.detail})" if finding.detail else ""
        print(printable(f"{finding.state:<8} {finding.what}{detail}"))
    counts = {state: sum(finding.state == state for finding in result.findings) for state in order}
    listed = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    changed = counts["changed"] or counts["missing"]
    verdict = "NOT as it was made" if changed else "as it was made" if result.sound else "WRONG when it was made"
    print(printable(f"{result.folder}: {verdict} ({listed})"))


def _table(title: str, width: int, *more: str) -> Table:
    table = Table(title=title, min_width=width)
    table.add_column("")
    for heading in ("log loss", "95% interval", *more):
        table.add_column(heading, justify="right")
    return table


def _cells(mark: figures.Mark) -> tuple[str, str, str]:
    """Return one row of the table: name, log loss, interval."""
    shown = f"{mark.ends[0]:.4f} – {mark.ends[1]:.4f}" if mark.ends else ""
    return mark.name, f"{mark.value:.4f}", shown


def _print(console: Console, line: str, style: str | None = None) -> None:
    """Print a line as it is: an id or a flag makes no second one."""
    console.print(" ".join(line.splitlines()), style=style)
