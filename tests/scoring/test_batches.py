"""Every row is read once within the token budget, and less at a time where memory runs out."""

from __future__ import annotations

import numpy as np
import pytest

from common.errors import ArenaError
from scoring.engines.torch_engine import score_labels
from scoring.packed_model import PackedModel
from tests.scoring.fakes import LABELS, token_rows


def watched(model, before, pads=None) -> PackedModel:
    """Return a packed model that calls `before(input_ids)` before every pass."""
    packed = PackedModel(model, pads=pads)
    packed.body.get_input_embeddings().register_forward_pre_hook(lambda _, args: before(args[0]))
    return packed


@pytest.mark.parametrize("pads", [False, True])
def test_a_batch_never_exceeds_the_budget_and_every_row_is_read_once(tiny_model, pads):
    shapes, shares, rows = [], [], token_rows(40)
    packed = watched(tiny_model(), lambda ids: shapes.append(tuple(ids.shape)), pads)
    score_labels(packed, rows, LABELS, token_budget=128, progress=shares.append)
    assert all(batch * length <= 128 for batch, length in shapes)
    tokens = sum(map(len, rows))
    if not pads:
        assert sum(length for _, length in shapes) == tokens, "no padding"
        assert len(shapes) <= tokens / 128 * 2
    else:
        assert sum(batch for batch, _ in shapes) == 40
        assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert shares == sorted(shares) and shares[-1] == 1.0 and len(shares) == len(shapes)


@pytest.mark.parametrize(
    "text", [None, "[enforce fail] DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"]
)
def test_out_of_memory_halves_the_batch_reports_it_and_loses_nothing(tiny_model, text):
    import torch

    sizes, notes, rows = [], [], token_rows(30, longest=90)
    expected = score_labels(tiny_model(), rows, LABELS)

    def small_memory(ids):
        sizes.append(ids.numel())
        if ids.numel() > 100:
            raise RuntimeError(text) if text else torch.OutOfMemoryError("CUDA out of memory")

    packed = watched(tiny_model(), small_memory)
    found = score_labels(packed, rows, LABELS, token_budget=1000, note=notes.append)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    failed = [size for size in sizes if size > 100]
    assert 2 <= len(failed) <= 5, "each failure halves what is tried next"
    assert len(notes) == len(failed) and "tokens a batch" in notes[-1]
    with pytest.raises(ArenaError, match="prompt 1: its 150 tokens alone do not fit") as caught:
        score_labels(packed, [[1] * 20, [1] * 150], LABELS, note=notes.append)
    assert "cutoff_len" in caught.value.remedy
