"""Tables of three probabilities an id, beside the votes: an arena's ground truth, and soft labels of a teacher.

id,winner_model_a,winner_model_b,winner_tie
100228,0.412,0.391,0.197

With the truth of a synthetic arena reports compare their figures. prepare --soft FILE reads such a table for some
battles of --train: LLaMA-Factory trains on labels, so for every battle, order and epoch one is drawn, also from the
shares of several voters. Its expected gradient is that of the soft cross-entropy.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from common.console import name_of
from common.errors import ArenaError
from common.files import is_within
from data_prep.cells import Shares, drawn_verdict
from data_prep.export_reader import read_columns, read_manifest
from data_prep.readers import Rejected, VoteReader
from data_prep.tables import CsvTable, keyed_rows, open_table

_NAMES = ("id", *PROBABILITY_COLUMNS)
_ENOUGH = 20  # rows of a real arena are never all certain
_NO_TRUTH = "--truth is the truth.csv of a synthetic arena; leave it out for votes of people"
_OF_THESE = "give the truth.csv that was made with these votes, or leave --truth out"
_NOT_SOFT = "--soft takes a table as `run.py score` writes them: id,winner_model_a,winner_model_b,winner_tie"
# Of a stage's tables these are of battles that it did not train on.
_HELD_OUT = "probabilities_valid.csv"


def read_truth_ids(path: Path) -> Collection[str]:
    """Return the ids of a truth.csv. Raises ArenaError unless it is a plain CSV of three probabilities an id."""
    found = read_distributions(path, _NO_TRUTH)
    if len(found) >= _ENOUGH and all(max(each) == 1 for each in found.values()):
        what = "holds verdicts (each row one 1 and two 0), not probabilities: the best possible would be perfect"
        raise ArenaError(what, where=str(path), remedy=_NO_TRUTH)
    return found.keys()


def read_distributions(path: Path, remedy: str) -> dict[str, Shares]:
    """Return the three probabilities of each id of a plain CSV; raises ArenaError, with `remedy`, for other rows."""
    table = open_table(path)
    if not isinstance(table, CsvTable) or table.compressed:
        raise ArenaError("is no plain CSV file", where=str(path), remedy=remedy)
    rows: dict[str, int] = {}
    found = {}
    for number, identity, cells in keyed_rows(path, _NAMES, remedy):
        where = f"{path} row {number}"
        if not _is_distribution(cells[1:]):
            raise ArenaError("holds no three probabilities", where=where, remedy=remedy)
        if identity is None:
            raise ArenaError("has no id", where=where, remedy=remedy)
        if (first := rows.setdefault(identity, number)) != number:
            what = f"the id {name_of(identity)} is in row {first} and again in row {number}"
            raise ArenaError(what, where=where, remedy="keep one of the two rows")
        values = tuple(float(cell) for cell in cells[1:])
        found[identity] = tuple(value / sum(values) for value in values)
    return found


def require_truth_of(rows: Path, known: Collection[str], where: Path) -> None:
    """Raise ArenaError where a battle of the first source in a rows.parquet is not among the `known` ids."""
    battles, missing, first = 0, 0, None
    with ParquetFile(rows) as file:
        for batch in file.iter_batches(columns=["source", "id"], use_threads=False):
            sources, ids = (batch.column(name).to_pylist() for name in ("source", "id"))
            judged = [identity for source, identity in zip(sources, ids, strict=True) if source == "train"]
            absent = [identity for identity in judged if identity not in known]
            battles, missing = battles + len(judged), missing + len(absent)
            first = first or next(iter(absent), None)
    if first is not None:
        raise ArenaError(
            f"has no true probabilities of {missing:,} of the {battles:,} battles, the first id is {name_of(first)}",
            where=str(where),
            remedy=_OF_THESE,
        )


def probabilities_of(truth: pd.DataFrame, ids: Sequence[str], where: str = "truth.csv") -> np.ndarray:
    """Return the true probabilities [ids, 3] of some battles; `truth` has `id` and `PROBABILITY_COLUMNS`.

    Raises ArenaError where one of them has none, or two.
    """
    known = truth.set_index(truth["id"].astype(str))
    counts = known.index.value_counts()
    if wrong := [name for name in ids if counts.get(name) != 1]:
        what = f"{len(wrong)} judged row(s) have no true probabilities or two, the first id is {name_of(wrong[0])}"
        raise ArenaError(what, where=where, remedy="prepare again with the truth.csv that was made with these votes")
    return known.loc[list(ids), list(PROBABILITY_COLUMNS)].to_numpy(float)


def _is_distribution(cells: Sequence[object]) -> bool:
    try:
        values = [float(cell) for cell in cells]
    except (TypeError, ValueError):
        return False
    return all(0 <= value <= 1 for value in values) and abs(sum(values) - 1) < 1e-3


@dataclass(frozen=True)
class Soft:
    """A table of soft labels, and their share beside a battle's own verdict."""

    path: Path
    share: float = 1.0


class Teacher:
    """The soft labels of one table, mixed into the battles that they belong to."""

    def __init__(self, soft: Soft):
        """Read the table; raises ArenaError for rows that are no distributions, or that a teacher was trained on."""
        self._path, self._share = soft.path, soft.share
        self._shares, self._used = read_distributions(soft.path, _NOT_SOFT), set()
        self.softened = 0  # battles
        _require_unseen(soft.path, self._shares.keys())

    def soften(self, reader: VoteReader, battles: Iterable[tuple[int, Battle]]) -> Iterator[Battle]:
        """Yield the battles with their soft labels; one with neither verdict nor soft label is rejected."""
        for row, battle in battles:
            name = battle.id if battle.id in self._shares else battle.id.split(":", 1)[-1]
            if (taught := self._shares.get(name)) is not None:
                self._used.add(name)
                self.softened += 1
                battle = mixed(battle, taught, self._share)
            if battle.verdict is None:
                reason = "has neither a verdict nor a soft label"
                reader.rejected.append(Rejected(str(reader.path), row, battle.id, reason))
                continue
            yield battle

    def require_used(self) -> None:
        """Raise ArenaError where the table has labels for battles that were not read."""
        if foreign := [row for row, name in enumerate(self._shares, 1) if name not in self._used]:
            first = name_of(list(self._shares)[foreign[0] - 1])
            raise ArenaError(
                f"has soft labels of {len(foreign):,} ids that are no battles of --train, the first is {first}",
                where=f"{self._path} row {foreign[0]}",
                remedy="give the battles with another --train, or remove these rows",
            )


def mixed(battle: Battle, taught: Shares, share: float) -> Battle:
    """Return the battle with `share` of a teacher's distribution and the rest of its own verdict, if it has one."""
    if battle.verdict is None:
        return replace(battle, shares=taught, verdict=VERDICTS[max(range(3), key=lambda place: taught[place])])
    own = battle.shares or tuple(float(name == battle.verdict) for name in VERDICTS)
    return replace(battle, shares=tuple(share * t + (1 - share) * o for t, o in zip(taught, own, strict=True)))


def drawn(battle: Battle, *key: object) -> Battle:
    """Return the battle with a verdict drawn from its shares by `key` and its id; itself where it has none."""
    if battle.shares is None:
        return battle
    return replace(battle, verdict=drawn_verdict(battle.shares, ":".join(map(str, (*key, battle.id)))))


def _require_unseen(path: Path, ids: Iterable[str]) -> None:
    """Raise ArenaError where a table in outputs/EXP/… is of battles that its judge was trained on.

    Such a judge knows their verdicts by heart: its probabilities teach nothing.
    """
    if not is_within(path, Path("outputs")) or path.name == _HELD_OUT:
        return
    name = path.resolve().relative_to(Path("outputs").resolve()).parts[0]
    folder = Path("data") / name
    if not folder.is_dir():
        return
    read_manifest(folder)
    rows = read_columns(folder / "rows.parquet", ["id", "split"]).to_pydict()
    trained = {i for i, split in zip(rows["id"], rows["split"], strict=True) if split not in ("test", "valid")}
    if seen := [(row, name) for row, name in enumerate(ids, 1) if name in trained]:
        raise ArenaError(
            f"its judge was trained on {len(seen):,} of these battles, the first is {name_of(seen[0][1])}: it knows "
            "their verdicts",
            where=f"{path} row {seen[0][0]}",
            remedy=f"train with folds and give outputs/{name}/STAGE/{_HELD_OUT}, which is out-of-fold",
        )
