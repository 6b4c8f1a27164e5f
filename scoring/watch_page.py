"""The watch page: a run of the command line in the browser, drawn by LLaMA-Factory's own readers (Gradio).

`python -m scoring.watch_page --experiment demo --stage sft --score 0 --port 7860`; `run.py watch` starts it.
"""

from __future__ import annotations

import sys
from typing import Any

from matplotlib.figure import Figure

from common.experiment import load_experiment
from factory.board import log_lines
from factory.serve_page import serve_gradio
from factory.stage_context import context_labelled
from scoring.run_status import BASELINE_NAMES, RunStatus, in_words
from scoring.watch import Watcher

_TICK = 2.0  # seconds between two looks
_LOG_LINES = 40
_MEAN = ", a mean over the label and the tokens that close the turn: of three, 0.37 is 1.10 for the label, a guess"
_HIGHEST = 1.6  # log loss at the top of the chart; a third for each class costs 1.0986


def main(arguments: list[str]) -> int:
    """Serve the page until the process is ended."""
    return serve_gradio(build, arguments, "experiment", "stage", "score")


def build(experiment: str, stage: str, score: str) -> Any:
    """Return the page (gradio.Blocks), which reads the run again every two seconds."""
    import gradio as gr
    from llamafactory.webui.control import get_trainer_info  # now, so that the first look does not wait for it

    watcher = Watcher(load_experiment(experiment), stage, int(score)).start()
    context = context_labelled(load_experiment(experiment), stage)

    def update(before: Any) -> list[Any]:
        status = watcher.status()
        now = (len(status.curve), len(status.measured), bool(status.ladder), status.point and status.point.step)
        progress, losses = gr.skip(), gr.skip()
        try:
            _, progress, info = get_trainer_info("en", str(context.adapter), True)
            losses = info.get("loss_viewer", gr.skip())
        except ValueError:  # the trainer is in the middle of a line: the next look has it
            now = before
        # An unchanged chart is not drawn again.
        charts = [losses, gr.Plot(ladder_plot(status))] if now != before else [gr.skip(), gr.skip()]
        log = "\n".join(log_lines(context.folder / "train.log")[-_LOG_LINES:])
        return [now, "\n\n".join(in_words(status)), progress, *charts, log]

    # Fonts of the reader's own system: the page requests none from the internet.
    theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    with gr.Blocks(title=f"{experiment} {stage}", theme=theme) as page:
        drawn = gr.State(None)
        gr.Markdown(f"## {experiment} / {stage}")
        words = gr.Markdown(elem_id="words")
        progress = gr.Slider(0, 100, visible=False, interactive=False)
        with gr.Row():
            losses = gr.Plot(label=f"Training loss{_MEAN if context.name == 'sft' else ''}", elem_id="losses")
            ladder = gr.Plot(label="Validation log loss and what it must beat", elem_id="ladder")
        with gr.Accordion("The end of train.log", open=False):
            tail = gr.Code(interactive=False, language=None)
        shown = [drawn, words, progress, losses, ladder, tail]
        page.load(update, [drawn], shown, show_progress="hidden")
        gr.Timer(_TICK).tick(update, [drawn], shown, show_progress="hidden")
    return page


def ladder_plot(status: RunStatus) -> Figure:
    """Draw the log losses of evaluations (upper bounds) and checkpoints (measured) over the baselines' lines."""
    figure = Figure(figsize=(7, 4.8), layout="constrained")
    figure.get_layout_engine().set(rect=(0, 0, 1, 0.93))  # the page writes its label over the upper left corner
    axes = figure.add_subplot()
    ladder, rows = status.ladder or {}, "all"
    if status.measured:  # compared with the baselines on its own rows, or a lucky sample would look like a good judge
        ladder, rows = status.measured[-1]["ladder"], f"these {status.measured[-1]['rows']}"
    bounds = [each for each in status.evaluations if each["log_loss"] is not None]
    series = {
        "at most, from the evaluation loss (all battles)": ("v-", "#1f77b4", bounds),
        f"measured on {rows} validation battles": ("o-", "#d62728", status.measured),
    }
    losses = list(ladder.values())
    for label, (style, color, points) in series.items():
        if points:
            found = [each["log_loss"] for each in points]
            axes.plot([each["step"] for each in points], found, style, color=color, label=label)
            losses += found
    axes.set_xlim(0, 1.03 * status.point.total if status.point else 1)  # with room for the last point
    if losses:  # a judge that still learns the form of an answer is far above: that must not flatten the rest
        axes.set_ylim(min(losses) - 0.03, min(max(losses), _HIGHEST) + 0.03)
    low, high = axes.get_ylim()
    place = low
    for name, loss in sorted(ladder.items(), key=lambda item: item[1]):
        axes.axhline(loss, linestyle="--", linewidth=1, color="#2a7f3f" if name == "bayes" else "#8a8a8a")
        place = max(loss, place + 0.05 * (high - low))  # names do not cover each other
        text = f"{BASELINE_NAMES[name]} {loss:.4f}"
        axes.annotate(text, (1.01, place), xycoords=("axes fraction", "data"), va="center", annotation_clip=False)
    axes.set_xlabel(f"step (baselines on {rows} validation battles)")
    axes.set_ylabel("log loss")
    if bounds or status.measured:
        figure.legend(loc="outside lower left", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
