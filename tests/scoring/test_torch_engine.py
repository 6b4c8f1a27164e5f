"""The torch engine: whatever the batches, the label logits are those of a plain pass over one row at a time."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest

from common.errors import ArenaError
from scoring import batches
from scoring.engines.torch_engine import cpu_half_precisions, device_name, load_model, score_labels
from scoring.packed_model import Reader

LABELS = (35, 7, 599)  # not sorted: the columns keep the order that is asked for


def rows(count: int, seed: int = 5, longest: int = 60) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 600, random.integers(1, longest)).tolist() for _ in range(count)]


def watched(model, before, mode=None) -> Reader:
    """Return a reader of the model that calls `before(input_ids)` before every pass."""
    reader = Reader(model, mode=mode)
    reader.body.get_input_embeddings().register_forward_pre_hook(lambda _, args: before(args[0]))
    return reader


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_label_logits_are_those_of_one_row_at_a_time(family_model, plain_logits, budget):
    sequences = rows(23)
    expected = np.array([plain_logits(family_model, ids)[-1, list(LABELS)].numpy() for ids in sequences])
    scores = score_labels(family_model, sequences, LABELS, token_budget=budget)
    assert scores.dtype == np.float64
    assert expected.std() > 0.3
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("mode", ["trimmed", "padded"])
def test_a_batch_never_exceeds_the_budget_and_every_row_is_read_once(tiny_model, mode):
    shapes, seen = [], []
    sequences = rows(40)
    reader = watched(tiny_model(), lambda ids: shapes.append(tuple(ids.shape)), mode)
    score_labels(reader, sequences, LABELS, token_budget=128, progress=seen.append)
    assert all(batch * length <= 128 for batch, length in shapes)
    tokens = sum(map(len, sequences))
    if mode == "trimmed":
        assert sum(length for _, length in shapes) == tokens, "no padding"
        assert len(shapes) <= tokens / 128 * 2
    else:
        assert sum(batch for batch, _ in shapes) == 40
        assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert (seen[-1].rows, seen[-1].tokens) == (40, tokens)
    assert all((p.total_rows, p.total_tokens) == (40, tokens) for p in seen)
    assert len(seen) == len(shapes)


def test_a_row_longer_than_the_budget_goes_alone(tiny_model, plain_logits):
    model = tiny_model()
    sequences = [[1, 2], list(range(200)), [3]]
    expected = plain_logits(model, sequences[1])[-1, list(LABELS)].numpy()
    np.testing.assert_allclose(score_labels(model, sequences, LABELS, token_budget=10)[1], expected, atol=1e-4)


@pytest.mark.parametrize(
    "failure",
    [
        lambda torch: torch.OutOfMemoryError("CUDA out of memory"),
        lambda _: RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["gpu", "cpu"],
)
@pytest.mark.parametrize("overlaps", [False, True])
def test_out_of_memory_halves_the_batch_says_so_and_loses_nothing(tiny_model, monkeypatch, failure, overlaps):
    import torch

    monkeypatch.setattr(batches, "_overlaps", lambda device: overlaps)
    sizes, said, threads = [], [], threading.active_count()
    sequences = rows(30, longest=90)
    expected = score_labels(tiny_model(), sequences, LABELS)

    def small_memory(ids):
        sizes.append(ids.numel())
        if ids.numel() > 100:
            raise failure(torch)

    reader = watched(tiny_model(), small_memory)
    scores = score_labels(reader, sequences, LABELS, token_budget=1000, note=said.append)
    np.testing.assert_allclose(scores, expected, atol=1e-4)
    failed = [size for size in sizes if size > 100]
    assert 2 <= len(failed) <= 5, "each failure halves what is tried next"
    assert len(said) == len(failed)
    assert threading.active_count() == threads
    assert re.fullmatch(r"out of memory: going on with \d+ tokens a batch", said[-1])


def test_a_row_that_does_not_fit_alone_is_named(tiny_model):
    import torch

    def no_memory(ids):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ArenaError, match=r"prompt 1: its 50 tokens alone do not fit") as caught:
        score_labels(watched(tiny_model(), no_memory), [[1] * 20, [1] * 50], LABELS)
    assert "cutoff_len" in caught.value.remedy


def test_the_model_is_itself_again_even_after_an_error(tiny_model, plain_logits):
    model = tiny_model()
    before = plain_logits(model, [1, 2, 3])

    def broken(ids):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        score_labels(watched(model, broken), [[1, 2, 3]], LABELS)
    model.get_input_embeddings()._forward_pre_hooks.clear()
    score_labels(model, [[1, 2, 3]], LABELS)
    assert (plain_logits(model, [1, 2, 3]) == before).all()
    assert model.config._attn_implementation == "sdpa"
    assert all("forward" not in module.__dict__ for module in model.modules())


def test_logits_that_are_not_finite_are_passed_on_in_their_own_rows(tiny_model):
    model = tiny_model(seed=2)
    model.get_input_embeddings().weight.data[9] = float("nan")
    scores = score_labels(model, [[1, 2], [1, 9, 2], [4]], LABELS, token_budget=4096)
    assert np.isnan(scores[1]).all()
    assert np.isfinite(scores[[0, 2]]).all()


def test_no_row_is_no_work(tiny_model):
    assert score_labels(tiny_model(), [], LABELS).shape == (0, 3)


def test_a_saved_model_is_loaded_in_fp32_and_scores_the_same(tiny_model, tmp_path):
    import torch

    model = tiny_model()
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, "cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert not loaded.training
    np.testing.assert_array_equal(score_labels(loaded, rows(5), LABELS), score_labels(model, rows(5), LABELS))
    half = load_model(tmp_path, "cpu", precision="bf16")
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


def test_a_folder_that_cannot_be_loaded_says_what_to_do(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ArenaError, match="cannot be loaded") as caught:
        load_model(tmp_path, "cpu")
    assert caught.value.where == str(tmp_path)
    assert "merge" in caught.value.remedy


def test_pickled_weights_are_refused(tiny_model, tmp_path):
    import torch

    model = tiny_model()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ArenaError, match="cannot be loaded"):
        load_model(tmp_path, "cpu")


def test_the_device_is_one_that_there_is():
    import torch

    assert device_name() == ("cuda" if torch.cuda.is_available() else "cpu")


def test_the_processor_s_16_bit_types_are_read_off_its_flags(monkeypatch):
    flags = {
        "flags\t\t: fpu avx2\n": set(),
        "flags\t\t: fpu avx512_bf16\n": {"bf16"},
        "processor: 0\nflags: amx_bf16 avx512_fp16\n": {"bf16", "fp16"},
        "Features\t: fp asimdhp bf16\n": {"bf16", "fp16"},
    }
    for text, expected in flags.items():
        monkeypatch.setattr("pathlib.Path.read_text", lambda *_, text=text, **__: text)
        assert cpu_half_precisions() == expected
