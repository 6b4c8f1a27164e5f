"""Pages in a browser: a child process that serves one, on a free address of this machine, to its own pages alone.

`python -m factory.serve_page --logdir saves --host 127.0.0.1 --port 7860` is TensorBoard; `run.py watch` starts it.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import re
import signal
import socket
import sys
import webbrowser
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import uvicorn
from starlette.middleware import Middleware

from common.errors import ArenaError, UsageError
from common.experiment import Experiment
from common.progress import Show
from factory.launcher import follow_parent
from factory.process import module, run_child
from factory.status import running_stages

FIRST_PORT = 7860  # Gradio's
_NAME = re.compile(r"(\[[0-9a-f:.]+\]|[^:]+)(?::\d+)?", re.IGNORECASE)  # of a Host header, without the port
# Nothing is loaded from elsewhere: an image in a model's answer or a log would tell its server what is shown.
_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; frame-ancestors 'self'"
_WHAT_PAGES_DO = "start trainings, load models and read files there; prefer 127.0.0.1 and `ssh -L`"
QUIET = {"access_log": False, "log_level": "error", "server_header": False, "lifespan": "on"}  # uvicorn's
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


def exposure(host: str, what: str = _WHAT_PAGES_DO) -> str | None:
    """Return a warning, with what others can do, where other machines can reach a page; None on the loopback."""
    if host in ("127.0.0.1", "localhost"):
        return None
    return f"warning: everybody who reaches this machine at {host} can {what}"


def url_of(host: str, port: int) -> str:
    """Return the address at which this machine reaches a page."""
    return f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"


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
    url = url_of(host, port)
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
    serve_page("factory.serve_page", arguments, "tensorboard", log, host, port, open_browser=open_browser, show=show)


class PageServer(uvicorn.Server):
    """A server that says so once it listens: an address that is printed earlier may refuse whoever opens it."""

    on_listening: Callable[[], None]

    async def startup(self, sockets: Any = None) -> None:
        """Listen, then call `on_listening`."""
        await super().startup(sockets)
        if self.started:
            self.on_listening()


def run_server(server: PageServer, on_listening: Callable[[], None]) -> None:
    """Serve in this process until SIGTERM or Ctrl-C; raises UsageError where it cannot listen."""
    server.on_listening = on_listening
    # uvicorn raises the signal again once it has ended in order, which is the usual end here, and no failure
    usual = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        server.run()
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    if not server.started:
        what = f"cannot listen at {server.config.host}:{server.config.port}"
        raise UsageError(what, where="--host, --port", remedy="choose others")


def serve_gradio(build: Callable[[], Any], arguments: list[str]) -> int:
    """Serve the page (gradio.Blocks) that `build` returns until this process ends; the child's side of serve_page."""
    follow_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    given = vars(parser.parse_args(arguments))
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from gradio import networking
    from llamafactory.extras.misc import fix_proxy

    fix_proxy()
    networking.url_ok = lambda url: True  # Gradio ends where a busy machine does not answer itself within 3 s
    page = build()
    guard = {"middleware": [Middleware(OwnPagesOnly, host=given["host"])]}
    page.queue().launch(
        server_name=given["host"], server_port=given["port"], share=False, inbrowser=False, app_kwargs=guard
    )
    return 0


def refusal(host: str, headers: Iterable[tuple[str, str]]) -> tuple[int, str] | None:
    """Return status and words for a request that a page from elsewhere may have made, None for one of ours.

    `host` is the address that we listen on. A foreign Host is a name whose owner let it point to this machine (DNS
    rebinding); a foreign Origin or Sec-Fetch-Site is another site's page, which may open ours and nothing else.
    """
    given: dict[str, list[str]] = {}
    for key, value in headers:
        given.setdefault(key.lower(), []).append(value.strip().lower())
    (asked,) = hosts if len(hosts := given.get("host", [])) == 1 else ("",)
    name = _NAME.fullmatch(asked)
    if not name or not _is_ours(name[1], host.lower()):
        return 421, "this server does not answer to that name: open it by the address that run.py printed"
    foreign = not {f"http://{asked}", f"https://{asked}"}.issuperset(given.get("origin", []))
    fetched = not {"none", "same-origin"}.issuperset(given.get("sec-fetch-site", []))
    if foreign or (fetched and given.get("sec-fetch-dest") != ["document"]):
        return 403, "this server does not answer pages of another site"
    return None


def _is_ours(name: str, host: str) -> bool:
    if name in ("127.0.0.1", "localhost", "[::1]", host):
        return True
    if not ipaddress.ip_address(socket.gethostbyname(host)).is_unspecified:
        return False
    try:  # we listen on all of this machine's addresses: any may be asked for, because DNS cannot rebind a number
        return bool(ipaddress.ip_address(name.strip("[]")))
    except ValueError:
        return name in (socket.gethostname().lower(), socket.getfqdn().lower())


class OwnPagesOnly:
    """ASGI middleware for every server that we start: other requests get 421 or 403, and pages load nothing foreign."""

    def __init__(self, app: Callable[..., Any], host: str):
        """Guard `app`, which listens on `host`."""
        self._app, self._host = app, host

    async def __call__(self, scope: dict[str, Any], receive: Callable[..., Any], send: Callable[..., Any]) -> None:
        """Answer a request, or pass it on."""

        async def with_policy(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                own = (b"content-security-policy", _POLICY.encode())
                message = {**message, "headers": [*message.get("headers", []), own]}
            await send(message)

        headers = [(key.decode("latin-1"), value.decode("latin-1")) for key, value in scope.get("headers", [])]
        fault = refusal(self._host, headers) if scope["type"] in ("http", "websocket") else None
        if fault is None:
            await self._app(scope, receive, with_policy)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": fault[1]})
        else:
            text = [(b"content-type", b"text/plain")]
            await send({"type": "http.response.start", "status": fault[0], "headers": text})
            await send({"type": "http.response.body", "body": fault[1].encode()})


def serve_guarded_tensorboard(arguments: list[str]) -> int:
    """Run TensorBoard, which looks at no Host and no Origin itself, until this process is ended."""
    follow_parent()
    from absl import app
    from tensorboard import default, main_lib, program

    def server(native: Callable[..., Any], flags: Any) -> Any:
        def guarded(environ: dict[str, Any], start: Callable[..., Any]) -> Any:
            given = ((key[5:].replace("_", "-"), str(value)) for key, value in environ.items() if key[:5] == "HTTP_")
            if fault := refusal(flags.host, given):
                start(f"{fault[0]} Refused", [("Content-Type", "text/plain")])
                return [fault[1].encode()]
            return native(environ, start)

        return program.WerkzeugServer(guarded, flags)

    main_lib.global_init()
    board = program.TensorBoard(plugins=default.get_plugins(), server_class=server)
    app.run(board.main, ["tensorboard", *arguments], flags_parser=board.configure)
    return 0


if __name__ == "__main__":
    sys.exit(serve_guarded_tensorboard(sys.argv[1:]))
