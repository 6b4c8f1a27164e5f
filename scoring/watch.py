"""Watching a run from another process: in the terminal, once, or in a page; with baselines and scored checkpoints.

The page is drawn as the report is, and read again every two seconds.
"""

from __future__ import annotations

import threading
import time
import webbrowser
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from common.errors import ArenaError, UsageError
from common.experiment import Experiment
from common.progress import Show
from common.stages import TRAININGS
from data_prep.export_reader import truth_of
from data_prep.verdict_shares import probabilities_of
from factory.board import log_lines
from factory.serve_page import (
    QUIET,
    OwnPagesOnly,
    PageServer,
    exposure,
    free_port,
    run_server,
    serve_tensorboard,
    url_of,
)
from factory.stage_context import StageContext, context_labelled
from factory.state import last_checkpoint
from factory.status import OUTDATED, readable_experiments, running_stages
from factory.trainer_log import show_points
from scoring.baselines import baseline_probabilities
from scoring.checkpoints import CheckpointScorer
from scoring.metrics import row_losses, verdict_codes
from scoring.report import figures
from scoring.report.page import environment
from scoring.run_status import RunStatus, events, remarks, run_status, state_in_words, step_in_words
from scoring.score_stage import texts

_LOG_LINES = 40
BUTTON_ROWS = 200  # validation battles that the page's button scores each checkpoint on


def experiment_at_work() -> str:
    """Return the experiment on which a run is at work; raises UsageError where that is none or more than one."""
    names = [each.name for each in readable_experiments()[0] if running_stages(each)]
    if len(names) == 1:
        return names[0]
    what = f"runs of {' and '.join(names)} are at work" if names else "no run is at work here"
    raise UsageError(what, remedy="name an experiment: -e EXP; `python run.py status` lists them")


def stage_to_watch(experiment: Experiment, stage: str | None, score_rows: int = 0) -> str:
    """Return `stage`, or the only one that runs.

    Raises UsageError where there is none or more than one, or where it has no labels and `score_rows` are to be scored.
    """
    running = [stage] if stage else running_stages(experiment)
    if len(running) == 1:
        if score_rows and context_labelled(experiment, running[0]).step.data == "dpo_reward":
            remedy = "leave --score out: scoring fits their link"
            raise UsageError(f"{running[0]} has rewards and no labels", remedy=remedy)
        return running[0]
    if running:
        what, remedy = f"{' and '.join(running)} run", "say which one: --stage"
    else:
        what = "no stage of this experiment runs now"
        start = f"python run.py {TRAININGS[0]} -e {experiment.name}"
        remedy = f"start one in another terminal: {start}; or look at an earlier one: --stage {TRAININGS[0]}"
    raise UsageError(what, where=experiment.name, remedy=remedy)


def baseline_losses(context: StageContext) -> pd.DataFrame:
    """Fit the baselines on the training rows; return each validation row's loss, a column a baseline, by row id.

    Seconds for thousands of battles, up to a minute for 60,000.
    """
    data, seed = context.experiment.data_folder, context.experiment.seed
    valid = texts(data, context.parts("valid"))
    truth = verdict_codes(valid["verdict"])
    shares = dict(baseline_probabilities(texts(data, context.parts("train")), valid, seed))
    known = truth_of(data)
    if known is not None:
        shares["bayes"] = probabilities_of(known, list(valid["id"]), str(data / "truth.csv"))
    return pd.DataFrame({name: row_losses(each, truth) for name, each in shares.items()}, index=list(valid["id"]))


def _log_losses(losses: pd.DataFrame) -> dict[str, float]:
    return {str(name): float(column.to_numpy().mean()) for name, column in losses.items()}


class Watcher:
    """Reads a run's status again and again, and adds baselines and checkpoints' scores from a thread of its own.

    `score_rows` may be set later: from then on the newest checkpoint is scored on so many validation battles.
    """

    def __init__(self, experiment: Experiment, stage: str, score_rows: int = 0):
        self._experiment, self._stage, self.score_rows = experiment, stage, score_rows
        self._baselines: pd.DataFrame | None = None
        self._scorer: CheckpointScorer | None = None
        self._measured: list[dict[str, Any]] = []
        self._faults: list[str] = []

    def start(self) -> Watcher:
        """Fit the baselines and score each checkpoint that appears, in a thread."""
        threading.Thread(target=self._work, daemon=True).start()
        return self

    def finish(self) -> Watcher:
        """Fit the baselines and score the newest checkpoint now, once."""
        self._advance()
        return self

    def status(self) -> RunStatus:
        """Return the run as it is now, with what the thread has found."""
        now = replace(run_status(context_labelled(self._experiment, self._stage)), faults=list(self._faults))
        if now.state == OUTDATED:  # today's validation rows say nothing about a run on another export
            return now
        ladder = now.ladder if self._baselines is None else _log_losses(self._baselines)
        return replace(now, measured=list(self._measured), ladder=ladder)

    def _work(self) -> None:
        while self._advance():
            time.sleep(2)

    def _advance(self) -> bool:
        """Fit the baselines once and score the newest checkpoint; return whether to look again."""
        try:
            context = context_labelled(self._experiment, self._stage)
            status = run_status(context)
            if self._baselines is None and (self.score_rows or not status.ladder):  # its report has the baselines
                self._baselines = baseline_losses(context)
            if self._scorer is None and self.score_rows:
                self._scorer = CheckpointScorer(context, self.score_rows)
            if self._scorer and status.state != OUTDATED:
                self._score_newest(context.adapter)
        except Exception as error:  # in a thread it would reach no user; the next checkpoint would end the same way
            first, *_ = str(error).splitlines() or [""]
            then = "no more checkpoints are scored: " if self._scorer else ""
            what = str(error) if isinstance(error, ArenaError) else f"{type(error).__name__}: {first}"
            self._faults.append(then + what)
            return False
        return True

    def _score_newest(self, adapter: Path) -> None:
        checkpoint = last_checkpoint(adapter, to_go_on=False)
        step = int(checkpoint.name.rsplit("-", 1)[1]) if checkpoint else None
        if step in (None, *(each["step"] for each in self._measured)):
            return
        try:
            loss = float(self._scorer.losses(checkpoint).mean())
        except ArenaError:
            if checkpoint.is_dir():
                raise
            return  # the trainer replaced it by a newer one while it was read
        ids = self._scorer.ids
        ladder = _log_losses(self._baselines.loc[ids])
        self._measured.append({"step": step, "log_loss": loss, "rows": len(ids), "ladder": ladder})


def watch(
    experiment: Experiment,
    stage: str | None,
    *,
    host: str,
    port: int | None,
    no_open: bool,
    terminal: bool,
    once: bool,
    tensorboard: bool,
    score: int,
    as_json: bool,
    show: Show,
) -> RunStatus | None:
    """Watch a stage, or the one that runs, in a page until Ctrl-C; or in the terminal, or once, and return its status.

    Raises UsageError for options that do not go together, and as `stage_to_watch`.
    """
    page = {"open_browser": not no_open, "show": show}
    if tensorboard:
        if once or terminal or as_json or score:
            raise UsageError(
                "--tensorboard has its own page", remedy="leave out --terminal, --once, --score and --json"
            )
        serve_tensorboard(experiment, host, port, **page)
        return None
    stage = stage_to_watch(experiment, stage, score)
    if not (once or terminal or as_json):
        context = context_labelled(experiment, stage)
        serve_watch(context, Watcher(experiment, stage, score).start(), host, port, **page)
        return None
    watcher = Watcher(experiment, stage, score)
    seen = watcher.finish().status() if once or as_json else follow(watcher.start(), show)
    for fault in seen.faults if as_json else ():
        show.note(fault)
    return seen


def follow(watcher: Watcher, show: Show, *, pause: float = 1.0) -> RunStatus:
    """Show a run in the terminal until it ends, or until Ctrl-C; return its last status."""
    status = watcher.status()
    # Between two steps of one command no process holds the stage's lock for a moment: a run that was at work is over
    # when it is not at work three times in a row.
    idle, patience = 0, 3 if status.at_work else 1
    printed: set[Any] = set()
    try:
        with show.line(f"{status.experiment} {status.stage}") as line:
            show_point = show_points(line, status.start_step)
            while True:
                line.update(status.state)
                if status.point and status.point not in printed:
                    printed.add(status.point)
                    show_point(status.last_loss)
                # An evaluation waits for the baselines that it is compared with.
                ready = status.ladder or status.faults or not status.at_work
                found = events(status, status.ladder) if ready else []
                for what, text in [*found, *((fault, fault) for fault in status.faults)]:
                    if what not in printed:
                        printed.add(what)
                        show.note(text)
                idle = 0 if status.at_work else idle + 1
                if idle >= patience:
                    return status
                time.sleep(pause)
                status = watcher.status()
    except KeyboardInterrupt:  # it does not reach the run, which is a process of another terminal
        show.note(f"watching ended; the {status.state} goes on" if status.at_work else "watching ended")
        return status


def serve_watch(
    context: StageContext, watcher: Watcher, host: str, port: int | None, *, open_browser: bool, show: Show
) -> None:
    """Serve the page until Ctrl-C; raises UsageError where it cannot listen."""
    port = free_port(host, port)
    if warning := exposure(host, "read this run; prefer `ssh -L`"):
        show.note(warning)
    url, label = url_of(host, port), context.label

    def announce() -> None:
        show.note(f"watch {context.experiment.name} {label}: {url}   (Ctrl-C ends it)")
        if open_browser:
            threading.Thread(target=webbrowser.open, args=[url], daemon=True).start()  # some browsers keep us waiting

    run_server(PageServer(uvicorn.Config(build_app(context, watcher, host), host, port, **QUIET)), announce)
    show.note("watching ended; a run goes on")


def build_app(context: StageContext, watcher: Watcher, host: str) -> Starlette:
    """Return the page's ASGI app: GET / shows the run, POST /score scores its checkpoints from now on."""

    def page(_: Request) -> Response:
        return HTMLResponse(environment().get_template("watch.html.j2").render(**_view(context, watcher)))

    def score(_: Request) -> Response:
        watcher.score_rows = watcher.score_rows or BUTTON_ROWS
        return RedirectResponse("/", 303)

    routes = [Route("/", page), Route("/score", score, methods=["POST"])]
    return Starlette(routes=routes, middleware=[Middleware(OwnPagesOnly, host=host)])


def _view(context: StageContext, watcher: Watcher) -> dict[str, Any]:
    status = watcher.status()
    bounds = [(each["step"], each["log_loss"]) for each in status.evaluations if each["log_loss"] is not None]
    measured = [(each["step"], each["log_loss"]) for each in status.measured]
    # Compared with the baselines on its own rows, or a lucky sample would look like a good judge.
    ladder = (status.measured[-1]["ladder"] if measured else status.ladder) or {}
    has_labels = context.is_trained and context.step.data != "dpo_reward"
    return {
        "title": f"{status.experiment} {status.stage}",
        "class_names": {},
        "status": status,
        "state": state_in_words(status),
        "step": step_in_words(status),
        "remarks": remarks(status),
        "curve": figures.curve(status.curve),
        "log_losses": figures.log_losses_by_step(bounds, measured, ladder, status.point.total if status.point else 1),
        "button_rows": BUTTON_ROWS if has_labels and not (watcher.score_rows or status.reached) else 0,
        "score_rows": watcher.score_rows,
        "log": "\n".join(log_lines(context.folder / "train.log")[-_LOG_LINES:]),
    }
