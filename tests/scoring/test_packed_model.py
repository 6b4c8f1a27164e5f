"""The packed model: packed, trimmed or padded, states are those of a plain pass over one row."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from data_prep.readers import VoteReader
from scoring.engines.torch_engine import score_labels
from scoring.packed_attention import NAME, UnknownAttention, attend, packed_attention
from scoring.packed_model import MODES, Piece, Reader, pack

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 1.0,
        "sliding_window": 8,
    },
}
LABELS = (35, 7, 599)


def model_of(family: str, *, size: int = 32, layers: int = 3, spread: float = 0.2, attention: str = "eager", **more):
    """A random model whose own attention is the eager one: the reference that knows soft-caps and windows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        family,
        vocab_size=600,
        hidden_size=size,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=spread,
        attn_implementation=attention,
        **FAMILIES.get(family, {}),
        **more,
    )
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return AutoModelForCausalLM.from_config(config).eval()


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 600, count).tolist()


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    """A model of each family."""
    return request.param, model_of(request.param)


@pytest.mark.parametrize("mode", MODES)
def test_states_are_those_of_a_plain_pass(family, mode):
    import torch

    _, model = family
    shared, answers, alone = ids(23, 1), [ids(9, 2), ids(41, 3)], ids(17, 4)
    pieces = [
        Piece(shared, wanted=1),
        *(Piece(answer, wanted=n, prefix=0) for answer, n in zip(answers, (9, 5), strict=True)),
        Piece(alone, wanted=2),
    ]
    with torch.inference_mode():
        plain = lambda row: model.base_model(input_ids=torch.tensor([row])).last_hidden_state[0]  # noqa: E731
        expected = [plain(shared)[-1:], plain(shared + answers[0])[-9:], plain(shared + answers[1])[-5:]]
        found = Reader(model, mode=mode).states(pack(pieces))
        torch.testing.assert_close(found, torch.cat([*expected, plain(alone)[-2:]]), atol=2e-4, rtol=1e-3)


def test_every_family_takes_the_fastest_way(family):
    name, model = family
    assert Reader(model).mode == "trimmed", name
    assert model.config._attn_implementation == "eager"


def test_a_soft_cap_counts_whatever_attention_the_model_was_loaded_with():
    exact = model_of("gemma2")
    loaded = model_of("gemma2", attention="sdpa")  # leaves the cap out without a word
    rows = [ids(30, 6)]
    expected = score_labels(Reader(exact, mode="padded"), rows, LABELS)
    for mode in MODES:
        np.testing.assert_allclose(score_labels(Reader(loaded, mode=mode), rows, LABELS), expected, atol=1e-4)


@pytest.mark.parametrize(
    "name, more, mode",
    [
        ("olmo2", {}, "packed"),  # norms stand elsewhere: the last layer cannot be trimmed
        ("gpt_oss", {"num_local_experts": 4, "num_experts_per_tok": 2}, "padded"),  # attention sinks
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "padded"),
    ],
)
def test_a_family_that_cannot_be_packed_is_padded(name, more, mode, plain_logits):
    model = model_of(name, **more)
    reader = Reader(model)
    assert reader.mode == mode
    rows = [ids(n, n) for n in (5, 33, 18)]
    expected = [plain_logits(model, row)[-1, list(LABELS)].numpy() for row in rows]
    np.testing.assert_allclose(score_labels(reader, rows, LABELS), expected, atol=1e-4)


def test_rows_whose_angles_depend_on_their_length_never_share_a_pass(plain_logits):
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
    model = model_of("llama", rope_parameters=rope)
    model.config.max_position_embeddings = model.model.rotary_emb.original_max_seq_len = 16
    model.model.rotary_emb.max_seq_len_cached = 16
    rows = [ids(60, 1), ids(12, 2)]
    found = score_labels(model, rows, LABELS)
    for row, logits in zip(rows, found, strict=True):
        np.testing.assert_allclose(plain_logits(model, row)[-1, list(LABELS)].numpy(), logits, atol=1e-4)


class TestAttend:
    @pytest.mark.parametrize("window", [None, 1, 7, 300, 5000])
    @pytest.mark.parametrize("softcap", [None, 2.0])
    @pytest.mark.parametrize("count, length", [(1, 1), (1, 40), (700, 700), (300, 700)])
    def test_it_is_the_definition(self, count, length, window, softcap):
        import torch

        torch.manual_seed(count + length)
        q, k, v = torch.randn(1, 2, count, 8), torch.randn(1, 2, length, 8), torch.randn(1, 2, length, 8)
        scores = (q @ k.transpose(2, 3)).double() * 0.4
        scores = scores if softcap is None else torch.tanh(scores / softcap) * softcap
        query, key = torch.arange(length - count, length)[:, None], torch.arange(length)[None]
        seen = (key <= query) & (key > query - (window or length))
        expected = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v.double()).float()
        torch.testing.assert_close(attend(q, k, v, 0.4, window, softcap), expected, atol=1e-5, rtol=1e-4)

    def test_what_it_does_not_know_is_refused(self):
        import torch

        x = torch.zeros(1, 1, 2, 4)
        for wrong in ({}, {"spans": (), "s_aux": x}):
            with pytest.raises(UnknownAttention):
                packed_attention(torch.nn.Identity(), x, x, x, None, **wrong)
        assert NAME == "arena_packed"


class TestRealRows:
    """The acceptance: 500 real rows, every way of batching, against a plain fp32 pass over one row at a time."""

    @pytest.fixture(scope="class")
    def prompts(self, real_data, small_tokenizer) -> list[list[int]]:
        csv.field_size_limit(2**31 - 1)
        battles = (battle for _, battle in VoteReader(real_data / "arena" / "train_natural.csv", labelled=True))
        texts = [
            f"{b.prompts[0][:300]}\n{b.responses_a[0][:200]}\n{b.responses_b[0][:200]}"
            for b, _ in zip(battles, range(500), strict=False)
        ]
        # The small tokenizer's ids are bytes and a few pairs: a tenth of each row is enough to differ in length.
        return [e.ids[: 8 + len(e.ids) // 10] for e in small_tokenizer.encode_batch(texts)]

    @pytest.mark.parametrize("name", FAMILIES)
    def test_probabilities_are_those_of_one_row_at_a_time(self, prompts, plain_logits, name):
        import torch

        model = model_of(name, spread=0.1, layers=2)
        expected = np.array([plain_logits(model, row)[-1, list(LABELS)].numpy() for row in prompts])
        assert len(expected) == 500
        for mode in MODES:
            for budget in (1, 700):
                found = score_labels(Reader(model, mode=mode), prompts, LABELS, token_budget=budget)
                assert np.abs(softmax(found) - softmax(expected)).max() < 1e-4, (mode, budget)
        reader = Reader(model.to(torch.bfloat16))
        assert reader.mode == "trimmed"
        found = score_labels(reader, prompts, LABELS, token_budget=700)
        assert 1e-6 < np.abs(softmax(found) - softmax(expected)).max() < 1e-2


def softmax(logits: np.ndarray) -> np.ndarray:
    raised = np.exp(logits - logits.max(axis=1, keepdims=True))
    return raised / raised.sum(axis=1, keepdims=True)
