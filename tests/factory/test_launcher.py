"""The launcher's guards: what would spoil a training, or its resumption, without any error."""

import os
from types import SimpleNamespace

import pytest
import torch

from factory import launcher


@pytest.fixture(autouse=True, scope="module")
def guarded():
    """A process that is about to train."""
    import bitsandbytes.nn.modules as modules
    import llamafactory.data.loader as loader
    from transformers import Trainer

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(loader, "os", os)
        patched.setattr(modules, "has_avx512bf16", lambda: True)
        patched.setattr(Trainer, "_run_epoch", lambda trainer, **_: trainer.ran.append(trainer.state.global_step))
        launcher.guard_worker()
        yield


def test_nf4_weights_are_not_repacked():
    import bitsandbytes.nn.modules as modules

    assert modules.has_avx512bf16() is False


def test_a_checkpoint_is_read_to_the_device_of_any_process(tmp_path):
    torch.save({"step": torch.tensor([3.0])}, tmp_path / "optimizer.pt")
    for device in (torch.device("cpu", 0), "cpu:1", "cpu"):
        assert torch.load(tmp_path / "optimizer.pt", map_location=device)["step"].item() == 3


def test_parts_are_listed_in_the_order_of_their_names(monkeypatch):
    import llamafactory.data.loader as loader

    monkeypatch.setattr(os, "listdir", lambda _: ["part-2", "part-0", "part-1"])
    assert loader.os.listdir("x") == ["part-0", "part-1", "part-2"]
    assert loader.os.path is os.path, "all else is os itself"


def test_a_training_that_is_over_makes_no_further_step():
    from transformers import Trainer

    ran = []
    for step, last in ((4, 5), (5, 5), (7, 5)):
        state = SimpleNamespace(global_step=step, max_steps=last)
        control = SimpleNamespace(should_training_stop=False)
        Trainer._run_epoch(SimpleNamespace(state=state, control=control, ran=ran), epoch=0)
        assert control.should_training_stop is (step >= last)
    assert ran == [4]
