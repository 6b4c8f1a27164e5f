"""A folder of its own for a measurement: run.py called as a user calls it, and what its outputs hold."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from figures import ROOT

# Each stage's outputs and the arguments of run.py that make them.
STAGES = {
    "sft": ["sft"],
    "dpo_judge": ["dpo", "--view", "judge"],
    "dpo_reward": ["dpo", "--view", "reward"],
    "rm": ["rm"],
}


class Workbench:
    """A copy of templates and experiments in which run.py works without touching the checkout's own runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("templates", "factory_configs"):
            if not (folder / name).exists():
                shutil.copytree(ROOT / name, folder / name)

    def run(self, *arguments: str) -> float:
        """Call run.py; return the seconds it took; its own words go to standard error."""
        started = time.monotonic()
        call = [sys.executable, str(ROOT / "run.py"), *arguments]
        subprocess.run(call, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - started

    def transcript(self, *arguments: str) -> tuple[str, float]:
        """Call run.py as into a pipe; return all that it said, on both of its streams, and the seconds it took."""
        started = time.monotonic()
        call = [sys.executable, str(ROOT / "run.py"), *arguments]
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        done = subprocess.run(call, cwd=self.folder, check=True, env={**os.environ, "COLUMNS": "96"}, **streams)
        return done.stdout.strip(), time.monotonic() - started

    def stage(self, experiment: str, stage: str) -> None:
        """Run a stage to its report, unless the report is there already."""
        if not self.has(experiment, stage):
            self.run(*STAGES[stage], "-e", experiment)

    def has(self, experiment: str, stage: str) -> bool:
        """Return whether a stage was run to its report."""
        return (self.output(experiment, stage) / "report.json").is_file()

    def prepare(self, experiment: str, *votes: str) -> None:
        """Export votes for an experiment, unless that was done already."""
        if not (self.folder / "data" / experiment / "manifest.json").is_file():
            self.run("prepare", "-e", experiment, *votes)

    def variant(self, name: str, of: str, **changed: Any) -> None:
        """Make another experiment from one that is there, with keys of experiment.yaml changed (`recipes` merged)."""
        from omegaconf import OmegaConf

        source = self.folder / "factory_configs" / of / "experiment.yaml"
        content = OmegaConf.merge(OmegaConf.load(source), OmegaConf.create(changed))
        target = self.folder / "factory_configs" / name
        target.mkdir(exist_ok=True)
        OmegaConf.save(content, target / "experiment.yaml")

    def report(self, experiment: str, stage: str) -> dict[str, Any]:
        """Return a stage's report.json."""
        return json.loads((self.output(experiment, stage) / "report.json").read_text(encoding="utf-8"))

    def output(self, experiment: str, stage: str) -> Path:
        """Return a stage's folder of outputs."""
        return self.folder / "outputs" / experiment / stage

    def judged(self, experiment: str, stage: str):
        """Return the validation rows of a stage: id, verdict, group, p_a, p_b, p_tie and the raw scores."""
        import pandas as pd

        from common.battle import PROBABILITY_COLUMNS

        scores = pd.read_parquet(self.output(experiment, stage) / "scores_valid.parquet")
        chances = pd.read_csv(self.output(experiment, stage) / "probabilities_valid.csv", dtype={"id": str})
        assert scores["id"].tolist() == chances["id"].tolist()
        for name, column in zip(("p_a", "p_b", "p_tie"), PROBABILITY_COLUMNS, strict=True):
            scores[name] = chances[column].to_numpy()
        return scores


def interval(ends: list[float] | None, digits: int = 3) -> str:
    """Return an interval as text, empty without one."""
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""


def paired(first, second, seed: int = 1) -> tuple[float, list[float] | None]:
    """Return (log loss of `first` minus that of `second` on the same rows, its 95% interval by prompt group)."""
    from scoring.metrics import paired_difference, verdict_codes

    second = second.set_index("id").loc[first["id"]]
    columns = ["p_a", "p_b", "p_tie"]
    found = paired_difference(
        first[columns].to_numpy(),
        second[columns].to_numpy(),
        verdict_codes(first["verdict"]),
        first["group"],
        seed=seed,
    )
    return found["difference"], found["ci95"]
