"""A scorer: the trained model of one stage, asked in the way that this stage was trained.

sft, dpo_judge   LabelScorer: label logits of the merged model behind the judge prompt, in both orders where asked
dpo_reward       ImplicitRewardScorer: rewards of both responses from the adapter on its base, switched on and off
rm               ValueHeadScorer: rewards of both responses from the merged model's value head
base             LabelScorer: as sft, of the untrained base
probe            ProbeScorer: probabilities from the hidden states that the untrained base has of both responses

It reads rows (from an export or from any table), makes token ids of them, and asks the model. Reading and asking may
happen in different processes, each of which makes its own scorer from the same `ScorerSpec`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from common.battle import TEXTS, Battle
from common.errors import ArenaError, UsageError
from common.experiment import Experiment
from common.files import sha256_of
from data_prep.audit import row_statistics
from data_prep.chat_template import ChatFrame, load_frame
from data_prep.export_reader import require_pairs, rows_of
from data_prep.preference_pairs import Pair, PairFitter, flatten, pair_sequences
from data_prep.readers import VoteReader
from data_prep.truncation import in_chunks
from factory.fingerprint import model_files
from factory.stage_context import StageContext
from scoring.calibration import AB_COLUMNS, REWARD_COLUMNS
from scoring.engines import open_engine, require_engine
from scoring.judge import MANIFEST, load_judge, require_golden_answers, require_judge
from scoring.links import softmax
from scoring.model_loading import TrainedAdapter, device_name, float_precision, load_model, trained_adapter
from scoring.packed_model import PackedModel
from scoring.probe import LENGTHS, PROBE, Probe
from scoring.rewards import VALUE_HEAD, a_beats_b, answer_states, implicit_rewards, load_value_head, value_rewards
from scoring.score_store import ROW_FACTS, Facts, ModelInput

_CHUNK = 512
_FLOATS = ("auto", "fp32", "bf16", "fp16")
# The precisions of stages that read each response alone; their engine is always torch.
_REWARD_PRECISIONS = {"rm": (*_FLOATS, "8bit", "4bit"), "dpo_reward": _FLOATS, "probe": _FLOATS}
# Keys of DPO's recipe on which its rewards depend.
_TRAINED = ("pref_beta", "pref_loss", "quantization_bit", "quantization_type", "double_quantization")
_BATTLE = ("id", *TEXTS)
_PAIR = ("id", "prompt", "response_a", "response_b")


class Scorer:
    """The model of one stage. `open` loads it; rows can be read and prepared without it."""

    columns: tuple[str, ...]  # names of one row's scores
    label_ids: tuple[int, ...] = ()  # tokens whose logits are the scores; none for rewards
    engine = "torch"
    note: Callable[[str], None] = print  # gets what a user should know, such as that memory ran out

    def __init__(self, context: StageContext, precision: str):
        """Keep the stage; `precision` is the requested one, and after `open` what the model really computes in."""
        self._context, self.precision = context, precision
        self._model: Any = None

    def inputs(self) -> dict[str, Any]:
        """Return what the scores depend on, weights as 'sha256:…'."""

    def require_own_export(self) -> None:
        """Raise ArenaError where the exported rows were made for another model than this one."""

    def exported(self, split: str) -> Iterator[tuple[Facts, ModelInput]]:
        """Yield the rows of one exported split, in the order of the input."""

    def read(self, path: Path, columns: Mapping[str, str] | None = None) -> Iterator[tuple[Facts, ModelInput | None]]:
        """Yield the rows of any table of battles, fitted as the training rows were; last, without an input, what is
        known of the rows that could not be read."""
        reader = VoteReader(path, labelled=False, columns=columns)
        for chunk in in_chunks((battle for _, battle in reader), _CHUNK):
            for battle, (fitted, texts) in zip(chunk, self.fit(chunk), strict=True):
                # the facts are those of the battle before it was fitted
                yield {**row_statistics(battle), "tokens": fitted.tokens, "cut": fitted.cut}, texts
        yield from ((asdict(row), None) for row in reader.rejected)

    def fit(self, battles: list[Battle]) -> Iterator[tuple[Any, ModelInput]]:
        """Yield each battle as it was fitted, and what the model reads of it."""

    def open(self) -> None:
        """Load the model."""

    def prepare(self, inputs: Sequence[ModelInput], *, swapped: bool) -> list:
        """Return the token ids of rows, with the answers exchanged where `swapped`."""

    def ask(self, prepared: list, *, progress: Callable[[float], None], name: Callable[[int], str]) -> np.ndarray:
        """Return scores [rows, columns] of prepared rows; raises ArenaError that calls a bad one by `name(i)`."""

    def close(self) -> None:
        """Free the model's memory."""
        self._model = None


@dataclass(frozen=True)
class ScorerSpec:
    """Which scorer: a stage, asked through which engine in which precision. It can be sent to another process."""

    context: StageContext
    engine: str = "torch"
    precision: str = "auto"

    def scorer(self) -> Scorer:
        """Return the scorer, its model not yet loaded.

        Raises ArenaError if the stage's model is missing or damaged, UsageError for an engine or a precision that the
        stage does not have.
        """
        stage = self.context.name
        if stage not in _REWARD_PRECISIONS:
            require_engine(self.engine, self.precision)  # the cheapest check first
            require_judge(self.context)
            return LabelScorer(self.context, self.engine, self.precision)
        offered = _REWARD_PRECISIONS[stage]
        if self.engine != "torch" or self.precision not in offered:
            raise UsageError(
                f"the stage {stage} reads each response alone, which {self.engine} in {self.precision} cannot do",
                where="--engine, --precision",
                remedy=f"choose torch and one of: {', '.join(offered)}; or a judge: --stage sft or dpo_judge",
            )
        if stage == "dpo_reward":
            return ImplicitRewardScorer(self.context, self.precision)
        if stage == "probe":
            return ProbeScorer(self.context, self.precision)
        require_judge(self.context)
        return ValueHeadScorer(self.context, self.precision)


def own_precision(experiment: Experiment, stage: str) -> str:
    """Return the experiment's `precision`, or auto for a stage that does not have this precision."""
    wanted = experiment.precision
    return wanted if wanted in _REWARD_PRECISIONS.get(stage, (wanted,)) else "auto"


class LabelScorer(Scorer):
    """A judge: the logits of the three labels behind the judge prompt."""

    columns = AB_COLUMNS

    def __init__(self, context: StageContext, engine: str, precision: str):
        """Read the judge's manifest."""
        super().__init__(context, precision)
        self.engine, self._judge = engine, load_judge(context.merged)
        self.label_ids, self._fitter = self._judge.frame.label_ids, self._judge.fitter()

    def inputs(self) -> dict[str, Any]:
        return _hashes(self._judge.folder, MANIFEST, "*.safetensors")

    def require_own_export(self) -> None:
        if ChatFrame.from_dict(self._context.manifest["frame"]) != self._judge.frame:
            raise ArenaError(
                "the data was exported for another tokenizer or chat template than this judge was trained with",
                where=str(self._judge.folder),
                remedy=f"run.py prepare -e {self._context.experiment.name} again, then train with --fresh",
            )

    def exported(self, split: str) -> Iterator[tuple[Facts, ModelInput]]:
        data, known = self._context.experiment.data_folder, (*ROW_FACTS[1:], "dropped")
        for row in rows_of(data, self._context.parts(split), "battles.parquet", _BATTLE, known):
            yield _of(row, ROW_FACTS), _of(row, (*_BATTLE, "dropped"))

    def fit(self, battles: list[Battle]) -> Iterator[tuple[Any, ModelInput]]:
        for fitted in self._fitter.fit(battles, both_orders=False):
            texts = {name: getattr(fitted.battle, name) for name in _BATTLE}
            yield fitted, {**texts, "dropped": fitted.dropped}

    def open(self) -> None:
        options: dict[str, Any] = {}
        if self.engine == "torch":
            options["note"] = lambda text: self.note(text)  # `note` may be replaced later
            if self.precision == "adapter":
                options["adapter"] = trained_adapter(self._context)
        judge = self._judge
        self._model = engine = open_engine(judge, self.engine, self.precision, **options)
        self.precision = engine.precision
        require_golden_answers(
            judge.folder,
            self.precision,
            lambda: softmax(engine.label_logits(judge.golden_sequences(), self.label_ids)),
        )

    def prepare(self, inputs: Sequence[ModelInput], *, swapped: bool) -> list:
        battles = [(Battle(row["id"], *(tuple(row[name]) for name in TEXTS)), row["dropped"]) for row in inputs]
        return self._judge.sequences(battles, swapped=swapped)

    def ask(self, prepared: list, *, progress: Callable[[float], None], name: Callable[[int], str]) -> np.ndarray:
        return self._model.label_logits(prepared, self.label_ids, progress=progress, name=name)

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
        super().close()


class RewardScorer(Scorer):
    """What both kinds of rewards share: each response is scored alone after the same prompt, so there is no order."""

    columns = REWARD_COLUMNS

    def __init__(self, context: StageContext, precision: str):
        """Load the frame and the tokenizer: those of the base model, or of the judge that was merged from it."""
        super().__init__(context, precision)
        experiment = context.experiment
        self.frame, self.tokenizer = self._read_with()
        budget = {"cutoff_len": experiment.cutoff_len, "prompt_share": experiment.prompt_share}
        self._fitter = PairFitter(self.frame, self.tokenizer, **budget)
        # What pairs are fitted by, in an export and in any other table.
        self._fitting = {"template": experiment.template, **budget}

    def _read_with(self) -> tuple[ChatFrame, Tokenizer]:
        return load_frame(self._context.experiment)

    def _settle_precision(self) -> str:
        """Replace "auto" by what it is on this machine; return the device."""
        device = device_name()
        self.precision = float_precision(device) if self.precision == "auto" else self.precision
        return device

    def exported(self, split: str) -> Iterator[tuple[Facts, ModelInput]]:
        data = self._context.experiment.data_folder
        require_pairs(data)
        # The pair's own `cut`, for rows.parquet describes the judge prompt, in which more is cut.
        columns = (*_PAIR, "tokens_a", "tokens_b", "cut")
        for row in rows_of(data, self._context.parts(split), "pairs.parquet", columns, ROW_FACTS[1:-2]):
            row["tokens"] = max(row["tokens_a"], row["tokens_b"])
            yield _of(row, ROW_FACTS), _of(row, _PAIR)

    def fit(self, battles: list[Battle]) -> Iterator[tuple[Any, ModelInput]]:
        for fitted in self._fitter.fit(battles):
            pair = flatten(fitted.battle)
            yield fitted, {name: getattr(pair, name) for name in _PAIR}

    def prepare(self, inputs: Sequence[ModelInput], *, swapped: bool) -> list:
        return pair_sequences(self.frame, self.tokenizer, [Pair(**row) for row in inputs])


class ImplicitRewardScorer(RewardScorer):
    """A DPO policy: beta * (log pi - log pi_ref) of each response."""

    def __init__(self, context: StageContext, precision: str):
        """Read how the adapter was trained."""
        super().__init__(context, precision)
        # Today's recipe says where the models are; the one that trained the adapter says how.
        self._recipe = context.trained_recipe
        self._adapter = TrainedAdapter.of(self._recipe, context.experiment)
        # orpo and simpo train mean log-probabilities, without a reference
        self._reference = self._recipe.get("pref_loss", "sigmoid") == "sigmoid"
        self._length_normalised = not self._reference or context.experiment.reward_length_normalised

    def inputs(self) -> dict[str, Any]:
        base = Path(self._adapter.base)
        return {
            **_hashes(self._adapter.folder, "adapter_config.json", "adapter_model.safetensors"),
            "length_normalised": self._length_normalised,
            **{key: self._recipe[key] for key in _TRAINED if key in self._recipe},
            **({"base": model_files(base)} if base.is_dir() else {}),  # on the hub the revision names the content
            **self._fitting,
        }

    def open(self) -> None:
        device = self._settle_precision()
        self._model = PackedModel(self._adapter.load(device, precision=self.precision))

    def ask(self, prepared: list, *, progress: Callable[[float], None], name: Callable[[int], str]) -> np.ndarray:
        return implicit_rewards(
            self._model,
            prepared,
            beta=self._recipe.get("pref_beta", 0.1),
            length_normalised=self._length_normalised,
            reference=self._reference,
            progress=progress,
            name=name,
            note=self.note,
        )


class ValueHeadScorer(RewardScorer):
    """A reward model: the value head's score behind each response."""

    def __init__(self, context: StageContext, precision: str):
        """Read the value head."""
        super().__init__(context, precision)
        self._head = load_value_head(context.merged)

    def _read_with(self) -> tuple[ChatFrame, Tokenizer]:
        judge = load_judge(self._context.merged)  # so that it needs neither the base nor LLaMA-Factory
        return judge.frame, judge.tokenizer

    def inputs(self) -> dict[str, Any]:
        return {**_hashes(self._context.merged, VALUE_HEAD, "*.safetensors"), **self._fitting}

    def open(self) -> None:
        device, folder = self._settle_precision(), self._context.merged
        self._model = model = PackedModel(load_model(folder, device, precision=self.precision))
        require_golden_answers(
            folder,
            self.precision,
            lambda: a_beats_b(value_rewards(model, self._head, load_judge(folder).golden_triples())),
        )

    def ask(self, prepared: list, *, progress: Callable[[float], None], name: Callable[[int], str]) -> np.ndarray:
        return value_rewards(self._model, self._head, prepared, progress=progress, name=name, note=self.note)


class ProbeScorer(RewardScorer):
    """A probe on the hidden states of the untrained base; with `layers` there is none yet, and `states` alone works."""

    columns = AB_COLUMNS

    def __init__(self, context: StageContext, precision: str, layers: Sequence[int] = ()):
        """Read the probe."""
        super().__init__(context, precision)
        experiment = context.experiment
        self._layers, self._probe = layers, None
        if not layers:
            if not (context.folder / PROBE).is_file():
                raise ArenaError("no probe was fitted yet", where=str(context.folder), remedy=context.command)
            self._probe = Probe.load(context.folder / PROBE)
            self._layers = self._probe.layers
            self.precision = self._probe.precision if precision == "auto" else precision
        trust = {"revision": experiment.revision, "trust_remote_code": experiment.trust_remote_code}
        self._base = TrainedAdapter(context.adapter, experiment.model, **trust)

    def inputs(self) -> dict[str, Any]:
        folder = Path(self._base.base)
        base = model_files(folder) if folder.is_dir() else f"{folder.as_posix()} {self._base.revision}"
        return {**_hashes(self._context.folder, PROBE), "base": base, **self._fitting}

    def exported(self, split: str) -> Iterator[tuple[Facts, ModelInput]]:
        yield from ((facts, _with_lengths(texts, facts)) for facts, texts in super().exported(split))

    def fit(self, battles: list[Battle]) -> Iterator[tuple[Any, ModelInput]]:
        for battle, (fitted, texts) in zip(battles, super().fit(battles), strict=True):
            yield fitted, _with_lengths(texts, row_statistics(battle))

    def open(self) -> None:
        self._model = PackedModel(self._base.load_base(self._settle_precision(), precision=self.precision))

    def prepare(self, inputs: Sequence[ModelInput], *, swapped: bool) -> list:
        triples = super().prepare([_of(row, _PAIR) for row in inputs], swapped=swapped)
        return list(zip(triples, [row["lengths"] for row in inputs], strict=True))

    def states(self, prepared: list, **how: Any) -> np.ndarray:
        """Return the hidden states of both answers, [rows, 2, layers x POOLS x hidden]."""
        return answer_states(self._model, [triple for triple, _ in prepared], self._layers, note=self.note, **how)

    def ask(self, prepared: list, *, progress: Callable[[float], None], name: Callable[[int], str]) -> np.ndarray:
        lengths = np.array([each for _, each in prepared], dtype=np.float64)
        return self._probe.logits(self.states(prepared, progress=progress, name=name), lengths)


def _with_lengths(texts: ModelInput, facts: Facts) -> ModelInput:
    return {**texts, "lengths": [facts[name] for name in LENGTHS]}


def _of(row: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: row[name] for name in names}


def _hashes(folder: Path, *patterns: str) -> dict[str, str]:
    files = sorted({path for pattern in patterns for path in folder.glob(pattern)})
    return {path.name: f"sha256:{sha256_of(path)}" for path in files}
