"""The doctor: what this machine can run and what is missing, each finding with its remedy. No secret is shown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
from packaging.markers import Marker

from common.progress import Show
from factory.devices import Devices, Product, cpu_with_bf16, devices

_PROJECT = Path(__file__).resolve().parents[1]
_GIB = 2**30
# A model in 16 bits takes 2 GB a billion weights, three times: downloaded, dequantised for the merge, merged. The
# default experiment's has 4 billion. Merging an 8B model needs RAM of its size.
_DISK_FAULT, _DISK_WARNING, _CACHE_WARNING, _MEMORY_WARNING = 5, 25, 10, 20  # GiB
_GIB_A_BILLION = 2e9 / _GIB


@dataclass(frozen=True)
class Finding:
    """One line: what was examined, ok / warning / fault, what was seen, and what to do unless all is well."""

    name: str
    state: str
    said: str
    remedy: str = ""


def _finding(name: str, said: str, remedy: str = "", *, fault: bool = False, warning: bool = False) -> Finding:
    """Return a finding; the remedy is left out where all is well."""
    state = "fault" if fault else "warning" if warning else "ok"
    return Finding(name, state, said, remedy if fault or warning else "")


def examine(show: Show | None = None) -> list[Finding]:
    """Examine this machine and the current folder; a person sees what is at work: importing torch takes seconds."""
    show = show or Show()
    with show.line("doctor") as line:
        if show.attended:
            line.update("importing torch, multiplying in 4 bits")
        seen = devices(products=True)
        of_torch = (_torch(seen), *_gpus(seen), _driver(seen), *map(_bitsandbytes, seen.products))
        return [packages(), *of_torch, cpu(), _memory(), _disk(), _hub_token(), _hub_cache()]


def as_report(findings: list[Finding]) -> dict[str, Any]:
    """Return what `--json` prints: ok, the number of faults and of warnings, and the findings."""
    states = [finding.state for finding in findings]
    faults, warnings = states.count("fault"), states.count("warning")
    return {"ok": not faults, "faults": faults, "warnings": warnings, "findings": [asdict(each) for each in findings]}


def as_lines(findings: list[Finding]) -> list[str]:
    """Return what people read: a line for each finding, a second one with the remedy."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.state:<8}{finding.name}: {finding.said}")
        if finding.remedy:
            lines.append(f"{'':8}  remedy: {finding.remedy}")
    report = as_report(findings)
    return [*lines, f"{report['faults']} fault(s), {report['warnings']} warning(s)"]


def packages(root: Path = _PROJECT) -> Finding:
    """Compare with the lock what is installed of the packages that pyproject.toml names."""
    remedy = "make install"
    try:
        lock = (root / "requirements.lock").read_text(encoding="utf-8")
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        named = {_normal(re.split(r"[^\w.-]", each)[0]) for each in project["project"]["dependencies"]}
    except (OSError, ValueError, KeyError) as error:
        return Finding("packages", "fault", f"the lock cannot be read: {error}", "restore requirements.lock from git")
    lines = re.findall(r"^([\w.-]+)==([^\s;\\]+)(?: ; ([^\\\n]+))?", lock, re.MULTILINE)
    pins = {
        _normal(name): version for name, version, marker in lines if not marker or Marker(marker.strip()).evaluate()
    }
    found = {name: _installed(name) for name in sorted(named & pins.keys())}
    apart = [f"{name} {got or 'is missing'} (locked {pins[name]})" for name, got in found.items() if got != pins[name]]
    said = ", ".join(apart) or f"all {len(found)} as locked, llamafactory {pins.get('llamafactory', '?')}"
    return _finding("packages", said, remedy, fault=bool(apart))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _torch(seen: Devices) -> Finding:
    built = f", built for CUDA {seen.cuda}" if seen.cuda else ""
    remedy = "make install: torch, torchvision and torchaudio of one CUDA build"
    return _finding("torch", seen.failure or f"{seen.torch}{built}", remedy, fault=bool(seen.failure))


def _gpus(seen: Devices) -> Iterator[Finding]:
    if not seen.gpus:
        hidden = " (CUDA_VISIBLE_DEVICES hides them)" if _hidden() else ""
        remedy = "a CPU trains `-e demo`, and reads for `run.py probe -e smollm2-135m`; the other presets need a GPU"
        yield Finding("gpu", "warning", f"none{hidden}", remedy)
    for number, gpu in enumerate(seen.gpus):
        said = (
            f"{number}: {gpu.name}, {gpu.memory_gib:.1f} GiB, {gpu.free_gib:.1f} free, {'' if gpu.bf16 else 'no '}bf16"
        )
        remedy = "give each step under `recipes:` of experiment.yaml fp16: true and bf16: false"
        if gpu.bf16:
            remedy = "more than half of its memory is in use: see `nvidia-smi` for what runs there"
        yield _finding("gpu", said, remedy, warning=not gpu.bf16 or gpu.free_gib < gpu.memory_gib / 2)


def _hidden() -> bool:
    return os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")


def _driver(seen: Devices) -> Finding:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
        versions = sorted(set(done.stdout.split())) if done.returncode == 0 else []
    except (OSError, subprocess.TimeoutExpired):
        versions = []
    unseen = bool(versions) and not seen.gpus and not _hidden()
    said = ", ".join(versions) or "no NVIDIA driver; needed only with an NVIDIA GPU"
    remedy = f"update the driver for CUDA {seen.cuda or '13'}, or install the locked torch (`make install`)"
    return _finding("driver", f"{said}, but torch sees no GPU" if unseen else said, remedy, fault=unseen)


def _bitsandbytes(product: Product) -> Finding:
    said = product.failure or f"4-bit products are {product.kernel_error:.1%} off"
    remedy = "run `python -m bitsandbytes`, then `make install`; or --bits none, which needs no bitsandbytes"
    return _finding(f"bitsandbytes {product.device}", said, remedy, fault=not product.works)


def cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Finding:
    return _finding("cpu", f"{os.cpu_count()} cores, {cpu_with_bf16(cpuinfo) or 'bf16 is emulated: use fp32'}")


def _memory() -> Finding:
    memory = psutil.virtual_memory()
    said = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} available"
    remedy = "merging needs RAM of the model's size in 16 bits, 16 GB for 8B; on a GPU `export_device: auto`"
    return _finding("memory", said, remedy, warning=memory.total / _GIB < _MEMORY_WARNING)


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    said = f"{free:.1f} GiB free here: enough for a model of {free / (3 * _GIB_A_BILLION):.1f} billion weights"
    remedy = "free some: old checkpoints under saves/, earlier runs: python run.py clean; or use a smaller model"
    said += " (downloaded, dequantised, merged)"
    return _finding("disk", said, remedy, fault=free < _DISK_FAULT, warning=free < _DISK_WARNING)


def _hub_token() -> Finding:
    """Say whether there is a token and where it comes from, never what it is."""
    from huggingface_hub import constants

    kept = Path(constants.HF_TOKEN_PATH)
    places = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    places += [str(kept)] if kept.is_file() else []
    remedy = "only gated models (Llama, Gemma) need one: accept the licence on the model's page, then `hf auth login`"
    return _finding("hub token", f"present in {places[0]}" if places else "absent", remedy, warning=not places)


def _hub_cache() -> Finding:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free, closed = shutil.disk_usage(there).free / _GIB, not os.access(there, os.W_OK)
    said = f"{cache}: {len(list(cache.glob('models--*')))} model(s), {free:.1f} GiB free"
    said += f"{', not writable' if closed else ''}{', HF_HUB_OFFLINE is set' if constants.is_offline_mode() else ''}"
    remedy = "a model of 4 billion weights is 8 GB to download: free some, or set HF_HOME to a folder of your own"
    return _finding("hub cache", said, remedy, fault=closed, warning=free < _CACHE_WARNING)
