"""Where a result comes from: versions, hashes, seeds, hardware. Nothing secret, no absolute path."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from common.files import sha256_of

_PACKAGES = (
    *("llamafactory", "transformers", "peft", "trl", "bitsandbytes", "torch", "tokenizers", "datasets"),
    *("numpy", "pyarrow", "scikit-learn", "scipy"),
)


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
