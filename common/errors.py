"""The errors that a user may see: what is wrong, where, and what to do about it."""

from __future__ import annotations

from common.screen import printable


class ArenaError(Exception):
    """A fault in the work, told in three parts: what, where (file, row, key) and the remedy."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None):
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(str(self))

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return printable(f"{head}\n  remedy: {self.remedy}" if self.remedy else head)


class UsageError(ArenaError):
    """The command was called wrongly: an unknown experiment, an option that does not fit."""

    exit_code = 2


class Interrupted(ArenaError):
    """Somebody ended the work: nothing is wrong with it."""
