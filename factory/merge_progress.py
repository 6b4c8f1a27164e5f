"""The progress of a merge: which part of the weights the child has loaded, and which part lies written on the disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from common.console import Countdown, Line

# transformers' own bar, as tqdm writes it into a file: Loading weights:  43%|████  | 125/290 [00:05<00:07, 23.1it/s]
_LOADING = re.compile(r"Loading weights:\s+(\d+)%\|.*<((?:\d+:)?\d+:\d+)")
_WEIGHTS = "*.safetensors"
_KIB, _MIB = 2**10, 2**20


class MergeProgress:
    """Shows a merge on a live line; the merged weights are as many bytes as the model's that the adapter goes into."""

    def __init__(self, line: Line, recipe: dict[str, Any], merged: Path):
        """`merged` is the folder that the child writes to."""
        self._line, self._recipe, self._merged = line, recipe, merged
        self._countdown = Countdown()
        self._total: int | None = None

    def read(self, text: str) -> None:
        """Take one line of the child's output."""
        if (told := _LOADING.search(text)) and told[1] != "100":
            self._line.part(int(told[1]) / 100, f"of the weights loaded, {told[2]} left")

    def look(self) -> None:
        """Look at what is written so far."""
        written = _bytes(self._merged)
        if not written:
            return
        if self._total is None:
            self._total = _bytes(_folder_of(self._recipe))
        if not self._total:  # a hub model in a cache that we cannot find
            self._line.phase(f"writing the merged model, {_size(written, written)} so far")
            return
        share = min(written / self._total, 1.0)
        size = f"{_number(written, self._total)} of {_size(self._total, self._total)}"
        self._line.part(share, f"of the merged model written, {size}{self._countdown.left(share)}")


def _size(count: int, largest: int) -> str:
    """Return bytes with their unit: that of `largest`, so that a tiny model is not 0 of 0 MiB."""
    return f"{_number(count, largest)} {'MiB' if largest >= _MIB else 'KiB'}"


def _number(count: int, largest: int) -> str:
    return f"{count // (_MIB if largest >= _MIB else _KIB):,}"


def _bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.glob(_WEIGHTS))
    except OSError:  # a file that was renamed between the list and the look
        return 0


def _folder_of(recipe: dict[str, Any]) -> Path:
    """Return the folder of the model that is merged into: its own, or the hub's cache, where the child has put it."""
    name = recipe["model_name_or_path"]
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        revision = recipe.get("model_revision", "main")
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=_WEIGHTS))
    except Exception:  # ModelScope's or Openmind's cache: only the time left is unknown then
        return Path(name)
