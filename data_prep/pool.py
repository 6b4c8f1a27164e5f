"""A crew of processes that fit batches of battles, in the input's order; on few cores a thread of our own.

A tokenizer releases the interpreter while it works and uses every core by itself, so that one thread beside the
reader is enough for a few cores. On many of them Python's own share, reading and writing JSON, would set the pace.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from common.battle import Battle
from common.errors import ArenaError
from data_prep.batch import Batch, BatchMaker

_FEW_CORES = 4
_MOST = 16  # processes; beyond them the reader sets the pace
_maker: BatchMaker | None = None  # in a process of the crew


def usual_workers() -> int:
    """Return how many processes suit this machine; 0 stands for a thread of our own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, _MOST) if cores >= _FEW_CORES else 0


class Crew:
    """Makes batches elsewhere; at most two a worker are under way or wait, so that memory stays flat."""

    def __init__(self, executor: Executor, make: Callable[[list[Battle], bool], Batch], ahead: int):
        self._executor, self._make, self._ahead = executor, make, ahead

    def batches(self, chunks: Iterable[list[Battle]], labelled: bool) -> Iterator[Batch]:
        """Yield the batch of each chunk, in their order; raises ArenaError as `BatchMaker.make` does."""
        waiting: deque[Future[Batch]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self._executor.submit(self._make, chunk, labelled))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenExecutor:
            raise ArenaError(
                "a worker process of prepare ended without a word, most likely for lack of memory",
                remedy="use fewer: --workers 2, or --workers 0 for none",
            ) from None
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def open_crew(maker: BatchMaker, workers: int) -> Iterator[Crew]:
    """Yield a crew of `workers` processes, or of one thread for 0."""
    if not workers:
        with ThreadPoolExecutor(max_workers=1) as executor:
            yield Crew(executor, maker.make, ahead=1)
        return
    # Spawned, not forked: a tokenizer's threads do not survive a fork.
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_join_crew, initargs=(maker,))
    try:
        yield Crew(executor, _make, ahead=2 * workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _join_crew(maker: BatchMaker) -> None:
    """Begin as a process of the crew: one core for it, Ctrl-C is its parent's business, and it ends with its parent."""
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker = maker


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _make(battles: list[Battle], labelled: bool) -> Batch:
    assert _maker is not None
    return _maker.make(battles, labelled)
