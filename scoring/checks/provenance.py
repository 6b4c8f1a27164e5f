"""Where a result comes from: versions, hashes, seeds, hardware, recorded when it is made and checked again by `verify`.

Nothing secret, no absolute path. `verify` hashes every file again that provenance (in report.json) or a finished part
(in state.json beside it) names; versions are compared with those of today.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.files import read_json, sha256_of
from data_prep.export_reader import readable
from factory.state import PARTS, StageState
from scoring.checks.run_checks import stopping
from scoring.predictions import REPORT

_PACKAGES = (
    *("llamafactory", "transformers", "peft", "trl", "bitsandbytes", "torch", "tokenizers", "datasets"),
    *("numpy", "pyarrow", "scikit-learn", "scipy"),
)
# `changed` and `missing` mean that the folder is no longer what was made, `failed` that it was wrong when it was made;
# a warning is for a person to weigh.
BAD = ("changed", "missing", "failed")


def provenance(*, seed: int, files: list[Path]) -> dict[str, Any]:
    """Return versions, the seed, SHA-256 of `files` (relative paths; missing ones left out), hardware and commit."""
    return {
        "versions": versions(),
        "seed": seed,
        "sha256": {path.as_posix(): sha256_of(path) for path in files if path.is_file()},
        "hardware": hardware(),
        "git_commit": git_commit(),
    }


def versions() -> dict[str, str]:
    """Return the version of Python and of every package that shapes a result."""
    return {"python": platform.python_version(), **{name: metadata.version(name) for name in _PACKAGES}}


def hardware() -> dict[str, Any]:
    """Return the processor, its cores, the memory in GiB and the names of the GPUs."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "gpus": gpus}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def git_commit() -> str | None:
    """Return the commit of the current folder, None where git does not know one."""
    try:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return found.stdout.strip() or None


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
    root, path = _root_of(folder), folder / REPORT
    with readable(path, "score the stage again"):
        report = read_json(path)
        made_from, recorded = (dict[str, str](report["provenance"][key]) for key in ("sha256", "versions"))
        failed = stopping(report.get("checks", []))
        failures = [Finding(f"run check: {check['name']}", "failed", check["detail"]) for check in failed]
    findings = [*_files("made from", root, made_from), *_parts(root, folder), *failures, *_versions(recorded)]
    return Verification(folder.as_posix(), findings)


def _root_of(folder: Path) -> Path:
    """Return where the relative paths of outputs/EXP/STAGE or outputs/EXP/STAGE/FOLD start from: what holds outputs/.

    It is found without ".." and without links that stand for the folder; outputs/ may be a link to another disk.
    """
    remedy = "give a scored stage's folder, such as outputs/EXP/sft"
    if not (folder / REPORT).is_file():
        raise UsageError(f"holds no {REPORT}", where=str(folder), remedy=remedy)
    for path in (Path(os.path.normpath(folder.absolute())), folder.resolve()):
        outputs = [above for above in (*path.parents,)[1:3] if above.name == "outputs"]
        if outputs and path.exists() and path.samefile(folder):
            return outputs[0].parent
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


def _versions(recorded: Mapping[str, str]) -> Iterator[Finding]:
    """Yield where the versions of today are not those that the result was made with."""
    today = versions()
    for name, value in recorded.items():
        if today.get(name) == value:
            yield Finding(f"version of {name}", "ok", value)
        else:
            yield Finding(f"version of {name}", "warning", f"{value} when it was made, {today.get(name)} now")
