"""The embedded base model: an ordinary folder, the same bytes for the same seed, labels that are single tokens."""

import pytest

from common.errors import ArenaError
from common.files import sha256_of
from data_prep.synthetic import synthetic_battles
from factory.base_model import SPECIAL_TOKENS, BaseModelSize, build_base_model

SMALL = BaseModelSize(vocabulary=512, hidden=64, layers=2, heads=2, feed_forward=128)
STRANGE = "Zażółć 你好 😀 \x00 \t\r\n a\u0301  trailing "


def _texts():
    for row in synthetic_battles(100, seed=1):
        yield from (*row.battle.prompts, *row.battle.responses_a, *row.battle.responses_b)


def _hashes(folder):
    return {path.name: sha256_of(path) for path in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "base"
    build_base_model(folder, _texts(), seed=1, size=SMALL)
    return folder


def test_the_folder_is_an_ordinary_hugging_face_model(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    assert model.config.vocab_size == len(tokenizer) == model.get_input_embeddings().num_embeddings
    assert not any(name.endswith("bias") for name, _ in model.named_parameters())
    assert not model.config.tie_word_embeddings
    assert model.config.eos_token_id == tokenizer.eos_token_id
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in base.iterdir())


def test_any_text_survives_the_tokenizer(base):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    assert tokenizer.decode(tokenizer(STRANGE, add_special_tokens=False)["input_ids"]) == STRANGE
    known = "The oven should be hot."
    assert len(tokenizer(known, add_special_tokens=False)["input_ids"]) <= len(known) * 0.6
    for token in SPECIAL_TOKENS:
        assert tokenizer.tokenize(f"x{token}y") == ["x", token, "y"]


def test_the_same_seed_gives_the_same_bytes_and_another_other_weights(base, tmp_path):
    import torch

    state = torch.random.get_rng_state()
    build_base_model(tmp_path / "same", _texts(), seed=1, size=SMALL)
    assert torch.equal(torch.random.get_rng_state(), state)
    build_base_model(tmp_path / "other", _texts(), seed=2, size=SMALL)
    assert _hashes(tmp_path / "same") == _hashes(base)
    changed = {name for name, digest in _hashes(tmp_path / "other").items() if digest != _hashes(base)[name]}
    assert changed == {"model.safetensors"}


def test_without_a_text_nothing_is_built(tmp_path):
    with pytest.raises(ArenaError, match="no text to train a tokenizer on"):
        build_base_model(tmp_path / "base", [" ", ""], seed=1, size=SMALL)
    assert not any(tmp_path.iterdir())
