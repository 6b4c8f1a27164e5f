"""Scoring with Ray Data: shards go through a pool of actors, one engine each, on this machine or on a cluster.

The same shards from the same store as without Ray, so the same scores. On a cluster of several machines all of them
must see this folder under the same path (a shared disk): the model and the rows are read from it.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ArenaError
from scoring.executor import Progress, ask, device_of, prepare
from scoring.score_store import RowStore, Shard
from scoring.scorer import Scorer, ScorerSpec

LOCAL = "local"
# Shards that are one data set of Ray's: what is planned ahead is kept in memory.
_TOGETHER = 4096
_ROOT = Path(__file__).resolve().parents[1]
# What every process of Ray needs: our modules, and no usage statistics sent.
_ENVIRONMENT = {"PYTHONPATH": str(_ROOT), "RAY_USAGE_STATS_ENABLED": "0"}


class RayActors:
    """A pool of Ray's actors, each with a model of its own."""

    def __init__(self, spec: ScorerSpec, note: Callable[[str], None], *, address: str, actors: int | None):
        """Connect to the cluster at `address` ("local": start one on 127.0.0.1) and ask it what it computes in.

        `actors` is their number (None: one a GPU of the cluster, else one). Raises ArenaError where Ray is missing,
        cannot be reached, or the model cannot be loaded there.
        """
        if find_spec("ray") is None:
            raise ArenaError("Ray is not installed", where="--ray", remedy="make extra-ray")
        self._spec, self._note = spec, note
        self._connect(address, actors)
        import ray

        gpus = int(ray.cluster_resources().get("GPU", 0)) if spec.engine == "torch" else 0
        self._actors, self._gpu = actors or max(gpus, 1), float(bool(gpus))
        probe = ray.remote(num_gpus=self._gpu)(_probe)
        found = ray.get(probe.remote(spec, str(Path.cwd())))
        if isinstance(found, ArenaError):
            raise found
        self.engine, self.precision, self.device = found
        note(f"Ray: {self._actors} actor(s) on {len(ray.nodes())} machine(s)")

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard with its scores, in any order; Ray gives a shard of an actor that died to another."""
        while together := {shard.name: shard for shard in islice(shards, _TOGETHER)}:
            for row in self._data(store, together).iter_rows():
                for text in json.loads(row["notes"]):
                    self._note(f"Ray: {text}")
                if row["fault"]:
                    raise pickle.loads(row["fault"])
                shard = together[row["name"]]
                yield shard, np.frombuffer(row["scores"], "<f8").reshape(len(shard.rows), -1)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        import ray

        ray.shutdown()

    def _data(self, store: RowStore, together: dict[str, Shard]) -> Any:
        import ray.data

        items = [{"name": name, "rows": shard.rows.astype("<i8").tobytes()} for name, shard in together.items()]
        return ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
            _Actor,
            fn_constructor_args=(self._spec, str(Path.cwd()), str(store.folder)),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=self._actors),
            num_cpus=1,
            num_gpus=self._gpu,
        )

    def _connect(self, address: str, actors: int | None) -> None:
        os.environ.update(_ENVIRONMENT)
        import ray
        import ray.data

        options: dict[str, Any] = {"runtime_env": {"env_vars": _ENVIRONMENT}}
        if address == LOCAL:
            ray._private.ray_constants.ENABLE_RAY_CLUSTER = False  # Ray's name for: listen on 127.0.0.1 only
            options = {"num_cpus": max(actors or 1, os.cpu_count() or 1), "include_dashboard": False}
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **options)
        except (ConnectionError, ValueError, RuntimeError, TimeoutError, OSError) as error:
            raise ArenaError(
                f"Ray cannot be reached: {str(error).strip().splitlines()[0]}",
                where=f"--ray {address}",
                remedy="check the address (ray://HOST:10001) and that the cluster runs the same versions of Python and "
                "Ray; --ray alone starts one here",
            ) from None
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)


class _Actor:
    """A model on a machine of the cluster; called with one shard a batch."""

    def __init__(self, spec: ScorerSpec, folder: str, store: str):
        os.chdir(folder)
        self._store = RowStore(Path(store), checked=False)  # its sums were checked where the run began
        self._scorer: Scorer | None = spec.scorer()
        self._fault: ArenaError | None = None
        self._notes: list[str] = []
        self._scorer.note = self._notes.append
        try:
            self._scorer.open()
        except ArenaError as error:  # Ray would start the actor again and again
            self._fault = error

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return name and scores of the one shard in `batch`, or in `fault` what went wrong."""
        name = str(batch["name"][0])
        shard, scores, fault = Shard(name, np.frombuffer(batch["rows"][0], "<i8"), 0), b"", b""
        try:
            if self._fault:
                raise self._fault
            found = ask(self._scorer, shard, prepare(self._scorer, self._store, shard), lambda *_: None)
            scores = np.ascontiguousarray(found, "<f8").tobytes()
        except ArenaError as error:
            fault = pickle.dumps(error)
        notes = json.dumps(self._notes)
        self._notes.clear()
        return {"name": [name], "scores": [scores], "fault": [fault], "notes": [notes]}


def _probe(spec: ScorerSpec, folder: str) -> tuple[str, str, str] | ArenaError:
    """Load the model once, where the actors will; return its engine, precision and device, or what is wrong."""
    os.chdir(folder)
    try:
        scorer = spec.scorer()
        scorer.open()
    except ArenaError as error:
        return error
    found = scorer.engine, scorer.precision, device_of(scorer.engine)
    scorer.close()
    return found
