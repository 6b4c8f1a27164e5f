"""The experiment trackers that a recipe reports to: what would end a run at its first step is told before it starts.

report_to: wandb         an account (WANDB_API_KEY, `wandb login`), or WANDB_MODE=offline
use_swanlab: true        an account (SWANLAB_API_KEY, `swanlab login`), or swanlab_mode: local

A training has no terminal to ask for a key in, and a tracker asks only when the model is loaded and the rows are read.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from common.screen import printable
from factory.inputs import names
from factory.process import child_environment

_PATIENCE = 60  # seconds for a tracker to say whether we are logged in
_SWANLAB_RAISES = (0, 8)  # from here on get_run() raises without a run, where transformers expects None


@dataclass(frozen=True)
class _Tracker:
    """A tracker with an account: its own question whether there is one, when it needs none, and the ways out."""

    asks: str
    mode: str
    without_account: tuple[str, ...]
    remedy: str


_TRACKERS = {
    "wandb": _Tracker(
        "import wandb; wandb.login()",
        "WANDB_MODE",
        ("offline", "dryrun", "disabled"),
        "set WANDB_API_KEY or call `wandb login`; or WANDB_MODE=offline, and `wandb sync` later; or report_to: none",
    ),
    "swanlab": _Tracker(
        "import swanlab; swanlab.login()",
        "SWANLAB_MODE",
        ("offline", "local", "disabled"),
        "set SWANLAB_API_KEY or call `swanlab login`; or swanlab_mode: local beside use_swanlab: true; or remove it",
    ),
}


def require_accounts(recipe: Mapping[str, Any], recipe_path: Path, given: Mapping[str, str] = os.environ) -> None:
    """Raise ArenaError if a tracker that this recipe reports to would ask for an account; it is asked in a child."""
    for name in accounts_needed(recipe, given):
        if said := _refusal(_TRACKERS[name].asks):
            raise ArenaError(
                f"{name} lets nobody in, so that the run would end at its first step:\n  {said}",
                where=str(recipe_path),
                remedy=_TRACKERS[name].remedy,
            )


def accounts_needed(recipe: Mapping[str, Any], given: Mapping[str, str]) -> Iterator[str]:
    """Yield the trackers that this recipe reports to over the network, as the environment `given` says.

    LLaMA-Factory passes swanlab_mode on, which SWANLAB_MODE then does not change.
    """
    reports = names(recipe.get("report_to"))
    for name, tracker in _TRACKERS.items():
        if name == "swanlab" and recipe.get("use_swanlab"):
            needed = recipe.get("swanlab_mode", "cloud") == "cloud"
        elif name in reports or ("all" in reports and find_spec(name) is not None):
            needed = given.get(tracker.mode, "").lower() not in tracker.without_account
        else:
            needed = False
        if needed:
            yield name


def swanlab_fails(recipe: Mapping[str, Any]) -> bool:
    """Return whether report_to reaches SwanLab by transformers' own reporter, which its newer releases break."""
    if recipe.get("use_swanlab") or not {"swanlab", "all"} & set(names(recipe.get("report_to"))):
        return False
    try:
        numbers = version("swanlab").split(".")[:2]
        return tuple(int(number) for number in numbers) >= _SWANLAB_RAISES
    except (PackageNotFoundError, ValueError):
        return False


def _refusal(question: str) -> str:
    """Return the last line of what a tracker says when it lets nobody in, empty where it does."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", question],
            env=child_environment(),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_PATIENCE,
        )
    except subprocess.TimeoutExpired:
        return f"it did not answer within {_PATIENCE} seconds"
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    return printable(lines[-1]) if lines else f"it ended with exit code {done.returncode}"
