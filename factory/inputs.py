"""The inputs of a recipe: what its result depends on, as values and SHA-256 sums, and the rows it must train on."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from common.files import read_json, sha256_of

# Keys whose value may name local files or folders that shape the result.
_PATH_KEYS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "deepspeed")
_MODEL_FILE = re.compile(
    r".*\.(safetensors|bin|model|jinja|txt|py)|(adapter_|generation_)?config\.json|tokenizer.*\.json|vocab\.json"
    r"|special_tokens_map\.json|added_tokens\.json"
)
# What the trainer leaves beside a model, and the log that LLaMA Board shows: no part of it.
_NO_MODEL = frozenset({"training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin", "running_log.txt"})
# `prepare` keeps a person's entries, and so reads the list, too.
_MEND = "mend it; or move it away where it holds no entries of your own, and run `run.py prepare` again"
_HASHED_UP_TO = 256 * 2**20  # bytes
_STRIDE, _SAMPLE = 4 * 2**20, 64 * 2**10


def inputs_of(recipe_path: Path, recipe: dict[str, Any], *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the inputs of a recipe: its keys, its data files and local models, but those of the keys `without`.

    A weights file of over 256 MiB counts by its size and samples, as hashing an 8B model takes half a minute.
    """
    inputs: dict[str, Any] = {str(recipe_path): recipe}
    for key in (key for key in _PATH_KEYS if key not in without):
        for name in names(recipe.get(key)):
            if Path(name).exists():
                inputs[f"{key} {name}"] = model_files(Path(name))
    data: dict[str, Any] = {}
    for key in ("dataset", "eval_dataset"):
        data.update({f"{_info(recipe)} {name}": entry for name, entry in _entries(recipe, key).items()})
        data.update({str(path): _content(path) for path in dataset_files(recipe, key)})
    return {**inputs, "data": data} if data else inputs


def dataset_files(recipe: dict[str, Any], key: str) -> list[Path]:
    """Return the local files of the recipe's `dataset` or `eval_dataset`, those that exist; of a folder its parts."""
    return [file for entry in _entries(recipe, key).values() for file in _entry_files(recipe, entry)]


def _entry_files(recipe: dict[str, Any], entry: dict[str, Any]) -> list[Path]:
    path = _info(recipe).parent / entry.get("file_name", "")
    return sorted(path.iterdir()) if path.is_dir() and entry.get("file_name") else [path] if path.is_file() else []


def training_rows(recipe: dict[str, Any]) -> int | None:
    """Return the number of rows that LLaMA-Factory must train on, None where the recipe makes that unknowable.

    Counted are JSON Lines files; `max_samples` and `num_samples` are taken into account, while packing,
    streaming, a random validation split, mixing and other file types leave the number open.
    """
    open_keys = ("packing", "neat_packing", "streaming", "val_size", "tokenized_path")
    if any(recipe.get(key) for key in open_keys) or recipe.get("mix_strategy", "concat") != "concat":
        return None
    entries = _entries(recipe, "dataset")
    files = {name: _entry_files(recipe, entry) for name, entry in entries.items()}
    if not files or len(files) != len(names(recipe.get("dataset"))):
        return None
    if not all(files.values()) or any(path.suffix != ".jsonl" for each in files.values() for path in each):
        return None
    total = 0
    for name, entry in entries.items():
        rows = entry.get("num_samples") or sum(map(_count_lines, files[name]))
        if not isinstance(rows, int):
            raise ArenaError(f"num_samples {rows!r} is no number", where=str(_info(recipe)), remedy="prepare again")
        total += min(rows, recipe.get("max_samples") or rows)
    return total


def names(value: Any) -> list[str]:
    """Return a recipe's comma list (or YAML list) as a list of names."""
    parts = value if isinstance(value, list) else str(value).split(",") if value is not None else []
    return [str(part).strip() for part in parts if str(part).strip()]


def _info(recipe: dict[str, Any]) -> Path:
    return Path(recipe.get("dataset_dir", "data")) / "dataset_info.json"


def _entries(recipe: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    path, wanted = _info(recipe), names(recipe.get(key))
    if not wanted or not path.is_file():
        return {}
    try:
        info = read_json(path)
    except (OSError, ValueError) as error:
        raise ArenaError(f"is not JSON: {error}", where=str(path), remedy=_MEND) from None
    if not isinstance(info, dict):
        raise ArenaError("is not a JSON object", where=str(path), remedy=_MEND)
    entries = {name: info[name] for name in wanted if name in info}
    for name, entry in entries.items():
        _check_entry(entry, f"{path}: {name}")
    return entries


def _check_entry(entry: Any, where: str) -> None:
    """Raise ArenaError unless a data set's file, if it names one, lies in the folder of dataset_info.json."""
    file = entry.get("file_name", "") if isinstance(entry, dict) else None
    if not isinstance(file, str):
        raise ArenaError("is not an object that names a file", where=where, remedy="run `run.py prepare` again")
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ArenaError(
            f"file_name {file!r} leads out of the data folder",
            where=where,
            remedy="run `run.py prepare` again; a data set of your own belongs into the data folder once it is done",
        )


def model_files(path: Path) -> Any:
    """Return what a model's or an adapter's folder holds, by name, each as 'sha256:…'; of a file its content alone."""
    if path.is_file():
        return _content(path)
    own = [file for file in sorted(path.iterdir()) if _MODEL_FILE.fullmatch(file.name) and file.name not in _NO_MODEL]
    return {file.name: _content(file) for file in own if file.is_file()}


def _content(path: Path) -> str:
    status = path.stat()
    if status.st_size > _HASHED_UP_TO and path.suffix in (".safetensors", ".bin"):
        return f"sha256:{_sampled(path, status.st_size)} of samples, {status.st_size} bytes"
    return f"sha256:{sha256_of(path)}"


def _sampled(path: Path, size: int) -> str:
    """Return the SHA-256 of a block in every 4 MiB and of the end: no large tensor changes unseen, a copy stays equal.

    The time of change would be another one on a disk that the project was moved to.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in (*range(0, size, _STRIDE), max(size - _SAMPLE, 0)):
            file.seek(place)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())
