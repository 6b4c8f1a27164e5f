"""A step: one recipe, run by one `llamafactory-cli` command; the names of all steps are declared here only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

DEFAULT_EXPERIMENT = "qwen3-4b"  # of every command without -e
# What a preference training starts from: the base model, or the merged SFT judge.
Start = Literal["base", "sft"]
# Which part of the votes a training leaves out to be judged by: its number; "full" leaves none out. None: not by folds.
Fold = int | Literal["full"] | None


@dataclass(frozen=True)
class Step:
    """One recipe of an experiment: a training, or the merge of a training's adapter (`merges` names that training)."""

    name: str  # the recipe's file name without .yaml; for a training also the name of its adapter and outputs
    stage: str  # LLaMA-Factory's `stage`
    template: str  # the file in templates/ that renders it
    data: str  # its export without the experiment's name: <experiment>_<data>_train and …_valid
    merges: str | None = None

    @property
    def trains(self) -> str:
        """The training step whose adapter this step writes or merges."""
        return self.merges or self.name

    @property
    def command(self) -> str:
        """The arguments of run.py that run it: sft, dpo --view judge, rm, score --stage base, probe, …"""
        if self.name == "base":
            return "score --stage base"
        return self.trains.replace("dpo_", "dpo --view ")


def fold_name(fold: int | str) -> str:
    """Return a fold's name in paths, data sets and the split column: fold0, fold1, …, full."""
    return fold if isinstance(fold, str) else f"fold{fold}"


def merge_of(training: str) -> str:
    """Return the name of the step that merges a training's adapter."""
    return f"merge_{training}"


# A reward model learns from the same pairs as DPO in the reward view.
_TRAININGS = (("sft", "sft", "sft"), ("dpo_judge", "dpo", "dpo_judge"), ("dpo_reward", "dpo", "dpo_reward"))
STEPS: dict[str, Step] = {}
for _name, _stage, _data in (*_TRAININGS, ("rm", "rm", "dpo_reward")):
    STEPS[_name] = Step(_name, _stage, f"{_stage}.yaml.j2", _data)
    STEPS[merge_of(_name)] = Step(merge_of(_name), _stage, "merge.yaml.j2", _data, merges=_name)
TRAININGS: tuple[str, ...] = tuple(name for name, step in STEPS.items() if not step.merges)
# Stages that train no model and so have no recipe: the base as it is, and a probe on its hidden states.
UNTRAINED = {"base": Step("base", "sft", "", "sft"), "probe": Step("probe", "rm", "", "dpo_reward")}
# Every stage that is scored: each has a folder in outputs/EXP.
STAGES: dict[str, Step] = {name: STEPS[name] for name in TRAININGS} | UNTRAINED
