"""How many requests a second `run.py serve` answers, and how long each waits.

    python benchmarks/serving.py --work FOLDER [--experiment demo] [--clients 1 8 64] [--requests 600]
    python benchmarks/serving.py --work FOLDER --clients 4 --requests 0 --minutes 30 --pause 0.25    # a soak

FOLDER is a place where the stage was scored. Each client has a connection of its own and sends a battle of the
validation fold, waits for the answer and sends the next one; one client is one request at a time. With --minutes the
largest number of clients goes on so long, with a pause behind each answer, and the server's memory, files and threads
are measured every minute.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import psutil
from aiohttp import ClientConnectorError, ClientSession, ClientTimeout, TCPConnector
from figures import ROOT, options, publish, row, table

PORT = 7999


async def load(http: ClientSession, clients: int, requests: int, battles: list, seconds=0.0, pause=0.0) -> np.ndarray:
    """Return the waiting times [requests] of so many clients, which go on for `seconds` at least."""
    waits, began = [], time.perf_counter()

    async def client(sent: int) -> None:
        while sent < requests or time.perf_counter() - began < seconds:
            asked = time.perf_counter()
            async with http.post("/v1/judge", json=battles[sent % len(battles)]) as answer:
                await answer.json()
            waits.append(time.perf_counter() - asked)
            sent += clients
            await asyncio.sleep(pause)

    await asyncio.gather(*map(client, range(clients)))
    return np.array(waits)


async def measure(server: psutil.Process, asked: Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """Return a line a number of clients, and a line a minute of the soak."""
    session = {"raise_for_status": True, "connector": TCPConnector(limit=0), "timeout": ClientTimeout()}
    async with ClientSession(f"http://127.0.0.1:{PORT}", **session) as http:
        while True:
            try:
                battles = await (await http.get("/v1/examples")).json()
                break
            except ClientConnectorError:
                assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE, "the server has ended"
                await asyncio.sleep(0.2)
        await load(http, max(asked.clients), asked.requests // 10, battles)
        lines, first, soak, sent = [], 0.0, [], 0
        for count in asked.clients if asked.requests else ():
            began = time.perf_counter()
            waits = await load(http, count, max(asked.requests, count), battles)
            speed = len(waits) / (time.perf_counter() - began)
            first = first or speed
            waited = [f"{1000 * np.percentile(waits, q):,.0f} ms" for q in (50, 99)]
            lines.append(row(count, len(waits), f"{speed:,.3g}", f"**{speed / first:.2f}**", *waited))
        for minute in range(1, asked.minutes + 1):
            sent += len(await load(http, max(asked.clients), 0, battles, seconds=60.0, pause=asked.pause))
            held = f"{server.memory_info().rss / 2**20:,.0f} MiB", server.num_fds(), server.num_threads()
            soak.append(row(minute, f"{sent:,}", *held))
    return lines, soak


def main() -> None:
    own = {"experiment": "demo", "stage": "sft", "clients": (1, 8, 64), "requests": 600, "minutes": 0, "pause": 0.0}
    asked = options(__doc__, "work", **own).parse_args()
    command = [sys.executable, str(ROOT / "run.py"), "--here", "serve", "-e", asked.experiment, "--stage", asked.stage]
    with subprocess.Popen([*command, "--port", str(PORT)], cwd=asked.work) as server:
        try:
            lines, soak = asyncio.run(measure(psutil.Process(server.pid), asked))
        finally:
            server.terminate()
    if lines:
        text = table(["clients", "requests", "requests/s", "against one at a time", "median wait", "99% wait"], lines)
        publish(f"serving-{asked.experiment}", text, asked.write)
    if soak:
        shown = [soak[at - 1] for at in (2, len(soak) // 2, len(soak))]
        publish("soak", table(["minute", "requests", "memory", "open files", "threads"], shown), asked.write)


if __name__ == "__main__":
    main()
