"""Soft labels: distributions over the verdicts, of teachers or of several voters, and the labels drawn from them.

prepare --soft FILE reads id,winner_model_a,winner_model_b,winner_tie for some battles of --train. LLaMA-Factory trains
on labels: for every battle, order and epoch one is drawn. Its expected gradient is that of the soft cross-entropy.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from common.battle import VERDICTS, Battle
from common.console import name_of
from common.errors import ArenaError
from common.files import is_within
from data_prep.cells import drawn_verdict
from data_prep.export_reader import read_columns, read_manifest
from data_prep.ground_truth import read_distributions
from data_prep.readers import Rejected, VoteReader

Shares = tuple[float, float, float]
_REMEDY = "--soft takes a table as `run.py score` writes them: id,winner_model_a,winner_model_b,winner_tie"
# Of a stage's tables these are of battles that it did not train on.
_HELD_OUT = "probabilities_valid.csv"


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
        self._shares, self._used = read_distributions(soft.path, _REMEDY), set()
        _require_unseen(soft.path, self._shares.keys())

    def soften(self, reader: VoteReader, battles: Iterable[tuple[int, Battle]]) -> Iterator[Battle]:
        """Yield the battles with their soft labels; one with neither verdict nor soft label is rejected."""
        for row, battle in battles:
            name = battle.id if battle.id in self._shares else battle.id.split(":", 1)[-1]
            if (taught := self._shares.get(name)) is not None:
                self._used.add(name)
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
            f"its judge was trained on {len(seen):,} of these battles, the first is {name_of(seen[0][1])}: it teaches "
            "back what it was told",
            where=f"{path} row {seen[0][0]}",
            remedy=f"train with folds and give outputs/{name}/STAGE/{_HELD_OUT}, which is out-of-fold",
        )
