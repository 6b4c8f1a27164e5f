"""What a stage reached, on one screen: the ladder with the result in its place, and where to look next."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from factory.experiment import Experiment

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
    if (folder / "submission.csv").exists():
        console.print(f"submission: {folder / 'submission.csv'}", highlight=False)


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
    lines = [f"accuracy {report['accuracy']:.3f}, expected calibration error {report['ece']:.3f}"]
    if report.get("learned_share") is not None:
        lines.insert(
            0, f"learned {report['learned_share']:.0%} of what could be learned: (prior - model) / (prior - Bayes)"
        )
    if bias := report.get("position_bias"):
        lines.append(
            f"position bias: P(A) moves by {bias['mean_abs_diff']:.3f} on average when A and B change places; "
            f"{bias['flip_rate']:.1%} of the verdicts flip; averaging both orders gains {bias['tta_gain']:+.4f}"
        )
    judged = (report.get("truncation") or {}).get("judged") or {}
    if judged.get("rows_cut"):
        lines.append(f"{judged['rows_cut_share']:.1%} of these battles were shortened to fit cutoff_len")
    return lines


def _own(stage: str) -> str:
    return f"this judge ({stage})"
