"""scoring.engine: whatever the batches, the label logits are those of a plain pass over one row at a time."""

from __future__ import annotations

import numpy as np
import pytest

from data_prep.errors import ArenaError
from scoring.engine import device_name, load_model, score_labels

LABELS = (35, 7, 599)  # not sorted: the columns keep the order that is asked for


def rows(count: int, seed: int = 5, longest: int = 60) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, 600, random.integers(1, longest)).tolist() for _ in range(count)]


def wrapped(model, before):
    """Return the model behind a `before(input_ids)` that sees every forward pass."""

    class Wrapped:
        device = model.device
        get_output_embeddings = model.get_output_embeddings

        def __call__(self, *, input_ids, **options):
            before(input_ids)
            return model(input_ids=input_ids, **options)

    return Wrapped()


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_label_logits_are_those_of_one_row_at_a_time(family_model, plain_logits, budget):
    sequences = rows(23)
    expected = np.array([plain_logits(family_model, ids)[-1, list(LABELS)].numpy() for ids in sequences])
    scores = score_labels(family_model, sequences, LABELS, token_budget=budget)
    assert scores.dtype == np.float64
    assert expected.std() > 0.3
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


def test_a_batch_never_exceeds_the_budget_and_every_row_is_read_once(tiny_model):
    model, shapes, seen = tiny_model(), [], []
    sequences = rows(40)
    score_labels(
        wrapped(model, lambda ids: shapes.append(tuple(ids.shape))),
        sequences,
        LABELS,
        token_budget=128,
        progress=seen.append,
    )
    assert all(batch * length <= 128 for batch, length in shapes)
    assert sum(batch for batch, _ in shapes) == 40
    assert [length for _, length in shapes] == sorted((length for _, length in shapes), reverse=True)
    assert (seen[-1].rows, seen[-1].tokens) == (40, sum(map(len, sequences)))
    assert all((p.total_rows, p.total_tokens) == (40, seen[-1].tokens) for p in seen)
    assert [p.rows for p in seen] == np.cumsum([batch for batch, _ in shapes]).tolist()


def test_a_row_longer_than_the_budget_goes_alone(tiny_model, plain_logits):
    model = tiny_model()
    sequences = [[1, 2], list(range(200)), [3]]
    expected = plain_logits(model, sequences[1])[-1, list(LABELS)].numpy()
    np.testing.assert_allclose(score_labels(model, sequences, LABELS, token_budget=10)[1], expected, atol=1e-4)


def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_model):
    import torch

    model, sizes = tiny_model(), []

    def small_memory(ids):
        sizes.append(ids.numel())
        if ids.numel() > 100:
            raise torch.OutOfMemoryError("CUDA out of memory")

    sequences = rows(30, longest=90)
    scores = score_labels(wrapped(model, small_memory), sequences, LABELS, token_budget=1000)
    np.testing.assert_allclose(scores, score_labels(model, sequences, LABELS), atol=1e-4)
    failed = [size for size in sizes if size > 100]
    assert 2 <= len(failed) <= 5, "each failure halves what is tried next"


def test_a_row_that_does_not_fit_alone_is_named(tiny_model):
    import torch

    def no_memory(ids):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(ArenaError, match=r"prompt 1: its 50 tokens alone do not fit") as caught:
        score_labels(wrapped(tiny_model(), no_memory), [[1] * 20, [1] * 50], LABELS)
    assert "cutoff_len" in caught.value.remedy


def test_the_hook_is_gone_even_after_an_error(tiny_model, plain_logits):
    model = tiny_model()

    def broken(ids):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        score_labels(wrapped(model, broken), [[1, 2, 3]], LABELS)
    score_labels(model, [[1, 2, 3]], LABELS)
    assert plain_logits(model, [1, 2, 3]).shape == (3, 600)


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
