"""Finished shards on disk: each a checked file of raw scores that belongs to one run and to no other.

outputs/<experiment>/<stage>/scoring/<target>-<digest of the inputs>/
  manifest.json     what the scores depend on: model, rows, engine, precision, plan, label ids
  ab-00012.scores   one line of JSON (run, shard, rows, columns, SHA-256 of rows and scores), then float64 scores
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ArenaError
from common.files import atomic_file, write_json
from factory.state import differences
from scoring.shard_plan import Shard

_MANIFEST = "manifest.json"
_FORMAT = 1


class ShardFolder:
    """The finished shards of one run; `inputs` are everything that its scores depend on."""

    def __init__(
        self,
        base: Path,
        target: str,
        inputs: Mapping[str, Any],
        note: Callable[[str], None],
        *,
        fresh: bool = False,
    ):
        """Open the folder of these inputs, with what an earlier call left there, or `fresh`; `note` tells a person."""
        self._inputs = json.loads(json.dumps({"format": _FORMAT, **inputs}))
        self._run = hashlib.sha256(json.dumps(self._inputs, sort_keys=True).encode()).hexdigest()
        self.path, self._note = base / f"{target}-{self._run[:12]}", note
        if fresh:
            shutil.rmtree(self.path, ignore_errors=True)
        manifest = self.path / _MANIFEST
        self._tell_others(base, target)
        if manifest.is_file() and _read(manifest) != self._inputs:
            raise ArenaError(
                "the manifest of these unfinished scores was changed",
                where=str(manifest),
                remedy="move the folder away: it is then begun anew",
            )
        self.resumed = manifest.is_file()
        write_json(manifest, self._inputs)

    def read(self, shard: Shard, columns: int) -> np.ndarray | None:
        """Return a shard's scores [rows, columns], None if it is not there or, which is noted, not what it must be."""
        path = self._file(shard)
        try:
            head, _, payload = path.read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        fault = self._fault(head, payload, shard, columns)
        if fault:
            self._note(f"{path}: {fault}; scored again")
            return None
        return np.frombuffer(payload, "<f8").reshape(len(shard.rows), columns)

    def write(self, shard: Shard, scores: np.ndarray) -> None:
        """Keep the scores [rows, columns] of a shard, whole or not at all."""
        payload = np.ascontiguousarray(scores, "<f8").tobytes()
        with atomic_file(self._file(shard), "wb") as file:
            file.write(json.dumps(self._head(shard, scores.shape[1], payload)).encode() + b"\n")
            file.write(payload)

    def remove(self) -> None:
        """Delete this run's folder: its scores are in the final files. The last one takes the base folder along."""
        shutil.rmtree(self.path, ignore_errors=True)
        remove_empty(self.path.parent)

    def _file(self, shard: Shard) -> Path:
        return self.path / f"{shard.name}.scores"

    def _head(self, shard: Shard, columns: int, payload: bytes) -> dict[str, Any]:
        digest = hashlib.sha256(shard.rows.astype("<i8").tobytes())
        digest.update(payload)
        about = {"run": self._run, "shard": shard.name, "rows": len(shard.rows), "columns": columns}
        return {**about, "sha256": digest.hexdigest()}

    def _fault(self, head: bytes, payload: bytes, shard: Shard, columns: int) -> str | None:
        try:
            found = dict(json.loads(head))
        except (ValueError, TypeError):
            return "is no shard of scores"
        expected = self._head(shard, columns, payload)
        if (found.get("run"), found.get("shard")) != (expected["run"], expected["shard"]):
            return "belongs to another run"
        if found != expected or len(payload) != 8 * columns * len(shard.rows):
            return "is damaged (its checksum does not fit)"
        return None if np.isfinite(np.frombuffer(payload, "<f8")).all() else "holds scores that are not finite"

    def _tell_others(self, base: Path, target: str) -> None:
        """Say which unfinished runs of the same target are left alone, and in what they differ."""
        for manifest in sorted(base.glob(f"{target}-*/{_MANIFEST}")):
            if manifest.parent != self.path and len(manifest.parent.name) == len(self.path.name):
                changed = differences(_read(manifest) or {}, self._inputs)
                self._note(
                    f"{manifest.parent}: unfinished scores of an earlier call with other inputs are not used "
                    f"({'; '.join(changed[:3])}{' …' if len(changed) > 3 else ''}); delete the folder if they are not "
                    "wanted any more"
                )


def remove_empty(base: Path) -> None:
    """Remove a folder of unfinished runs if there are none, nor a lock: what lies in there belongs to other runs."""
    with suppress(OSError):
        base.rmdir()


def _read(manifest: Path) -> dict[str, Any] | None:
    try:
        return json.loads(manifest.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
