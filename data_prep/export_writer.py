"""The files of an export: first the tables, as the battles are fitted; then, by folds, the data sets made from them.

A text lies once in battles.parquet, and once in pairs.parquet where the reward view fits it to another budget. The
data sets repeat it, and stay on disk because plain `llamafactory-cli train` reads nothing else.
"""

from __future__ import annotations

import json
import shutil
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import repeat
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from common.battle import VERDICTS, Battle
from common.errors import ArenaError
from common.experiment import Experiment
from data_prep.audit import add_counts
from data_prep.export_folder import set_names
from data_prep.export_reader import TEST_LINES, iter_battles, iter_pairs, read_columns
from data_prep.export_rows import SCHEMAS, FittedChunk
from data_prep.folds import LEFT_OUT, GivenFolds, group_number, splits_beside, splits_of, trained_with
from data_prep.preference_pairs import View
from data_prep.readers import VoteReader
from data_prep.truncation import in_chunks

# Battles that are worked on at once: enough to keep every core busy, little enough to keep memory flat.
CHUNK = 512
_CHUNKS_A_GROUP = 128  # of rows.parquet, whose rows are small
_WAITING = "rows.arrow"  # the rows, until the folds are known


@dataclass
class Written:
    """Counts by source and table, or what became of a source's rows, and what the folds need of all with verdicts."""

    counts: dict[tuple[str, str], Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    groups: array = field(default_factory=lambda: array("Q"))
    verdicts: array = field(default_factory=lambda: array("b"))
    given: GivenFolds | None = None
    folds: array = field(default_factory=lambda: array("b"))

    def add(self, chunk: FittedChunk) -> None:
        """Add up one chunk."""
        for table, counts in chunk.counts.items():
            add_counts(self.counts[chunk.source, table], counts)
        if chunk.source != "test":
            rows = chunk.tables["rows"]
            self.groups.extend(map(group_number, rows.column("group").to_pylist()))
            self.verdicts.extend(map(VERDICTS.index, rows.column("verdict").to_pylist()))
            if self.given is not None and chunk.source == "train":
                self.folds.extend(map(self.given.__getitem__, rows.column("id").to_pylist()))

    @property
    def prompts_in_several_folds(self) -> int:
        """How many prompts the given folds put on both sides."""
        return len(set(zip(self.groups, self.folds, strict=False))) - len(set(self.groups)) if self.folds else 0


def write_tables(
    folder: Path,
    chunks: Iterable[FittedChunk],
    experiment: Experiment,
    weights: Mapping[str, float],
    folds: GivenFolds | None = None,
    test: VoteReader | None = None,
    drop: Collection[str] = (),
) -> Written:
    """Write rows.parquet, battles.parquet and, where chunks hold pairs, pairs.parquet; labelled battles come first.

    `weights` are those of the sources with verdicts, `folds` are those of each id where the user gives a table of them,
    `test` is read to its end with the chunks, the ids to `drop` are not trained on. Raises ArenaError where the folds
    cannot have the share that the experiment asks for.
    """
    written = Written(given=folds)
    with ExitStack() as stack:
        waiting = stack.enter_context(pa.OSFile(str(folder / _WAITING), "w"))
        writers = {"rows": stack.enter_context(pa.ipc.new_stream(waiting, SCHEMAS["rows"]))}
        for chunk in chunks:
            for name, batch in chunk.tables.items():
                if name not in writers:
                    writers[name] = stack.enter_context(_table(folder, name))
                writers[name].write_batch(batch)
            written.add(chunk)
    groups, verdicts = np.array(written.groups, np.uint64), np.array(written.verdicts, np.int8)
    # The first source is the target: it alone validates, so that a figure means the same with and without others.
    own = written.counts["train", "battles"]["rows"]
    given = () if folds is None else (np.array(written.folds, np.int64), folds.path)
    splits = splits_of(experiment, groups[:own], verdicts[:own], *given)
    splits = np.concatenate([splits, splits_beside(experiment, splits, groups[:own], groups[own:])])
    lines = [(row.before, row.id) for row in (test.rejected if test else []) if row.id is not None]
    metadata = {TEST_LINES: json.dumps([test.is_wsdm, lines])} if test else {}
    _write_rows(folder, splits, weights, drop, experiment.seed, written, SCHEMAS["rows"].with_metadata(metadata))
    return written


def _write_rows(
    folder: Path,
    known: np.ndarray,
    weights: Mapping[str, float],
    drop: Collection[str],
    seed: int,
    written: Written,
    schema: pa.Schema,
) -> None:
    """Write rows.parquet from the rows that wait, and count what becomes of them by source.

    `known`: the split of each row with a verdict; the rows to `drop` are judged, and not trained on.
    """
    at = 0
    with pa.OSFile(str(folder / _WAITING)) as file, _table(folder, "rows", schema) as writer:
        for batches in in_chunks(pa.ipc.open_stream(file), _CHUNKS_A_GROUP):
            rows = pa.Table.from_batches(batches)
            splits, times = [], []
            named = zip(rows["source"].to_pylist(), rows["id"].to_pylist(), strict=True)
            for number, (source, name) in enumerate(named, at):
                split = "test" if source == "test" else str(known[number])
                # A row that validates is trained on by other folds, if at all.
                count = 0 if split == LEFT_OUT else 1
                if split not in ("test", "valid", LEFT_OUT):
                    count = 0 if name in drop else times_trained(name, weights[source], seed)
                reasons = {"test": "test", "valid": "valid", LEFT_OUT: "prompt validates"}
                drawn = "train" if count else "dropped" if name in drop else "not drawn"
                reason = reasons.get(split, drawn)
                written.counts[source, "splits"][reason] += 1
                splits.append(LEFT_OUT if split == "train" and not count else split)
                times.append(count)
            for column, values in (("split", splits), ("times", times)):
                place = schema.get_field_index(column)
                rows = rows.set_column(place, schema.field(place), pa.array(values, schema.field(place).type))
            writer.write_table(rows.replace_schema_metadata(schema.metadata))
            at += len(rows)
    (folder / _WAITING).unlink()


def _of_set(folder: Path, splits: list[str], times: list[int], pairs: bool) -> Iterator[tuple[Battle, int, Any]]:
    """Yield each battle of a set as often as it is trained on, with its dropped turns and its pair."""
    beside = (pair for pair, _ in iter_pairs(folder, splits)) if pairs else repeat(None)
    for (battle, dropped), pair, count in zip(iter_battles(folder, splits), beside, times, strict=False):
        for _ in range(count):
            yield battle, dropped, pair


class _Blocks:
    """Where the lines of each battle begin, so that battles can be shuffled and their copies stay behind them."""

    def __init__(self, start: int):
        self._at, self._last, self._starts = start, None, array("Q")

    def add(self, lines: Iterable[str]) -> None:
        """Note lines that were written."""
        for line in lines:
            battle = line.split(', "conversations"', 1)[0]
            if battle != self._last:
                self._starts.append(self._at)
            self._at, self._last = self._at + len(line), battle

    def shuffle(self, file: BinaryIO, seed: str) -> None:
        """Put the blocks of the file into an order that the seed draws."""
        ends = [*self._starts[1:], self._at]
        numbers = np.random.default_rng(list(seed.encode())).permutation(len(ends))
        with TemporaryFile(dir=Path(file.name).parent) as shuffled:
            for number in numbers:
                file.seek(self._starts[number])
                shuffled.write(file.read(ends[number] - self._starts[number]))
            shuffled.seek(0)
            file.seek(self._starts[0] if self._starts else self._at)
            shutil.copyfileobj(shuffled, file)


def times_trained(identity: str, weight: float, seed: int) -> int:
    """Return how often a row of a source with this weight is trained on: its whole part, and once more by lot."""
    whole, rest = divmod(weight, 1)
    digest = blake2b(f"{seed}:{identity}".encode(errors="surrogatepass"), digest_size=8).digest()
    return int(whole) + (int.from_bytes(digest, "big") < rest * 2**64)


def _table(folder: Path, name: str, schema: pa.Schema | None = None) -> ParquetWriter:
    # Statistics of texts would hold a text a group in memory until the end, and no reader asks for them.
    path, options = folder / f"{name}.parquet", {"compression": "zstd", "write_statistics": ["split"]}
    return ParquetWriter(path, schema or SCHEMAS[name], **options)


def write_sets(
    folder: Path,
    experiment: Experiment,
    views: Collection[View],
    work: Callable[[str, Iterable[tuple]], Iterator[dict[str, list[str]]]],
) -> dict[str, int]:
    """Write the data sets from the tables; return how many rows each has. `work` is `open_pool`'s.

    Raises ArenaError for a set without a row, on which LLaMA-Factory would stop or validate nothing.
    """
    parts = experiment.labelled_parts
    rows: Counter[str] = Counter({f"{name}_{part}": 0 for part in parts for name in set_names(views)})
    for split in parts:
        of_set = trained_with(split)
        times = read_columns(folder / "rows.parquet", ["times"], where=("split", of_set))["times"].to_pylist()
        # A swapped copy is for training: the validation fold is judged on the battles as they were. One of several
        # folds is trained on by the others, so that it has them; scoring reads the tables, which have none.
        swapped = experiment.swap_copies and split != "valid"
        with ExitStack() as stack:
            names = {name: folder / f"{name}_{split}.jsonl" for name in set_names(views)}
            files = {name: stack.enter_context(path.open("w+b")) for name, path in names.items()}
            # The validation fold is judged by its verdicts. Epoch by epoch, each with labels of its own.
            for epoch in range(experiment.epochs_as_rows) if split != "valid" else [None]:
                battles = _of_set(folder, of_set, times, "reward" in views)
                blocks = {name: _Blocks(file.tell()) for name, file in files.items()}
                for lines in work("lines", ((chunk, swapped, epoch) for chunk in in_chunks(battles, CHUNK))):
                    for name, file in files.items():
                        file.write("".join(lines[name]).encode("ascii"))
                        blocks[name].add(lines[name])
                        rows[f"{name}_{split}"] += len(lines[name])
                if experiment.orders_together and split != "valid":
                    for name, file in files.items():
                        blocks[name].shuffle(file, f"{experiment.seed}:{epoch}")
    if empty := [name for name, count in rows.items() if not count]:
        remedy = "give more battles with different prompts, or change valid_share in experiment.yaml"
        if all(name.startswith("dpo_reward") for name in empty):
            remedy = "give battles with a winner and two different responses, or prepare without the reward view"
        what = f"no row is left for {', '.join(empty)}"
        raise ArenaError(what, where=str(experiment.data_folder), remedy=remedy)
    return dict(rows)
