import json
import subprocess
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from factory import devices as module
from factory.devices import Devices, Gpu, Product, devices, look
from scoring.model_loading import float_precision, weight_dtype


@pytest.fixture(autouse=True)
def _ask_again():
    devices.cache_clear()
    yield
    devices.cache_clear()


@pytest.mark.slow
def test_a_child_process_tells_what_torch_sees():
    import torch

    seen = devices(products=True)
    assert seen.failure == "" and seen.torch == torch.__version__
    assert len(seen.gpus) == torch.cuda.device_count()
    assert [product.device for product in seen.products] == ["cpu", *(["cuda"] if seen.gpus else [])]
    assert all(product.works for product in seen.products), seen.products


@pytest.mark.slow
@pytest.mark.parametrize("major, minor, hip", [(7, 5, None), (8, 0, None), (9, 0, None), (9, 4, "6")])
def test_gpus_are_read_from_torch(monkeypatch, major, minor, hip):
    import torch

    bf16, card = major > 7, SimpleNamespace(name="Card", major=major, minor=minor, total_memory=24 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (6 * 2**30, 24 * 2**30))
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: SimpleNamespace(type="cuda"))
    seen = look(products=False)
    assert seen.gpus == (Gpu("Card", 24.0, 6.0, bf16),) * 2 and seen.accelerator == "cuda"
    assert (float_precision("cuda"), weight_dtype("cuda")) == (("fp16", torch.float16), ("bf16", torch.bfloat16))[bf16]


@pytest.mark.parametrize("error", [subprocess.TimeoutExpired("x", 1), OSError("no python")])
def test_a_child_that_hangs_is_a_finding(monkeypatch, error):
    monkeypatch.setattr(module.subprocess, "run", Mock(side_effect=error))
    assert devices().failure.startswith("torch did not answer: ")


def test_what_the_child_prints_is_read_back_and_its_death_is_a_finding(monkeypatch):
    content = {"torch": "2", "cuda": "13", "accelerator": "cuda", "failure": ""}
    content |= {"gpus": [vars(Gpu("A", 1.0, 0.5, True))], "products": [vars(Product("cpu", 0.001))]}
    done = subprocess.CompletedProcess([], 0, "a library's chatter\n" + json.dumps(content) + "\n", "")
    monkeypatch.setattr(module.subprocess, "run", lambda *_, **__: done)
    seen = devices(products=True)
    assert seen.gpus[0].name == "A" and seen.products[0].works
    done.returncode, done.stderr = -11, "Traceback\nOSError: libcudart.so is missing\n"
    assert devices() == Devices(failure="importing torch ended with -11: OSError: libcudart.so is missing")
