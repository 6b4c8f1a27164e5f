"""What a stage reached, on one screen: the ladder with the result in its place, and where to look next."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.battle import PROBABILITY_COLUMNS
from common.console import printable
from common.stages import STEPS
from factory import status as survey
from scoring.report.formatting import final_flips, points

if TYPE_CHECKING:
    from rich.console import Console

    from common.experiment import Experiment
    from scoring.checks.verify import Verification

_NAMES = {
    "uniform": "uniform, 1/3 each",
    "prior": "class prior",
    "length": "length features",
    "tfidf": "TF-IDF",
    "bayes": "Bayes: the best possible",
}
_STYLES = {"red": "bold red", "amber": "yellow", "info": "dim"}


def print_summary(console: Console, experiment: Experiment, stage: str, report: dict[str, Any]) -> None:
    """Print the ladder of log losses, the flags, and the files that were made."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{experiment.name} / {stage}: log loss on {report['rows']} held-out battles", min_width=56)
    for heading, justify in (("", "left"), ("log loss", "right"), ("95% interval", "right")):
        table.add_column(heading, justify=justify)
    for name, loss, interval in ladder(stage, report):
        own = name == _own(stage)
        shown = "" if not interval else f"{interval[0]:.4f} – {interval[1]:.4f}"
        table.add_row(name, f"{loss:.4f}", shown, style="bold" if own else None)
    console.print(table)
    for line in findings(report):
        console.print(line, highlight=False)
    for flag in report.get("flags", []):
        console.print(f"[{flag['level']}] {flag['text']}", style=_STYLES.get(flag["level"]), markup=False)
    folder = experiment.output_folder(stage)
    console.print(f"report:     {folder / 'report.html'}   (numbers: report.json)", highlight=False)
    submission, why_none = folder / "submission.csv", "none: nothing to submit was exported; prepare with --test FILE"
    console.print(f"submission: {submission if submission.exists() else why_none}", highlight=False)
    for command in next_commands(experiment, stage, report):
        console.print(Text(f"next:       {command}"), soft_wrap=True)


def next_commands(experiment: Experiment, stage: str, report: dict[str, Any]) -> list[str]:
    """Return what to look at or to run after a report: the worst row, then what `status` says."""
    name, commands = shlex.quote(experiment.name), []
    if report.get("worst"):
        worst = shlex.quote(str(report["worst"][0]["id"]))
        commands.append(f"python run.py show {worst} -e {name} --stage {stage}   (its worst row)")
    return [*commands, *survey.next_commands(survey.experiment_view(experiment))]


def input_lines(rows: int, output: Path) -> list[str]:
    """Return what `score --input` made, and what to do with it."""
    columns = ", ".join(("id", *PROBABILITY_COLUMNS))
    return [
        f"probabilities: {output}   ({rows:,} rows: {columns})",
        "next:          hand it in where a submission.csv is asked for, or read it with any table program",
    ]


def export_lines(experiment: Experiment, stage: str, manifest: dict[str, Any]) -> list[str]:
    """Return what `export` made, how near it is to the merged judge, and how to ask it."""
    name, kind, checked = shlex.quote(experiment.name), manifest["quantization"], manifest["checked"]
    apart = points(checked["largest_probability_difference"])
    return [
        f"gguf: {manifest['output']}   ({kind}, {manifest['bytes'] / 2**20:,.1f} MiB)",
        f"      largest difference from the merged judge: {apart} percentage points, on {checked['prompts']} prompts",
        f"next: python run.py score -e {name} --stage {stage} --engine llama.cpp --precision {kind} --input FILE",
        "      docs/edge.md has the other programs that read it",
    ]


def print_comparison(console: Console, experiment: Experiment, result: dict[str, Any]) -> None:
    """Print every stage beside the baselines, and which differences are more than chance."""
    from rich.table import Table

    table = Table(title=f"{experiment.name}: log loss on the same {result['rows']} held-out battles", min_width=64)
    for heading in ("", "log loss", "95% interval", "accuracy", "ECE"):
        table.add_column(heading, justify="right" if heading else "left")
    for row in sorted(result["table"], key=lambda row: row["log_loss"]):
        ends = row["log_loss_ci95"]
        shown = f"{ends[0]:.4f} – {ends[1]:.4f}" if ends else ""
        table.add_row(row["name"], f"{row['log_loss']:.4f}", shown, f"{row['accuracy']:.1%}", f"{row['ece']:.1%}")
    for name, loss in sorted(result["baselines"].items(), key=lambda item: item[1]):
        table.add_row(_NAMES.get(name, name), f"{loss:.4f}", "", "", "", style="dim")
    if result.get("bayes") is not None:
        table.add_row(_NAMES["bayes"], f"{result['bayes']:.4f}", "", "", "", style="dim")
    console.print(table)
    for pair in result["differences"]:
        ends = pair["ci95"]
        said = f"{pair['better']} is better" if pair["better"] else "chance alone may explain it"
        between = f" [{ends[0]:+.4f}, {ends[1]:+.4f}]" if ends else ""
        line = f"{pair['first']} - {pair['second']}: {pair['difference']:+.4f}{between}: {said}"
        console.print(line, highlight=False, markup=False)
    console.print(f"page: {experiment.output_folder('compare') / 'compare.html'}", highlight=False)
    for stage, texts in result["flags"].items():
        for text in texts:
            console.print(f"[red] {stage}: {text}", style=_STYLES["red"], markup=False)
    for line in advice(experiment, result):
        console.print(line, highlight=False, markup=False)


def advice(experiment: Experiment, result: dict[str, Any]) -> list[str]:
    """Return what to do after a comparison: the best stage that nothing red is said of, and what is ahead of it."""
    sound = [row for row in result["table"] if row["name"] in STEPS and not result["flags"].get(row["name"])]
    if not sound:
        return ["no stage is fit to score with: its report says why, docs/recipes.md what to change"]
    best = min(sound, key=lambda row: row["log_loss"])
    ahead = [
        f"{_NAMES.get(name, name)} ({loss:.4f})"
        for name, loss in result["baselines"].items()
        if loss <= best["log_loss"]
    ]
    command = f"python run.py score -e {shlex.quote(experiment.name)} --stage {best['name']} --input FILE"
    lines = [f"next: {command}   (the best single stage on any battles)"]
    if ahead:
        lines.insert(
            0, f"as good as the best stage, {best['name']} ({best['log_loss']:.4f}), or better: {', '.join(ahead)}"
        )
    return lines


def print_verification(result: Verification) -> None:
    """Print one line a finding, what is not in order last, and the verdict."""
    order = ("ok", "warning", "changed", "missing", "failed")
    for finding in sorted(result.findings, key=lambda finding: order.index(finding.state)):
        detail = f"  ({finding.detail})" if finding.detail else ""
        print(printable(f"{finding.state:<8} {finding.what}{detail}"))
    counts = {state: sum(finding.state == state for finding in result.findings) for state in order}
    told = ", ".join(f"{number} {state}" for state, number in counts.items() if number)
    changed = counts["changed"] or counts["missing"]
    verdict = "NOT as it was made" if changed else "as it was made" if result.sound else "WRONG when it was made"
    print(printable(f"{result.folder}: {verdict} ({told})"))


def ladder(stage: str, report: dict[str, Any]) -> list[tuple[str, float, list[float] | None]]:
    """Return (name, log loss, interval) of every baseline, the model and Bayes, the worst first."""
    intervals = report.get("baselines_ci95") or {}
    rungs = [(_NAMES.get(k, k), v, intervals.get(k)) for k, v in report["baselines"].items()]
    rungs.append((_own(stage), report["log_loss"], report.get("log_loss_ci95")))
    if report.get("bayes") is not None:
        rungs.append((_NAMES["bayes"], report["bayes"], intervals.get("bayes")))
    return sorted(rungs, key=lambda rung: -rung[1])


def findings(report: dict[str, Any]) -> list[str]:
    """Return what else is worth a line: share learned, accuracy, position bias, rows that were cut."""
    lines = [f"accuracy {report['accuracy']:.1%}, expected calibration error {report['ece']:.1%}"]
    if report.get("learned_share") is not None:
        lines.insert(
            0, f"learned {report['learned_share']:.0%} of what could be learned: (prior - model) / (prior - Bayes)"
        )
    if bias := report.get("position_bias"):
        gain = bias["tta_gain"]
        way = "lowers" if gain > 0 else "raises"
        final = final_flips(bias, averaged=bool(report["calibration"]["swap_tta"]), decimals=1)
        lines.append(
            f"position bias: P(A) moves by {100 * bias['mean_abs_diff']:.1f} percentage points on average when A and B "
            f"change places; {bias['flip_rate']:.1%} of its first choices flip{final}; averaging both orders {way} the "
            f"log loss by {abs(gain):.4f}"
        )
    judged = (report.get("truncation") or {}).get("judged") or {}
    if judged.get("rows_cut"):
        lines.append(f"{judged['rows_cut_share']:.1%} of these battles were shortened to fit cutoff_len")
    if checks := report.get("checks"):
        states = [check["passed"] for check in checks]
        without = f", {states.count(None)} not applicable" if None in states else ""
        lines.append(f"run checks: {states.count(True)} passed, {states.count(False)} failed{without}")
    return lines


def _own(stage: str) -> str:
    return f"this judge ({stage})"
