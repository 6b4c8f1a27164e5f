"""Tallies: what fitting cost, counted battle by battle, batch by batch, for the audit."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from data_prep.truncation import Fitted
from collections.abc import Iterable, Iterator
from hashlib import blake2b
from typing import TYPE_CHECKING

from common.battle import Battle
from data_prep.folds import prompt_group

if TYPE_CHECKING:
    import numpy as np
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import ArenaError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

AnyTally = TypeVar("AnyTally")


@dataclass
class Tally:
    """What the audit says of the judge prompts."""

    rows: int = 0
    cut_rows: int = 0
    rows_with_dropped_turns: int = 0
    turns_dropped: int = 0
    tokens_full: int = 0
    tokens_kept: int = 0
    lost: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "a": 0, "b": 0})
    cut: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "a": 0, "b": 0})
    longest: int = 0

    def add(self, fitted: Fitted) -> None:
        """Count one battle."""
        self.rows += 1
        self.cut_rows += fitted.cut
        self.rows_with_dropped_turns += fitted.dropped > 0
        self.turns_dropped += fitted.dropped
        self.tokens_full += fitted.tokens_full
        self.tokens_kept += fitted.tokens
        self.longest = max(self.longest, fitted.tokens, fitted.tokens_swapped)
        for name, lost in zip(self.lost, fitted.lost, strict=True):
            self.lost[name] += lost
            self.cut[name] += lost > 0

    def summary(self) -> dict[str, Any]:
        """Return the audit's part `truncation`."""
        return {
            "rows": self.rows,
            "rows_cut": self.cut_rows,
            "rows_cut_share": round(self.cut_rows / self.rows, 6) if self.rows else 0.0,
            "rows_with_dropped_turns": self.rows_with_dropped_turns,
            "turns_dropped": self.turns_dropped,
            "tokens_before": self.tokens_full,
            "tokens_fed": self.tokens_kept,
            "fields_cut": self.cut,
            "tokens_lost_in_kept_turns": self.lost,
            "longest_row": self.longest,
        }


def add_counts(total: AnyTally, part: AnyTally) -> None:
    """Add the counts of one tally to those of another of its kind; `longest` is the longer of the two."""
    for each in fields(total):
        mine, theirs = getattr(total, each.name), getattr(part, each.name)
        if isinstance(mine, dict):
            mine.update({name: count + theirs[name] for name, count in mine.items()})
        else:
            setattr(total, each.name, max(mine, theirs) if each.name == "longest" else mine + theirs)


def battle_facts(battle: Battle) -> dict[str, Any]:
    """Return id, group, verdict, language, turns and the characters of prompts, A and B of a battle that is whole."""
    return {
        "id": battle.id,
        "group": prompt_group(battle),
        "verdict": battle.verdict,
        "language": battle.language,
        "turns": battle.turns,
        "chars_prompt": sum(map(len, battle.prompts)),
        "chars_a": sum(map(len, battle.responses_a)),
        "chars_b": sum(map(len, battle.responses_b)),
    }


def first_prompts(battles: Iterable[Battle]) -> np.ndarray:
    """Return uint64 [battles], equal for the same first prompt but for white space and the case of ASCII letters.

    A second opinion on the folds, which are made of `prompt_group`: it is noted where the table is read, and the run
    checks ask it whether a prompt is on both sides. What is equal here is of one group, not the other way round.
    """
    import numpy as np

    return np.fromiter(map(_digest, battles), dtype=np.uint64)


def _digest(battle: Battle) -> int:
    words = battle.prompts[0].encode(errors="surrogatepass").lower().split()
    return int.from_bytes(blake2b(b" ".join(words), digest_size=8).digest(), "big")


def noting(chunks: Iterable[list[Battle]], noted: list[np.ndarray]) -> Iterator[list[Battle]]:
    """Yield chunks of battles, and append each chunk's `first_prompts` to `noted` as it goes by."""
    for chunk in chunks:
        noted.append(first_prompts(chunk))
        yield chunk


_COLUMNS = ("split", "id", "group")
_REMEDY = (
    "give the battles without verdicts (the competition's test.csv), or leave --test out: a part of the votes is held "
    "out and scored anyway, and `run.py score --input FILE` answers for any other table"
)


def refuse_same_table(train: Path, test: Path) -> None:
    """Raise ArenaError where one table is given twice."""
    if train.samefile(test):
        raise ArenaError("is the train table, given as the test set", where=str(test), remedy=_REMEDY)


def check_overlap(rows: Path, test: Path, *, has_verdicts: bool) -> int:
    """Return how many test rows of a rows.parquet are training rows: same id, same prompt.

    Raises ArenaError where all of them are and the test table has verdicts: it is a copy of the votes.
    """
    total, found = _count(rows)
    if found and found == total and has_verdicts:
        raise ArenaError(f"all of its {total:,} rows are training rows", where=str(test), remedy=_REMEDY)
    return found


def _count(path: Path) -> tuple[int, int]:
    """Return (test rows, how many of them are labelled rows, too); eight bytes of each test row are in memory."""
    import numpy as np
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        parts = [_keys(batch, test=True) for batch in file.iter_batches(columns=_COLUMNS)]
        tests = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.int64)
        if not len(tests):
            return 0, 0
        seen = np.zeros(len(tests), bool)
        for batch in file.iter_batches(columns=_COLUMNS):
            keys = _keys(batch, test=False)
            at = np.minimum(np.searchsorted(tests, keys), len(tests) - 1)
            seen[at[tests[at] == keys]] = True
    return len(tests), int(seen.sum())


def _keys(batch: pa.RecordBatch, *, test: bool) -> np.ndarray:
    """Return a hash of id and prompt of each test row, or of each other row."""
    import numpy as np

    names = (batch.column(name).to_pylist() for name in _COLUMNS)
    mine = [hash((identity, group)) for split, identity, group in zip(*names, strict=True) if (split == "test") == test]
    return np.array(mine, np.int64)
