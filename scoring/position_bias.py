"""Calibrations by what was scored of a row: one order of the answers, or both.

The mean of two orders is less sharp than either, so a temperature that was fitted on one does not fit the other. Where
a time limit left some rows with one order only, each row goes through the calibration of its own kind.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from common.errors import ArenaError
from scoring.calibration import BA_COLUMNS, Calibration, calibrate, calibration_from_json, has_both_orders, kind_of

if TYPE_CHECKING:
    import pandas as pd

_KEY = "calibrations"


@dataclass(frozen=True)
class OrderCalibrations:
    """The calibration of rows with one order and that of rows with both; None where there is none (rewards: both)."""

    one: Calibration | None
    both: Calibration | None

    def apply(self, table: pd.DataFrame) -> np.ndarray:
        """Return the final probabilities [rows, 3] of a score table, row by row with the calibration of its kind."""
        both = _has_both(table)
        found = np.empty((len(table), 3))
        for rows, calibration in ((both, self.both), (~both, self.one)):
            if rows.any():
                found[rows] = _there(calibration).apply(table[rows])
        return found

    def require_one(self) -> None:
        """Raise ArenaError if rows with one order only could not be calibrated."""
        _there(self.one)

    def to_json(self) -> dict[str, Any]:
        """Return what the report keeps under "calibrations"."""
        pairs = {"one_order": self.one, "both_orders": self.both}
        return {name: each.to_json() if each else None for name, each in pairs.items()}


def fit_orders(valid: pd.DataFrame, used: Calibration, *, seed: int, target_prior: Mapping | None) -> OrderCalibrations:
    """Return both calibrations of a validation fold; `used` is the one that its report was made with."""
    if kind_of(valid) == "rewards":
        return OrderCalibrations(used, None)
    if not has_both_orders(valid):
        return OrderCalibrations(used, None)
    other = calibrate(
        valid,
        "logits",
        groups=valid["group"],
        verdicts=valid["verdict"],
        seed=seed,
        swap_tta=not used.swap_tta,
        target_prior=target_prior,
    )
    return OrderCalibrations(other, used) if used.swap_tta else OrderCalibrations(used, other)


def orders_of(report: Mapping[str, Any]) -> OrderCalibrations:
    """Return the calibrations of a report; one that an earlier version wrote has only that which it used."""
    used = calibration_from_json(report["calibration"])
    kept = report.get(_KEY) or {}
    named = {
        name: calibration_from_json(kept[name]) if kept.get(name) else None for name in ("one_order", "both_orders")
    }
    named["both_orders" if used.swap_tta else "one_order"] = used
    return OrderCalibrations(named["one_order"], named["both_orders"])


def _has_both(table: pd.DataFrame) -> np.ndarray:
    if not set(BA_COLUMNS) <= set(table.columns):
        return np.zeros(len(table), dtype=bool)
    return table[list(BA_COLUMNS)].notna().all(axis=1).to_numpy()


def _there(calibration: Calibration | None) -> Calibration:
    if calibration is None:
        raise ArenaError(
            "the report holds no calibration for rows with this number of orders",
            where="calibrations",
            remedy="score the stage again (run.py score --fresh), or without --time-limit",
        )
    return calibration
