"""Trackers are asked before a run starts: stand-ins for their packages answer as the real ones do."""

import importlib.metadata
import time
from pathlib import Path

import pytest

from common.errors import ArenaError
from factory import recipe_checks as trackers
from factory.recipe_checks import accounts_needed, require_accounts, swanlab_fails

RECIPE = Path("factory_configs/demo/sft.yaml")
# What wandb 0.31.0 and swanlab 0.10.3 do without a terminal: they raise, with their reason in the last line.
STAND_IN = """
import os, sys
def login():
    if sys.stdin.read():
        raise SystemExit("it would have waited for an answer")
    key = os.environ.get("{name}_API_KEY")
    if not key:
        raise RuntimeError("No API key configured. Use `{low} login` to log in.")
    if key.startswith("bad"):
        raise RuntimeError("The key " + key + " is not known.")
"""


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Both packages, as stand-ins that a child of ours finds; nobody is logged in."""
    for name in ("wandb", "swanlab"):
        (tmp_path / f"{name}.py").write_text(STAND_IN.format(name=name.upper(), low=name))
        for variable in ("API_KEY", "MODE"):
            monkeypatch.delenv(f"{name.upper()}_{variable}", raising=False)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("recipe", "name", "remedy"),
    [
        ({"report_to": "wandb"}, "wandb", "WANDB_MODE=offline"),
        ({"report_to": ["tensorboard", "wandb"]}, "wandb", "set WANDB_API_KEY"),
        ({"report_to": "none", "use_swanlab": True}, "swanlab", "swanlab_mode: local"),
    ],
)
def test_without_an_account_nothing_is_started(packages, monkeypatch, recipe, name, remedy):
    begun = time.monotonic()
    with pytest.raises(ArenaError) as caught:
        require_accounts(recipe, RECIPE)
    assert f"Use `{name} login` to log in." in caught.value.what and remedy in caught.value.remedy
    assert caught.value.where == str(RECIPE) and time.monotonic() - begun < 20
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "0123456789abcdef")
    require_accounts(recipe, RECIPE)


def test_a_key_that_is_not_known_is_not_told(packages, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "bad-0123456789abcdef")
    with pytest.raises(ArenaError) as caught:
        require_accounts({"report_to": "wandb"}, RECIPE)
    assert "The key <WANDB_API_KEY> is not known." in caught.value.what
    assert "bad-0123456789abcdef" not in str(caught.value)


def test_a_tracker_that_does_not_answer_is_told(packages, monkeypatch):
    monkeypatch.setattr(trackers, "_PATIENCE", 0.5)
    (packages / "wandb.py").write_text("import time; time.sleep(60)")
    with pytest.raises(ArenaError, match=r"did not answer within 0\.5 seconds"):
        require_accounts({"report_to": "wandb"}, RECIPE)


@pytest.mark.parametrize(
    ("recipe", "given", "needed"),
    [
        ({}, {}, []),
        ({"report_to": "none"}, {}, []),
        ({"report_to": ["tensorboard", "trackio"]}, {}, []),
        ({"report_to": "wandb"}, {"WANDB_MODE": "offline"}, []),
        ({"report_to": "wandb"}, {"WANDB_MODE": "online"}, ["wandb"]),
        ({"report_to": "swanlab"}, {"SWANLAB_MODE": "local"}, []),
        ({"report_to": "swanlab"}, {}, ["swanlab"]),
        ({"report_to": "none", "use_swanlab": True, "swanlab_mode": "local"}, {}, []),
        # LLaMA-Factory passes its own mode on: the variable changes nothing.
        ({"report_to": "none", "use_swanlab": True}, {"SWANLAB_MODE": "offline"}, ["swanlab"]),
        ({"report_to": ["swanlab", "wandb"], "use_swanlab": True, "swanlab_mode": "local"}, {}, ["wandb"]),
    ],
)
def test_who_needs_an_account(recipe, given, needed):
    assert list(accounts_needed(recipe, given)) == needed


def test_all_reporters_are_those_that_are_installed(monkeypatch):
    monkeypatch.setattr(trackers, "find_spec", lambda name: name == "wandb" or None)
    assert list(accounts_needed({"report_to": "all"}, {})) == ["wandb"]


@pytest.mark.parametrize(
    ("installed", "recipe", "fails"),
    [
        ("0.10.3", {"report_to": "swanlab"}, True),
        ("0.8.0", {"report_to": ["tensorboard", "swanlab"]}, True),
        ("0.10.3", {"report_to": "all"}, True),
        ("0.7.20", {"report_to": "swanlab"}, False),
        ("0.10.3", {"report_to": "swanlab", "use_swanlab": True}, False),
        ("0.10.3", {"report_to": "tensorboard"}, False),
        ("of a fork", {"report_to": "swanlab"}, False),
    ],
)
def test_swanlab_is_reached_by_the_reporter_that_goes_with_it(monkeypatch, installed, recipe, fails):
    monkeypatch.setattr(trackers, "version", lambda name: installed)
    assert swanlab_fails(recipe) is fails


def test_swanlab_that_is_not_installed_is_somebody_elses_fault(monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(trackers, "version", absent)
    assert swanlab_fails({"report_to": "swanlab"}) is False
