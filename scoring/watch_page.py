"""The watch page: a run of the command line in the browser, drawn as the report is, read again every two seconds."""

from __future__ import annotations

import threading
import webbrowser
from typing import Any, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import Route

from common.progress import Show
from factory.board import log_lines
from factory.serve_page import QUIET, OwnPagesOnly, PageServer, exposure, free_port, run_server, url_of
from factory.stage_context import StageContext
from scoring.report import figures
from scoring.report.page import environment
from scoring.run_status import RunStatus, remarks, state_in_words, step_in_words

_LOG_LINES = 40
BUTTON_ROWS = 200  # validation battles that the page's button scores each checkpoint on


class Watcher(Protocol):
    """What the page asks: scoring.watch.Watcher."""

    score_rows: int

    def status(self) -> RunStatus:
        """Return the run as it is now."""


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
