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
