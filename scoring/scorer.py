"""A scorer: the trained model of one stage, asked in the way that this stage was trained.

sft, dpo_judge   label logits of the merged model behind the judge prompt, in both orders where asked
dpo_reward       implicit rewards of both responses: the adapter on its base, switched on and off
rm               rewards of both responses: the merged model's value head
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from data_prep.budget import in_chunks
from data_prep.chat_frame import load_frame
from data_prep.dataset import read_manifest, read_pairs, read_rows
from data_prep.errors import ArenaError
from data_prep.files import sha256_of
from data_prep.flatten import Pair
from data_prep.pair_budget import PairFitter
from data_prep.pairs import pair_sequences
from factory.experiment import Experiment, read_yaml
from factory.step import STEPS
from scoring.engine import device_name, load_model
from scoring.judge import MANIFEST, load_judge
from scoring.rewards import VALUE_HEAD, implicit_rewards, load_policy, load_value_head, reward_table, value_rewards
from scoring.scores import COLUMNS, battles_to_score, describe, score_file, score_split

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 512


class Scorer(Protocol):
    """What scoring a stage needs of its model; loading it is put off until `open`."""

    def inputs(self) -> dict[str, Any]:
        """Return what the scores depend on, weights as 'sha256:…'."""

    def open(self) -> None:
        """Load the model."""

    def split(self, split: str, *, both_orders: bool, progress: Callable) -> pd.DataFrame:
        """Score one exported split; one row a battle, in the order of the input."""

    def file(self, path: Path, *, both_orders: bool, progress: Callable) -> pd.DataFrame:
        """Score any table of battles."""


def scorer_of(experiment: Experiment, stage: str) -> Scorer:
    """Return the scorer of a stage; raises ArenaError if its model is missing or does not fit the export."""
    if stage not in STEPS or STEPS[stage].merges:
        raise ArenaError(f"{stage!r} is no stage", remedy="choose one of: sft, dpo_judge, dpo_reward, rm")
    if stage == "dpo_reward":
        return _PolicyScorer(experiment)
    return _ValueScorer(experiment) if stage == "rm" else _LabelScorer(experiment, stage)


class _LabelScorer:
    def __init__(self, experiment: Experiment, stage: str):
        self._data = experiment.data_folder
        self._judge = load_judge(experiment.merged_folder(stage))
        self._model: Any = None
        exported = read_manifest(self._data)["frame"]
        if json.loads(json.dumps(asdict(self._judge.frame))) != exported:
            raise ArenaError(
                "the data was exported for another tokenizer or chat template than this judge was trained with",
                where=str(self._judge.folder),
                remedy=f"run.py prepare -e {experiment.name} again, then train with --fresh",
            )

    def inputs(self) -> dict[str, Any]:
        return _hashes(self._judge.folder, [MANIFEST, "*.safetensors"])

    def open(self) -> None:
        self._model = load_model(self._judge.folder, device_name())

    def split(self, split: str, *, both_orders: bool, progress: Callable) -> pd.DataFrame:
        return score_split(self._judge, self._model, self._data, split, tta=both_orders, progress=progress)

    def file(self, path: Path, *, both_orders: bool, progress: Callable) -> pd.DataFrame:
        return score_file(self._judge, self._model, path, tta=both_orders, progress=progress)


class _PairScorer:
    """Rewards have no order: each response is scored alone, after the same prompt."""

    def __init__(self, experiment: Experiment):
        self._experiment = experiment
        self._frame, self._tokenizer = load_frame(experiment)

    def rewards(self, triples: list, progress: Callable):
        raise NotImplementedError

    def split(self, split: str, *, both_orders: bool, progress: Callable) -> pd.DataFrame:
        data = self._experiment.data_folder
        return self._scored(read_rows(data, split), read_pairs(data, split), progress)

    def file(self, path: Path, *, both_orders: bool, progress: Callable) -> pd.DataFrame:
        import pandas as pd

        shares, cutoff = self._experiment.budget_shares, self._experiment.cutoff_len
        fitter = PairFitter(self._frame, self._tokenizer, cutoff_len=cutoff, shares=shares)
        rows, pairs = [], []
        for chunk in in_chunks(battles_to_score(path), _CHUNK):
            for battle, fitted in zip(chunk, fitter.fit(chunk), strict=True):
                rows.append(describe(battle, tokens=fitted.tokens, cut=fitted.cut))
                pairs.append(fitted.pair)
        return self._scored(pd.DataFrame(rows, columns=list(COLUMNS)), pairs, progress)

    def _scored(self, rows: pd.DataFrame, pairs: list[Pair], progress: Callable) -> pd.DataFrame:
        return reward_table(rows, self.rewards(pair_sequences(self._frame, self._tokenizer, pairs), progress))


class _PolicyScorer(_PairScorer):
    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        self._recipe = read_yaml(experiment.recipe("dpo_reward"))
        self._adapter = Path(self._recipe["output_dir"])
        self._model: Any = None

    def inputs(self) -> dict[str, Any]:
        return {
            **_hashes(self._adapter, ["adapter_config.json", "adapter_model.safetensors"]),
            "length_normalised": self._length_normalised,
        }

    @property
    def _loss(self) -> str:
        return self._recipe.get("pref_loss", "sigmoid")

    @property
    def _length_normalised(self) -> bool:
        # orpo and simpo train mean log-probabilities, without a reference
        return self._loss != "sigmoid" or self._experiment.reward_length_normalised

    def open(self) -> None:
        self._model = load_policy(
            self._recipe["model_name_or_path"],
            self._adapter,
            device_name(),
            quantization_bit=self._recipe.get("quantization_bit"),
            quantization_type=self._recipe.get("quantization_type", "nf4"),
            double_quantization=self._recipe.get("double_quantization", True),
            revision=self._experiment.revision,
            trust_remote_code=self._experiment.trust_remote_code,
        )

    def rewards(self, triples: list, progress: Callable):
        return implicit_rewards(
            self._model,
            triples,
            beta=self._recipe.get("pref_beta", 0.1),
            length_normalised=self._length_normalised,
            reference=self._loss == "sigmoid",
            progress=progress,
        )


class _ValueScorer(_PairScorer):
    def __init__(self, experiment: Experiment):
        super().__init__(experiment)
        self._folder = experiment.merged_folder("rm")
        self._head = load_value_head(self._folder)
        self._model: Any = None

    def inputs(self) -> dict[str, Any]:
        return _hashes(self._folder, [VALUE_HEAD, "*.safetensors"])

    def open(self) -> None:
        self._model = load_model(self._folder, device_name())

    def rewards(self, triples: list, progress: Callable):
        return value_rewards(self._model, self._head, triples, progress=progress)


def _hashes(folder: Path, patterns: list[str]) -> dict[str, str]:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: f"sha256:{sha256_of(path)}" for path in files}
