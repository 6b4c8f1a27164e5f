"""Folds: which battles validate, so that no prompt is on both sides and each side has the same verdicts."""

from __future__ import annotations

import string
import unicodedata
from hashlib import blake2b
from pathlib import Path

import numpy as np

from common.battle import VERDICTS, Battle
from common.console import name_of
from common.errors import ArenaError
from common.experiment import Experiment
from common.stages import fold_name
from data_prep.prompt import BREAK
from data_prep.tables import keyed_rows

# The normal form of an empty prompt, and of "(empty)", which the judge reads instead.
_NOTHING = "empty"
_SLICE, _PIECE = 1 << 14, 1000
# The split of rows that no set holds: of another source than the first, with a prompt that validates; or not drawn.
LEFT_OUT = "left_out"
_BESIDE = "_beside"  # behind a fold's name: rows of further sources that are trained on with it


def normalise_prompt(text: str) -> str:
    """Return a prompt without what does not make it another: case, width, white space, punctuation at its ends.

    A prompt and the sanitized prompt (`data_prep.prompt`) are equal: what is fed alike is in one group.
    """
    if text.isascii():
        text = " ".join(text.lower().split())
        return text.strip(string.punctuation + " ") or text or _NOTHING
    folded = _compatible(_compatible(text.replace(BREAK, "")).casefold())
    text = " ".join(folded.split())
    # Unicode's categories P and S, of which string.punctuation holds exactly the ASCII characters.
    edges = [character for character in set(text) if character == " " or unicodedata.category(character)[0] in "PS"]
    return text.strip("".join(edges)) or text or _NOTHING


def _compatible(text: str) -> str:
    """Return the text in NFKC, in pieces: thousands of marks on one letter take quadratic time."""
    return "".join(unicodedata.normalize("NFKC", text[i : i + _PIECE]) for i in range(0, len(text), _PIECE))


def prompt_group(battle_or_prompt: Battle | str) -> str:
    """Return 16 hexadecimal digits that are equal for battles of the same normalised first prompt."""
    prompt = battle_or_prompt.prompts[0] if isinstance(battle_or_prompt, Battle) else battle_or_prompt
    return blake2b(normalise_prompt(prompt).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def group_number(group: str) -> int:
    """Return a group of `prompt_group` as an unsigned number of 64 bits."""
    return int(group, 16)


def validation_mask(groups: np.ndarray, kinds: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Return a mask of the rows that validate: whole groups, about `share` of all rows and of each kind of verdict.

    `groups` are numbers (uint64, see `group_number`), `kinds` small integers. The choice depends on seed, groups and
    kinds, not on the order of the rows. Raises ArenaError when whole groups cannot come near the share.
    """
    if len(groups) != len(kinds):
        raise ValueError(f"{len(groups)} groups for {len(kinds)} verdicts")
    if not 0 < share < 1:
        raise ArenaError(f"valid_share {share} is not between 0 and 1", remedy="set valid_share to 0.1, for example")
    numbers, rows = np.unique(groups, return_inverse=True)
    order = _seeded_order(numbers, seed)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    rows = place[rows]
    present, kinds = np.unique(kinds, return_inverse=True)
    counts = np.bincount(rows * len(present) + kinds, minlength=len(order) * len(present))
    counts = counts.reshape(len(order), len(present))
    chosen = _refine(_choose(counts, share), counts, share)
    _check(chosen, counts.sum(axis=1), share)
    return chosen[rows]


def fold_numbers(groups: np.ndarray, kinds: np.ndarray, *, folds: int, seed: int) -> np.ndarray:
    """Return each row's fold, 0 to folds - 1: whole groups, each fold about alike in size and verdicts.

    Arguments and errors are those of `validation_mask`, which draws one fold after the other from the rows left.
    """
    numbers, left = np.full(len(groups), folds - 1), np.arange(len(groups))
    for fold in range(folds - 1):
        chosen = validation_mask(groups[left], kinds[left], share=1 / (folds - fold), seed=seed)
        numbers[left[chosen]] = fold
        left = left[~chosen]
    return numbers


def splits_of(
    experiment: Experiment, groups: np.ndarray, kinds: np.ndarray, given: np.ndarray | None = None, where: str = "folds"
) -> np.ndarray:
    """Return the split of each row that was voted on: train or valid, or the fold that it is judged in.

    `given` are the folds of the user's table `where`. Raises ArenaError as `validation_mask` does, and
    where a fold lacks a class that another one has.
    """
    if experiment.folds == 1:
        mask = validation_mask(groups, kinds, share=experiment.valid_share, seed=experiment.seed)
        return np.where(mask, "valid", "train")
    numbers = given
    if numbers is None:
        numbers = fold_numbers(groups, kinds, folds=experiment.folds, seed=experiment.seed)
    for kind in np.unique(kinds):
        if lacking := set(range(experiment.folds)) - set(numbers[kinds == kind].tolist()):
            raise ArenaError(
                f"fold {min(lacking)} has no battle with the verdict {VERDICTS[kind]}",
                where=where,
                remedy="give it battles with this verdict, or set folds to a lower number in experiment.yaml",
            )
    return np.array([fold_name(number) for number in numbers.tolist()])


def splits_beside(experiment: Experiment, splits: np.ndarray, own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the split of each row of further sources, `other` their groups; `splits` and `own` are of the first.

    They train only: in the fold of their prompt beside the rows that are judged there, or not where it validates.
    """
    known = dict(zip(own.tolist(), splits.tolist(), strict=True))
    if experiment.folds == 1:
        return np.array([LEFT_OUT if known.get(group) == "valid" else "train" for group in other.tolist()], str)
    drawn = ((group, fold_name(group % experiment.folds)) for group in other.tolist())
    return np.array([f"{known.get(group, fold)}{_BESIDE}" for group, fold in drawn], str)


def trained_with(part: str) -> list[str]:
    """Return the splits whose rows are in one data set: those that are judged, and those of further sources."""
    return [part, f"{part}{_BESIDE}"]


class GivenFolds(dict[str, int]):
    """The fold of each id, from the user's table."""

    def __init__(self, path: Path):
        super().__init__()
        self.path = str(path)

    def __missing__(self, identity: str) -> int:
        what, remedy = f"has no fold for the battle {name_of(identity)}", "give each battle of --train one"
        raise ArenaError(what, where=self.path, remedy=remedy)


def read_folds(path: Path, folds: int) -> GivenFolds:
    """Return the fold of each id of a table (columns id, fold) whose folds are 0 to folds - 1; raises ArenaError."""
    found = GivenFolds(path)
    for number, identity, cells in keyed_rows(path, ("id", "fold"), "give a table with the columns id and fold"):
        fold = "" if identity is None else str(cells[1]).strip()
        if not fold.isdecimal() or len(fold) > 9 or int(fold) >= folds:
            what = f"holds no id with a fold from 0 to {folds - 1} (folds: {folds} in experiment.yaml)"
            raise ArenaError(what, where=f"{path} row {number}", remedy="write the fold's number, or change folds")
        if found.setdefault(identity, int(fold)) != int(fold):
            what = f"the id {name_of(identity)} is in two folds"
            raise ArenaError(what, where=f"{path} row {number}", remedy="keep one of its rows")
    if unused := sorted(set(range(folds)) - set(found.values())):
        remedy = "change folds in experiment.yaml"
        raise ArenaError(f"has no battle in fold {unused[0]}", where=str(path), remedy=remedy)
    return found


def read_ids(path: Path) -> frozenset[str]:
    """Return the ids of a table with a column id; raises ArenaError where it has none."""
    rows = keyed_rows(path, ("id",), "give a table with a column id")
    return frozenset(identity for _, identity, _ in rows if identity is not None)


def _seeded_order(numbers: np.ndarray, seed: int) -> np.ndarray:
    """Return the places of the distinct groups in an order that only the seed and the groups decide."""
    keys = (blake2b(f"{seed}:{number:016x}".encode(), digest_size=8).digest() for number in numbers.tolist())
    return np.argsort(np.fromiter((int.from_bytes(key, "big") for key in keys), dtype=np.uint64), kind="stable")


def _vectors(counts: np.ndarray) -> np.ndarray:
    """Return float [groups, kinds + 1]: the groups' rows of each kind, and of all."""
    return np.column_stack((counts, counts.sum(axis=1))).astype(np.float64)


def _choose(counts: np.ndarray, share: float) -> np.ndarray:
    """Go through the groups, the large ones first, and take one whenever that keeps the kinds closer to the share.

    counts: int [groups, kinds]. scikit-learn's StratifiedGroupKFold gives whole folds only (1/2, 1/3, …) and needs
    20 s for 57,477 rows of 50,721 prompts; this needs half a second.
    """
    # Sizes in powers of two: within one of them the seeded order rules, so that each seed gives other groups.
    order = np.argsort(-np.frexp(counts.sum(axis=1))[1], kind="stable")
    chosen = np.zeros(len(counts), dtype=bool)
    off = [0.0] * (counts.shape[1] + 1)  # validation rows taken so far, less the share of the rows seen so far
    for start in range(0, len(order), _SLICE):  # as lists, which the loop reads faster, a slice at a time
        part = order[start : start + _SLICE]
        vectors = _vectors(counts[part])
        thresholds = ((share - 0.5) * (vectors**2).sum(axis=1)).tolist()
        for i, vector, threshold in zip(part.tolist(), vectors.tolist(), thresholds, strict=True):
            # |off + (1 - share) v|² < |off - share v|²
            take = sum([o * v for o, v in zip(off, vector, strict=True)]) < threshold
            weight = take - share
            off = [o + weight * v for o, v in zip(off, vector, strict=True)]
            chosen[i] = take
    return chosen


def _refine(chosen: np.ndarray, counts: np.ndarray, share: float) -> np.ndarray:
    """Move single groups across as long as that brings kinds and total closer to the share (least squares)."""
    chosen, vectors = chosen.copy(), _vectors(counts)
    off = vectors[chosen].sum(axis=0) - share * vectors.sum(axis=0)
    while len(counts) > 1:
        # A move changes |off|² by ±2 off·v + |v|². Column by column: a matrix product rounds otherwise on other
        # machines, and equal groups must come out equal.
        change = np.zeros(len(chosen))
        for vector, distance in zip(vectors.T, off, strict=True):
            change += np.where(chosen, -2, 2) * (distance * vector) + vector**2
        # Neither side may become empty, and an empty one must be filled.
        inside = int(chosen.sum())
        if inside in (1, len(chosen) - 1):
            change[chosen == (inside == 1)] = np.inf
        best = int(change.argmin())
        if change[best] >= -1e-9 and 0 < inside < len(chosen):
            break
        off += vectors[best] * (-1 if chosen[best] else 1)
        chosen[best] = not chosen[best]
    return chosen


def _check(chosen: np.ndarray, sizes: np.ndarray, share: float) -> None:
    """Refuse a split that is empty on one side or far from the share (a factor of two and a row)."""
    total, got = sizes.sum(), sizes[chosen].sum()
    smaller, wanted = (got, share * total) if share <= 0.5 else (total - got, (1 - share) * total)
    if 0 < smaller < total and wanted / 2 - 1 <= smaller <= 2 * wanted + 1:
        return
    raise ArenaError(
        f"{len(sizes)} different prompt(s) in {total:.0f} rows (the most frequent one in {max(sizes, default=0):.0f}) "
        f"cannot be split whole into {share:.0%} for validation and the rest",
        remedy="add battles with other prompts, or change valid_share (or folds)",
    )
