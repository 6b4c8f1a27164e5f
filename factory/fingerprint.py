"""Fingerprints: what a part of a stage is made from, as values and SHA-256 sums, and what changed since.

{"factory_configs/exp/sft.yaml": {"learning_rate": 0.0001, …},
 "model_name_or_path models/base": {"config.json": "sha256:…", …}, "data": {"data/exp/sft_train.jsonl": "sha256:…", …}}
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from common.files import read_json, sha256_of
from data_prep.export_folder import ELSEWHERE

# Recipe keys that change neither weights nor probabilities.
NEUTRAL_KEYS = frozenset(
    {
        *("logging_steps", "logging_first_step", "save_steps", "save_strategy", "save_total_limit", "plot_loss"),
        *("report_to", "run_name", "dataloader_num_workers", "preprocessing_num_workers", "overwrite_cache"),
        "ddp_timeout",
    }
)
# Keys whose value may name local files or folders that shape the result.
MODEL_KEYS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "deepspeed")
DATA_KEYS = ("dataset", "eval_dataset")
_MODEL_FILE = re.compile(
    r".*\.(safetensors|bin|model|jinja|txt|py)|(adapter_|generation_)?config\.json|tokenizer.*\.json|vocab\.json"
    r"|special_tokens_map\.json|added_tokens\.json"
)
# What the trainer leaves beside a model, and the log that LLaMA Board shows.
_NOT_THE_MODEL = frozenset({"training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin", "running_log.txt"})
_HASHED_UP_TO = 256 * 2**20  # bytes; hashing an 8B model takes half a minute
_STRIDE, _SAMPLE = 4 * 2**20, 64 * 2**10
_ABSENT = object()


def names(value: Any) -> list[str]:
    """Return a recipe's comma list (or YAML list) as a list of names."""
    parts = value if isinstance(value, list) else str(value).split(",") if value is not None else []
    return [str(part).strip() for part in parts if str(part).strip()]


def local_models(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fingerprint of every local model, adapter or file that a recipe names."""
    named = [(key, name) for key in MODEL_KEYS for name in names(recipe.get(key))]
    return {f"{key} {name}": model_files(Path(name)) for key, name in named if Path(name).exists()}


def model_files(path: Path) -> Any:
    """Return the files of a model's or an adapter's folder, {name: 'sha256:…'}; of a single file its sum alone."""
    if path.is_file():
        return _content(path)
    own = [f for f in sorted(path.iterdir()) if _MODEL_FILE.fullmatch(f.name) and f.name not in _NOT_THE_MODEL]
    return {file.name: _content(file) for file in own if file.is_file()}


def exported_files(manifest: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Return the fingerprint of every exported file by its path, as the export's manifest has them."""
    return {(folder / name).as_posix(): f"sha256:{digest}" for name, digest in manifest["files"].items()}


def data_sets(recipe: Mapping[str, Any], known: Mapping[str, str]) -> dict[str, Any]:
    """Return the fingerprint of the recipe's data sets; files in `known` (see `exported_files`) are not read again."""
    info, found = dataset_info(recipe), {}
    for name, entry in dataset_entries(recipe, *DATA_KEYS).items():
        found[f"{info} {name}"] = entry
        for path in entry_files(recipe, entry):
            found[path.as_posix()] = known.get(path.as_posix()) or _content(path)
    return found


def dataset_info(recipe: Mapping[str, Any]) -> Path:
    """Return the path of the recipe's dataset_info.json."""
    return Path(recipe.get("dataset_dir", "data")) / "dataset_info.json"


def dataset_entries(recipe: Mapping[str, Any], *keys: str) -> dict[str, dict[str, Any]]:
    """Return the entries of dataset_info.json that these keys of a recipe (`DATA_KEYS`) name and that are there."""
    path, wanted = dataset_info(recipe), [name for key in keys for name in names(recipe.get(key))]
    if not wanted or not path.is_file():
        return {}
    remedy = "fix it; or move it away if it holds no entries of your own, and run `run.py prepare` again"
    try:
        info = read_json(path)
    except (OSError, ValueError) as error:
        raise ArenaError(f"is not JSON: {error}", where=str(path), remedy=remedy) from None
    if not isinstance(info, dict):
        raise ArenaError("is not a JSON object", where=str(path), remedy=remedy)
    entries = {name: info[name] for name in wanted if name in info}
    for name, entry in entries.items():
        if isinstance(entry, dict) and (other := next((key for key in ELSEWHERE if entry.get(key)), None)):
            raise ArenaError(
                f"{other}: LLaMA-Factory would train on that instead of the exported file",
                where=f"{path}: {name}",
                remedy="remove the key; `run.py prepare --train hf://datasets/OWNER/NAME` reads votes from the hub",
            )
        file = entry.get("file_name", "") if isinstance(entry, dict) else None
        if not isinstance(file, str) or Path(file).is_absolute() or ".." in Path(file).parts:
            raise ArenaError(
                f"file_name {file!r} does not name a file in the data folder",
                where=f"{path}: {name}",
                remedy="run `run.py prepare` again; put a data set of your own into the data folder",
            )
    return entries


def entry_files(recipe: Mapping[str, Any], entry: Mapping[str, Any]) -> list[Path]:
    """Return the files of one entry of dataset_info.json that exist; of a folder its parts in order."""
    path = dataset_info(recipe).parent / entry.get("file_name", "")
    return sorted(path.iterdir()) if path.is_dir() and entry.get("file_name") else [path] if path.is_file() else []


def training_rows(recipe: Mapping[str, Any]) -> int | None:
    """Return on how many rows LLaMA-Factory must train, None where the recipe leaves that open.

    Counts JSON Lines files up to `max_samples` and `num_samples`; packing, streaming, a random validation split,
    mixing and other file types leave it open.
    """
    unknown = ("packing", "neat_packing", "streaming", "val_size", "tokenized_path")
    if any(recipe.get(key) for key in unknown) or recipe.get("mix_strategy", "concat") != "concat":
        return None
    entries = dataset_entries(recipe, "dataset")
    files = {name: entry_files(recipe, entry) for name, entry in entries.items()}
    if not files or len(files) != len(names(recipe.get("dataset"))) or not all(files.values()):
        return None
    if any(path.suffix != ".jsonl" for each in files.values() for path in each):
        return None
    total = 0
    for name, entry in entries.items():
        rows = entry.get("num_samples") or sum(map(_count_lines, files[name]))
        if not isinstance(rows, int):
            where = str(dataset_info(recipe))
            raise ArenaError(f"num_samples {rows!r} is not a whole number", where=where, remedy="run prepare again")
        total += min(rows, recipe.get("max_samples") or rows)
    return total


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return one line for each input that differs, e.g. 'sft.yaml: learning_rate 0.0001 -> 0.0002'."""
    before, after, lines = _flat(old), _flat(new), []
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if key[-1] in NEUTRAL_KEYS or was == now:
            continue
        if _is_sum(was) or _is_sum(now):
            change = "is new" if was is _ABSENT else "is gone" if now is _ABSENT else "has other content"
            lines.append(f"{': '.join(key)} {change}")
        else:
            lines.append(f"{': '.join(key)} {_shown(was)} -> {_shown(now)}")
    return lines


def _content(path: Path) -> str:
    size = path.stat().st_size
    if size > _HASHED_UP_TO and path.suffix in (".safetensors", ".bin"):
        return f"sha256:{_sampled(path, size)} of samples, {size} bytes"
    return f"sha256:{sha256_of(path)}"


def _sampled(path: Path, size: int) -> str:
    """Return the SHA-256 of a block in every 4 MiB and of the end, so that no large tensor changes unnoticed."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in (*range(0, size, _STRIDE), max(size - _SAMPLE, 0)):
            file.seek(place)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


def _flat(values: Any, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(values, Mapping):
        return {above: json.loads(json.dumps(values))}  # as state.json gives them back, so that old and new compare
    return {key: value for name, each in values.items() for key, value in _flat(each, (*above, str(name))).items()}


def _is_sum(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("sha256:")


def _shown(value: Any) -> str:
    return "(absent)" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
