"""A scorer: the trained model of one stage, asked in the way that this stage was trained.

sft, dpo_judge   label logits of the merged model behind the judge prompt, in both orders where asked
dpo_reward       implicit rewards of both responses: the adapter on its base, switched on and off
rm               rewards of both responses: the merged model's value head

It reads rows (from an export or from any table), makes token ids of them, and asks the model. Reading and asking may
happen in different processes: `ScorerSpec` is what one tells the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ArenaError
from common.experiment import Experiment, load_experiment, read_yaml

if TYPE_CHECKING:
    from scoring.judge import Judge
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np

from common.battle import Battle
from common.console import name_of
from common.errors import UsageError
from common.files import sha256_of
from common.stages import STEPS
from data_prep.audit import row_statistics
from data_prep.chat_template import ChatFrame, load_frame
from data_prep.export_reader import read_manifest, readable, require_pairs
from data_prep.preference_pairs import Pair, PairFitter, flatten, pair_sequences
from data_prep.readers import VoteReader
from data_prep.truncation import in_chunks
from factory.state import model_files, trained_recipe
from scoring.calibration import AB_COLUMNS, REWARD_COLUMNS
from scoring.engines.protocol import open_engine, require_engine
from scoring.engines.torch_engine import device_name, load_model
from scoring.judge import MANIFEST, label_canaries, load_judge, require_canaries, require_judge, reward_canaries
from scoring.links import softmax
from scoring.packed_model import Reader
from scoring.rewards import VALUE_HEAD, beats, implicit_rewards, load_policy, load_value_head, value_rewards
from scoring.score_store import ROW_FACTS, Facts, Fed


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


# The first columns of every score table.
COLUMNS = ROW_FACTS
_BATCH = 512
_AGAIN = "run prepare again"


def exported_rows(data: Path, split: str, texts: str) -> Iterator[tuple[Facts, dict[str, Any]]]:
    """Yield (facts and `dropped`, texts as fed) of one exported split, in the order of the input.

    `texts` is the table that lies beside rows.parquet, row by row: battles.parquet or pairs.parquet. Raises ArenaError
    where it was not exported.
    """
    from pyarrow.parquet import ParquetFile

    if texts == "pairs.parquet":
        require_pairs(data)
    columns = ["split", "dropped", *COLUMNS]
    with readable(data / texts):
        fed = ParquetFile(data / texts)
    with readable(data / "rows.parquet"), fed, ParquetFile(data / "rows.parquet") as rows:
        beside = (text for batch in fed.iter_batches(batch_size=_BATCH) for text in batch.to_pylist())
        for batch in rows.iter_batches(batch_size=_BATCH, columns=columns):
            for facts in batch.to_pylist():
                text = next(beside, None)
                if text is None:
                    raise ArenaError("has fewer rows than rows.parquet", where=str(data / texts), remedy=_AGAIN)
                if facts.pop("split") == split:
                    yield facts, text


def battles_to_score(path: Path) -> Iterator[Battle]:
    """Yield the battles of a table; at its end raises ArenaError if a row could not be read: each needs its answer."""
    reader = VoteReader(path, labelled=False)
    yield from (battle for _, battle in reader)
    if reader.rejected:
        first = reader.rejected[0]
        named = f" (id {name_of(first.id)})" if first.id is not None else ""
        raise ArenaError(
            f"{len(reader.rejected)} row(s) cannot be scored; the first{named}: {first.reason}",
            where=f"{path} row {first.row}",
            remedy="mend or remove these rows: every row needs its own probabilities",
        )


def describe(battle: Battle, *, tokens: int, cut: bool) -> Facts:
    """Return one row of `COLUMNS` for a battle as it was before it was fitted."""
    return {**row_statistics(battle), "tokens": tokens, "cut": cut}


_CHUNK = 512
_FLOATS = ("auto", "fp32", "bf16", "fp16")
# Where the engine of a stage is not a choice, the precisions that it has.
_REWARD_PRECISIONS = {"rm": (*_FLOATS, "8bit", "4bit"), "dpo_reward": _FLOATS}
# Keys of DPO's recipe that say what its rewards are.
_TRAINED = ("pref_beta", "pref_loss", "quantization_bit", "quantization_type", "double_quantization")


class Scorer(Protocol):
    """What scoring a stage needs of its model; loading it is put off until `open`."""

    columns: tuple[str, ...]  # what the scores of one row are called
    label_ids: tuple[int, ...]  # tokens whose logits are the scores; none for rewards
    engine: str
    precision: str  # what was asked for; after `open` what it really computes in
    note: Callable[[str], None]  # told what a user should know, such as that memory ran out

    def inputs(self) -> dict[str, Any]:
        """Return what the scores depend on, weights as 'sha256:…'."""

    def require_own_export(self) -> None:
        """Raise ArenaError where the exported rows were made for another model than this one."""

    def exported(self, split: str) -> Iterator[tuple[Facts, Fed]]:
        """Yield the rows of one exported split, in the order of the input."""

    def read(self, path: Path) -> Iterator[tuple[Facts, Fed]]:
        """Yield the rows of any table of battles, fitted as the training rows were; a bad row stops it by name."""

    def open(self) -> None:
        """Load the model."""

    def prepare(self, fed: Sequence[Fed], *, swapped: bool) -> list:
        """Return the token ids of rows, with the answers' places exchanged where `swapped`."""

    def ask(self, prepared: list, *, progress: Callable, name: Callable[[int], str]) -> np.ndarray:
        """Return scores [rows, columns] of prepared rows; raises ArenaError that calls a bad one by `name(i)`."""

    def close(self) -> None:
        """Give the model's memory back."""


@dataclass(frozen=True)
class ScorerSpec:
    """Which scorer: an experiment's stage, asked through which engine in which precision."""

    experiment: Experiment
    stage: str
    engine: str = "torch"
    precision: str = "auto"

    def scorer(self) -> Scorer:
        """Return the scorer, its model not yet loaded; raises as `scorer_of`."""
        return scorer_of(self.experiment, self.stage, self.engine, self.precision)


def scorer_of(experiment: Experiment, stage: str, engine: str = "torch", precision: str = "auto") -> Scorer:
    """Return the scorer of a stage; raises ArenaError if its model is missing or does not fit the export.

    Raises UsageError for an engine or a precision that this stage has not.
    """
    if stage not in STEPS or STEPS[stage].merges:
        raise ArenaError(f"{stage!r} is no stage", remedy="choose one of: sft, dpo_judge, dpo_reward, rm")
    if stage not in _REWARD_PRECISIONS:
        require_engine(engine, precision)  # before the judge is read: nothing is begun for an engine that is not there
        require_judge(experiment, stage)
        return _LabelScorer(experiment, stage, engine, precision)
    if engine != "torch":
        raise UsageError(
            f"the stage {stage} gives rewards, which only the engine torch computes",
            where=f"--engine {engine}",
            remedy="leave --engine out, or choose a judge: --stage sft or dpo_judge",
        )
    if precision not in _REWARD_PRECISIONS[stage]:
        raise UsageError(
            f"the stage {stage} cannot be scored in {precision}",
            where=f"--precision {precision}",
            remedy=f"choose one of: {', '.join(_REWARD_PRECISIONS[stage])}",
        )
    if stage == "dpo_reward":
        return _PolicyScorer(experiment, precision)
    require_judge(experiment, stage)
    return _ValueScorer(experiment, precision)


def own_precision(experiment: Experiment, stage: str) -> str:
    """Return the experiment's `precision`, or auto for a stage that has no such precision."""
    asked = experiment.precision
    return asked if asked in _REWARD_PRECISIONS.get(stage, (asked,)) else "auto"


class _LabelScorer:
    columns = AB_COLUMNS

    def __init__(self, experiment: Experiment, stage: str, engine: str, precision: str):
        self.engine, self.precision, self.note = engine, precision, print
        self._data = experiment.data_folder
        self._judge = load_judge(experiment.merged_folder(stage))
        self.label_ids = self._judge.frame.label_ids
        self._engine: Any = None

    def inputs(self) -> dict[str, Any]:
        return _hashes(self._judge.folder, [MANIFEST, "*.safetensors"])

    def require_own_export(self) -> None:
        # Any other table is fitted by what the judge's own folder says.
        if ChatFrame.from_dict(read_manifest(self._data)["frame"]) != self._judge.frame:
            raise ArenaError(
                "the data was exported for another tokenizer or chat template than this judge was trained with",
                where=str(self._judge.folder),
                remedy=f"run.py prepare -e {self._data.name} again, then train with --fresh",
            )

    def exported(self, split: str) -> Iterator[tuple[Facts, Fed]]:
        for facts, text in exported_rows(self._data, split, "battles.parquet"):
            yield facts, {**text, "dropped": facts.pop("dropped")}

    def read(self, path: Path) -> Iterator[tuple[Facts, Fed]]:
        fitter = self._judge.fitter()
        for chunk in in_chunks(battles_to_score(path), _CHUNK):
            for battle, fitted in zip(chunk, fitter.fit(chunk, both_orders=False), strict=True):
                fed = {name: getattr(fitted.battle, name) for name in ("id", "prompts", "responses_a", "responses_b")}
                yield describe(battle, tokens=fitted.tokens, cut=fitted.cut), {**fed, "dropped": fitted.dropped}

    def open(self) -> None:
        # by name, for `note` may be another one later
        told = {"note": lambda text: self.note(text)} if self.engine == "torch" else {}
        self._engine = open_engine(self._judge, self.engine, self.precision, **told)
        self.precision = self._engine.precision
        require_canaries(self._judge.folder, self.precision, self._canaries)

    def _canaries(self) -> np.ndarray:
        return softmax(self._engine.label_logits(label_canaries(self._judge), self.label_ids))

    def prepare(self, fed: Sequence[Fed], *, swapped: bool) -> list:
        texts = [(row["id"], *(tuple(row[k]) for k in ("prompts", "responses_a", "responses_b"))) for row in fed]
        battles = [(Battle(*text), row["dropped"]) for text, row in zip(texts, fed, strict=True)]
        return self._judge.sequences(battles, swapped=swapped)

    def ask(self, prepared: list, *, progress: Callable, name: Callable[[int], str]) -> np.ndarray:
        return self._engine.label_logits(prepared, self.label_ids, progress=progress, name=name)

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None


class _PairScorer:
    """Rewards have no order: each response is scored alone, after the same prompt."""

    columns, label_ids = REWARD_COLUMNS, ()
    engine = "torch"

    def __init__(self, experiment: Experiment, precision: str):
        self.precision, self.note = precision, print
        self._experiment = experiment
        self._frame, self._tokenizer = load_frame(experiment)
        self._model: Any = None

    def _fitting(self) -> dict[str, Any]:
        """Return what any table's pairs are fitted by, which an export's were, too."""
        shares = self._experiment.budget_shares.model_dump()
        return {"template": self._experiment.template, "cutoff_len": self._experiment.cutoff_len, "shares": shares}

    def require_own_export(self) -> None:
        """The frame comes from the experiment, as the export's did."""

    def exported(self, split: str) -> Iterator[tuple[Facts, Fed]]:
        for facts, text in exported_rows(self._experiment.data_folder, split, "pairs.parquet"):
            facts.pop("dropped")
            # rows.parquet tells of the judge prompt, which cuts more than the pair that is fed here
            facts |= {"tokens": max(text["tokens_a"], text["tokens_b"]), "cut": text["cut"]}
            yield facts, {name: text[name] for name in ("id", "prompt", "response_a", "response_b")}

    def read(self, path: Path) -> Iterator[tuple[Facts, Fed]]:
        shares, cutoff = self._experiment.budget_shares, self._experiment.cutoff_len
        fitter = PairFitter(self._frame, self._tokenizer, cutoff_len=cutoff, shares=shares)
        for chunk in in_chunks(battles_to_score(path), _CHUNK):
            for battle, fitted in zip(chunk, fitter.fit(chunk), strict=True):
                pair = flatten(fitted.battle)
                fed = {name: getattr(pair, name) for name in ("id", "prompt", "response_a", "response_b")}
                yield describe(battle, tokens=fitted.tokens, cut=fitted.cut), fed

    def prepare(self, fed: Sequence[Fed], *, swapped: bool) -> list:
        return pair_sequences(self._frame, self._tokenizer, [Pair(**row) for row in fed])

    def close(self) -> None:
        self._model = None


class _PolicyScorer(_PairScorer):
    def __init__(self, experiment: Experiment, precision: str):
        super().__init__(experiment, precision)
        # Where the models lie is said by today's recipe, how the adapter was trained by the one that trained it.
        self._recipe = trained_recipe(experiment, "dpo_reward", _TRAINED)
        self._adapter = Path(self._recipe["output_dir"])

    def inputs(self) -> dict[str, Any]:
        base = Path(self._recipe["model_name_or_path"])
        return {
            **_hashes(self._adapter, ["adapter_config.json", "adapter_model.safetensors"]),
            "length_normalised": self._length_normalised,
            **{key: self._recipe[key] for key in _TRAINED if key in self._recipe},
            **({"base": model_files(base)} if base.is_dir() else {}),  # what the hub holds is its revision's matter
            **self._fitting(),
        }

    @property
    def _loss(self) -> str:
        return self._recipe.get("pref_loss", "sigmoid")

    @property
    def _length_normalised(self) -> bool:
        # orpo and simpo train mean log-probabilities, without a reference
        return self._loss != "sigmoid" or self._experiment.reward_length_normalised

    def open(self) -> None:
        self.precision, device = _float_of(self.precision)
        policy = load_policy(
            self._recipe["model_name_or_path"],
            self._adapter,
            device,
            quantization_bit=self._recipe.get("quantization_bit"),
            quantization_type=self._recipe.get("quantization_type", "nf4"),
            double_quantization=self._recipe.get("double_quantization", True),
            revision=self._experiment.revision,
            trust_remote_code=self._experiment.trust_remote_code,
            precision=self.precision,
        )
        self._model = Reader(policy)

    def ask(self, prepared: list, *, progress: Callable, name: Callable[[int], str]) -> np.ndarray:
        return implicit_rewards(
            self._model,
            prepared,
            beta=self._recipe.get("pref_beta", 0.1),
            length_normalised=self._length_normalised,
            reference=self._loss == "sigmoid",
            progress=progress,
            name=name,
            note=self.note,
        )


class _ValueScorer(_PairScorer):
    def __init__(self, experiment: Experiment, precision: str):
        super().__init__(experiment, precision)
        self._folder = experiment.merged_folder("rm")
        self._head = load_value_head(self._folder)

    def inputs(self) -> dict[str, Any]:
        return {**_hashes(self._folder, [VALUE_HEAD, "*.safetensors"]), **self._fitting()}

    def open(self) -> None:
        self.precision, device = _float_of(self.precision)
        self._model = Reader(load_model(self._folder, device, precision=self.precision))
        require_canaries(self._folder, self.precision, self._canaries)

    def _canaries(self) -> np.ndarray:
        return beats(value_rewards(self._model, self._head, reward_canaries(load_judge(self._folder))))

    def ask(self, prepared: list, *, progress: Callable, name: Callable[[int], str]) -> np.ndarray:
        return value_rewards(self._model, self._head, prepared, progress=progress, name=name, note=self.note)


def _float_of(precision: str) -> tuple[str, str]:
    """Return what a precision really is on this machine, and the device."""
    device = device_name()
    return ("bf16" if device == "cuda" else "fp32") if precision == "auto" else precision, device


def _hashes(folder: Path, patterns: list[str]) -> dict[str, str]:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: f"sha256:{_sha256(path, path.stat().st_size, path.stat().st_mtime_ns)}" for path in files}


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, changed_ns: int) -> str:
    """Return a file's hash; an 8B judge takes half a minute, and is asked for by every job of a scoring."""
    return sha256_of(path)
