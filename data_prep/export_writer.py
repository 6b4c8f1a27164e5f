"""The writer of an export: batches become the data sets' files and the two or three tables beside them."""

from __future__ import annotations

from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
from array import array
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from common.battle import VERDICTS
from common.errors import ArenaError
from data_prep.audit import Tally, add_counts
from data_prep.dataset_info import set_names
from data_prep.export_rows import RECORD_HEAD, Batch, row_schema, text_schema
from data_prep.folds import validation_mask
from data_prep.preference_pairs import VIEWS, PairTally, View, pair_schema

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from common.experiment import Experiment

SPLITS = ("train", "valid")
# Lines of a data set in one file; a larger set is a folder of such parts, which LLaMA-Factory reads in parallel.
PART = 500_000
# Battles in one waiting file, which is removed as soon as it is divided: the disk never holds a set twice.
_SEGMENT = 1 << 16


class Spool:
    """One data set's lines; `divide` turns them into <name>_train.jsonl and <name>_valid.jsonl, or folders of parts."""

    def __init__(self, folder: Path, name: str, part: int = PART, segment: int = _SEGMENT):
        self.name = name
        self._folder, self._part, self._segment = folder, part, segment
        self._paths: list[Path] = []
        self._file: IO[bytes] | None = None
        self._waiting = 0  # battles in the newest file

    def add(self, records: bytes, battles: int) -> None:
        """Keep the records of some battles, as `record` makes them, one after the other."""
        if self._file is None or self._waiting >= self._segment:
            self.close()
            self._paths.append(self._folder / f"{self.name}.spool-{len(self._paths)}")
            self._file, self._waiting = self._paths[-1].open("wb"), 0
        self._file.write(records)
        self._waiting += battles

    def close(self) -> None:
        """Flush what waits; `divide` comes after it."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def divide(self, valid: np.ndarray) -> dict[str, int]:
        """Write the two sets, given which battles validate; return the rows in each and remove the spool."""
        train, held = (_Parts(self._folder / f"{self.name}_{split}", self._part) for split in SPLITS)
        validates = iter(valid)
        for path in self._paths:
            with path.open("rb") as spool:
                while head := spool.read(RECORD_HEAD.size):
                    size, lines, extra_size, extra_lines = RECORD_HEAD.unpack(head)
                    own, extra = spool.read(size), spool.read(extra_size)
                    if next(validates):
                        held.write(own, lines)
                    else:
                        train.write(own + extra, lines + extra_lines)
            path.unlink()
        return dict(zip(SPLITS, (train.finish(), held.finish()), strict=True))


class _Parts:
    """<stem>.jsonl, or once that is full the folder <stem>/ with part-00000.jsonl, part-00001.jsonl, …"""

    def __init__(self, stem: Path, size: int):
        self._stem, self._size = stem, size
        self._single = stem.with_name(f"{stem.name}.jsonl")
        self._file = self._single.open("wb")
        self._number, self._lines, self._total = 0, 0, 0

    def write(self, content: bytes, lines: int) -> None:
        if lines and self._lines + lines > self._size and self._lines:
            self._next()
        self._file.write(content)
        self._lines += lines
        self._total += lines

    def finish(self) -> int:
        """Close the last file; return the number of lines."""
        self._file.close()
        return self._total

    def _next(self) -> None:
        self._file.close()
        if not self._number:
            self._stem.mkdir()
            self._single.rename(self._path(0))
        self._number, self._lines = self._number + 1, 0
        self._file = self._path(self._number).open("wb")

    def _path(self, number: int) -> Path:
        return self._stem / f"part-{number:05}.jsonl"


# Rows that are put into one group of a parquet file: they wait in memory. Texts are large, what is known of them small.
_TEXT_GROUP = 1024
_ROW_GROUP = 1 << 16
# The column that tells the run checks, without the folds' own groups, which battles share a prompt.
FIRST_PROMPT = "first_prompt"


class Writer:
    """Streams batches to disk; the folds, which need all verdicts, divide the rows at the end.

    Of each labelled battle nine bytes stay in memory: its group and its verdict.
    """

    def __init__(self, folder: Path, experiment: Experiment, views: Collection[View]):
        self._folder, self._experiment, self._views = folder, experiment, views
        self._groups, self._kinds = array("Q"), array("b")
        self._tests = 0
        self.tallies = {"train": Tally(), "test": Tally()}
        self._pair_tallies = {"train": PairTally(), "test": PairTally()}
        self._spools = {name: Spool(folder, name) for name in set_names(views)}
        self._waiting = folder / "rows.waiting"
        self._rows = _ParquetFile(self._waiting, known_schema(), _ROW_GROUP)
        self._battles = _ParquetFile(folder / "battles.parquet", text_schema(), _TEXT_GROUP)
        self._pairs = _ParquetFile(folder / "pairs.parquet", pair_schema(), _TEXT_GROUP) if "reward" in views else None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        for file in (*self._spools.values(), self._rows, self._battles, self._pairs):
            if file is not None:
                file.close()

    def add(self, batch: Batch, first_prompts: np.ndarray) -> None:
        """Append a batch and its `first_prompts` (see row_statistics); labelled battles come before the others."""
        import pyarrow as pa

        split = "train" if batch.labelled else "test"
        for name, records in batch.lines.items():
            self._spools[name].add(records, batch.battles)
        self._groups.extend(batch.groups)
        self._kinds.extend(batch.kinds)
        self._tests += 0 if batch.labelled else batch.battles
        self._rows.add(batch.rows.append_column(FIRST_PROMPT, pa.array(first_prompts, pa.uint64())))
        self._battles.add(batch.texts)
        add_counts(self.tallies[split], batch.tally)
        if self._pairs is not None:
            self._pairs.add(batch.pairs)
            add_counts(self._pair_tallies[split], batch.pair_tally)

    def split(self) -> dict[str, int]:
        """Divide the labelled rows into the folds; write the data sets and rows.parquet; return row counts."""
        import numpy as np

        kinds = np.frombuffer(self._kinds, dtype=np.int8) if self._kinds else np.empty(0, np.int8)
        groups = np.frombuffer(self._groups, dtype=np.uint64) if self._groups else np.empty(0, np.uint64)
        experiment = self._experiment
        valid = validation_mask(groups, kinds, share=experiment.valid_share, seed=experiment.seed)
        counts = {f"{n}_{s}": rows for n, spool in self._spools.items() for s, rows in spool.divide(valid).items()}
        self._write_rows(valid)
        ties = int((kinds == VERDICTS.index("tie")).sum())
        _refuse_empty(counts, experiment, ties=ties, battles=len(kinds))
        return {**counts, "test": self._tests}

    def pairs_audit(self, counts: dict[str, int]) -> dict[str, Any]:
        """Return what the audit says of the preference sets that were asked for."""
        audit: dict[str, Any] = {}
        for view in (view for view in VIEWS if view in self._views):
            audit[view] = {split: counts[f"dpo_{view}_{split}"] for split in ("train", "valid")}
        if "judge" in audit:
            audit["judge"]["rejected"] = self._experiment.dpo_rejected
        if "reward" in audit:
            audit["reward"] |= self._pair_tallies["train"].preferences()
            audit["reward"]["truncation"] = {n: t.truncation() for n, t in self._pair_tallies.items() if t.battles}
        return audit

    def _write_rows(self, valid: np.ndarray) -> None:
        """Write rows.parquet from what waits, now that the folds are known."""
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile

        schema, at = known_schema(), 0
        place = schema.get_field_index("split")
        target = _ParquetFile(self._folder / "rows.parquet", schema, _ROW_GROUP)
        with ParquetFile(self._waiting) as waiting:
            for batch in waiting.iter_batches(batch_size=_ROW_GROUP):
                mine = valid[at : at + len(batch)].tolist()
                split = ["valid" if held else "train" for held in mine] + ["test"] * (len(batch) - len(mine))
                target.add(batch.set_column(place, "split", pa.array(split, pa.string())))
                at += len(batch)
        target.close()
        self._waiting.unlink()


def known_schema() -> pa.Schema:
    """Return the columns of rows.parquet: those of a batch, and the first prompts that were noted beside it."""
    import pyarrow as pa

    return row_schema().append(pa.field(FIRST_PROMPT, pa.uint64()))


class _ParquetFile:
    """A parquet file that is written batch by batch, in groups of rows that do not depend on the batches' sizes."""

    def __init__(self, path: Path, schema: pa.Schema, group: int):
        from pyarrow.parquet import ParquetWriter

        self._schema, self._group, self._waiting = schema, group, []
        # Statistics of texts would hold a text a group in memory until the end, and nobody asks for them.
        self._writer = ParquetWriter(path, schema, compression="zstd", write_statistics=["split"])

    def add(self, batch: pa.RecordBatch) -> None:
        self._waiting.append(batch)
        while sum(map(len, self._waiting)) >= self._group:
            self._flush()

    def close(self) -> None:
        if self._writer.is_open:
            if self._waiting:
                self._flush()
            self._writer.close()

    def _flush(self) -> None:
        """Write one group, the rest goes on waiting."""
        import pyarrow as pa

        table = pa.Table.from_batches(self._waiting, schema=self._schema)
        self._writer.write_table(table.slice(0, self._group), row_group_size=self._group)
        self._waiting = table.slice(self._group).to_batches()


def _refuse_empty(counts: dict[str, int], experiment: Experiment, *, ties: int, battles: int) -> None:
    """Raise ArenaError for a set without a row, on which LLaMA-Factory would stop or validate nothing."""
    empty = [name for name, count in counts.items() if not count]
    if not empty:
        return
    remedy = "give more battles with different prompts, or change valid_share in experiment.yaml"
    if all(name.startswith("dpo_reward") for name in empty):
        remedy = "give battles with a winner and two different responses, or prepare without the reward view"
    raise ArenaError(
        f"no row is left for {', '.join(empty)} ({battles} battles, {ties} of them ties)",
        where=str(experiment.data_folder),
        remedy=remedy,
    )
