"""Workers: several processes, each with a model of its own on a GPU of its own (or a share of the cores).

A worker computes one shard at a time. One that dies is replaced once, its shard is given out again and this is said;
a shard that ends two workers stops the run, and what is finished is kept.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from common.console import name_of
from common.errors import ArenaError, same_command
from scoring.model_loading import device_name
from scoring.score_store import RowStore, Shard
from scoring.scorer import Scorer, ScorerSpec

# Called with a shard and the share of it that is done, rising from 0 to 1.
Progress = Callable[[Shard, float], None]
Prepared = tuple[list, list[str]]  # token ids and battle ids of a shard's rows


class Executor(Protocol):
    """Computes shards; its model is loaded."""

    engine: str
    precision: str  # what it really computes in
    device: str

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard with its scores [rows, columns], in any order; `shards` are taken as late as possible."""

    def close(self) -> None:
        """Give the models' memory back and end every process."""


class InProcess:
    """One engine in this process; the next shard is tokenized while the model works on this one."""

    def __init__(self, scorer: Scorer, note: Callable[[str], None] = print):
        """Load the scorer's model; `note` is told what a user should know."""
        self._scorer, scorer.note = scorer, note
        scorer.open()
        self.engine, self.precision, self.device = scorer.engine, scorer.precision, device_of(scorer.engine)

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard with its scores, in the order of `shards`, which are taken one ahead."""
        with ThreadPoolExecutor(1) as pool:
            current: tuple[Shard, Future[Prepared]] | None = None
            for shard in shards:
                following = shard, pool.submit(prepare, self._scorer, store, shard)
                if current:
                    yield self._scored(*current, progress)
                current = following
            if current:
                yield self._scored(*current, progress)

    def _scored(self, shard: Shard, prepared: Future[Prepared], progress: Progress) -> tuple[Shard, np.ndarray]:
        return shard, ask(self._scorer, shard, prepared.result(), progress)

    def close(self) -> None:
        """Give the model's memory back."""
        self._scorer.close()


def prepare(scorer: Scorer, store: RowStore, shard: Shard) -> Prepared:
    """Read a shard's rows and make token ids of them."""
    fed = store.fed(shard.rows)
    return scorer.prepare(fed, swapped=shard.swapped), [row["id"] for row in fed]


def ask(scorer: Scorer, shard: Shard, prepared: Prepared, progress: Progress) -> np.ndarray:
    """Return the scores [rows, columns] of a shard's prepared rows; a row that has none is named by its id."""
    sequences, ids = prepared

    return scorer.ask(sequences, progress=lambda share: progress(shard, share), name=lambda i: f"id {name_of(ids[i])}")


def device_of(engine: str) -> str:
    """Return the kind of device that an engine uses: only torch uses a GPU here."""
    return device_name() if engine == "torch" else "cpu"


def open_executor(spec: ScorerSpec, note: Callable[[str], None], *, workers: int | None, ray: str | None) -> Executor:
    """Load the model as often as asked: `workers` processes (None: one a visible GPU), or Ray's actors at `ray`.

    Raises ArenaError where a model cannot be loaded or Ray is missing.
    """
    if ray is not None:
        from scoring.ray_scoring import RayActors

        return RayActors(spec, note, address=ray, actors=workers)
    count = workers or default_workers(spec.engine)
    if count == 1:
        return InProcess(spec.scorer(), note)

    return Workers(spec, note, count)


def default_workers(engine: str) -> int:
    """Return one for each GPU that is visible to torch, 1 on a CPU."""
    return max(len(visible_gpus()), 1) if engine == "torch" else 1


def visible_gpus() -> list[str]:
    """Return the names by which CUDA_VISIBLE_DEVICES shows each visible GPU to a process of its own."""
    import torch

    count = torch.cuda.device_count()
    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return named[:count] if named else [str(number) for number in range(count)]


_GRACE = 10.0  # seconds that a worker has to end


@dataclass
class _Worker:
    """A process as its parent sees it: its pipe, its GPU or None, and the shard that it is computing."""

    process: Any
    pipe: Connection
    slot: int
    shard: Shard | None = None


class Workers:
    """Processes that compute shards side by side, one model each."""

    def __init__(self, spec: ScorerSpec, note: Callable[[str], None], count: int):
        """Start the processes and wait until every model is loaded; raises what one of them raises."""
        self._spec, self._note, self._count = spec, note, count
        self._gpus = visible_gpus() if spec.engine == "torch" else []
        if self._gpus and count > len(self._gpus):
            raise ArenaError(
                f"{count} workers for {len(self._gpus)} visible GPU(s): two models would share one",
                where="--workers",
                remedy=f"give at most {len(self._gpus)}, or leave it out",
            )
        self.device = device_of(spec.engine)
        self._workers: list[_Worker] = []
        self._retries: dict[str, int] = {}
        try:
            self._workers = [self._start(slot) for slot in range(count)]
            found = [self._ready(worker) for worker in self._workers]
        except BaseException:
            self.close()
            raise
        self.engine, self.precision = found[0]

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard with its scores as workers finish them."""
        again: deque[Shard] = deque()
        while True:
            for worker in self._workers:
                if worker.shard is None:
                    self._give(worker, store, again.popleft() if again else next(shards, None))
            busy = [worker for worker in self._workers if worker.shard is not None]
            if not busy:
                return
            ready = wait([worker.pipe for worker in busy])
            for worker in busy:
                if worker.pipe in ready:
                    found = self._hear(worker, progress, again)
                    if found is not None:
                        yield found

    def close(self) -> None:
        """End every process."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_GRACE)
            if worker.process.is_alive():
                worker.process.kill()
            worker.pipe.close()
        self._workers = []

    def _start(self, slot: int) -> _Worker:
        context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
        ours, theirs = context.Pipe()
        place = _Place(str(Path.cwd()), self._gpus[slot] if self._gpus else None, self._count)
        process = context.Process(
            target=_work, args=(theirs, self._spec, place), name=f"scoring worker {slot + 1}", daemon=True
        )
        process.start()
        theirs.close()
        return _Worker(process, ours, slot)

    def _ready(self, worker: _Worker) -> tuple[str, str]:
        try:
            while (message := worker.pipe.recv())[0] == "note":
                self._note(f"{worker.process.name}: {message[1]}")
        except (EOFError, OSError):
            raise self._died(worker, "while it loaded the model") from None
        kind, content = message
        if kind == "error":
            raise ArenaError(**content)
        return content

    def _give(self, worker: _Worker, store: RowStore, shard: Shard | None) -> None:
        if shard is not None:
            worker.shard = shard
            with suppress(OSError):  # it died just now: `run` hears of it
                worker.pipe.send((store.folder, shard))

    def _hear(self, worker: _Worker, progress: Progress, again: deque[Shard]) -> tuple[Shard, np.ndarray] | None:
        """Take one message of a worker; return what it finished, if anything."""
        try:
            kind, content = worker.pipe.recv()
        except (EOFError, OSError):
            self._replace(worker, again)
            return None
        if kind == "error":
            raise ArenaError(**content)
        if kind == "progress":
            progress(worker.shard, content)
            return None
        if kind == "note":
            self._note(f"{worker.process.name}: {content}")
            return None
        shard, worker.shard = worker.shard, None
        return shard, content

    def _replace(self, worker: _Worker, again: deque[Shard]) -> None:
        """Start another process in a dead one's place, or raise ArenaError where its shard has ended two."""
        shard = worker.shard
        what = self._died(worker, f"on shard {shard.name}")
        if self._retries.get(shard.name, 0):
            raise what
        self._retries[shard.name] = 1
        self._note(f"{what.where} {what.what}: started again, and the shard once more")
        fresh = self._start(worker.slot)
        self._workers[self._workers.index(worker)] = fresh
        self._ready(fresh)
        again.append(shard)

    def _died(self, worker: _Worker, when: str) -> ArenaError:
        worker.process.join(_GRACE)
        code = worker.process.exitcode
        killed = code is not None and code < 0
        how = f"was killed by {signal.Signals(-code).name}" if killed else f"ended with exit code {code}"
        remedy = f"{same_command()} goes on from what is scored; if it happens again, give fewer --workers"
        if killed and -code == signal.SIGKILL:
            remedy += " or a smaller --precision: an end by SIGKILL is mostly the system's, for want of memory"
        return ArenaError(f"{how} {when}", where=worker.process.name, remedy=remedy)


@dataclass(frozen=True)
class _Place:
    """Where a worker works: the current folder, the GPU that it sees (None: none), among how many workers."""

    folder: str
    gpu: str | None
    workers: int


def _work(pipe: Connection, spec: ScorerSpec, place: _Place) -> None:
    """Be a worker: load the model, then compute the shards that come through the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    os.chdir(place.folder)
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu  # before torch looks
    with suppress(BrokenPipeError, EOFError):  # the parent is gone
        try:
            scorer = _opened(spec, place, lambda text: pipe.send(("note", text)))
            pipe.send(("ready", (scorer.engine, scorer.precision)))
            stores: dict[Path, RowStore] = {}
            while True:
                folder, shard = pipe.recv()
                if folder not in stores:  # its sums were checked by the parent
                    stores[folder] = RowStore(folder, checked=False)
                prepared = prepare(scorer, stores[folder], shard)
                pipe.send(("done", ask(scorer, shard, prepared, lambda _, share: pipe.send(("progress", share)))))
        except ArenaError as error:
            pipe.send(("error", {"what": error.what, "where": error.where, "remedy": error.remedy}))
        except (BrokenPipeError, EOFError):
            raise
        except Exception:
            pipe.send(("error", {"what": f"a worker failed:\n{traceback.format_exc()}", "remedy": "please report it"}))


def _opened(spec: ScorerSpec, place: _Place, note: Callable[[str], None]) -> Scorer:
    import torch

    if place.gpu is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(cores // place.workers, 1))
    scorer = spec.scorer()
    scorer.note = note
    scorer.open()
    return scorer
