"""The launcher's guards: what would spoil a training, or its resumption, without a word."""

from __future__ import annotations

import os

from factory import launcher


def test_a_checkpoint_is_read_to_the_device_of_any_process(tmp_path):
    import torch

    torch.save({"step": torch.tensor([3.0])}, tmp_path / "optimizer.pt")
    launcher._read_checkpoints_of_numbered_cpus()
    for device in (torch.device("cpu", 0), "cpu:1", "cpu"):
        assert torch.load(tmp_path / "optimizer.pt", map_location=device)["step"].item() == 3


def test_parts_are_listed_in_the_order_of_their_names(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "listdir", lambda _: ["part-2", "part-0", "part-1"])
    listing = launcher._SortedListing()
    assert listing.listdir(tmp_path) == ["part-0", "part-1", "part-2"]
    assert listing.path is os.path, "all else is os itself"


def test_a_training_that_is_over_makes_no_step_more(monkeypatch):
    from types import SimpleNamespace

    from transformers import Trainer

    ran = []
    monkeypatch.setattr(Trainer, "_run_epoch", lambda trainer, **_: ran.append(trainer.state.global_step))
    for _ in range(2):  # put on once
        launcher._end_where_no_step_is_left()
    assert not hasattr(Trainer._run_epoch.__wrapped__, "__wrapped__")
    for step, last in ((4, 5), (5, 5), (7, 5)):
        state, control = (
            SimpleNamespace(global_step=step, max_steps=last),
            SimpleNamespace(should_training_stop=False),
        )
        Trainer._run_epoch(SimpleNamespace(state=state, control=control), epoch=0)
        assert control.should_training_stop is (step >= last)
    assert ran == [4]
