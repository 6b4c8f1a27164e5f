"""What tests of scoring share: tiny random models of several families, and a plain forward pass over one row."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.scoring.places import save_adapter

FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 8},
    # capped scores and logits, and a window shorter than the rows; only the eager attention knows the cap
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 1.0,
        "sliding_window": 8,
        "attn_implementation": "eager",
    },
}
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,  # logits that spread as a trained model's do
    "vocab_size": 600,
}


@pytest.fixture(scope="session")
def tiny_model():
    """A function that makes a random two-layer model in fp32; `more` are keys of its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def make(family: str = "llama", *, seed: int = 0, tied: bool = False, **more):
        more = {"tie_word_embeddings": tied} | SIZES | FAMILIES.get(family, {}) | more
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **more)).eval()

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


@pytest.fixture(scope="session")
def base(tmp_path_factory, tiny_model) -> Path:
    """A saved base model."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model("qwen3", seed=3).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, base) -> Path:
    """An adapter that changes every linear layer, the embeddings and the head."""
    return save_adapter(base, tmp_path_factory.mktemp("adapter"))
