"""Folds: which battles validate, so that no prompt is on both sides and each side has the same verdicts."""

from __future__ import annotations

import string
import unicodedata
from hashlib import blake2b

import numpy as np

from common.battle import Battle
from common.errors import ArenaError
from data_prep.sanitize import BREAK

# What becomes of a prompt of nothing, and of "(empty)", which is fed in its place.
_NOTHING = "empty"
_SLICE, _PIECE = 1 << 14, 1000


def normalise_prompt(text: str) -> str:
    """Return a prompt without what does not make it another: case, width, white space, punctuation at its ends.

    A prompt and the sanitized prompt (`data_prep.sanitize`) are equal: what is fed alike is in one group.
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
        remedy="add battles with other prompts, or change valid_share",
    )
