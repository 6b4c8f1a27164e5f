"""Devices: what this machine computes with, and what a forecast assumes of GPUs, by their makers' data sheets.

torch is asked in a child process: no GPU memory stays occupied, and a library that crashes does not end ours.
`python -m factory.devices [--products]` prints what it sees as one line of JSON. The CPU's speed is measured now.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from common.errors import UsageError
from factory.process import child_environment, module

GIB = 2**30
# Tokens of one forward pass in scoring. A GPU wants many to be busy. A CPU is busy with one row, and what does not fit
# into its caches costs time: of 1, 1,024 and 4,096 tokens on two cores, 1,024 were the fastest in fp32.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 32768}

# Shares of the matrix rate that training and scoring reach on a GPU, derived from public runs (of QLoRA the mean of
# four); docs/forecast.md has the derivation. Not measured by this project.
_TRAINING_SHARE, _SCORING_SHARE = 0.33, 0.21
# Seconds from the command to the first step with a large model on a GPU: assumed, not measured.
CARD_START = 60.0
# What a CPU adds to its products, measured on two cores with benchmarks/forecast_check.py.
_CPU_SHARE = 0.55  # of the probe's rate, in a whole training step
_CPU_LAYER_CALL = 0.9e-3  # seconds that calling one layer costs, however small it is
CPU_START = 12.0  # seconds from the command to the first step
# A card of which only the memory is known is taken to be as fast as this one.
_UNKNOWN = "RTX-3060-12GB"
_TOKENS = 512  # a batch of the size that a CPU trains on
# Products of larger matrices reach the same rate, and would make the probe a matter of minutes.
_LARGEST = 2048
_TIMEOUT = 300  # seconds; importing torch from a cold disk can take a minute
_FIRST_BF16 = (8, 0)  # NVIDIA's compute capability of Ampere; torch emulates bf16 on older cards, slowly
# A sound kernel is as near to its own dequantised weights as bf16 rounds: 0.2% were measured.
_KERNEL_ERROR = 0.02


@dataclass(frozen=True)
class DeviceRates:
    """Memory in GiB as the driver shows it, rates in floating-point operations a second."""

    kind: str  # cuda or cpu
    memory: float
    training_rate: float
    scoring_rate: float
    dequantise: float = float("inf")  # nf4 weights a second
    layer_call: float = 0.0  # seconds
    start: float = CARD_START
    bf16: bool = True


def _card(memory: float, tflops: float, bf16: bool = True) -> DeviceRates:
    """Return a GPU; `tflops` are dense 16-bit ones with fp32 accumulation."""
    rate = tflops * 1e12
    return DeviceRates("cuda", memory, rate * _TRAINING_SHARE, rate * _SCORING_SHARE, bf16=bf16)


CARDS = {
    "T4": _card(14.6, 65, bf16=False),
    "RTX-3060-6GB": _card(5.8, 40),
    "RTX-4060-8GB": _card(7.6, 30),
    "RTX-3060-12GB": _card(11.7, 26),
    "RTX-4060-Ti-16GB": _card(15.6, 44),
    "RTX-3090": _card(23.7, 71),
    "RTX-4090": _card(23.6, 165),
    "A100-40GB": _card(39.4, 312),
    "A100-80GB": _card(79.2, 312),
    "H100": _card(79.1, 989),
    "H200": _card(139.8, 989),
}


def card_named(text: str) -> str:
    """Return the card of `CARDS` that a person means: t4, "RTX 4090", 4090; raises UsageError for any other name."""
    short = _plain(text)
    found = [name for name in CARDS if _plain(name) == short] or [name for name in CARDS if short in _plain(name)]
    if len(found) == 1 and short:
        return found[0]
    what = f"{text!r} may be {' or '.join(found)}" if len(found) > 1 and short else f"there is no card {text}"
    raise UsageError(what, remedy=f"choose from: {', '.join((*CARDS, 'cpu'))}; or --gpu-memory GB")


def _plain(name: str) -> str:
    return re.sub(r"nvidia|geforce|laptop|tesla|gpu|[^a-z0-9]", "", name.lower())


def card_of(memory_gib: float, name: str = "", bf16: bool = True) -> DeviceRates:
    """Return a GPU of this memory, at the rate of the card in `CARDS` that its name means, else of a slow one."""
    known = [each for each in CARDS if _plain(each.rsplit("-", 1)[0] if each.endswith("GB") else each) == _plain(name)]
    return replace(CARDS[known[0] if known else _UNKNOWN], memory=memory_gib, bf16=bf16)


def may_have_gpu() -> bool:
    """Tell whether this machine shows a GPU, without the seconds that importing torch takes."""
    return any(each for name in ("nvidia[0-9]*", "kfd", "dxg") for each in Path("/dev").glob(name))


def own_card() -> dict[str, DeviceRates]:
    """Return this machine's first GPU by its name; nothing where it has none."""
    if not may_have_gpu():
        return {}
    return {f"this {gpu.name}": card_of(gpu.memory_gib, gpu.name, gpu.bf16) for gpu in devices().gpus[:1]}


def this_cpu(hidden: int, feed_forward: int, *, nf4: bool) -> DeviceRates:
    """Return this machine's CPU, measured for a second: fp32 products of a feed-forward layer, nf4 dequantised."""
    import torch
    from torch.utils.benchmark import Timer

    def seconds(call: Callable[[], Any]) -> float:
        # Threads that wake up make a small product's first calls a hundred times slower: hence the median.
        timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
        return timer.blocked_autorange(min_run_time=0.25).median

    x = torch.randn(_TOKENS, min(hidden, _LARGEST))
    weight = torch.randn(min(feed_forward, _LARGEST), x.shape[1])
    rate = 2.0 * _TOKENS * weight.numel() / seconds(lambda: torch.nn.functional.linear(x, weight)) * _CPU_SHARE
    dequantise = float("inf")
    if nf4:
        from bitsandbytes import functional

        packed, state = functional.quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
        dequantise = weight.numel() / seconds(lambda: functional.dequantize_4bit(packed, state))
    memory = psutil.virtual_memory().total / GIB
    return DeviceRates("cpu", memory, rate, rate, dequantise, _CPU_LAYER_CALL, CPU_START)


@dataclass(frozen=True)
class Gpu:
    """One GPU: memory in GiB, and whether it computes in bf16 by itself."""

    name: str
    memory_gib: float
    free_gib: float
    bf16: bool


@dataclass(frozen=True)
class Product:
    """A 4-bit product on one device: its relative distance from that of the dequantised weights, or the error."""

    device: str
    kernel_error: float | None = None
    failure: str = ""

    @property
    def works(self) -> bool:
        """Whether there is a product and it is near enough to the true one."""
        return self.kernel_error is not None and self.kernel_error < _KERNEL_ERROR


@dataclass(frozen=True)
class Devices:
    """What torch sees; `failure` says why nothing is known."""

    torch: str = ""
    cuda: str = ""  # the CUDA or ROCm version that torch was built for
    accelerator: str = ""  # cuda, mps, xpu, …; empty on a CPU
    gpus: tuple[Gpu, ...] = ()
    products: tuple[Product, ...] = ()
    failure: str = ""


@cache
def devices(*, products: bool = False) -> Devices:
    """Ask a child process; `products` also tries bitsandbytes on every kind of device."""
    command = module("factory.devices", *(["--products"] if products else []))
    try:
        done = subprocess.run(
            command,
            env=child_environment(),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
            errors="replace",
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Devices(failure=f"torch did not answer: {type(error).__name__}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [""])[-1]
        return Devices(failure=f"importing torch ended with {done.returncode}: {last}")
    content = json.loads(done.stdout.splitlines()[-1])
    content["gpus"] = tuple(Gpu(**each) for each in content["gpus"])
    content["products"] = tuple(Product(**each) for each in content["products"])
    return Devices(**content)


def cpu_with_bf16(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return by which of its instructions this CPU computes in bf16; empty where it emulates it."""
    flags = cpuinfo.read_text(encoding="utf-8").split() if cpuinfo.is_file() else []
    return " and ".join(flag for flag in ("avx512_bf16", "amx_bf16") if flag in flags)


def look(*, products: bool) -> Devices:
    """Return what torch sees, in this process."""
    import torch

    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    kinds = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return Devices(
        torch=torch.__version__,
        cuda=torch.version.cuda or torch.version.hip or "",
        accelerator=accelerator.type if accelerator else "",
        gpus=tuple(_gpu(i) for i in range(torch.cuda.device_count())) if torch.cuda.is_available() else (),
        products=tuple(four_bit_product(kind) for kind in kinds) if products else (),
    )


def has_bf16(device: int | str) -> bool:
    """Return whether a GPU that torch sees in this process computes in bf16 by itself."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    return bool(torch.version.hip) or (properties.major, properties.minor) >= _FIRST_BF16


def _gpu(index: int) -> Gpu:
    import torch

    properties = torch.cuda.get_device_properties(index)
    free, _ = torch.cuda.mem_get_info(index)
    sizes = (round(each / 2**30, 1) for each in (properties.total_memory, free))
    return Gpu(properties.name, *sizes, has_bf16(index))


def four_bit_product(device: str) -> Product:
    """Multiply by a random matrix in nf4 as QLoRA does, and compare with the dequantised weights."""
    try:
        import torch
        from bitsandbytes.functional import dequantize_4bit, quantize_4bit
        from bitsandbytes.nn import Linear4bit, Params4bit

        generator = torch.Generator().manual_seed(1)
        weight, rows = (torch.randn(shape, generator=generator) for shape in ((256, 512), (8, 512)))
        layer = Linear4bit(512, 256, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        layer.weight = Params4bit(weight.clone(), requires_grad=False, quant_type="nf4")
        with torch.no_grad():
            result = layer.to(device)(rows.to(device)).float().cpu()
            kept = dequantize_4bit(*quantize_4bit(weight.to(device), quant_type="nf4")).float().cpu()
        true = rows @ kept.T
        return Product(device, round(float((result - true).norm() / true.norm()), 4))
    except Exception as error:  # whatever a broken installation raises is the finding
        return Product(device, failure=f"{type(error).__name__}: {error}".splitlines()[0])


if __name__ == "__main__":
    print(json.dumps(asdict(look(products="--products" in sys.argv[1:]))))
