"""The report's plots as PNG files, for a notebook, a README or a message; the page draws its own.

write_plots(report, Path("outputs/demo/sft/plots")) == [Path(".../ladder.png"), ...]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from common.battle import VERDICTS
from common.files import atomic_file
from scoring.report import figures as charts
from scoring.report import formatting as words

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DOTS_PER_INCH = 120
_ACCENT, _OTHER, _BEST, _WARM, _GRID = "#1f5fc4", "#7a8496", "#0b7a5c", "#b4570a", "#dde2ea"
_KINDS = {"model": _ACCENT, "baseline": _OTHER, "bayes": _BEST}


def write_plots(report: dict, folder: Path) -> list[Path]:
    """Write loss_curve.png, reliability.png, confusion.png and ladder.png, each whole or not at all.

    `report` is report.json's content. A plot without data is left out and an earlier file of its name removed,
    so that the folder never shows another run. Needs no display; the same report gives the same bytes.
    """
    import matplotlib.style

    draw: dict[str, Callable[[dict], Figure | None]] = {
        "loss_curve": _loss_curve,
        "reliability": _reliability,
        "confusion": _confusion,
        "ladder": _ladder,
    }
    written = []
    # The user's own matplotlibrc must not change the files.
    with matplotlib.style.context("default"):
        for name, plot in draw.items():
            path, figure = folder / f"{name}.png", plot(report)
            if figure is None:
                path.unlink(missing_ok=True)
                continue
            with atomic_file(path, "wb") as file:
                figure.savefig(file, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
            written.append(path)
    return written


def _figure(width: float, height: float) -> Figure:
    """Return a figure of width × height inches on the Agg canvas, outside pyplot's global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=_GRID)
    axes.set_axisbelow(True)


def _title(report: dict, text: str) -> str:
    stage = " · ".join(str(report[key]) for key in ("experiment", "stage") if report.get(key))
    # A dollar sign would start a formula.
    return f"{stage}: {text}".replace("$", r"\$") if stage else text


def _loss_curve(report: dict) -> Figure | None:
    train, evals = charts.curve_values(report.get("loss_curve") or [])
    if not train and not evals:
        return None
    figure = _figure(7, 4)
    axes = figure.subplots()
    smooth = charts.smoothed(train)
    if train:
        axes.plot(*zip(*train, strict=True), color=_ACCENT, lw=1, alpha=0.35 if smooth else 1, label="training")
    if smooth:
        axes.plot(*zip(*smooth, strict=True), color=_ACCENT, lw=2, label="training, smoothed")
    if evals:
        axes.plot(*zip(*evals, strict=True), "o--", color=_WARM, lw=1.5, label="validation")
    axes.set(xlabel="training step", ylabel="loss (lower is better)", title=_title(report, "training loss"))
    axes.legend(frameon=False)
    _plain(axes, "y")
    return figure


def _reliability(report: dict) -> Figure | None:
    points = report.get("reliability") or {}
    names = {"top": "Its first choice", **words.CLASS_NAMES}
    panels = {name: charts.reliability(points.get(key) or []) for key, name in names.items()}
    if not any(panels.values()):
        return None
    figure = _figure(11, 3.4)
    for axes, (name, bins) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        axes.fill_between([0, 1], [0, 1], color=_GRID, alpha=0.4, lw=0)
        axes.plot([0, 1], [0, 1], color=_OTHER, lw=1.2, ls="--")
        said, happened = [row["confidence"] for row in bins], [row["frequency"] for row in bins]
        axes.plot(said, happened, color=_ACCENT, lw=1, alpha=0.5)
        axes.scatter(said, happened, s=[5 * row["radius"] ** 2 for row in bins], color=_ACCENT, zorder=3)
        axes.set(xlim=(0, 1), ylim=(0, 1.03), aspect="equal", title=name, xlabel="what the judge said")
        _percent_ticks(axes)
        axes.text(0.97, 0.04, "overconfident", ha="right", color=_OTHER, fontsize=8)
        axes.text(0.03, 0.94, "too timid", color=_OTHER, fontsize=8)
    figure.axes[0].set_ylabel("what happened")
    figure.suptitle(_title(report, "reliability (a larger dot holds more battles)"))
    return figure


def _percent_ticks(axes: Axes) -> None:
    ticks = [0, 0.25, 0.5, 0.75, 1]
    labels = [words.percent(tick) for tick in ticks]
    axes.set_xticks(ticks, labels, fontsize=8)
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _confusion(report: dict) -> Figure | None:
    cells = charts.confusion(report.get("confusion"))
    if cells is None:
        return None
    figure = _figure(5, 4.4)
    axes = figure.subplots()
    axes.imshow([[cell["share"] or 0 for cell in row] for row in cells], cmap="Blues", vmin=0, vmax=1.3)
    for line, row in enumerate(cells):
        for column, cell in enumerate(row):
            dark = (cell["share"] or 0) > 0.75
            text = f"{words.count(cell['count'])}\n{words.percent(cell['share'])}"
            weight = "bold" if line == column else "normal"
            color = "white" if dark else "black"
            axes.text(column, line, text, ha="center", va="center", weight=weight, color=color)
    names = [words.CLASS_NAMES[key] for key in VERDICTS]
    axes.set_xticks(range(3), names)
    axes.set_yticks(range(3), names)
    axes.set(xlabel="the judge's first choice", ylabel="true verdict")
    axes.set_title(_title(report, "confusion (share of each row)"), fontsize=11)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return figure


def _ladder(report: dict) -> Figure | None:
    ladder = charts.ladder(report)
    marks = [mark for mark in ladder.marks if mark.value is not None]
    if not marks:
        return None
    figure = _figure(7, 1.4 + 0.42 * len(marks))
    axes = figure.subplots()
    prior = words.finite((report.get("baselines") or {}).get("prior"))
    if prior is not None:
        axes.axvline(prior, color=_OTHER, lw=1.2, ls="--")
    for row, mark in enumerate(marks):
        color = _KINDS.get(mark.kind, _OTHER)
        if mark.ends:
            axes.hlines(row, *mark.ends, color=color, lw=4, alpha=0.45)
        axes.plot(mark.value, row, "o", color=color, ms=8)
        axes.annotate(
            words.number(mark.value),
            (mark.value, row),
            (0, 7),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        )
    axes.set_yticks(range(len(marks)), [mark.name for mark in marks])
    axes.set_ylim(len(marks) - 0.4, -0.8)
    axes.set(xlabel="log loss (further left is better; thick: 95% interval)", title=_title(report, "the ladder"))
    _plain(axes, "x")
    return figure
