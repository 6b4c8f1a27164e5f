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
import json
import os
import subprocess
import sys
import time
from argparse import Namespace

import numpy as np
import psutil
from figures import ROOT, options, publish, table

PORT = 7999


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes = b"") -> dict:
    """Send one request on an open connection; return the JSON of its answer."""
    method = "POST" if body else "GET"
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1:{PORT}\r\nContent-Type: application/json\r\n"
    writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    lines = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
    assert " 200 " in lines[0], lines[0]
    length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length:"))
    return json.loads(await reader.readexactly(length))


async def load(
    clients: int, requests: int, bodies: list[bytes], seconds: float = 0, pause: float = 0
) -> tuple[float, np.ndarray]:
    """Return the wall time and the waiting times [requests] of so many clients; they go on for `seconds` at least."""
    waits: list[float] = []
    began = time.perf_counter()

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
        sent = number
        while sent < requests or time.perf_counter() - began < seconds:
            asked = time.perf_counter()
            await answer(reader, writer, "/v1/judge", bodies[sent % len(bodies)])
            waits.append(time.perf_counter() - asked)
            sent += clients
            await asyncio.sleep(pause)
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return time.perf_counter() - began, np.array(waits)


async def measure(server: psutil.Process, asked: Namespace) -> tuple[list[list[str]], list[list[str]]]:
    """Return a line a number of clients, and a line a minute of the soak."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            break
        except OSError:
            assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE, "the server has ended"
            await asyncio.sleep(0.2)
    bodies = [json.dumps(each).encode() for each in await answer(reader, writer, "/v1/examples")]
    await load(max(asked.clients), asked.requests // 10, bodies)
    lines, first = [], 0.0
    for count in asked.clients if asked.requests else ():
        seconds, waits = await load(count, max(asked.requests, count), bodies)
        speed = len(waits) / seconds
        first = first or speed
        waited = [f"{1000 * np.percentile(waits, q):,.0f} ms" for q in (50, 99)]
        lines.append([f"{count}", f"{len(waits)}", f"{speed:,.3g}", f"**{speed / first:.2f}**", *waited])
        print(" | ".join(lines[-1]), flush=True)
    soak, sent = [], 0
    for minute in range(1, asked.minutes + 1):
        sent += len((await load(max(asked.clients), 0, bodies, seconds=60, pause=asked.pause))[1])
        held = [f"{server.memory_info().rss / 2**20:,.0f} MiB", f"{server.num_fds()}", f"{server.num_threads()}"]
        soak.append([f"{minute}", f"{sent:,}", *held])
        print(" | ".join(soak[-1]), flush=True)
    return lines, soak


def main() -> None:
    parser = options(__doc__, work=True)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--requests", type=int, default=600, help="of each number of clients")
    parser.add_argument("--minutes", type=int, default=0)
    parser.add_argument("--pause", type=float, default=0, help="seconds behind each answer of the soak")
    asked = parser.parse_args()
    command = [sys.executable, str(ROOT / "run.py"), "serve", "-e", asked.experiment, "--stage", asked.stage]
    with subprocess.Popen(
        [*command, "--port", str(PORT)], cwd=asked.work, env={**os.environ, "ARENA_FACTORY_HERE": "1"}
    ) as server:
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
