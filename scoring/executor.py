"""What computes shards: one engine in this process, or several processes with a model each (workers, Ray's actors)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import numpy as np

from common.console import name_of
from scoring.model_loading import device_name
from scoring.score_store import RowStore, Shard
from scoring.scorer import Scorer, ScorerSpec

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
            return asker("ask", prepared).result()
        finally:
            self._free.put(asker)

    def _result(self, future: Future) -> Any:
        """Return a call's result; raises ArenaError where it failed or its process died."""
        return future.result()


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
