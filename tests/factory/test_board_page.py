"""The mended parts of LLaMA Board that need no browser: its job's output, foreign adapters, other runs' folders."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import factory.board_page as webui
from factory.board_page import Job, _own_checkpoints

CHATTY = """#!/bin/sh
head -c 500000 /dev/zero | tr '\\0' 'x' >&2
echo ' the last word' >&2
exit 3
"""


@pytest.fixture
def chatty(tmp_path) -> Path:
    """A program that says more than a pipe holds."""
    path = tmp_path / "chatty"
    path.write_text(CHATTY)
    path.chmod(0o755)
    return path


def test_a_job_ends_although_nobody_reads_what_it_says(chatty, tmp_path, monkeypatch):
    native = subprocess.Popen([str(chatty)], stderr=subprocess.PIPE)  # as LLaMA-Factory 0.9.5 starts it
    try:
        with pytest.raises(subprocess.TimeoutExpired):
            native.wait(2)
    finally:
        native.kill()
        native.communicate()
    monkeypatch.setattr(webui.sys, "executable", str(chatty))
    job = Job(["llamafactory-cli", "train", "x.yaml"], env={"LLAMABOARD_WORKDIR": str(tmp_path)}, stderr=-1, text=True)
    assert job.wait(20) == 3
    out, said = job.communicate(timeout=1)
    assert out is None and said.rstrip().endswith("the last word")
    assert (tmp_path / "board_job.log").stat().st_size > 500_000


def test_a_job_is_our_launcher_in_boards_mode_and_nothing_else_of_the_shell(tmp_path, monkeypatch):
    seen = {}

    def start(self, command, **options):
        seen.update(command=command, **options)

    monkeypatch.setattr(subprocess.Popen, "__init__", start)
    monkeypatch.setenv("USE_V1", "1")
    board = {"LLAMABOARD_ENABLED": "1", "LLAMABOARD_WORKDIR": str(tmp_path), "FORCE_TORCHRUN": "1", "USE_V1": "1"}
    job = Job(["llamafactory-cli", "train", "args.yaml"], env=board, stderr=subprocess.PIPE, text=True)
    job.returncode = 0
    assert seen["command"] == [sys.executable, "-m", "factory.launcher", "train", "args.yaml"]
    assert seen["env"]["LLAMABOARD_ENABLED"] == "1" and seen["env"]["FORCE_TORCHRUN"] == "1"
    assert "USE_V1" not in seen["env"] and str(Path(webui.__file__).parents[1]) in seen["env"]["PYTHONPATH"]


@pytest.fixture
def listed(tmp_path, monkeypatch):
    """What the page's list of checkpoints sends where a model has three, of another base and of its hub id, too."""
    from llamafactory.extras.constants import SUPPORTED_MODELS
    from llamafactory.webui.control import list_checkpoints

    monkeypatch.chdir(tmp_path)
    for name, base in (("own", "models/tiny"), ("foreign", "outputs/merged"), ("hub", "somebody/tiny")):
        folder = tmp_path / "saves" / "tiny" / "lora" / name
        folder.mkdir(parents=True)
        (folder / "adapter_model.safetensors").touch()
        (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": base}))
    for base in ("models/tiny", "outputs/merged"):
        (tmp_path / base).mkdir(parents=True)
    monkeypatch.setitem(SUPPORTED_MODELS, "tiny", {webui_default(): "models/tiny"})
    own = _own_checkpoints(list_checkpoints)
    return lambda kind, chosen: own("tiny", kind, chosen).constructor_args  # what is sent to the browser


def test_adapters_of_another_base_are_not_offered(listed):
    assert listed("lora", [])["choices"] == ["hub", "own"]


HELD = Path("cache/models--Qwen--Qwen3-4B/snapshots/0123abc")


@pytest.mark.parametrize(
    ("named", "base", "fits"),
    [
        ("models/tiny", "models/tiny", True),
        ("models/../models/tiny", "models/tiny", True),
        ("Qwen/Qwen3-4B", "Qwen/Qwen3-4B", True),
        ("Qwen/Qwen3-4B", "models/Qwen3-4B", True),  # the hub's model and a copy of it
        ("models/Qwen3-4B", "Qwen/Qwen3-4B", True),
        ("Qwen/Qwen3-4B", str(HELD), True),
        ("outputs/exam/sft/merged", "models/tiny", False),  # the merged judge is gone
        ("outputs/exam/sft/merged", "outputs/other/sft/merged", False),
        ("outputs/exam/sft/merged", "Qwen/Qwen3-4B", False),
        ("models/tiny", "models/Qwen3-4B", False),
        ("meta/Llama-3", "Qwen/Qwen3-4B", False),  # any hub base
        ("somebody/Qwen3-4B", "Qwen/Qwen3-4B", False),
        ("meta/Llama-3", "models/tiny", False),
        ("models/tiny", "", True),  # no model is chosen
        (None, "models/tiny", True),
    ],
)
def test_an_adapter_fits_the_base_that_it_was_trained_on(tmp_path, monkeypatch, named, base, fits):
    monkeypatch.chdir(tmp_path)
    for folder in ("models/tiny", "models/Qwen3-4B", "outputs/other/sft/merged", HELD):
        Path(folder).mkdir(parents=True)
    Path("adapter_config.json").write_text(json.dumps({"base_model_name_or_path": named}))
    assert webui._fits(tmp_path, base) is fits


@pytest.mark.parametrize("content", ["[]", "3", "{", "[" * 100_000])
def test_a_damaged_adapter_is_left_for_the_page_to_complain_about(tmp_path, content):
    (tmp_path / "adapter_config.json").write_text(content)
    assert webui._fits(tmp_path, "models/tiny")


@pytest.mark.parametrize(
    ("kind", "chosen"), [("lora", []), ("lora", ["own"]), ("lora", ["hub", "own"]), ("full", None)]
)
def test_a_choice_that_the_list_still_holds_is_left_alone(listed, kind, chosen):
    assert "value" not in listed(kind=kind, chosen=chosen)


@pytest.mark.parametrize(
    ("kind", "chosen", "emptied"),
    [
        *(("lora", chosen, []) for chosen in (["foreign"], ["own", "gone"], "own", None)),
        *(("full", chosen, None) for chosen in (["own"], [], "gone")),
    ],
)
def test_a_choice_that_the_list_lost_or_that_is_of_another_kind_is_emptied(listed, kind, chosen, emptied):
    assert listed(kind=kind, chosen=chosen)["value"] == emptied


def webui_default():
    from llamafactory.extras.constants import DownloadSource

    return DownloadSource.DEFAULT
