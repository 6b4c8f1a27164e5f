"""Processes of this machine that score side by side, each with a model of its own on a GPU or a share of the cores."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from threading import Thread
from typing import Any

from common.errors import ArenaError, same_command
from scoring.executor import Asker, SideBySide
from scoring.scorer import ScorerSpec


class Workers(SideBySide):
    """As many processes as asked for; where one dies the run ends, and what is finished is kept."""

    name = "a worker"

    def __init__(self, spec: ScorerSpec, note: Callable[[str], None], count: int):
        """Start the processes and load the first model; raises ArenaError where it cannot be loaded."""
        gpus = visible_gpus() if spec.engine == "torch" else []
        if gpus and count > len(gpus):
            raise ArenaError(
                f"{count} workers for {len(gpus)} visible GPU(s): two models would share one",
                where="--workers",
                remedy=f"give at most {len(gpus)}, or leave it out",
            )
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        self._pools = [
            ProcessPoolExecutor(1, context, _begin, (spec, str(Path.cwd()), count, gpus[number] if gpus else None))
            for number in range(count)
        ]
        super().__init__([partial(pool.submit, _ask) for pool in self._pools], note)

    def close(self) -> None:
        for pool in self._pools:
            pool.shutdown(wait=False, cancel_futures=True)
        for process in multiprocessing.active_children():  # also in the middle of a shard
            process.kill()

    def _result(self, future: Future) -> Any:
        try:
            return future.result()
        except BrokenProcessPool:
            raise ArenaError(
                "a scoring worker was killed, probably for want of memory",
                where="--workers",
                remedy=f"{same_command()} goes on from what is scored; give fewer --workers or a smaller --precision",
            ) from None


def default_workers(engine: str) -> int:
    """Return one for each GPU that is visible to torch, 1 on a CPU."""
    return max(len(visible_gpus()), 1) if engine == "torch" else 1


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES shows each visible GPU to a process of its own."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


_asker: Asker | None = None  # of this process, where it is a worker


def _begin(spec: ScorerSpec, folder: str, workers: int, gpu: str | None) -> None:
    """Begin as a worker, on a GPU or a share of the cores; it ends with the process that started it."""
    global _asker
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch looks
    else:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // workers, 1))
    _asker = Asker(spec, folder)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _ask(method: str, *arguments: Any) -> Any:
    return getattr(_asker, method)(*arguments)
