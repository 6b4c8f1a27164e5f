"""Load and check once: whatever a command needs to know of a stage is read from its file a single time."""

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
from chain import call

OPENED: Counter | None = None


def _count(event: str, arguments: tuple) -> None:
    if OPENED is not None and event == "open" and isinstance(arguments[0], (str, os.PathLike)):
        OPENED[Path(os.path.relpath(arguments[0])).as_posix()] += 1


@pytest.fixture
def opened(place):
    """How often each file is opened for reading or writing from now on, by its relative path."""
    global OPENED
    if OPENED is None:
        sys.addaudithook(_count)  # cannot be taken back
    OPENED = Counter()
    yield OPENED
    OPENED.clear()


@pytest.mark.parametrize("command", [["score"], ["status"], ["show", "9000"]], ids=lambda command: command[0])
def test_recipes_manifest_and_state_are_read_once(opened, command):
    done = call(*command, "-e", "exam")
    assert done.exit_code == 0, done.output
    files = ("sft.yaml", "merge_sft.yaml")
    recipes = {f"factory_configs/exam/{name}": opened[f"factory_configs/exam/{name}"] for name in files}
    assert max(recipes.values()) <= 1, recipes
    assert opened["data/exam/manifest.json"] == 1 and opened["outputs/exam/sft/state.json"] == 1
