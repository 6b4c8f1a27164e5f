"""The sizes in a model's config.json, and the numbers of weights that follow from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ArenaError


@dataclass(frozen=True)
class ModelSize:
    """A decoder with gated feed-forward layers and grouped-query attention; properties are numbers of weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    tied: bool  # the head is the embedding
    normed: bool = False  # queries and keys pass through norms (Qwen3)
    soft_capped: bool = False  # attention scores pass through tanh (Gemma 2)

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of keys and values together."""
        return 2 * self.kv_heads * self.head_dim

    def linear_shapes(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of one layer's linear layers: q, k, v, o, gate, up, down."""
        q, kv, h, f = self.attention_width, self.key_value_width // 2, self.hidden, self.feed_forward
        return [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]

    @property
    def linear(self) -> int:
        """Linear layers without the head: those that quantisation shrinks."""
        return self.layers * sum(i * o for i, o in self.linear_shapes())

    @property
    def embedding(self) -> int:
        """The embedding."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """The head, 0 if it is the embedding."""
        return 0 if self.tied else self.embedding

    @property
    def parameters(self) -> int:
        """All weights but the norms, which are a few thousandths."""
        return self.linear + self.embedding + self.head

    def lora(self, rank: int) -> int:
        """Return the weights of a LoRA adapter on all linear layers."""
        return self.layers * rank * sum(i + o for i, o in self.linear_shapes())


# From the config.json of models that people use: a forecast for these needs neither network nor disk.
_KNOWN = {
    "meta-llama/Meta-Llama-3-8B-Instruct": ModelSize(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
    "meta-llama/Llama-3.1-8B-Instruct": ModelSize(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
    "meta-llama/Meta-Llama-3.1-8B-Instruct": ModelSize(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
    "google/gemma-2-9b-it": ModelSize(3584, 42, 16, 8, 256, 14336, 256000, tied=True, soft_capped=True),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelSize(1536, 28, 12, 2, 128, 8960, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": ModelSize(3584, 28, 28, 4, 128, 18944, 152064, tied=False),
    "Qwen/Qwen3-0.6B": ModelSize(1024, 28, 16, 8, 128, 3072, 151936, tied=True, normed=True),
    "Qwen/Qwen3-1.7B": ModelSize(2048, 28, 16, 8, 128, 6144, 151936, tied=True, normed=True),
    "Qwen/Qwen3-4B-Instruct-2507": ModelSize(2560, 36, 32, 8, 128, 9728, 151936, tied=True, normed=True),
    "Qwen/Qwen3-8B": ModelSize(4096, 36, 32, 8, 128, 12288, 151936, tied=False, normed=True),
    "models/SmolLM2-135M-Instruct": ModelSize(576, 30, 9, 3, 64, 1536, 49152, tied=True),
    "models/arena-tiny": ModelSize(64, 2, 8, 8, 8, 128, 1024, tied=False, normed=True),
    "microsoft/Phi-4-mini-instruct": ModelSize(3072, 32, 24, 8, 128, 8192, 200064, tied=True),
}


# Weights up to which a CPU trains in minutes, and up to which in hours.
_TINY, SMALL = 1e7, 5e8


def time_on_cpu(model: str) -> str:
    """Return what a CPU takes to train it: minutes, hours or days; nothing where only a hub knows its sizes."""
    try:
        size = size_of(model).parameters if model in _KNOWN or Path(model).is_dir() else 0
    except ArenaError:
        size = 0
    return ("minutes" if size <= _TINY else "hours" if size <= SMALL else "days") if size else ""


def size_of(model: str, revision: str = "main") -> ModelSize:
    """Return the sizes of a model folder or hub id; raises ArenaError where they are not to be had.

    For a hub id that is not known here the hub's config.json is read (from the cache when offline).
    """
    path = Path(model) / "config.json"
    if not path.parent.is_dir():
        if model in _KNOWN:
            return _KNOWN[model]
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json", revision=revision))
        except Exception as error:  # gated, offline, unknown: the library has a class for each
            what = f"cannot download its config.json: {str(error).splitlines()[0]}"
            remedy = "go online, accept the model's licence on its page, or give a folder as `model`"
            raise ArenaError(what, where=model, remedy=remedy) from None
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "forecast needs a decoder with hidden_size, num_hidden_layers, intermediate_size and vocab_size"
        raise ArenaError(f"does not hold the model's sizes ({error!r})", where=str(path), remedy=remedy) from None


_NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
_LARGEST = 1 << 32


def _parse(config: dict[str, Any]) -> ModelSize:
    """Read the keys by hand: AutoConfig takes seconds to import, and refuses model types newer than itself."""
    config = config.get("text_config", config)
    for key, least in {**dict.fromkeys(_NEEDED, 1), "num_key_value_heads": 0, "head_dim": 0}.items():
        value = config[key] if least else config.get(key) or 0
        if type(value) is not int or not least <= value < _LARGEST:
            raise ValueError(f"{key} is {value!r:.40}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelSize(
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        feed_forward=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        normed=str(config.get("model_type")).startswith("qwen3"),
        soft_capped=bool(config.get("attn_logit_softcapping")),
    )
