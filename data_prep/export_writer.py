"""The files of an export: first the tables, as the battles are fitted; then, by folds, the data sets made from them.

A text lies once in battles.parquet, and once in pairs.parquet where the reward view fits it to another budget. The
data sets repeat it, and stay on disk because plain `llamafactory-cli train` reads nothing else.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from common.battle import VERDICTS
from common.errors import ArenaError
from data_prep.audit import add_counts
from data_prep.dataset_info import set_names
from data_prep.export_reader import iter_battles, iter_pairs
from data_prep.export_rows import BATTLES, PAIRS, ROWS, FittedChunk
from data_prep.folds import group_number, validation_mask
from data_prep.preference_pairs import View
from data_prep.truncation import in_chunks

if TYPE_CHECKING:
    from common.experiment import Experiment

# Battles that are worked on at once: enough to keep every core busy, little enough to keep memory flat.
CHUNK = 512
# Lines of a data set in one file; a larger set is a folder of such parts, which LLaMA-Factory reads in parallel.
PART = 500_000
_CHUNKS_A_GROUP = 128  # of rows.parquet, whose rows are small
_WAITING = "rows.arrow"  # the rows, until the folds are known


@dataclass
class Written:
    """What the tables hold, added up; of each labelled battle nine bytes: its group and its verdict."""

    groups: array = field(default_factory=lambda: array("Q"))
    verdicts: array = field(default_factory=lambda: array("b"))
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {"train": Counter(), "test": Counter()})
    pair_counts: dict[str, Counter[str]] = field(default_factory=lambda: {"train": Counter(), "test": Counter()})

    def add(self, chunk: FittedChunk) -> None:
        """Add up one chunk."""
        split = "train" if chunk.labelled else "test"
        add_counts(self.counts[split], chunk.counts)
        add_counts(self.pair_counts[split], chunk.pair_counts)
        if chunk.labelled:
            self.groups.extend(map(group_number, chunk.rows.column("group").to_pylist()))
            self.verdicts.extend(map(VERDICTS.index, chunk.rows.column("verdict").to_pylist()))

    def validates(self, experiment: Experiment) -> np.ndarray:
        """Return which labelled battles validate; raises ArenaError where the share cannot be met."""
        groups, verdicts = np.array(self.groups, np.uint64), np.array(self.verdicts, np.int8)
        return validation_mask(groups, verdicts, share=experiment.valid_share, seed=experiment.seed)


def write_tables(folder: Path, chunks: Iterable[FittedChunk], experiment: Experiment) -> Written:
    """Write rows.parquet, battles.parquet and, where chunks hold pairs, pairs.parquet; labelled battles come first."""
    written = Written()
    with ExitStack() as stack:
        rows = stack.enter_context(pa.ipc.new_stream(stack.enter_context(pa.OSFile(f"{folder / _WAITING}", "w")), ROWS))
        writers: dict[str, ParquetWriter] = {}
        for chunk in chunks:
            rows.write_batch(chunk.rows)
            for name, schema, batch in (("battles", BATTLES, chunk.battles), ("pairs", PAIRS, chunk.pairs)):
                if batch is not None and name not in writers:
                    writers[name] = stack.enter_context(_table(folder / f"{name}.parquet", schema))
                if batch is not None:
                    writers[name].write_batch(batch)
            written.add(chunk)
    _write_rows(folder, written.validates(experiment))
    return written


def _write_rows(folder: Path, validates: np.ndarray) -> None:
    """Write rows.parquet from the rows that wait, now that the folds are known."""
    at, place = 0, ROWS.get_field_index("split")
    with pa.OSFile(f"{folder / _WAITING}") as file, _table(folder / "rows.parquet", ROWS) as writer:
        for batches in in_chunks(pa.ipc.open_stream(file), _CHUNKS_A_GROUP):
            rows = pa.Table.from_batches(batches)
            held = validates[at : at + len(rows)].tolist()
            split = ["valid" if each else "train" for each in held] + ["test"] * (len(rows) - len(held))
            writer.write_table(rows.set_column(place, ROWS.field(place), pa.array(split)))
            at += len(rows)
    (folder / _WAITING).unlink()


def _table(path: Path, schema: pa.Schema) -> ParquetWriter:
    # Statistics of texts would hold a text a group in memory until the end, and no reader asks for them.
    return ParquetWriter(path, schema, compression="zstd", write_statistics=["split"])


def write_sets(
    folder: Path,
    experiment: Experiment,
    views: Collection[View],
    work: Callable[[str, Iterable[tuple]], Iterator[dict[str, list[str]]]],
) -> dict[str, int]:
    """Write the data sets from the tables; return how many rows each has. `work` calls RowMaker, see `open_pool`.

    Raises ArenaError for a set without a row, on which LLaMA-Factory would stop or validate nothing.
    """
    counts: dict[str, int] = {}
    for split in ("train", "valid"):
        pairs = (pair for pair, _ in iter_pairs(folder, split)) if "reward" in views else repeat(None)
        rows = ((*fitted, pair) for fitted, pair in zip(iter_battles(folder, split), pairs, strict=False))
        # A swapped copy is for training: the validation fold is judged on the battles as they were.
        swapped = experiment.swap_copies and split == "train"
        with ExitStack() as stack:
            sets = {name: stack.enter_context(_SetFile(folder / f"{name}_{split}")) for name in set_names(views)}
            for lines in work("lines", ((chunk, swapped) for chunk in in_chunks(rows, CHUNK))):
                for name, file in sets.items():
                    file.write(lines[name])
        counts |= {f"{name}_{split}": file.rows for name, file in sets.items()}
    return counts


class _SetFile:
    """<stem>.jsonl, or once that is full the folder <stem>/ with part-00000.jsonl, part-00001.jsonl, …"""

    def __init__(self, stem: Path):
        self.rows = 0
        self._stem, self._single = stem, stem.with_name(f"{stem.name}.jsonl")
        self._file = self._single.open("wb")

    def __enter__(self) -> _SetFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, lines: list[str]) -> None:
        """Append lines."""
        while lines:
            if self.rows and self.rows % PART == 0:
                self._next_part()
            room = PART - self.rows % PART
            now, lines = lines[:room], lines[room:]
            self._file.write("".join(now).encode("ascii"))
            self.rows += len(now)

    def _next_part(self) -> None:
        self._file.close()
        if self.rows == PART:
            self._stem.mkdir()
            self._single.rename(self._stem / "part-00000.jsonl")
        self._file = (self._stem / f"part-{self.rows // PART:05}.jsonl").open("wb")


def require_rows(counts: dict[str, int], written: Written, experiment: Experiment) -> None:
    """Raise ArenaError for a set without a row, on which LLaMA-Factory would stop or validate nothing."""
    empty = [name for name, count in counts.items() if not count]
    if not empty:
        return
    remedy = "give more battles with different prompts, or change valid_share in experiment.yaml"
    if all(name.startswith("dpo_reward") for name in empty):
        remedy = "give battles with a winner and two different responses, or prepare without the reward view"
    battles, ties = len(written.verdicts), written.verdicts.count(VERDICTS.index("tie"))
    raise ArenaError(
        f"no row is left for {', '.join(empty)} ({battles} battles, {ties} of them ties)",
        where=str(experiment.data_folder),
        remedy=remedy,
    )
