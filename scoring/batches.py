"""Batches: groups of pieces read together within a token budget, the longest first, halved where memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from common.errors import ArenaError
from factory.gpu import TOKEN_BUDGET
from scoring.packed_model import Pack, PackedModel, Piece, pack

Group = Sequence[Piece]  # pieces that share a batch, such as a prompt and its answers


def run_batches(
    model: PackedModel,
    groups: Sequence[Group],
    work: Callable[[list[int], Pack], None],
    *,
    token_budget: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
    name: Callable[[int], str] = "prompt {}".format,
    note: Callable[[str], None] = warnings.warn,
) -> None:
    """Call `work(indices, pack)` on every group once, in batches; `pack` has the groups' pieces behind one another.

    `progress` gets the share of the tokens that is done. `work` may be called again for the same indices: out of
    memory halves the token budget, reports it by `note` and continues. Raises ArenaError that calls a group by
    `name(index)` where it does not fit alone.
    """
    import torch

    budget = token_budget or TOKEN_BUDGET[model.device.type]
    sizes = [sum(len(piece.ids) for piece in group) for group in groups]
    # Longest first: a batch that does not fit in memory fails at once, not after an hour.
    order = sorted(range(len(groups)), key=lambda i: -sizes[i])
    done = tokens = 0
    while done < len(order):
        failed: list[int] = []
        for batch in _plan(model, groups, order[done:], budget):
            try:
                with torch.inference_mode():
                    work(batch, pack(_joined([groups[i] for i in batch]), model.device))
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                failed = batch
                break
            done += len(batch)
            tokens += sum(sizes[i] for i in batch)
            progress(tokens / sum(sizes))
        if failed:
            # Only here, where the exception and with it the failed pass's frames are gone, can memory be freed.
            torch.cuda.empty_cache()
            if len(failed) == 1:
                raise ArenaError(
                    f"its {sizes[failed[0]]} tokens alone do not fit in memory",
                    where=name(failed[0]),
                    remedy="free memory, choose a smaller --precision, or lower cutoff_len and train again",
                )
            budget = max(1, min(budget, sum(sizes[i] for i in failed)) // 2)
            note(f"out of memory: continuing with {budget:,} tokens a batch")


def _plan(model: PackedModel, groups: Sequence[Group], order: list[int], budget: int) -> Iterator[list[int]]:
    """Yield batches of neighbours in `order`, each within the budget or of one group."""
    batch: list[int] = []
    rows = longest = tokens = 0
    for index in order:
        group = groups[index]
        size = sum(len(piece.ids) for piece in group)
        lengths = [len(p.ids) + (0 if p.prefix is None else len(group[p.prefix].ids)) for p in group if p.wanted]
        rows, longest, tokens = rows + len(lengths), max(longest, *lengths), tokens + size
        if batch and (rows * longest if model.pads else tokens) > budget:
            yield batch
            batch, rows, longest, tokens = [], len(lengths), max(lengths), size
        batch.append(index)
    if batch:
        yield batch


def _joined(groups: Sequence[Group]) -> list[Piece]:
    """Return the pieces of all groups one behind the other, with their prefixes' new places."""
    pieces: list[Piece] = []
    for group in groups:
        first = len(pieces)
        pieces += [p if p.prefix is None else replace(p, prefix=p.prefix + first) for p in group]
    return pieces


def _is_out_of_memory(error: RuntimeError) -> bool:
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    known = isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)
    return known or "CUBLAS_STATUS_ALLOC_FAILED" in str(error)
