"""What computes shards: one engine in this process, or several processes with a model each (workers, Ray's actors).

Workers are processes of this machine, each on a GPU or a share of the cores. Ray's actors are on this machine or on a
cluster; all of its machines must see this folder under the same path (a shared disk): the model and the rows are read
from it. All score the same shards from the same store, so the scores are the same.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from common.console import name_of
from common.errors import ArenaError, first_line, same_command
from data_prep.export_rows import end_with_parent, submit
from scoring.model_loading import device_name
from scoring.score_store import RowStore, Shard
from scoring.scorer import Scorer, ScorerSpec

LOCAL = "local"  # the address of a Ray that is started here
# What every process of Ray needs: our modules, and no usage statistics sent.
_ENVIRONMENT = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "RAY_USAGE_STATS_ENABLED": "0"}
# Called with a shard and the share of it that is done, rising from 0 to 1.
Progress = Callable[[Shard, float], None]


class Executor:
    """Computes shards; `precision` is what the model really computes in."""

    engine: str
    precision: str
    device: str
    models = 1  # that compute at the same time

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard with its scores [rows, columns], in any order; `shards` are taken as late as possible."""

    def load(self) -> None:
        """Load what the first rows would load: the models of other processes."""

    def ask(self, prepared: list) -> np.ndarray:
        """Return the scores [rows, columns] of prepared rows; `models` threads may call it at the same time."""

    def close(self) -> None:
        """Free the models' memory and end every process."""


class InProcess(Executor):
    """One engine in this process."""

    def __init__(self, scorer: Scorer, note: Callable[[str], None] = print):
        """Load the scorer's model; `note` gets what a user should know."""
        self._scorer, scorer.note = scorer, note
        scorer.open()
        self.engine, self.precision, self.device = _loaded(scorer)

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        for shard in shards:
            yield shard, _score(self._scorer, store, shard, progress)

    def ask(self, prepared: list) -> np.ndarray:
        return _ask(self._scorer, prepared)

    def close(self) -> None:
        self._scorer.close()


class Asker:
    """What another process runs: a scorer whose model the first call loads, and what it has to tell the user."""

    def __init__(self, spec: ScorerSpec, folder: str):
        """Prepare for calls; relative paths are those of `folder`."""
        os.chdir(folder)
        self._spec, self._notes = spec, []
        self._stores: dict[Path, RowStore] = {}

    @cached_property
    def _scorer(self) -> Scorer:
        scorer = self._spec.scorer()
        scorer.note = self._notes.append
        scorer.open()
        return scorer

    def loaded(self) -> tuple[str, str, str]:
        """Return engine, precision and device of the model."""
        return _loaded(self._scorer)

    def score(self, folder: Path, shard: Shard) -> tuple[np.ndarray, list[str]]:
        """Return the scores [rows, columns] of a shard of the store in `folder`, and notes."""
        if folder not in self._stores:  # its sums were checked where the run began
            self._stores[folder] = RowStore(folder, checked=False)
        scores = _score(self._scorer, self._stores[folder], shard)
        notes = list(self._notes)
        self._notes.clear()
        return scores, notes

    def ask(self, prepared: list) -> np.ndarray:
        """Return the scores [rows, columns] of prepared rows."""
        return _ask(self._scorer, prepared)


class SideBySide(Executor):
    """Several processes that compute side by side, an `Asker` in each."""

    name: str  # of one of them, for notes

    def __init__(self, askers: Sequence[Callable[..., Future]], note: Callable[[str], None]):
        """Load the first model; each of `askers` calls a method of its Asker by name, with arguments."""
        self._askers, self._note, self.models = askers, note, len(askers)
        self._free: SimpleQueue = SimpleQueue()
        for asker in askers:
            self._free.put(asker)
        self.engine, self.precision, self.device = self._result(askers[0]("loaded"))

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        free, working = list(self._askers), {}
        while True:
            while free and (shard := next(shards, None)) is not None:
                asker = free.pop()
                working[asker("score", store.folder, shard)] = asker, shard
            if not working:
                return
            for future in wait(working, return_when=FIRST_COMPLETED).done:
                asker, shard = working.pop(future)
                free.append(asker)
                scores, notes = self._result(future)
                for text in notes:
                    self._note(f"{self.name}: {text}")
                yield shard, scores

    def load(self) -> None:
        for loaded in [asker("loaded") for asker in self._askers]:
            self._result(loaded)

    def ask(self, prepared: list) -> np.ndarray:
        asker = self._free.get()
        try:
            return self._result(asker("ask", prepared))
        finally:
            self._free.put(asker)

    def _result(self, future: Future) -> Any:
        """Return a call's result; raises what it raised, ProcessDied where its process died."""
        return future.result()


class ProcessDied(ArenaError):
    """A process with a model is gone: its executor can answer no more."""

    def __init__(self, what: str, where: str):
        """Say what died, and which option asked for it."""
        again = f"{same_command()} goes on from what is scored; give fewer --workers or a smaller --precision"
        super().__init__(what, where=where, remedy=again)


def _loaded(scorer: Scorer) -> tuple[str, str, str]:
    """Return engine, precision and device of an open scorer; only torch uses a GPU here."""
    return scorer.engine, scorer.precision, device_name() if scorer.engine == "torch" else "cpu"


def _ask(scorer: Scorer, prepared: list) -> np.ndarray:
    return scorer.ask(prepared, progress=lambda _: None, name="request {}".format)


def _score(scorer: Scorer, store: RowStore, shard: Shard, progress: Progress = lambda *_: None) -> np.ndarray:
    """Return the scores [rows, columns] of a shard; a row that has none is named by its id."""
    inputs = store.inputs(shard.rows)
    return scorer.ask(
        scorer.prepare(inputs, swapped=shard.swapped),
        progress=lambda share: progress(shard, share),
        name=lambda i: f"id {name_of(inputs[i]['id'])}",
    )


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
        try:
            super().__init__([partial(_submit, pool) for pool in self._pools], note)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        for process in multiprocessing.active_children():  # also in the middle of a shard
            process.kill()
        for pool in self._pools:  # waits for the pool's own thread, which would print a fault once this process ends
            pool.shutdown(cancel_futures=True)

    def _result(self, future: Future) -> Any:
        try:
            return future.result()
        except (BrokenProcessPool, BrokenPipeError):  # the latter where it died before it had read the call
            raise ProcessDied(
                "a scoring worker was killed, for want of memory or by a damaged model file", "--workers"
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


def _submit(pool: ProcessPoolExecutor, *call: Any) -> Future:
    try:
        return submit(pool, _call, *call)
    except BrokenProcessPool as error:  # its process died after the last call
        future: Future = Future()
        future.set_exception(error)
        return future


_asker: Asker | None = None  # of this process, where it is a worker


def _begin(spec: ScorerSpec, folder: str, workers: int, gpu: str | None) -> None:
    """Begin as a worker, on a GPU or a share of the cores; it ends with the process that started it."""
    global _asker
    for number in (signal.SIGINT, signal.SIGTERM):  # they may reach the whole group; the parent ends its workers
        signal.signal(number, signal.SIG_IGN)
    end_with_parent()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu  # before torch looks
    else:
        import torch

        torch.set_num_threads(max(len(os.sched_getaffinity(0)) // workers, 1))
    _asker = Asker(spec, folder)


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_asker, method)(*arguments)


class RayActors(SideBySide):
    """A pool of Ray's actors; one that dies is started again once, on another machine if need be."""

    name = "Ray"

    def __init__(self, spec: ScorerSpec, note: Callable[[str], None], *, address: str, actors: int | None):
        """Connect to the cluster at `address` ("local": start one on 127.0.0.1) and load the first model there.

        `actors` is their number (None: one a GPU of the cluster, else one). Raises ArenaError where Ray is missing,
        cannot be reached, or the model cannot be loaded there.
        """
        if find_spec("ray") is None:
            raise ArenaError("Ray is not installed", where="--ray", remedy="make extra-ray")
        _connect(address, actors)
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0)) if spec.engine == "torch" else 0
        count = actors or max(gpus, 1)
        actor = ray.remote(num_cpus=1, num_gpus=float(bool(gpus)), max_restarts=1, max_task_retries=1)(Asker)
        self._actors = [actor.remote(spec, str(Path.cwd())) for _ in range(count)]  # they end when nothing names them

        def asker(actor: Any) -> Callable[..., Future]:
            return lambda method, *arguments: getattr(actor, method).remote(*arguments).future()

        super().__init__([asker(actor) for actor in self._actors], note)
        note(f"Ray: {count} actor(s) on {len(ray.nodes())} machine(s)")

    def close(self) -> None:
        import ray

        ray.shutdown()  # a cluster that was started here ends

    def _result(self, future: Future) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return future.result()
        except RayTaskError as error:  # what an Asker raised
            raise error.cause from None
        except RayActorError as error:
            raise ProcessDied(f"a Ray actor died twice: {first_line(error)}", "--ray") from None


def _connect(address: str, actors: int | None) -> None:
    os.environ.update(_ENVIRONMENT)
    import ray

    options: dict[str, Any] = {"runtime_env": {"env_vars": _ENVIRONMENT}}
    if address == LOCAL:
        ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's name for: listen on 127.0.0.1 only
        options = {"num_cpus": max(actors or 1, os.cpu_count() or 1), "include_dashboard": False}
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
    except Exception as error:  # a bare one where Ray does not start within 30 s
        raise ArenaError(
            f"Ray cannot be reached: {first_line(error)}",
            where=f"--ray {address}",
            remedy="check the address (ray://HOST:10001) and that the cluster runs the same versions of Python and "
            "Ray; --ray alone starts one here",
        ) from None
