"""The watch page: a run of the command line in the browser, drawn by LLaMA-Factory's own readers (Gradio).

`python -m scoring.watch_page --experiment demo --stage sft --port 7860`; `run.py watch` starts it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.experiment import load_experiment
from factory.board import log_lines
from factory.launcher import follow_parent
from scoring.watch import RUNG_NAMES, Look, Watcher, in_words

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TICK = 2.0  # seconds between two looks
_LOG_LINES = 40
_HIGHEST = 1.6  # log loss at the top of the chart; a third for each class costs 1.0986


def main(arguments: list[str]) -> int:
    """Serve the page until the process is ended."""
    follow_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--experiment", required=True)
    parser.add_argument("--stage", required=True)
    parser.add_argument("--score", type=int, default=0)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from llamafactory.extras.misc import fix_proxy

    fix_proxy()
    experiment = load_experiment(options.experiment)
    watcher = Watcher(experiment, options.stage, options.score).start()
    log = experiment.output_folder(options.stage) / "train.log"
    page = build(watcher, experiment.adapter_folder(options.stage), log)
    page.queue().launch(server_name=options.host, server_port=options.port, share=False, inbrowser=False)
    return 0


def build(watcher: Watcher, adapter: Path, log: Path) -> Any:
    """Return the page (gradio.Blocks), which looks anew every two seconds; an unchanged chart is not drawn again."""
    import gradio as gr
    from llamafactory.webui.control import get_trainer_info  # now, so that the first look does not wait for it

    seen = watcher.look()
    # Fonts of the reader's own system: the page asks nobody on the internet for any.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with gr.Blocks(title=f"{seen.experiment} {seen.stage}", theme=theme) as page:
        drawn = gr.State(None)
        gr.Markdown(f"## {seen.experiment} / {seen.stage}")
        words = gr.Markdown(elem_id="words")
        progress = gr.Slider(0, 100, visible=False, interactive=False)
        with gr.Row():
            losses = gr.Plot(label="Training loss", elem_id="losses")
            ladder = gr.Plot(label="Validation log loss and what it must beat", elem_id="ladder")
        with gr.Accordion("The end of train.log", open=False):
            tail = gr.Code(interactive=False, language=None)
        shown = [drawn, words, progress, losses, ladder, tail]

        def update(before: Any) -> list[Any]:
            return _update(watcher, get_trainer_info, adapter, log, before)

        page.load(update, [drawn], shown, show_progress="hidden")
        gr.Timer(_TICK).tick(update, [drawn], shown, show_progress="hidden")
    return page


def _update(watcher: Watcher, read: Callable, adapter: Path, log: Path, before: Any) -> list[Any]:
    import gradio as gr

    seen = watcher.look()
    now = (len(seen.curve), len(seen.measured), bool(seen.ladder), seen.point and seen.point.step)
    progress, chart = gr.skip(), gr.skip()
    try:
        _, progress, info = read("en", str(adapter), True)
        chart = info.get("loss_viewer", gr.skip())
    except ValueError:  # the trainer is in the middle of a line: the next look has it
        now = before
    changed = now != before
    return [
        now,
        "\n\n".join(in_words(seen)),
        progress,
        chart if changed else gr.skip(),
        gr.Plot(ladder_plot(seen)) if changed else gr.skip(),
        "\n".join(log_lines(log)[-_LOG_LINES:]),
    ]


def ladder_plot(seen: Look) -> Figure:
    """Draw the log losses of evaluations (upper bounds) and checkpoints (measured) over the baselines' lines."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))  # the page writes its label over the upper left corner
    axes = figure.add_subplot()
    bounds = [(each.step, each.log_loss) for each in seen.evaluations if each.log_loss is not None]
    if bounds:
        axes.plot(
            *zip(*bounds, strict=True), "v-", color="#1f77b4", label="at most, from the evaluation loss (all battles)"
        )
    if seen.measured:
        points = [(each.step, each.log_loss) for each in seen.measured]
        label = f"measured on {seen.measured[-1].rows} validation battles"
        axes.plot(*zip(*points, strict=True), "o-", color="#d62728", label=label)
    axes.set_xlim(0, 1.03 * seen.point.total if seen.point else 1)  # the last point is whole
    # A measured point stands beside the baselines on its own rows, or a lucky sample would look like a good judge.
    ladder = seen.measured[-1].ladder if seen.measured else seen.ladder or {}
    rows = f"these {seen.measured[-1].rows}" if seen.measured else "all"
    _draw_rungs(axes, ladder, [value for _, value in bounds] + [each.log_loss for each in seen.measured])
    axes.set_xlabel(f"step (baselines on {rows} validation battles)")
    axes.set_ylabel("log loss")
    if bounds or seen.measured:
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return figure


def _draw_rungs(axes: Any, ladder: dict[str, float], losses: list[float]) -> None:
    """Draw a line for each baseline, with names that do not cover each other."""
    values = [*ladder.values(), *losses]
    if not values:
        return
    # A judge that still learns the form of an answer is far above: that must not flatten what matters.
    low, high = min(values) - 0.03, min(max(values), _HIGHEST) + 0.03
    axes.set_ylim(low, high)
    place = low
    for name, loss in sorted(ladder.items(), key=lambda item: item[1]):
        axes.axhline(loss, linestyle="--", linewidth=1, color="#2a7f3f" if name == "bayes" else "#8a8a8a")
        place = max(loss, place + 0.05 * (high - low))
        text = f"{RUNG_NAMES[name]} {loss:.4f}"
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
