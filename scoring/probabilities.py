"""Tables of class probabilities as the competition wants them.

id,winner_model_a,winner_model_b,winner_tie
136060,0.331812,0.358012,0.310176
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from data_prep.battle import PROBABILITY_COLUMNS
from data_prep.errors import ArenaError
from data_prep.files import atomic_file

HEADER = ("id", *PROBABILITY_COLUMNS)
# Rows must sum to 1 within this as written; nine significant digits keep them within 1.5e-9.
SUM_TOLERANCE = 1e-6
# Rounding of float32 sums stays far below this; what exceeds it is a fault and not rounding.
_INPUT_TOLERANCE = 1e-3


def write_probabilities(path: Path, ids: Iterable, probabilities: np.ndarray) -> None:
    """Write one row an id in the given order, whole or not at all; ids are text or integers and stay as they are.

    `probabilities` [rows, 3] in the order of `VERDICTS`.
    Raises ArenaError, with all faults together, for NaN, numbers outside 0..1, rows that do not sum to 1,
    ids that are floats, missing or not unique.
    """
    names, values = list(ids), np.asarray(probabilities, dtype=np.float64)
    if values.shape != (len(names), 3):
        raise ArenaError(f"{len(names)} ids but probabilities of shape {values.shape}", where=str(path), remedy=_AGAIN)
    faults = [*_id_faults(names), *_value_faults([str(name) for name in names], values, _INPUT_TOLERANCE)]
    _raise(faults, path)
    values = values / values.sum(axis=1, keepdims=True)
    with atomic_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows([name, *(f"{p:.9g}" for p in row)] for name, row in zip(names, values, strict=True))


def check_submission(path: Path, ids: Iterable) -> int:
    """Check a written table against the test set's ids in its order, and return the number of rows.

    Raises ArenaError, with all faults together: header, ids missing, unknown or out of order, NaN, sums.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            lines = list(csv.reader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArenaError(f"cannot be read: {error}", where=str(path), remedy=_AGAIN) from None
    if not lines or tuple(lines[0]) != HEADER:
        raise ArenaError(f"the header must be {','.join(HEADER)}", where=str(path), remedy=_AGAIN)
    rows, wanted = lines[1:], [str(name) for name in ids]
    short = [number for number, row in enumerate(rows, 2) if len(row) != len(HEADER)]
    if short:
        raise ArenaError(f"line {short[0]} has not {len(HEADER)} cells", where=str(path), remedy=_AGAIN)
    names = [row[0] for row in rows]
    values = np.array([[_number(cell) for cell in row[1:]] for row in rows]).reshape(-1, 3)
    _raise([*_order_faults(names, wanted), *_value_faults(names, values, SUM_TOLERANCE)], path)
    return len(rows)


_AGAIN = "score the stage again; please report it if it comes back"


def _number(cell: str) -> float:
    try:
        return float(cell)
    except ValueError:
        return float("nan")


def _id_faults(names: Sequence) -> list[str]:
    faults = []
    floats = [name for name in names if isinstance(name, (float, np.floating)) or name is None]
    if floats:
        faults.append(f"{len(floats)} id(s) are floats or missing ({_some(floats)}): read ids as text")
    elif len(set(names)) < len(names):
        seen: set = set()
        twice = [name for name in names if name in seen or seen.add(name)]
        faults.append(f"{len(twice)} id(s) occur twice: {_some(twice)}")
    return faults


def _order_faults(names: list[str], wanted: list[str]) -> list[str]:
    if names == wanted:
        return []
    missing, unknown = set(wanted) - set(names), set(names) - set(wanted)
    faults = []
    if missing:
        faults.append(f"{len(missing)} id(s) are missing: {_some(sorted(missing))}")
    if unknown:
        faults.append(f"{len(unknown)} id(s) are not in the test set: {_some(sorted(unknown))}")
    if len(names) != len(set(names)):
        faults.append("ids occur twice")
    return faults or ["the rows are not in the test set's order"]


def _value_faults(names: list[str], values: np.ndarray, tolerance: float) -> list[str]:
    with np.errstate(invalid="ignore"):
        outside = ((values < 0) | (values > 1 + tolerance)).any(axis=1)
        sums = np.abs(values.sum(axis=1) - 1) > tolerance
    kinds = {
        "NaN or infinite": ~np.isfinite(values).all(axis=1),
        "outside 0..1": outside,
        "not summing to 1": sums,
    }
    array = np.array(names, dtype=object)
    return [
        f"{broken.sum()} row(s) {what}: id {_some(array[broken])}" for what, broken in kinds.items() if broken.any()
    ]


def _some(names: Iterable) -> str:
    names = [str(name) for name in names]
    return ", ".join(names[:5]) + (" …" if len(names) > 5 else "")


def _raise(faults: list[str], path: Path) -> None:
    if faults:
        raise ArenaError("; ".join(faults), where=str(path), remedy=_AGAIN)
