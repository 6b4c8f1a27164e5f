"""Seen ids: which ids of a table came before, at eight bytes an id; ids that only share a hash are told apart.

seen = SeenIds()
seen.add("30192", place)    # a set of suspects, empty as long as no hash came twice
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

# Ids that are compared one by one, with their texts; older ones are sorted hashes, compared a block at a time.
_BLOCK = 1 << 16


class SeenIds:
    """The ids of a table: repeats within a block are seen at once, others when the block is full."""

    def __init__(self, block: int = _BLOCK):
        self._size = block
        self._block: dict[str, int] = {}  # id to its number, of the newest ids
        self._hashes = array("q")  # of the same
        self._runs: list[np.ndarray] = []  # sorted hashes, the longest first
        self._count = 0

    def add(self, identity: str) -> set[int]:
        """Note an id; return the hashes that came twice, each a suspect: `hash_of` tells which ids have them."""
        if self._block.setdefault(identity, self._count) != self._count:
            return {hash_of(identity)}
        self._hashes.append(hash_of(identity))
        self._count += 1
        return self.check() if len(self._block) >= self._size else set()

    def check(self) -> set[int]:
        """Compare the newest ids with all others; to be called once more at the table's end."""
        import numpy as np

        run = np.sort(np.frombuffer(self._hashes, dtype=np.int64)) if self._hashes else np.empty(0, np.int64)
        self._block, self._hashes = {}, array("q")
        suspects = set(run[1:][run[1:] == run[:-1]].tolist())
        for older in self._runs:
            places = np.searchsorted(older, run)
            found = older[np.minimum(places, len(older) - 1)] == run
            suspects.update(run[found].tolist())
        self._keep(run)
        return suspects

    def _keep(self, run: np.ndarray) -> None:
        """Merge runs of like length, so that there are few of them and each hash is merged few times."""
        import numpy as np

        while self._runs and len(self._runs[-1]) <= 2 * len(run):
            run = np.concatenate([self._runs.pop(), run])
            run.sort(kind="stable")  # two sorted runs: a merge
        if len(run):
            self._runs.append(run)


def hash_of(identity: str) -> int:
    """Return the 64-bit hash by which ids are compared first (of this process only)."""
    return hash(identity)


def first_repeat(ids: Iterator[tuple[str, object]], suspects: set[int]) -> tuple[str, object, object] | None:
    """Return (id, its first place, its second) of the first id that really comes twice, None for mere collisions."""
    places: dict[str, object] = {}
    for identity, place in ids:
        if hash_of(identity) in suspects:
            if identity in places:
                return identity, places[identity], place
            places[identity] = place
    return None
