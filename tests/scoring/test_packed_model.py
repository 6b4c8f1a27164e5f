"""Hidden states are those of a plain pass over one row; every row is read once, less at a time without memory."""

import numpy as np
import pytest

from common.errors import ArenaError
from scoring.engines.torch_engine import score_labels
from scoring.packed_attention import UnknownAttention, attend, packed_attention
from scoring.packed_model import PackedModel, Piece, pack
from tests.scoring.fakes import LABELS, token_rows

DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize("pads", [False, True])
def test_states_are_those_of_a_plain_pass_and_the_model_is_left_as_it_was(family_model, pads):
    import torch

    shared, one, other, alone = (token_rows(1, seed, 60)[0] + [seed] * 9 for seed in (1, 2, 3, 4))
    pieces = [Piece(shared), Piece(one, wanted=9, prefix=0), Piece(other, wanted=5, prefix=0), Piece(alone, wanted=2)]
    attention = family_model.config._attn_implementation

    def plain(row):
        return family_model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]

    with torch.inference_mode():
        expected = [plain(shared)[-1:], plain(shared + one)[-9:], plain(shared + other)[-5:], plain(alone)[-2:]]
        found = PackedModel(family_model, pads=pads).states(pack(pieces))
        behind = PackedModel(family_model, pads=pads).states_behind((1, 1), pack(pieces[-1:]))
        inner = family_model.base_model(input_ids=torch.tensor([alone]), output_hidden_states=True).hidden_states[1]
    torch.testing.assert_close(found, torch.cat(expected), atol=2e-4, rtol=1e-3)
    torch.testing.assert_close(behind, inner[0, -2:].repeat(1, 2), atol=2e-4, rtol=1e-3)
    assert not PackedModel(family_model).pads, "every family takes the fast way"
    assert family_model.config._attn_implementation == attention
    assert all("forward" not in module.__dict__ for module in family_model.modules())


def test_a_soft_cap_counts_whatever_attention_the_model_was_loaded_with(tiny_model):
    expected = score_labels(PackedModel(tiny_model("gemma2"), pads=True), token_rows(1), LABELS)
    loaded = tiny_model("gemma2", attn_implementation="sdpa")  # drops the cap silently
    for pads in (False, True):
        found = score_labels(PackedModel(loaded, pads=pads), token_rows(1), LABELS)
        np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, more",
    [
        ("olmo2", {}),  # its norms are elsewhere: the last layer cannot be trimmed
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}),  # attention sinks
        ("llama", {"rope_parameters": DYNAMIC, "max_position_embeddings": 16}),  # longer rows have other angles
    ],
)
def test_a_family_that_cannot_be_packed_is_padded(name, more, tiny_model, plain_logits):
    packed = PackedModel(model := tiny_model(name, attn_implementation="eager", **more))
    assert packed.pads
    found = score_labels(packed, token_rows(5), LABELS)
    expected = [plain_logits(model, row)[-1, list(LABELS)].numpy() for row in token_rows(5)]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("window", [None, 1, 7, 300, 5000])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("count, length", [(1, 1), (1, 40), (700, 700), (300, 700)])
def test_attention_is_its_definition(count, length, window, softcap):
    import torch

    torch.manual_seed(count + length)
    q, k, v = torch.randn(1, 2, count, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
    scores = (q @ k.transpose(2, 3)).double() * 0.4
    scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
    query, key = torch.arange(length - count, length)[:, None], torch.arange(length)[None]
    seen = (key <= query) & (key > query - (window or length))
    expected = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.double()).float()
    torch.testing.assert_close(attend(q, k, v, 0.4, window, softcap), expected, atol=1e-5, rtol=1e-4)


def test_attention_refuses_what_it_does_not_support():
    import torch

    x = torch.zeros(1, 1, 2, 4)
    for options in ({}, {"spans": (), "s_aux": 1}, {"spans": (), "attention_mask": 1}):
        with pytest.raises(UnknownAttention):
            packed_attention(torch.nn.Identity(), x, x, x, **{"attention_mask": None} | options)


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


@pytest.mark.parametrize("text", [None, "DefaultCPUAllocator: can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"])
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
    with pytest.raises(ArenaError, match=r"prompt 1: its 150 tokens alone do not fit(.|\n)*cutoff_len"):
        score_labels(packed, [[1] * 20, [1] * 150], LABELS, note=notes.append)
