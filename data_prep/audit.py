"""Tallies: what fitting cost, counted battle by battle, batch by batch, for the audit."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from data_prep.truncation import Fitted

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
