"""What tests of scoring share: tiny random models of three families, and a plain forward pass over one row."""

from __future__ import annotations

import pytest

FAMILIES = {
    "llama": {},
    "qwen3": {"head_dim": 8},
    # capped logits, and a window shorter than the rows
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "sliding_window": 8,
        "attn_implementation": "eager",
    },
}


@pytest.fixture(scope="session")
def tiny_model():
    """A function that makes a random two-layer model in fp32 whose logits spread as a trained one's do."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str = "llama", *, seed: int = 0, vocabulary: int = 600, tied: bool = False):
        config = AutoConfig.for_model(
            family,
            vocab_size=vocabulary,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            tie_word_embeddings=tied,
            initializer_range=0.2,
            **FAMILIES[family],
        )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(config).eval()

    return make


@pytest.fixture(scope="session", params=FAMILIES)
def family_model(request, tiny_model):
    """One tiny model of each family; tests leave it as it is."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def plain_logits():
    """A function that returns the logits at every position of one row, [length, vocabulary]."""
    import torch

    def logits(model, ids):
        with torch.no_grad():
            return model(input_ids=torch.tensor([list(ids)])).logits[0].float()

    return logits
