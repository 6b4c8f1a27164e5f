"""A step: one recipe, run by one `llamafactory-cli` command; the names of all steps are declared here only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# The steps that may start from the merged SFT judge instead of the base model.
Start = Literal["base", "sft"]


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
    def asked_by(self) -> str:
        """The arguments of run.py that run it: sft, dpo --view judge, dpo --view reward, rm."""
        return self.trains.replace("dpo_", "dpo --view ")

    @property
    def command(self) -> str:
        """The command of llamafactory-cli that runs it."""
        return "export" if self.merges else "train"


_TRAININGS = (
    Step("sft", stage="sft", template="sft.yaml.j2", data="sft"),
    Step("dpo_judge", stage="dpo", template="dpo.yaml.j2", data="dpo_judge"),
    Step("dpo_reward", stage="dpo", template="dpo.yaml.j2", data="dpo_reward"),
    Step("rm", stage="rm", template="rm.yaml.j2", data="dpo_reward"),  # a reward model learns from the same pairs
)


def merge_of(training: str) -> str:
    """Return the name of the step that merges a training's adapter."""
    return f"merge_{training}"


_MERGES = tuple(
    Step(merge_of(s.name), stage=s.stage, template="merge.yaml.j2", data=s.data, merges=s.name) for s in _TRAININGS
)
STEPS: dict[str, Step] = {step.name: step for pair in zip(_TRAININGS, _MERGES, strict=True) for step in pair}
TRAININGS: tuple[str, ...] = tuple(step.name for step in _TRAININGS)
