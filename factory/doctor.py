"""The doctor: what this machine can run and what is missing, each finding with its remedy. Nothing secret is shown."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from common.progress import Show
from factory.devices import Devices, Product, devices

State = Literal["ok", "warning", "fault"]
_HERE = Path(__file__).resolve().parents[1]
_GIB = 2**30
# A model in 16 bits takes 2 GB a billion weights, three times: downloaded, dequantised for the merge, merged. The
# default experiment's has 4 billion. RAM of an 8B model's size to merge it.
_DISK_FAULT, _DISK_WARNING, _CACHE_WARNING, _MEMORY_WARNING = 5, 25, 10, 20  # GiB
_BILLION = 2e9 / _GIB
# What our pages do without: `run.py` takes the next free port from 7860 on, or that of --port.
_PORTS = {
    7860: (
        "the pages of run.py",
        "nothing to do: `run.py board` and `watch` take the next free one, or that of --port",
    ),
    6006: ("a TensorBoard of your own", "start that one with tensorboard --port"),
}
_FOLDERS = ("data", "saves", "outputs", "factory_configs")


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, how it stands, what was seen, and what to do unless all is well."""

    name: str
    state: State
    said: str
    remedy: str = ""


def examine(show: Show | None = None) -> list[Finding]:
    """Look at this machine and the current folder; one finding or more for each name.

    A person who watches sees on `show`'s live line what is being looked at: the libraries take seconds to import.
    """
    show = show or Show()
    with show.line("doctor") as line:
        tell = line.update if show.attended else lambda _: None
        tell("importing torch, multiplying in 4 bits")
        seen = devices(products=True)
        tell("versions, driver, memory, disk, ports")
        return _findings(seen)


def _findings(seen: Devices) -> list[Finding]:
    looks: tuple[Callable[[], Iterator[Finding]], ...] = (
        _python,
        _packages,
        _extras,
        lambda: _torch(seen),
        lambda: _gpus(seen),
        lambda: _driver(seen),
        lambda: _bitsandbytes(seen),
        _cpu,
        _memory,
        _disk,
        _hub_token,
        _hub_cache,
        _torchrun,
        _ports,
        _folders,
        _path,
    )
    return [finding for look in looks for finding in look()]


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


def _python() -> Iterator[Finding]:
    yield Finding("python", "ok", ".".join(map(str, sys.version_info[:3])))  # an older one cannot read this file


def _packages(root: Path = _HERE) -> Iterator[Finding]:
    """Compare what is installed with the lock; what pyproject.toml names must be there."""
    try:
        pins = dict(_pins((root / "requirements.lock").read_text(encoding="utf-8")))
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        named = {_plain(re.split(r"[^\w.-]", each)[0]) for each in project["project"]["dependencies"]}
    except (OSError, ValueError, KeyError) as error:
        yield Finding("packages", "fault", f"the pins cannot be read: {error}", "restore requirements.lock from git")
        return
    apart = {name: found for name, pin in pins.items() if (found := _installed(name)) != pin}
    for name in sorted(apart.keys() & named):
        yield Finding("packages", "fault", f"{name} {apart[name] or 'is missing'}, locked {pins[name]}", "make install")
    others = [f"{name} {apart[name] or 'missing'} (locked {pins[name]})" for name in sorted(apart.keys() - named)]
    if others:
        yield Finding("packages", "warning", f"not as locked: {_some(others)}", "make install")
    if not apart:
        yield Finding("packages", "ok", f"all {len(pins)} as locked, llamafactory {pins.get('llamafactory', '?')}")


def _pins(lock: str) -> Iterator[tuple[str, str]]:
    """Yield name and version of each pin that is for this machine."""
    from packaging.markers import Marker

    for name, version, marker in re.findall(r"^([\w.-]+)==([^\s;\\]+)(?: ; ([^\\\n]+))?", lock, re.MULTILINE):
        if not marker or Marker(marker.strip()).evaluate():
            yield _plain(name), version


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _some(names: list[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _extras(root: Path = _HERE) -> Iterator[Finding]:
    """Extras are nobody's duty: what is absent is no warning."""
    for path in sorted((root / "extras").glob("*.in")):
        lines = path.read_text(encoding="utf-8").splitlines()
        names = [match[0] for line in lines if (match := re.match(r"[\w.-]+", line))]
        absent = [name for name in names if _installed(name) is None]
        said = (
            f"not installed, optional: make extra-{path.stem} adds {', '.join(absent)}"
            if absent
            else f"{', '.join(names)} installed"
        )
        yield Finding(f"extra {path.stem}", "ok", said)


def _torch(seen: Devices) -> Iterator[Finding]:
    if seen.failure:
        yield Finding(
            "torch", "fault", seen.failure, "make install: torch, torchvision and torchaudio of one CUDA build"
        )
    else:
        yield Finding("torch", "ok", f"{seen.torch}{f', built for CUDA {seen.cuda}' if seen.cuda else ''}")


def _gpus(seen: Devices) -> Iterator[Finding]:
    if not seen.gpus:
        hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
        why = f" (CUDA_VISIBLE_DEVICES={hidden!r} hides them)" if hidden in ("", "-1") else ""
        other = f"; torch offers {seen.accelerator}" if seen.accelerator else ""
        remedy = "`-e demo` and models of some million weights train on a CPU; the presets need a GPU"
        yield Finding("gpu", "warning", f"none{why}{other}", remedy)
    for number, gpu in enumerate(seen.gpus):
        said = f"{number}: {gpu.name}, {gpu.memory_gib:.1f} GiB, {gpu.free_gib:.1f} free, "
        if gpu.free_gib < gpu.memory_gib / 2:
            yield Finding("gpu", "warning", f"{said}more than half is taken", "see `nvidia-smi` for what runs there")
        elif not gpu.bf16:
            remedy = "give each step under `recipes:` of experiment.yaml fp16: true and bf16: false"
            yield Finding("gpu", "warning", f"{said}no bf16", remedy)
        else:
            yield Finding("gpu", "ok", f"{said}bf16")


def _driver(seen: Devices) -> Iterator[Finding]:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    versions = sorted(set(done.stdout.split())) if done is not None and done.returncode == 0 else []
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    if not versions:
        yield Finding(
            "driver",
            "ok",
            "no NVIDIA driver, and without such a GPU none is needed" if not seen.gpus else "not NVIDIA's",
        )
    elif not seen.gpus and not hidden:
        remedy = f"update the driver for CUDA {seen.cuda or '13'}, or install the locked torch (`make install`)"
        yield Finding("driver", "fault", f"{versions[0]}, but torch sees no GPU", remedy)
    else:
        yield Finding("driver", "ok", ", ".join(versions))


def _bitsandbytes(seen: Devices) -> Iterator[Finding]:
    for product in seen.products:
        yield _product(product)


def _product(product: Product) -> Finding:
    name = f"bitsandbytes {product.device}"
    if product.works:
        said = f"a 4-bit product is {product.nf4_error:.1%} from fp32, {product.kernel_error:.1%} from its own weights"
        return Finding(name, "ok", said)
    wrong = (
        product.failure or f"a 4-bit product is {product.nf4_error} from fp32 and {product.kernel_error} from its own"
    )
    remedy = "run `python -m bitsandbytes`, then `make install`; or --bits none, which needs no bitsandbytes"
    return Finding(name, "fault", wrong, remedy)


def _cpu(cpuinfo: Path = Path("/proc/cpuinfo")) -> Iterator[Finding]:
    try:
        text = cpuinfo.read_text(encoding="utf-8")
    except OSError:
        yield Finding("cpu", "ok", f"{os.cpu_count()} cores; its flags cannot be read here")
        return
    flags = set((re.search(r"^(?:flags|Features)\s*:\s*(.*)$", text, re.MULTILINE) or ["", ""])[1].split())
    fast = [flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags]
    said = f"{os.cpu_count()} cores, {' and '.join(fast) or 'no avx512_bf16, no amx_bf16: bf16 is emulated, use fp32'}"
    if flags & {"sse2"} and "avx2" not in flags:
        yield Finding("cpu", "warning", f"{said}, no avx2", "expect a CPU to score many times slower; use a GPU")
    else:
        yield Finding("cpu", "ok", said)


def _memory() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    said = f"{memory.total / _GIB:.1f} GiB, {memory.available / _GIB:.1f} available"
    if memory.total / _GIB < _MEMORY_WARNING:
        remedy = "merging needs RAM of the model's size in 16 bits, 16 GB for 8B; on a GPU `export_device: auto`"
        yield Finding("memory", "warning", said, remedy)
    else:
        yield Finding("memory", "ok", said)


def _disk() -> Iterator[Finding]:
    free = shutil.disk_usage(Path.cwd()).free / _GIB
    said = f"{free:.1f} GiB free here: enough for a model of {free / (3 * _BILLION):.1f} billion weights"
    said += " (downloaded, dequantised, merged)"
    if free < _DISK_WARNING:
        remedy = "free some: old checkpoints under saves/, runs named *.earlier-N; or take a smaller model"
        yield Finding("disk", "fault" if free < _DISK_FAULT else "warning", said, remedy)
    else:
        yield Finding("disk", "ok", said)


def _hub_token() -> Iterator[Finding]:
    """Say whether there is a token and where it comes from, never what it is."""
    from huggingface_hub import constants

    named = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    kept = Path(constants.HF_TOKEN_PATH)
    if named:
        yield Finding("hub token", "ok", f"present in {named[0]}")
    elif kept.is_file():
        yield Finding("hub token", "ok", f"present in {kept}")
    else:
        remedy = (
            "only gated models (Llama, Gemma) need one: accept the licence on the model's page, then `hf auth login`"
        )
        yield Finding("hub token", "warning", "absent", remedy)


def _hub_cache() -> Iterator[Finding]:
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if constants.HF_HUB_OFFLINE or os.environ.get("TRANSFORMERS_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        yield Finding(
            "hub", "warning", "switched off", "unset HF_HUB_OFFLINE and TRANSFORMERS_OFFLINE to download models"
        )
    held = len(list(cache.glob("models--*"))) if cache.is_dir() else 0
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(there).free / _GIB
    said = f"{cache}: {held} model(s), {free:.1f} GiB free"
    if not _writable(there):
        yield Finding("hub cache", "fault", f"{said}, not writable", "set HF_HOME to a folder of your own")
    elif free < _CACHE_WARNING:
        remedy = (
            "a model of 4 billion weights takes 8 GB to download: free some, or set HF_HOME to another disk's folder"
        )
        yield Finding("hub cache", "warning", said, remedy)
    else:
        yield Finding("hub cache", "ok", said)


def _torchrun() -> Iterator[Finding]:
    """Our launcher calls torch.distributed.run itself; the command is for people and for LLaMA-Factory's own cli."""
    found = shutil.which("torchrun")
    if found:
        yield Finding("torchrun", "ok", f"on the PATH: {found}")
    else:
        remedy = "source .venv/bin/activate, where you call torchrun or llamafactory-cli yourself"
        yield Finding("torchrun", "warning", "not on the PATH; run.py does without", remedy)


def _ports() -> Iterator[Finding]:
    for port, (who, remedy) in _PORTS.items():
        if _is_free(port):
            yield Finding(f"port {port}", "ok", f"free for {who}")
        else:
            yield Finding(f"port {port}", "warning", "taken", remedy)


def _is_free(port: int) -> bool:
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # a port that was just left is free
        try:
            trial.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _folders() -> Iterator[Finding]:
    closed = [name for name in _FOLDERS if not _writable(Path(name) if Path(name).exists() else Path())]
    if closed:
        remedy = "make them writable, or run from a folder of your own"
        yield Finding("folders", "fault", f"not writable: {', '.join(closed)}", remedy)
    else:
        yield Finding("folders", "ok", f"{', '.join(_FOLDERS)} are writable")


def _writable(folder: Path) -> bool:
    """Try it: permission bits say little about network disks and containers."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def _path() -> Iterator[Finding]:
    here = str(Path.cwd())
    if any(character.isspace() for character in here):
        # LLaMA-Factory's launcher splits its command line at spaces; ours hands over a list.
        remedy = "run.py works in it; for llamafactory-cli by hand on several GPUs rename the folder"
        yield Finding("path", "warning", f"{here!r} has a space", remedy)
    else:
        yield Finding("path", "ok", "no space in it")
