"""Several processes that score side by side, each with a model of its own on a GPU (or a share of the cores).

When one dies all are started again, once for each shard, and this is said; what is finished is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from queue import Empty
from threading import Thread
from typing import Any

import numpy as np

from common.errors import ArenaError, same_command
from scoring.executor import Progress, ask, device_of, prepare
from scoring.score_store import RowStore, Shard
from scoring.scorer import Scorer, ScorerSpec

_POLL = 0.2  # seconds between two looks at what the workers report


class Workers:
    """Processes that compute shards side by side, one model each."""

    def __init__(self, spec: ScorerSpec, note: Callable[[str], None], count: int):
        """Start the processes and load the first model; raises ArenaError where it cannot be loaded."""
        self._spec, self._note, self._count = spec, note, count
        self._gpus = visible_gpus() if spec.engine == "torch" else []
        if self._gpus and count > len(self._gpus):
            raise ArenaError(
                f"{count} workers for {len(self._gpus)} visible GPU(s): two models would share one",
                where="--workers",
                remedy=f"give at most {len(self._gpus)}, or leave it out",
            )
        self.device = device_of(spec.engine)
        self._start()
        try:
            self.engine, self.precision = self._pool.submit(_loaded).result()
        except BrokenProcessPool:
            raise self._died("while the model was loaded") from None
        finally:
            self._read_reports(lambda *_: None)

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard with its scores as workers finish them."""
        working: dict[Future, Shard] = {}
        lost: list[Shard] = []
        tried: dict[str, int] = {}
        self._shards = {}
        while True:
            while len(working) < self._count and (shard := lost.pop(0) if lost else next(shards, None)) is not None:
                self._shards[shard.name] = shard
                working[self._pool.submit(_score, store.folder, shard)] = shard
            if not working:
                return
            done, _ = wait(working, timeout=_POLL, return_when=FIRST_COMPLETED)
            self._read_reports(progress)
            for future in done:
                shard = working.pop(future)
                try:
                    yield shard, future.result()
                except BrokenProcessPool:
                    lost = [shard, *working.values()]
                    working.clear()
                    tried |= {each.name: tried.get(each.name, 0) + 1 for each in lost}
                    if any(tried[each.name] > 1 for each in lost):
                        raise self._died(f"again on {' or '.join(each.name for each in lost)}") from None
                    self._note(f"a scoring worker died: started again, with {', '.join(each.name for each in lost)}")
                    self.close()
                    self._start()
                    break

    def close(self) -> None:
        """End every process."""
        self._lifeline.close()  # each worker ends when it is closed, also by our own death
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        lifeline, self._lifeline = context.Pipe(duplex=False)
        self._reports, gpus = context.Queue(), context.Queue()
        for number in range(self._count):
            gpus.put(self._gpus[number] if self._gpus else None)
        arguments = (str(Path.cwd()), self._count, self._spec, lifeline, self._reports, gpus)
        self._pool = ProcessPoolExecutor(self._count, context, initializer=_begin, initargs=arguments)

    def _read_reports(self, progress: Progress) -> None:
        """Pass on what the workers reported: notes for a person, and shares of shards that are done."""
        with suppress(Empty):
            while True:
                name, content = self._reports.get_nowait()
                if name is None:
                    self._note(content)
                elif name in self._shards:
                    progress(self._shards[name], content)

    def _died(self, when: str) -> ArenaError:
        return ArenaError(
            f"a scoring worker was killed {when}, probably for want of memory",
            where="--workers",
            remedy=f"{same_command()} goes on from what is scored; give fewer --workers or a smaller --precision",
        )


def default_workers(engine: str) -> int:
    """Return one for each GPU that is visible to torch, 1 on a CPU."""
    return max(len(visible_gpus()), 1) if engine == "torch" else 1


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES shows each visible GPU to a process of its own."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


_worker: dict[str, Any] = {}  # of this process, where it is a worker: its spec, reports, scorer and stores


def _begin(folder: str, workers: int, spec: ScorerSpec, lifeline: Connection, reports: Any, gpus: Any) -> None:
    """Begin as a worker: a folder, a GPU or a share of the cores, and a thread that ends with the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    Thread(target=_end_with, args=(lifeline,), daemon=True).start()
    os.chdir(folder)
    if (gpu := gpus.get()) is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch looks
    else:
        import torch

        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // workers, 1))
    _worker.update(spec=spec, reports=reports, stores={})


def _end_with(lifeline: Connection) -> None:
    with suppress(EOFError, OSError):
        lifeline.recv()
    os._exit(1)


def _loaded() -> tuple[str, str]:
    """Return engine and precision of this worker's model."""
    return _scorer().engine, _scorer().precision


def _score(folder: Path, shard: Shard) -> np.ndarray:
    """Return the scores [rows, columns] of a shard."""
    stores = _worker["stores"]
    if folder not in stores:  # its sums were checked by the parent
        stores[folder] = RowStore(folder, checked=False)
    prepared = prepare(_scorer(), stores[folder], shard)
    return ask(_scorer(), shard, prepared, lambda _, share: _worker["reports"].put((shard.name, share)))


def _scorer() -> Scorer:
    """Return this worker's scorer, its model loaded on the first call."""
    if "scorer" not in _worker:
        scorer = _worker["spec"].scorer()
        name = multiprocessing.current_process().name
        scorer.note = lambda text: _worker["reports"].put((None, f"{name}: {text}"))
        scorer.open()
        _worker["scorer"] = scorer
    return _worker["scorer"]
