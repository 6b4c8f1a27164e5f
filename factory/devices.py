"""What this machine computes with, asked in a child process: no GPU memory stays occupied, and a library that crashes
does not end ours.

`python -m factory.devices [--products]` prints it as one line of JSON.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from factory.process import child_environment, module

_TIMEOUT = 300  # seconds; importing torch from a cold disk can take a minute
_FIRST_BF16 = (8, 0)  # NVIDIA's compute capability of Ampere; torch emulates bf16 on older cards, slowly
# A sound kernel is as near to its own dequantised weights as bf16 rounds: 0.2% were measured.
_KERNEL_ERROR = 0.02


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
