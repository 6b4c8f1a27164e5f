"""Pages in a browser: a child process that serves one, on an address of this machine that is free."""

from __future__ import annotations

import argparse
import os
import socket
import webbrowser
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.errors import ArenaError, UsageError
from common.experiment import Experiment
from common.progress import Show
from factory.launcher import follow_parent
from factory.process import module, run_child
from factory.status import running_stages

FIRST_PORT = 7860  # Gradio's
_LISTENING = ("Running on local URL:", "(Press CTRL+C to quit)")  # what Gradio and TensorBoard print then


def free_port(host: str, wanted: int | None = None) -> int:
    """Return `wanted`, or the first free port from 7860 on; raises UsageError where a page cannot be served."""
    what = f"{host!r} is no address of this machine (a name or an IPv4 address, without a port)"
    no_address = UsageError(what, where="--host", remedy="--host 127.0.0.1; a port is given by --port")
    if ":" in host:  # Gradio cannot serve at an IPv6 address
        raise no_address
    for port in [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + 100):
        try:
            family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, number) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except (socket.gaierror, UnicodeError):  # the latter of a name that no network could have: a..b
            raise no_address from None
        except OSError:
            continue
        return port
    taken = f"port {wanted}" if wanted else f"every port from {FIRST_PORT} to {FIRST_PORT + 99}"
    raise UsageError(f"{taken} of {host} is in use or not allowed", remedy="choose another one with --port")


def exposure(host: str) -> str | None:
    """Return a warning where other machines can reach a page, None on the loopback."""
    if host in ("127.0.0.1", "localhost"):
        return None
    return (
        f"warning: everybody who reaches this machine at {host} can start trainings, load models and read files there; "
        "prefer 127.0.0.1 and `ssh -L`"
    )


def serve_page(
    name: str,
    arguments: list[str],
    label: str,
    log: Path,
    host: str,
    port: int | None,
    *,
    open_browser: bool,
    show: Show,
) -> None:
    """Run a module that serves a page as a child process, until Ctrl-C or its own end.

    Prints its address once it listens, and opens a browser where wanted. Raises ArenaError if the module ends with an
    error, UsageError where it cannot listen.
    """
    port = free_port(host, port)
    if warning := exposure(host):
        show.note(warning)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"
    show.note(f"{label}: starting (up to half a minute)")
    listens = False

    def read(line: str) -> None:
        nonlocal listens
        if not listens and any(sign in line for sign in _LISTENING):
            listens = True
            show.note(f"{label}: {url}   (Ctrl-C ends it)")
            if open_browser:
                webbrowser.open(url)

    command = module(name, *arguments, "--host", host, "--port", str(port))
    try:
        run_child(command, log, what=label, on_line=read, interrupted_remedy=str)
    except ArenaError as error:
        if "was interrupted" not in error.what:  # Ctrl-C is how one leaves a page
            raise
    show.note(f"{label}: ended; its log is {log}")


def serve_tensorboard(experiment: Experiment, host: str, port: int | None, *, open_browser: bool, show: Show) -> None:
    """Serve TensorBoard over every run on an experiment's base model until Ctrl-C."""
    folder = experiment.adapter_folder("sft").parent
    if not any(folder.glob("*/runs/*/events.*")) and not running_stages(experiment):  # a running one will write them
        raise ArenaError(
            "no run here wrote anything for TensorBoard",
            where=str(folder),
            remedy=f"train first, with report_to: tensorboard in the recipe: python run.py sft -e {experiment.name}",
        )
    arguments, log = ["--logdir", str(folder), "--reload_interval", "5"], Path("llamaboard_cache", "tensorboard.log")
    serve_page("tensorboard.main", arguments, "tensorboard", log, host, port, open_browser=open_browser, show=show)


def serve_gradio(build: Callable[..., Any], arguments: list[str], *options: str) -> int:
    """Serve the page (gradio.Blocks) that `build` returns until this process is ended; the child's side of serve_page.

    `build` gets the values of the named options.
    """
    follow_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    for name in options:
        parser.add_argument(f"--{name}", required=True)
    given = vars(parser.parse_args(arguments))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from llamafactory.extras.misc import fix_proxy

    fix_proxy()
    page = build(**{name: given[name] for name in options})
    page.queue().launch(server_name=given["host"], server_port=given["port"], share=False, inbrowser=False)
    return 0
