"""What memory and hours depend on: a model's sizes, the values of one rendered recipe, token lengths of the rows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import ArenaError, first_line
from common.experiment import Experiment
from common.llamafactory_schema import arguments
from data_prep.export_reader import SPLITS, how_to_export, read_columns, readable, require_pairs
from factory.stage_context import StageContext

# Weights up to which a CPU trains in minutes, and up to which in hours.
_TINY, SMALL = 1e7, 5e8
_NEEDED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
_LARGEST = 1 << 32
# LLaMA-Factory's collators pad the longest sequence of a batch to a multiple of this.
_MULTIPLE = 8
# Bytes that an optimizer keeps for each trained weight; Adam's two moments in fp32 for all others.
_OPTIMIZER_BYTES = {"adamw_8bit": 2, "adamw_bnb_8bit": 2, "paged_adamw_8bit": 2, "adafactor": 0.1, "sgd": 0}
# Tokens of a comparison, and of a prompt with one answer, in the competition: ends of twenty equal parts of real
# battles (1,479 of them, at four bytes a token).
_TYPICAL = {
    kind: [int(each) for each in ends.split()]
    for kind, ends in {
        "comparison": "90 170 210 260 310 360 420 470 550 620 690 760 830 900 980 1080 1180 1320 1530 2070 8880",
        "answer": "20 50 80 100 130 150 180 220 260 300 340 380 420 460 500 550 620 720 870 1210 6690",
    }.items()
}


@dataclass(frozen=True)
class ModelSize:
    """A decoder with gated feed-forward layers and grouped-query attention; properties are numbers of weights."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    feed_forward: int
    vocabulary: int
    tied: bool  # the head is the embedding
    normed: bool = False  # queries and keys pass through norms (Qwen3)
    soft_capped: bool = False  # attention scores pass through tanh (Gemma 2)

    @property
    def attention_width(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def key_value_width(self) -> int:
        """Width of keys and values together."""
        return 2 * self.kv_heads * self.head_dim

    def linear_shapes(self) -> list[tuple[int, int]]:
        """Return (inputs, outputs) of one layer's linear layers: q, k, v, o, gate, up, down."""
        q, kv, h, f = self.attention_width, self.key_value_width // 2, self.hidden, self.feed_forward
        return [(h, q), (h, kv), (h, kv), (q, h), (h, f), (h, f), (f, h)]

    @property
    def linear(self) -> int:
        """Linear layers without the head: those that quantisation shrinks."""
        return self.layers * sum(i * o for i, o in self.linear_shapes())

    @property
    def embedding(self) -> int:
        """The embedding."""
        return self.vocabulary * self.hidden

    @property
    def head(self) -> int:
        """The head, 0 if it is the embedding."""
        return 0 if self.tied else self.embedding

    @property
    def parameters(self) -> int:
        """All weights but the norms, which are a few thousandths."""
        return self.linear + self.embedding + self.head

    def lora(self, rank: int) -> int:
        """Return the weights of a LoRA adapter on all linear layers."""
        return self.layers * rank * sum(i + o for i, o in self.linear_shapes())


# From the config.json of models that people use: a forecast for these needs neither network nor disk.
_KNOWN = {
    "meta-llama/Meta-Llama-3-8B-Instruct": ModelSize(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
    "meta-llama/Llama-3.1-8B-Instruct": ModelSize(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
    "meta-llama/Meta-Llama-3.1-8B-Instruct": ModelSize(4096, 32, 32, 8, 128, 14336, 128256, tied=False),
    "google/gemma-2-9b-it": ModelSize(3584, 42, 16, 8, 256, 14336, 256000, tied=True, soft_capped=True),
    "Qwen/Qwen2.5-1.5B-Instruct": ModelSize(1536, 28, 12, 2, 128, 8960, 151936, tied=True),
    "Qwen/Qwen2.5-7B-Instruct": ModelSize(3584, 28, 28, 4, 128, 18944, 152064, tied=False),
    "Qwen/Qwen3-0.6B": ModelSize(1024, 28, 16, 8, 128, 3072, 151936, tied=True, normed=True),
    "Qwen/Qwen3-1.7B": ModelSize(2048, 28, 16, 8, 128, 6144, 151936, tied=True, normed=True),
    "Qwen/Qwen3-4B-Instruct-2507": ModelSize(2560, 36, 32, 8, 128, 9728, 151936, tied=True, normed=True),
    "Qwen/Qwen3-8B": ModelSize(4096, 36, 32, 8, 128, 12288, 151936, tied=False, normed=True),
    "models/SmolLM2-135M-Instruct": ModelSize(576, 30, 9, 3, 64, 1536, 49152, tied=True),
    "models/arena-tiny": ModelSize(64, 2, 8, 8, 8, 128, 1024, tied=False, normed=True),
    "microsoft/Phi-4-mini-instruct": ModelSize(3072, 32, 24, 8, 128, 8192, 200064, tied=True),
}


def time_on_cpu(model: str) -> str:
    """Return what a CPU takes to train it: minutes, hours or days; nothing where only a hub knows its sizes."""
    try:
        size = size_of(model).parameters if model in _KNOWN or Path(model).is_dir() else 0
    except ArenaError:
        size = 0
    return ("minutes" if size <= _TINY else "hours" if size <= SMALL else "days") if size else ""


def size_of(model: str, revision: str = "main") -> ModelSize:
    """Return the sizes of a model folder or hub id; raises ArenaError where they are not to be had.

    For a hub id that is not known here the hub's config.json is read (from the cache when offline).
    """
    path = Path(model) / "config.json"
    if not path.parent.is_dir():
        if model in _KNOWN:
            return _KNOWN[model]
        from huggingface_hub import hf_hub_download

        try:
            path = Path(hf_hub_download(model, "config.json", revision=revision))
        except Exception as error:  # gated, offline, unknown: the library has a class for each
            what = f"cannot download its config.json: {first_line(error)}"
            remedy = "go online, accept the model's licence on its page, or give a folder as `model`"
            raise ArenaError(what, where=model, remedy=remedy) from None
    try:
        return _parse(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        remedy = "forecast needs a decoder with hidden_size, num_hidden_layers, intermediate_size and vocab_size"
        raise ArenaError(f"does not hold the model's sizes ({error!r})", where=str(path), remedy=remedy) from None


def _parse(config: dict[str, Any]) -> ModelSize:
    """Read the keys by hand: AutoConfig takes seconds to import, and refuses model types newer than itself."""
    config = config.get("text_config", config)
    for key, least in {**dict.fromkeys(_NEEDED, 1), "num_key_value_heads": 0, "head_dim": 0}.items():
        value = config[key] if least else config.get(key) or 0
        if type(value) is not int or not least <= value < _LARGEST:
            raise ValueError(f"{key} is {value!r:.40}")
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelSize(
        hidden=hidden,
        layers=config["num_hidden_layers"],
        heads=heads,
        kv_heads=config.get("num_key_value_heads") or heads,
        head_dim=config.get("head_dim") or hidden // heads,
        feed_forward=config["intermediate_size"],
        vocabulary=config["vocab_size"],
        tied=bool(config.get("tie_word_embeddings", False)),
        normed=str(config.get("model_type")).startswith("qwen3"),
        soft_capped=bool(config.get("attn_logit_softcapping")),
    )


class TrainConfig(dict[str, Any]):
    """A recipe's values by LLaMA-Factory's keys, with its defaults where the recipe is silent."""

    @classmethod
    def of(cls, recipe: Mapping[str, Any]) -> TrainConfig:
        """Return the values of a recipe that was checked."""
        return cls({key: argument.default for key, argument in arguments().items()} | dict(recipe))

    @property
    def checkpoints(self) -> bool:
        """Whether activations are computed a second time instead of kept."""
        return not self["disable_gradient_checkpointing"]

    @property
    def has_reference(self) -> bool:
        """Whether DPO reads each batch once more without the adapter."""
        return self["stage"] == "dpo" and self["pref_loss"] == "sigmoid"

    @property
    def compute_bytes(self) -> int:
        """Bytes of one number."""
        return 2 if self["bf16"] or self["fp16"] else 4

    @property
    def optimizer_bytes(self) -> float:
        """Bytes that the optimizer keeps for each trained weight."""
        return _OPTIMIZER_BYTES.get(str(self["optim"]), 8)

    @property
    def evaluations(self) -> float:
        """Passes over the validation rows; steps that are a whole number are counted as a quarter of the run."""
        share = self["eval_steps"]
        of_steps = 1 / share if isinstance(share, float) and 0 < share < 1 else 4.0
        return {"epoch": float(self["num_train_epochs"]), "steps": of_steps}.get(str(self["eval_strategy"]), 0.0)


@dataclass(frozen=True)
class TokenLengths:
    """Tokens of each sequence; a training row is one sequence of SFT or the two of a preference pair.

    train, valid: [rows, sequences a row]; scored: [sequences] that scoring reads, both orders or both responses.
    """

    train: np.ndarray
    valid: np.ndarray
    scored: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest training sequence, padded as LLaMA-Factory pads it."""
        return -(-int(self.train.max()) // _MULTIPLE) * _MULTIPLE


def padded_tokens(rows: np.ndarray, batch: int, *, grouped: bool) -> int:
    """Return the tokens of one pass over [rows, sequences a row], padded; `grouped`: like lengths together."""
    longest = rows.max(axis=1)
    order = np.argsort(longest) if grouped else np.random.default_rng(0).permutation(len(rows))
    starts = np.arange(0, len(rows), batch)
    heights = np.minimum(batch, len(rows) - starts)
    widths = -(-np.maximum.reduceat(longest[order], starts) // _MULTIPLE) * _MULTIPLE
    return int((heights * widths).sum()) * rows.shape[1]


@dataclass(frozen=True)
class Counts:
    """Numbers of battles to assume: of votes, None for those that are exported, and of the test set, likewise."""

    votes: int | None = None
    test: int | None = None


def sequence_lengths(
    context: StageContext, max_samples: int | None = None, assumed: Counts | None = None
) -> TokenLengths:
    """Return what a stage trains on, validates on and scores; raises ArenaError where its rows were not exported.

    `max_samples` keeps the first rows of training and validation, as LLaMA-Factory does; scoring reads all.
    """
    experiment, data = context.experiment, context.experiment.data_folder
    assumed = assumed or Counts()
    if assumed.votes is not None:
        rows = _typical_rows(experiment, assumed.votes, assumed.test or 0)
    else:
        rows = _read(data / "rows.parquet", ["split", "verdict", "tokens"])
        if context.step.data == "dpo_reward":
            rows |= _read(require_pairs(data), ["tokens_a", "tokens_b"])
        if assumed.test is not None:  # Kaggle's hidden test set: the same kind of battles
            voted = np.flatnonzero(rows["split"] != "test")
            chosen = np.concatenate([voted, np.resize(voted, assumed.test)])
            rows = {name: column[chosen] for name, column in rows.items()}
            rows["split"] = np.concatenate([rows["split"][: len(voted)], ["test"] * assumed.test])
    own, split, verdict = rows["tokens"], rows["split"], rows["verdict"]
    train, valid, test = (np.isin(split, context.parts(name)) for name in SPLITS)
    if context.step.data == "dpo_reward":
        pairs = np.column_stack([rows["tokens_a"], rows["tokens_b"]])
        decided = verdict != "tie"
        trained, judged, scored = pairs[train & decided], pairs[valid & decided], pairs[valid | test].ravel()
    else:
        orders = 2 if experiment.swap_tta else 1
        scored = np.concatenate([np.repeat(own[valid], 2), np.repeat(own[test], orders)])
        # A judge's pair is the same prompt twice, each time with one label: all labels have the same length.
        sequences = 1 if context.name == "sft" else 2
        wrong = 2 if sequences == 2 and experiment.dpo_rejected == "each" else 1
        copies = wrong * (2 if experiment.swap_copies else 1)
        trained = np.repeat(np.repeat(own[train], copies)[:, None], sequences, axis=1)
        judged = np.repeat(np.repeat(own[valid], wrong)[:, None], sequences, axis=1)
    return TokenLengths(trained[:max_samples], judged[:max_samples], scored)


def _typical_rows(experiment: Experiment, votes: int, test: int) -> dict[str, np.ndarray]:
    """Return rows with the competition's lengths, spread evenly and in no order."""
    number = np.arange(votes + test)
    ends = np.linspace(0, 1, 21)

    def tokens(kind: str, shift: float) -> np.ndarray:
        place = (number * 0.618034 + shift) % 1
        return np.minimum(np.interp(place, ends, _TYPICAL[kind]), experiment.cutoff_len).astype(int)

    valid = round(votes * experiment.valid_share)
    parts = ["valid"] * valid + ["train"] * (votes - valid)
    if experiment.folds > 1:
        parts = np.resize(experiment.parts("valid"), votes).tolist()
    return {
        "split": np.array([*parts, *["test"] * test]),
        "verdict": np.where(number % 10 < 3, "tie", "a"),
        "tokens": tokens("comparison", 0),
        "tokens_a": tokens("answer", 0.2),
        "tokens_b": tokens("answer", 0.4),
    }


def _read(path: Path, columns: list[str]) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise ArenaError(
            "a forecast needs the lengths of exported rows, and nothing is exported here",
            where=str(path.parent),
            remedy=how_to_export(path.parent),
        )
    with readable(path):
        table = read_columns(path, columns)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in columns}
