"""A real Chromium on real pages: one tiny training, LLaMA Board and the watch page, each started as a user does.

Chromium is Debian's (apt-get install chromium); Playwright for Python drives it (make extra-browser).
ARENA_SCREENSHOTS=FOLDER keeps pictures of what was seen.
"""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from chain import ROOT, run_py
from chain import place as lay_out

from data_prep.synthetic import write_arena

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"),
    *("--disable-sync", "--no-first-run"),
)
PATIENCE = 300_000  # milliseconds; a page on a busy machine
# Gradio itself asks these for a script and for fonts; without the internet it does without.
ELSEWHERE = ("cdnjs.cloudflare.com", "fonts.googleapis.com", "fonts.gstatic.com")
RECIPE = {"per_device_train_batch_size": 8, "max_steps": 40, "logging_steps": 1}
RECIPE |= {"save_strategy": "steps", "save_steps": 20, "eval_strategy": "steps", "eval_steps": 20}


@pytest.fixture(scope="session")
def browser():
    """Debian's Chromium, headless."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is missing: make extra-browser")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is missing: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=str(CHROMIUM), args=list(FLAGS))
        yield browser
        browser.close()


class Tab:
    """One page with everything that its console said."""

    def __init__(self, browser, width: int = 1400, height: int = 1800):
        self.page = browser.new_page(viewport={"width": width, "height": height})
        self.page.set_default_timeout(PATIENCE)
        self.errors: list[str] = []  # of the console, apart from what Gradio could not fetch from the internet
        self.page.on("console", self._note)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))

    def _note(self, message) -> None:
        if message.type == "error" and not any(host in message.text + message.location["url"] for host in ELSEWHERE):
            self.errors.append(f"{message.text} ({message.location['url']})")

    def picture(self, name: str) -> None:
        """Keep a picture where one is wanted."""
        if folder := os.environ.get("ARENA_SCREENSHOTS"):
            self.page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)

    def until(self, read, holds, seconds: float = PATIENCE / 1000, pause: float = 0.2):
        """Return what `read()` gives as soon as `holds` it; fails with the last value."""
        value, end = None, time.monotonic() + seconds
        while time.monotonic() < end:
            value = read()
            if holds(value):
                return value
            self.page.wait_for_timeout(1000 * pause)
        raise AssertionError(f"not within {seconds:.0f} s; last seen: {value!r}")


@pytest.fixture
def tab(browser) -> Iterator[Tab]:
    """A fresh tab."""
    opened = Tab(browser)
    yield opened
    opened.page.close()


class Server:
    """A command of run.py that serves a page, in `folder`."""

    def __init__(self, folder: Path, *arguments: str):
        self.log = folder / f"{arguments[0]}.said"
        with self.log.open("wb") as output:
            call = [sys.executable, str(ROOT / "run.py"), *arguments, "--no-open", "--port", str(unused_port())]
            own = {"env": environment(folder), "stdout": output, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(call, cwd=folder, **own)

    @property
    def url(self) -> str:
        """Its address, once it listens."""
        end = time.monotonic() + PATIENCE / 1000
        while time.monotonic() < end and self.process.poll() is None:
            for line in self.log.read_text().splitlines():
                if "http://" in line:
                    return "http://" + line.split("http://")[1].split()[0]
            time.sleep(0.2)
        raise AssertionError(self.log.read_text())

    def end(self) -> None:
        """Press Ctrl-C."""
        self.process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(40)
        self.process.kill()


def unused_port() -> int:
    """Return a port that nobody listens on, chosen by the system: other tests may run beside these."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(folder: Path) -> dict[str, str]:
    # One thread each: several processes of a tiny model on few cores would otherwise wait for one another.
    own = {"HF_DATASETS_CACHE": str(folder / "cache"), "NO_COLOR": "1", "CI": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **own}


@pytest.fixture(scope="session")
def place(browser, tmp_path_factory) -> Path:
    """A folder with an exported arena and a recipe of a minute at most, evaluated and saved on the way."""
    folder = lay_out(tmp_path_factory.mktemp("pages") / "place", sft=RECIPE)
    write_arena(folder / "arena", seed=11, train_rows=700, test_rows=20)
    done = run_py(folder, "prepare", "-e", "demo", "--train", "arena/train.csv", "--truth", "arena/truth.csv")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="session")
def servers(place) -> Iterator[dict[str, Server]]:
    """LLaMA Board and the watch page, started together."""
    started = {"watch": Server(place, "watch", "-e", "demo", "--stage", "sft"), "board": Server(place, "board")}
    yield started
    for server in started.values():
        server.end()


@pytest.fixture(scope="session")
def training(place, servers) -> Iterator[subprocess.Popen]:
    """A run of the command line that begins when the watch page listens."""
    assert servers["watch"].url
    with (place / "training.said").open("wb") as output:
        call = [sys.executable, str(ROOT / "run.py"), "sft", "-e", "demo", "--until", "train"]
        process = subprocess.Popen(call, cwd=place, env=environment(place), stdout=output, stderr=subprocess.STDOUT)
    yield process
    process.send_signal(signal.SIGINT)
    process.wait(40)


@pytest.fixture(scope="session")
def trained(place, training) -> Path:
    """The folder in which that run has ended well."""
    assert training.wait(PATIENCE / 1000) == 0, (place / "training.said").read_text()
    return place
