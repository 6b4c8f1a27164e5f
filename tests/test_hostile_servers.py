"""Hostile surroundings: what a stranger's folder, web page or log may not do. One guard, one test."""

import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http.client import HTTPConnection
from pathlib import Path

import pytest
import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from factory import board_page
from factory.process import child_environment, module
from factory.serve_page import OwnPagesOnly, free_port, refusal
from scoring import service_app

ROOT = Path(__file__).resolve().parents[1]
NAMES = ("psutil", "filelock", "multiprocessing", "sitecustomize", "factory/launcher", "factory/process")


@pytest.fixture
def strangers(tmp_path) -> Path:
    """A folder whose modules are called like ours and those of libraries; each writes a file where it is imported."""
    (tmp_path / "factory").mkdir()
    (tmp_path / "factory_configs").symlink_to(ROOT / "factory_configs")
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("open('pwned', 'w')")
    return tmp_path


def run_py(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    own = {**child_environment(), "PYTHONPATH": "", "ARENA_FACTORY_HERE": "", **environment}
    call = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(call, cwd=folder, env=own, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        module("factory.process"),
        [sys.executable, "-c", f"import subprocess as s, sys; s.run([sys.executable, '-c', 'import {NAMES[0]}'])"],
        [sys.executable, "-c", "from multiprocessing.resource_tracker import main"],
    ],
    ids=["child", "grandchild", "worker"],
)
@pytest.mark.parametrize("path", ["", ".", f":{ROOT}"])
def test_no_process_imports_a_module_of_the_current_folder(strangers, monkeypatch, command, path):
    monkeypatch.setenv("PYTHONPATH", path)
    subprocess.run(command, cwd=strangers, env=child_environment(), check=True)
    assert not (strangers / "pwned").exists()


def test_a_strangers_folder_is_refused_unless_told(strangers):
    done = run_py(strangers, "status")
    assert done.returncode == 2 and "not this project's folder" in done.stderr and "--here" in done.stderr
    for told in (run_py(strangers, "--here", "status"), run_py(strangers, "status", ARENA_FACTORY_HERE="1")):
        assert told.returncode == 0 and "run.py demo" in told.stdout, told.stderr
    assert run_py(strangers, "sft", "--help").returncode == run_py(ROOT, "status").returncode == 0
    assert not (strangers / "pwned").exists()


@pytest.mark.parametrize("command", [["status"], ["demo"], ["prepare", "--train", "x.csv"], ["doctor"]], ids=" ".join)
def test_a_deleted_folder_ends_with_a_remedy(tmp_path, command):
    call = f"mkdir gone; cd gone; rmdir ../gone; exec {sys.executable} {ROOT / 'run.py'} --here {' '.join(command)}"
    done = subprocess.run(["sh", "-c", call], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("Error: the current folder was deleted"), done.stderr


@pytest.fixture(scope="module", params=["gradio", "tensorboard"])
def server(request, tmp_path_factory) -> Iterator[int]:
    """The port of a real server on 127.0.0.1, as board, watch and watch --tensorboard start theirs."""
    folder, port = tmp_path_factory.mktemp("served"), free_port("127.0.0.1", None)
    own = "import sys, gradio as g; from factory.serve_page import serve_gradio as s"
    own += "; s(lambda: g.Interface(str, 'text', 'text'), sys.argv[1:])"
    page = module("factory.serve_page", "--logdir", str(folder))
    served = {"gradio": [sys.executable, "-P", "-c", own], "tensorboard": page}
    call = [*served[request.param], "--host", "127.0.0.1", "--port", str(port)]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(call, env=child_environment(), stdout=log, stderr=log)
    try:
        until = time.monotonic() + 100
        while "http://127.0.0.1" not in (folder / "log").read_text():
            assert time.monotonic() < until and process.poll() is None, (folder / "log").read_text()
            time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


REBOUND = {"Host": "evil.example:PORT", "Origin": "http://evil.example:PORT", "Sec-Fetch-Site": "same-origin"}
IMAGE, LINK = {"Sec-Fetch-Dest": "image"}, {"Sec-Fetch-Dest": "document"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:PORT", "Origin": "http://localhost:PORT", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Host": "[::1]:PORT"}, 200),
        ({"Host": "127.0.0.1:8080", "Origin": "http://127.0.0.1:8080"}, 200),  # ssh -L 8080
        ({"Sec-Fetch-Site": "cross-site", **LINK}, 200),
        (REBOUND, 421),
        ({"Host": "evil.example"}, 421),
        ({"Host": "127.0.0.1.evil.example"}, 421),
        ({"Host": "evil.example@127.0.0.1"}, 421),
        ({"Host": "10.0.0.1:PORT"}, 421),
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Sec-Fetch-Site": "cross-site", **IMAGE}, 403),
        ({"Sec-Fetch-Site": "same-site", **IMAGE}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Dest": "iframe"}, 403),
    ],
    ids=str,
)
def test_a_server_answers_its_own_pages_only(server, headers, status):
    asked = {key: value.replace("PORT", str(server)) for key, value in headers.items()}
    for method in ("GET", "POST") if status != 200 else ("GET",):
        connection = HTTPConnection("127.0.0.1", server)
        connection.request(method, "/", headers=asked)
        answer = connection.getresponse()
        assert answer.status == status
        assert status != 200 or "default-src 'self'" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize(("host", "name", "known"), [
    ("0.0.0.0", "192.168.1.7:80", True), ("0.0.0.0", "evil.example", False), ("0.0.0.0", socket.gethostname(), True),
    ("localhost", "192.168.1.7", False),
])  # fmt: skip
def test_on_all_networks_numbers_and_the_machines_name_are_known(host, name, known):
    assert (refusal(host, [("Host", name)]) is None) is known


def test_a_websocket_is_guarded_as_well():
    async def echo(socket):
        await socket.accept()
        await socket.send_text("hello")

    client, own = TestClient(OwnPagesOnly(Starlette(routes=[WebSocketRoute("/", echo)]), "127.0.0.1")), "127.0.0.1:1"
    with client.websocket_connect("/", headers={"Host": own, "Origin": f"http://{own}"}) as opened:
        assert opened.receive_text() == "hello"
    for headers in ({"Host": "evil.example"}, {"Host": own, "Origin": "http://evil.example"}):
        with pytest.raises(WebSocketDisconnect), client.websocket_connect("/", headers=headers):
            pass


@pytest.mark.parametrize(
    "sent", [b"", b"GET / HTTP/1.1\r\nHost: 127", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab"]
)
def test_a_connection_that_sends_nothing_is_closed(monkeypatch, sent):
    monkeypatch.setattr(service_app, "SLOWEST_REQUEST", 0.1)

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass

    port = free_port("127.0.0.1", None)
    server = uvicorn.Server(uvicorn.Config(app, "127.0.0.1", port, http=service_app.Impatient, lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        with socket.create_connection(("127.0.0.1", port), timeout=10) as slow:
            slow.sendall(sent)
            with suppress(ConnectionResetError):
                assert slow.recv(1) == b""
    finally:
        server.should_exit = True
        thread.join()


@pytest.mark.parametrize("model", [service_app.BattleIn, service_app.ResponseIn])
def test_thousands_of_unknown_keys_are_one_fault(model):
    with pytest.raises(ValidationError) as caught:
        model.model_validate({f"k{number}": 1 for number in range(100_000)})
    assert caught.value.error_count() == 1


def test_a_log_does_not_leave_its_box():
    prompt = "hello\n```\n![](http://evil.example/?seen)\n"
    shown, *_ = board_page.fenced(lambda: (f"```\n{prompt}\n```\n", None, {}))()
    assert shown.count("```") == 2 and shown.startswith("```\n") and shown.endswith("\n```\n")
    assert board_page.fenced(lambda: ("", None, {}))()[0] == ""
