"""Executors: who computes shards. One engine in this process, one process a GPU, or Ray's actors.

All of them compute the same shards from the same store with the same code, so that their scores are the same.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

import numpy as np

from common.screen import name_of
from scoring.row_store import RowStore
from scoring.scorer import Scorer, ScorerSpec
from scoring.shard_plan import Shard

if TYPE_CHECKING:
    from scoring.engines.torch_engine import ScoreProgress

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

    def tell(at: ScoreProgress) -> None:
        progress(shard, at.tokens / max(at.total_tokens, 1))

    return scorer.ask(sequences, progress=tell, name=lambda i: f"id {name_of(ids[i])}")


def device_of(engine: str) -> str:
    """Return the kind of device that an engine uses: only torch uses a GPU here."""
    from scoring.engines.torch_engine import device_name

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
    from scoring.workers import Workers

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
