"""The embedded base model: a tiny random-weight Qwen3 with a tokenizer of its own, as a Hugging Face folder.

Whatever a judge built on it can do was learned by the adapter, and by the embeddings and the head that are trained with
it. Being an ordinary folder, it is trained and scored like any model.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from common.errors import ArenaError
from common.files import atomic_folder

SPECIAL_TOKENS = END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"


@dataclass(frozen=True)
class BaseModelSize:
    """The shape of the network; the vocabulary is an upper bound, a small corpus fills less."""

    vocabulary: int = 1024
    hidden: int = 64
    layers: int = 2
    heads: int = 8
    feed_forward: int = 128
    positions: int = 4096


SIZE = BaseModelSize()


def build_base_model(folder: Path, texts: Iterable[str], *, seed: int, size: BaseModelSize = SIZE) -> None:
    """Train a byte-level BPE tokenizer on `texts`, draw a random model by `seed` and save both in `folder`.

    The same texts, seed and size give the same bytes. An earlier folder is replaced as a whole.
    Raises ArenaError where `texts` holds no text.
    """
    from transformers.utils import logging

    tokenizer = _train_tokenizer(texts, size)
    model = _random_model(tokenizer, seed, size)
    logging.disable_progress_bar()  # of two megabytes
    with atomic_folder(folder) as fresh:
        tokenizer.save_pretrained(fresh)
        model.save_pretrained(fresh)


def _train_tokenizer(texts: Iterable[str], size: BaseModelSize) -> Any:
    from transformers import PreTrainedTokenizerFast

    corpus = [text for text in texts if text.strip()]
    if not corpus:
        raise ArenaError("no text to train a tokenizer on", where="base model", remedy="give it the arena's texts")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size.vocabulary,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),  # any byte is a token: no text is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        model_max_length=size.positions,
        clean_up_tokenization_spaces=False,
    )


def _random_model(tokenizer: Any, seed: int, size: BaseModelSize) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=size.hidden,
        intermediate_size=size.feed_forward,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.heads,
        head_dim=size.hidden // size.heads,
        max_position_embeddings=size.positions,
        tie_word_embeddings=False,  # embeddings and head are trained apart and merged apart
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config)
