"""How many requests a second `run.py serve` answers, and how long each waits.

    python benchmarks/serving.py --work FOLDER [--experiment demo] [--stage sft] [--clients 1 8 64] [--minutes 0]

FOLDER is a place where the stage was scored. Each client has a connection of its own and sends a battle of the
validation fold, waits for the answer and sends the next one; one client is one request at a time. With --minutes the
largest number of clients goes on so long, and the server's memory is looked at every minute.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time

import numpy as np
import psutil
from figures import ROOT, options, publish, table

REQUESTS = 600  # of each number of clients
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


async def load(clients: int, requests: int, bodies: list[bytes], seconds: float = 0) -> tuple[float, np.ndarray]:
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
        writer.close()

    await asyncio.gather(*(client(number) for number in range(clients)))
    return time.perf_counter() - began, np.array(waits)


async def measure(server: psutil.Process, clients: list[int], minutes: float) -> tuple[list[list[str]], list[float]]:
    """Return a line a number of clients, and the server's memory in MiB after each minute of the soak."""
    while True:
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", PORT)
            break
        except OSError:
            assert server.is_running() and server.status() != psutil.STATUS_ZOMBIE, "the server has ended"
            await asyncio.sleep(0.2)
    bodies = [json.dumps(each).encode() for each in await answer(reader, writer, "/v1/examples")]
    await load(max(clients), 64, bodies)
    lines, first = [], 0.0
    for count in clients:
        seconds, waits = await load(count, REQUESTS, bodies)
        speed = len(waits) / seconds
        first = first or speed
        waited = [f"{1000 * np.percentile(waits, q):,.0f} ms" for q in (50, 99)]
        lines.append([f"{count}", f"{speed:,.0f}", f"**{speed / first:.2f}**", *waited])
        print(" | ".join(lines[-1]), flush=True)
    memory = []
    for _ in range(round(minutes)):
        await load(max(clients), 0, bodies, seconds=60)
        memory.append(server.memory_info().rss / 2**20)
        print(f"{memory[-1]:,.0f} MiB", flush=True)
    return lines, memory


def main() -> None:
    parser = options(__doc__, work=True)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--clients", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--minutes", type=float, default=0)
    asked = parser.parse_args()
    command = [sys.executable, str(ROOT / "run.py"), "serve", "-e", asked.experiment, "--stage", asked.stage]
    with subprocess.Popen(
        [*command, "--port", str(PORT)], cwd=asked.work, env={**os.environ, "ARENA_FACTORY_HERE": "1"}
    ) as server:
        try:
            lines, memory = asyncio.run(measure(psutil.Process(server.pid), asked.clients, asked.minutes))
        finally:
            server.terminate()
    text = table(["clients", "requests/s", "against one at a time", "median wait", "99% wait"], lines)
    if memory:
        text += f"\n\n{len(memory)} minutes with {max(asked.clients)} clients: memory {memory[0]:,.0f} MiB after the "
        text += f"first minute, {memory[-1]:,.0f} MiB after the last."
    publish("serving", text, asked.write)


if __name__ == "__main__":
    main()
