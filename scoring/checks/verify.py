"""Checking an output folder again against what was recorded when it was made: report.json and state.json beside it.

Every file that provenance or a finished part names is hashed again; versions and hardware are compared with those of
today.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common.errors import ArenaError, UsageError
from common.files import read_json, sha256_of
from factory.state import PARTS, StageState
from scoring.checks.provenance import git_commit, hardware, versions
from scoring.predictions import REPORT

# `changed` and `missing` mean that the folder is no longer what was made, `failed` that it was wrong when it was made;
# a warning is for a person to weigh.
BAD = ("changed", "missing", "failed")


@dataclass(frozen=True)
class Finding:
    """One line of a verification: `state` is ok, changed, missing, failed or warning."""

    what: str
    state: str
    detail: str = ""


@dataclass(frozen=True)
class Verification:
    """All findings about one output folder."""

    folder: str
    findings: list[Finding]

    @property
    def sound(self) -> bool:
        """Whether nothing changed, nothing is missing and no run check failed."""
        return not any(finding.state in BAD for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"folder": self.folder, "sound": self.sound, "findings": [asdict(finding) for finding in self.findings]}


def verify(folder: Path) -> Verification:
    """Check outputs/EXP/STAGE again; raises UsageError if it is no such folder, ArenaError if its report is damaged."""
    stage = _stage_folder(folder)
    root, path = stage.parents[2], folder / REPORT
    try:
        report = read_json(path)
        provenance, hashes = report["provenance"], report["provenance"]["sha256"]
        if not isinstance(hashes, dict) or not all(isinstance(digest, str) for digest in hashes.values()):
            raise TypeError("it names no hashes")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArenaError(f"cannot be read: {error}", where=str(path), remedy="score the stage again") from None
    findings = [
        *_files("made from", root, hashes),
        *_parts(root, folder),
        *_checks(report.get("checks", [])),
        *_today(provenance),
    ]
    return Verification(folder.as_posix(), findings)


def _stage_folder(folder: Path) -> Path:
    """Return the whole path of outputs/EXP/STAGE, without ".." and without links that stand for the folder.

    The folder that holds outputs/ is where relative paths start from; outputs/ itself may be a link to another disk.
    """
    remedy = "give a scored stage's folder, such as outputs/EXP/sft"
    if not (folder / REPORT).is_file():
        raise UsageError(f"holds no {REPORT}", where=str(folder), remedy=remedy)
    for path in (Path(os.path.normpath(folder.absolute())), folder.resolve()):
        if len(path.parents) > 2 and path.parents[1].name == "outputs" and path.exists() and path.samefile(folder):
            return path
    raise UsageError("is not the folder of a stage", where=str(folder), remedy=remedy)


def _files(role: str, root: Path, hashes: Mapping[str, str]) -> Iterator[Finding]:
    """Yield one finding a file; a path that leads out of the root is not opened."""
    for name, digest in hashes.items():
        what = f"{role}: {name}"
        if Path(name).is_absolute() or ".." in Path(name).parts:
            yield Finding(what, "changed", "the path leads out of this folder; it was not written by a run")
        elif not (root / name).is_file():
            yield Finding(what, "missing")
        elif sha256_of(root / name) != digest:
            yield Finding(what, "changed", "has other content than when the result was made")
        else:
            yield Finding(what, "ok")


def _parts(root: Path, folder: Path) -> Iterator[Finding]:
    """Yield the outputs of the finished parts, from state.json."""
    if not (folder / "state.json").is_file():
        yield Finding("state.json", "missing", "the hashes of the outputs are not known")
        return
    state = StageState(folder)
    for part in PARTS:
        if (record := state.record(part)) is None:
            continue
        if record.finished_at is None:
            yield Finding(f"{part}: finished", "changed", f"{part} was started again and did not end: run it again")
        yield from _files(part, root, record.sha256)


def _checks(checks: Any) -> Iterator[Finding]:
    """Yield the run checks that failed when the result was made."""
    if not (isinstance(checks, list) and all(isinstance(check, dict) for check in checks)):
        yield Finding("run checks", "changed", f"{REPORT} does not hold them as a run writes them")
        return
    for check in checks:
        if check.get("passed") is False and check.get("stops"):
            yield Finding(f"run check: {check.get('name')}", "failed", str(check.get("detail", "")))


def _today(provenance: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield where versions, commit or hardware are not those that the result was made with."""
    before, now = (
        {f"version of {name}": value for name, value in _mapping(made.get("versions")).items()}
        | {"git commit": made.get("git_commit")}
        | _mapping(made.get("hardware"))
        for made in (provenance, {"versions": versions(), "git_commit": git_commit(), "hardware": hardware()})
    )
    for name, value in before.items():
        if now.get(name) == value:
            yield Finding(name, "ok", _shown(value))
        else:
            yield Finding(name, "warning", f"{_shown(value)} when it was made, {_shown(now.get(name))} now")


def _mapping(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
