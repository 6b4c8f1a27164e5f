"""What computes shards: the protocol, and the simplest case, one engine in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np

from common.console import name_of
from scoring.model_loading import device_name
from scoring.score_store import RowStore, Shard
from scoring.scorer import Scorer

# Called with a shard and the share of it that is done, rising from 0 to 1.
Progress = Callable[[Shard, float], None]
Prepared = tuple[list, list[str]]  # token ids and battle ids of a shard's rows


class Executor(Protocol):
    """Computes shards."""

    engine: str
    precision: str  # what the model really computes in
    device: str

    def run(self, store: RowStore, shards: Iterator[Shard], progress: Progress) -> Iterator[tuple[Shard, np.ndarray]]:
        """Yield each shard with its scores [rows, columns], in any order; `shards` are taken as late as possible."""

    def close(self) -> None:
        """Free the models' memory and end every process."""


class InProcess:
    """One engine in this process; the next shard is tokenized while the model works on this one."""

    def __init__(self, scorer: Scorer, note: Callable[[str], None] = print):
        """Load the scorer's model; `note` gets what a user should know."""
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
                    yield current[0], ask(self._scorer, current[0], current[1].result(), progress)
                current = following
            if current:
                yield current[0], ask(self._scorer, current[0], current[1].result(), progress)

    def close(self) -> None:
        """Free the model's memory."""
        self._scorer.close()


def prepare(scorer: Scorer, store: RowStore, shard: Shard) -> Prepared:
    """Read a shard's rows and make token ids of them."""
    inputs = store.inputs(shard.rows)
    return scorer.prepare(inputs, swapped=shard.swapped), [row["id"] for row in inputs]


def ask(scorer: Scorer, shard: Shard, prepared: Prepared, progress: Progress) -> np.ndarray:
    """Return the scores [rows, columns] of a shard's prepared rows; a row that has none is named by its id."""
    sequences, ids = prepared
    return scorer.ask(sequences, progress=lambda share: progress(shard, share), name=lambda i: f"id {name_of(ids[i])}")


def device_of(engine: str) -> str:
    """Return the kind of device that an engine uses: only torch uses a GPU here."""
    return device_name() if engine == "torch" else "cpu"
