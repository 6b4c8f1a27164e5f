"""Batches: groups of pieces read together by a token budget, the longest first, in whatever memory there is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

from common.errors import ArenaError
from factory.gpu import TOKEN_BUDGET
from scoring.packed_model import Pack, Piece, Reader, pack

if TYPE_CHECKING:
    import torch

_Item = TypeVar("_Item")
_SECONDS = 0.1


def ahead(items: Iterable[_Item], depth: int = 1) -> Generator[_Item, None, None]:
    """Yield the items in their order, up to `depth` of them made before they are asked for.

    What `items` raises is raised here, in its place. When the iterator is closed, nothing more is made.
    """
    ready: Queue = Queue(maxsize=depth)
    stopped = Event()

    def put(kind: str, value: object) -> None:
        while not stopped.is_set():
            try:
                ready.put((kind, value), timeout=_SECONDS)
                return
            except Full:
                continue

    def make() -> None:
        try:
            for item in items:
                put("item", item)
                if stopped.is_set():
                    return
            put("end", None)
        except BaseException as error:  # whatever it is, it belongs to the one who asks
            put("error", error)

    thread = Thread(target=make, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            try:
                kind, value = ready.get(timeout=_SECONDS)
            except Empty:
                continue
            if kind == "end":
                return
            if kind == "error":
                raise value
            yield value
    finally:
        stopped.set()
        thread.join()


# What the allocators say that raise no error of their own kind.
_NO_MEMORY = ("can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDA out of memory")

Group = Sequence[Piece]


class DoesNotFit(ArenaError):
    """One group alone is too large for the memory; `index` is its place."""

    def __init__(self, index: int, tokens: int, where: str):
        super().__init__(
            f"its {tokens} tokens alone do not fit in memory",
            where=where,
            remedy="free memory, choose a smaller --precision, or lower cutoff_len and train again",
        )
        self.index = index


@dataclass
class ScoreProgress:
    """How far scoring is: groups done and all (a prompt, or a prompt with its answers), tokens done and all."""

    rows: int
    total_rows: int
    tokens: int
    total_tokens: int


def tell(text: str) -> None:
    """Say something where nobody else was asked to: as a warning."""
    warnings.warn(text, stacklevel=3)


def run_batches(
    reader: Reader,
    groups: Sequence[Group],
    work: Callable[[list[int], Pack], None],
    *,
    token_budget: int | None = None,
    progress: Callable[[ScoreProgress], None] = lambda _: None,
    name: Callable[[int], str] = "prompt {}".format,
    note: Callable[[str], None] = tell,
) -> None:
    """Call `work(indices, pack)` on every group once, in batches; `pack` has the groups' pieces behind one another.

    The next pack is made, and copied to the GPU, while the present one is worked on. `work` may be called again for
    the same indices: out of memory halves the token budget, says so by `note` and goes on; with one group a batch it
    is a DoesNotFit, which calls the group by `name(index)`.
    """
    import torch

    budget = token_budget or TOKEN_BUDGET[reader.device.type]
    sizes = [sum(len(piece.ids) for piece in group) for group in groups]
    # Longest first: a batch that does not fit in memory shows at once, not after an hour.
    order = sorted(range(len(groups)), key=lambda i: -sizes[i])
    done = tokens = 0
    while done < len(order):
        failed = None
        with closing(_ready(reader, groups, order[done:], budget)) as batches:
            for batch, ready in batches:
                try:
                    with torch.inference_mode():
                        work(batch, ready)
                except RuntimeError as error:
                    if not _is_out_of_memory(error):
                        raise
                    failed = batch
                    break
                done += len(batch)
                tokens += sum(sizes[i] for i in batch)
                progress(ScoreProgress(done, len(order), tokens, sum(sizes)))
        if failed is not None:
            # Only here, where the exception and with it the failed pass's frames are gone, can memory be given back.
            torch.cuda.empty_cache()
            budget = _smaller(budget, failed, [sizes[i] for i in failed], name)
            note(f"out of memory: going on with {budget:,} tokens a batch")


def _ready(
    reader: Reader, groups: Sequence[Group], order: list[int], budget: int
) -> Generator[tuple[list[int], Pack], None, None]:
    device = reader.device

    def made() -> Generator[tuple[list[int], Pack], None, None]:
        for batch in _plan(reader, groups, order, budget):
            yield batch, pack(_joined([groups[i] for i in batch])).to(device)

    return ahead(made()) if _overlaps(device) else made()


def _overlaps(device: torch.device) -> bool:
    """On a CPU a pack is made in no time and its copy is none; a thread would only take a core from the model."""
    return device.type != "cpu"


def _plan(reader: Reader, groups: Sequence[Group], order: list[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of neighbours in `order`, each within the budget or of one group."""
    batch: list[int] = []
    rows = longest = tokens = 0
    for index in order:
        lengths = _row_lengths(groups[index])
        size = sum(len(piece.ids) for piece in groups[index])
        rows, longest, tokens = rows + len(lengths), max(longest, *lengths), tokens + size
        if batch and (rows * longest if reader.pads else tokens) > budget:
            yield batch
            batch, rows, longest, tokens = [], len(lengths), max(lengths), size
        batch.append(index)
    if batch:
        yield batch


def _row_lengths(group: Group) -> list[int]:
    """Return the tokens of each wanted piece with its prefix."""
    return [len(p.ids) + (0 if p.prefix is None else len(group[p.prefix].ids)) for p in group if p.wanted]


def _joined(groups: Sequence[Group]) -> list[Piece]:
    """Return the pieces of all groups behind one another, prefixes counted anew."""
    pieces: list[Piece] = []
    for group in groups:
        first = len(pieces)
        pieces += [p if p.prefix is None else replace(p, prefix=p.prefix + first) for p in group]
    return pieces


def _smaller(budget: int, batch: list[int], sizes: list[int], name: Callable[[int], str]) -> int:
    if len(batch) == 1:
        raise DoesNotFit(batch[0], sizes[0], name(batch[0]))
    return max(1, min(budget, sum(sizes)) // 2)


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch

    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)
