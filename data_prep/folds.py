"""Folds: which battles validate, so that no prompt is on both sides and each side has the same verdicts."""

from __future__ import annotations

import string
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

from common.battle import Battle
from common.errors import ArenaError
from data_prep.sanitize import BREAK

if TYPE_CHECKING:
    import numpy as np

# Exactly the ASCII characters of Unicode's categories P and S, and the space.
_EDGES = string.punctuation + " "
# What becomes of a prompt of nothing, and of "(empty)", which is fed in its place.
_NOTHING = "empty"
_SLICE = 1 << 14
_PIECE = 1 << 16


def normalise_prompt(text: str) -> str:
    """Return a prompt without what does not make it another: case, width, white space, punctuation at its ends.

    Nor does it matter whether a prompt was made harmless (`data_prep.sanitize`): what is fed alike is in one group.
    """
    if text.isascii():
        text = " ".join(text.lower().split())
        return text.strip(_EDGES) or text or _NOTHING
    text = text.replace(BREAK, "")
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    text = " ".join(folded.split())
    start, end = 0, len(text)
    while start < end and _is_edge(text[start]):
        start += 1
    while end > start and _is_edge(text[end - 1]):
        end -= 1
    return text[start:end] or text or _NOTHING


def prompt_group(battle_or_prompt: Battle | str) -> str:
    """Return 16 hexadecimal digits that are equal for battles of the same normalised first prompt."""
    prompt = battle_or_prompt.prompts[0] if isinstance(battle_or_prompt, Battle) else battle_or_prompt
    return blake2b(normalise_prompt(prompt).encode(errors="surrogatepass"), digest_size=8).hexdigest()


def validation_rows(groups: Sequence[str], verdicts: Sequence[str], *, share: float, seed: int) -> list[bool]:
    """Say for each row whether it validates: whole groups, about `share` of all rows and of each verdict.

    The choice depends on seed, groups and verdicts, not on the order of the rows.
    Raises ArenaError when whole groups cannot come near the share.
    """
    import numpy as np

    if len(groups) != len(verdicts):
        raise ValueError(f"{len(groups)} groups for {len(verdicts)} verdicts")
    classes = {verdict: i for i, verdict in enumerate(sorted(set(verdicts), key=str))}
    kinds = np.fromiter((classes[verdict] for verdict in verdicts), dtype=np.int8, count=len(groups))
    names = sorted(set(groups))
    place = {name: i for i, name in enumerate(names)}
    rows = np.fromiter((place[group] for group in groups), dtype=np.int32, count=len(groups))
    return _validates(rows, names, kinds, len(classes), share, seed).tolist()


def validation_mask(groups: np.ndarray, kinds: np.ndarray, *, share: float, seed: int) -> np.ndarray:
    """Return `validation_rows` of millions of rows: groups as numbers (uint64, see `group_number`), kinds 0, 1, …

    At the peak it takes about 15 bytes a row and 50 bytes a group (measured on a million rows).
    """
    import numpy as np

    found = np.unique(groups)
    rows = np.empty(len(groups), dtype=np.int32)
    for part in _slices(len(rows)):
        rows[part] = np.searchsorted(found, groups[part])
    present = np.unique(kinds)
    names = (f"{number:016x}" for number in found.tolist())
    return _validates(rows, names, np.searchsorted(present, kinds).astype(np.int8), len(present), share, seed)


def group_number(group: str) -> int:
    """Return a group of `prompt_group` as an unsigned number of 64 bits."""
    return int(group, 16)


def _validates(
    rows: np.ndarray, names: Iterable[str], kinds: np.ndarray, classes: int, share: float, seed: int
) -> np.ndarray:
    """Return a mask: rows are places in the sorted `names`, kinds the verdicts' places."""
    import numpy as np

    if not 0 < share < 1:
        raise ArenaError(f"valid_share {share} is not between 0 and 1", remedy="set valid_share to 0.1, for example")
    order = _seeded_order(names, seed)
    place = np.empty(len(order), dtype=np.int32)
    place[order] = np.arange(len(order), dtype=np.int32)
    for part in _slices(len(rows)):
        rows[part] = place[rows[part]]
    del order, place
    counts = np.empty((int(rows.max(initial=-1)) + 1, classes), dtype=np.int32)
    for kind in range(classes):
        counts[:, kind] = np.bincount(rows[kinds == kind], minlength=len(counts))
    chosen = _refine(_choose(counts, share), counts, share)
    _check(chosen, counts.sum(axis=1), share)
    return chosen[rows]


def _slices(length: int) -> Iterator[slice]:
    """Yield the slices of an array that is worked on piece by piece, so that nothing of its size lies beside it."""
    return (slice(start, start + _PIECE) for start in range(0, length, _PIECE))


def _vectors(counts: np.ndarray) -> np.ndarray:
    """Return float [groups, classes + 1]: the groups' rows of each class, and of all."""
    import numpy as np

    return np.column_stack((counts, counts.sum(axis=1))).astype(np.float64)


def _is_edge(character: str) -> bool:
    return character == " " or unicodedata.category(character)[0] in "PS"


def _seeded_order(names: Iterable[str], seed: int) -> np.ndarray:
    """Return the places of the distinct groups in an order that only the seed and their names decide."""
    import numpy as np

    def key(name: str) -> int:
        return int.from_bytes(blake2b(f"{seed}:{name}".encode(errors="surrogatepass"), digest_size=8).digest(), "big")

    return np.argsort(np.fromiter((key(name) for name in names), dtype=np.uint64), kind="stable")


def _choose(counts: np.ndarray, share: float) -> np.ndarray:
    """Go through the groups, the large ones first, and take one whenever that keeps the classes closer to the share.

    counts: int [groups, classes]. scikit-learn's StratifiedGroupKFold gives whole folds only (1/2, 1/3, …) and needs
    20 s for 57,477 rows of 50,721 prompts; this needs half a second.
    """
    import numpy as np

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
    """Move single groups across as long as that brings classes and total closer to the share (least squares)."""
    chosen = chosen.copy()
    taken = counts[chosen].sum(axis=0, keepdims=True)
    off = (_vectors(taken) - share * _vectors(counts.sum(axis=0, keepdims=True)))[0]
    while len(counts) > 1:
        best, change = _best_move(chosen, counts, off)
        if change >= -1e-9 and chosen.any() and not chosen.all():
            break
        off += _vectors(counts[best : best + 1])[0] * (-1 if chosen[best] else 1)
        chosen[best] = not chosen[best]
    return chosen


def _best_move(chosen: np.ndarray, counts: np.ndarray, off: np.ndarray) -> tuple[int, float]:
    """Return the group whose move changes |off|² the most downwards, and that change: ±2 off·v + |v|²."""
    import numpy as np

    # neither side may become empty, and an empty one must be filled
    inside = int(chosen.sum())
    lone = True if inside == 1 else False if inside == len(chosen) - 1 else None
    found = []
    for part in _slices(len(counts)):
        change = np.zeros(len(chosen[part]))
        # Column by column: a matrix product rounds otherwise on other machines, and equal groups must come out equal.
        for vector, distance in zip(_vectors(counts[part]).T, off, strict=True):
            change += np.where(chosen[part], -2, 2) * (distance * vector) + vector**2
        if lone is not None:
            change[chosen[part] == lone] = np.inf
        best = int(change.argmin())
        found.append((float(change[best]), part.start + best))
    change, best = min(found)
    return best, change


def _check(chosen: np.ndarray, sizes: np.ndarray, share: float) -> None:
    """Refuse a split that is empty on one side or far from the share (a factor of two and a row)."""
    total, got = sizes.sum(), sizes[chosen].sum()
    smaller, asked = (got, share * total) if share <= 0.5 else (total - got, (1 - share) * total)
    if 0 < smaller < total and asked / 2 - 1 <= smaller <= 2 * asked + 1:
        return
    raise ArenaError(
        f"{len(sizes)} different prompt(s) in {total:.0f} rows (the most frequent one in {max(sizes, default=0):.0f}) "
        f"cannot be split whole into {share:.0%} for validation and the rest",
        remedy="add battles with other prompts, or change valid_share",
    )
