"""A trained adapter, unmerged: where it lies, and the base that it was trained on, as the recipe says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ArenaError
from common.experiment import Experiment, load_experiment, read_yaml

if TYPE_CHECKING:
    from scoring.judge import Judge


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter's folder and its base, quantised as it was in training."""

    folder: Path
    base: str
    quantization_bit: int | None = None
    quantization_type: str = "nf4"
    double_quantization: bool = True
    revision: str = "main"
    trust_remote_code: bool = False

    def load(self, device: str, *, precision: str | None = None) -> Any:
        """Load the base with the adapter on it; `precision` is that of what is not quantised. Raises ArenaError."""
        from scoring.rewards import load_policy

        return load_policy(
            self.base,
            self.folder,
            device,
            quantization_bit=self.quantization_bit,
            quantization_type=self.quantization_type,
            double_quantization=self.double_quantization,
            revision=self.revision,
            trust_remote_code=self.trust_remote_code,
            precision=precision,
        )


def trained_adapter(experiment: Experiment, stage: str) -> TrainedAdapter:
    """Return the adapter that the recipe of `stage` trained; raises ArenaError if the recipe does not tell its base."""
    path = experiment.recipe(stage)
    recipe = read_yaml(path)
    if recipe.get("adapter_name_or_path"):
        raise ArenaError(
            "the training went on from another adapter, so its base is not a model by itself",
            where=f"{path}: adapter_name_or_path",
            remedy="score the merged model instead (--precision auto)",
        )
    # LLaMA-Factory's own defaults (hparams/model_args.py), where a recipe does not name a value
    return TrainedAdapter(
        folder=Path(recipe["output_dir"]),
        base=recipe["model_name_or_path"],
        quantization_bit=recipe.get("quantization_bit"),
        quantization_type=recipe.get("quantization_type", "nf4"),
        double_quantization=recipe.get("double_quantization", True),
        revision=experiment.revision,
        trust_remote_code=experiment.trust_remote_code,
    )


def adapter_of(judge: Judge) -> TrainedAdapter:
    """Return the adapter that a judge was merged from, by the experiment and stage that judge.json names."""
    return trained_adapter(load_experiment(judge.source["experiment"]), judge.source["stage"])
