"""The work that an export holds: the token lengths of its rows, in the batches that training and scoring make."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.errors import ArenaError
from common.stages import STEPS
from data_prep.export_reader import readable, require_pairs, to_export

if TYPE_CHECKING:
    from common.experiment import Experiment

# LLaMA-Factory's collators pad the longest sequence of a batch to a multiple of this.
_MULTIPLE = 8


@dataclass(frozen=True)
class Workload:
    """Token lengths; a training row is one sequence of SFT or the two of a preference pair.

    train, valid: [rows, sequences a row]; scored: [sequences] that scoring reads, both orders or both responses.
    """

    train: np.ndarray
    valid: np.ndarray
    scored: np.ndarray

    @property
    def longest(self) -> int:
        """Tokens of the longest training sequence, padded as LLaMA-Factory pads it."""
        return _up(int(self.train.max()))

    def first(self, rows: int | None) -> Workload:
        """Return what is left where LLaMA-Factory's `max_samples` takes the first rows of each set; all are scored."""
        return self if rows is None else Workload(self.train[:rows], self.valid[:rows], self.scored)

    def padded_tokens(self, rows: np.ndarray, batch: int, *, grouped: bool, seed: int = 0) -> int:
        """Return the tokens of one pass over `rows`, padding included; `grouped`: batches of like lengths."""
        longest = rows.max(axis=1)
        order = np.argsort(longest) if grouped else np.random.default_rng(seed).permutation(len(rows))
        starts = np.arange(0, len(rows), batch)
        heights = np.minimum(batch, len(rows) - starts)
        widths = -(-np.maximum.reduceat(longest[order], starts) // _MULTIPLE) * _MULTIPLE
        return int((heights * widths).sum()) * rows.shape[1]


def workload_of(experiment: Experiment, stage: str) -> Workload:
    """Return the work of one stage (sft, dpo_judge, dpo_reward, rm); raises ArenaError where nothing was exported."""
    data = experiment.data_folder
    rows = _read(data / "rows.parquet", ["split", "verdict", "tokens"], experiment)
    own, split, verdict = rows["tokens"], rows["split"], rows["verdict"]
    train, valid, test = (split == name for name in ("train", "valid", "test"))
    orders = 2 if experiment.swap_tta else 1
    if STEPS[stage].data == "dpo_reward":
        table = _read(require_pairs(data), ["tokens_a", "tokens_b"], experiment)
        pairs = np.column_stack([table["tokens_a"], table["tokens_b"]])
        decided = verdict != "tie"
        return Workload(pairs[train & decided], pairs[valid & decided], pairs[valid | test].ravel())
    copies = 2 if experiment.swap_copies else 1
    wrong = 2 if experiment.dpo_rejected == "each" else 1
    repeated, wide = (copies, 1) if stage == "sft" else (copies * wrong, 2)
    scored = np.concatenate([np.repeat(own[valid], 2), np.repeat(own[test], orders)])
    judged = own[valid] if stage == "sft" else np.repeat(own[valid], wrong)
    return Workload(_wide(np.repeat(own[train], repeated), wide), _wide(judged, wide), scored)


def _wide(lengths: np.ndarray, sequences: int) -> np.ndarray:
    """A judge's pair is the same prompt twice, each with one label of the same length."""
    return np.repeat(lengths[:, None], sequences, axis=1)


def _read(path: Path, columns: list[str], experiment: Experiment) -> dict[str, np.ndarray]:
    from pyarrow.parquet import read_table

    if not path.is_file():
        raise ArenaError(
            "there is no exported data, and its lengths are what a forecast is made of",
            where=str(path.parent),
            remedy=to_export(path.parent),
        )
    with readable(path):
        table = read_table(path, columns=columns)
    return {name: table[name].to_numpy(zero_copy_only=False) for name in columns}


def _up(length: int) -> int:
    return -(-length // _MULTIPLE) * _MULTIPLE
