"""Tables of class probabilities as the competition wants them.

id,winner_model_a,winner_model_b,winner_tie
136060,0.331812,0.358012,0.310176
"""

from __future__ import annotations

import csv
import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.battle import PROBABILITY_COLUMNS
from common.console import name_of, printable
from common.errors import ArenaError, UsageError
from common.files import atomic_file, is_within, only_run, read_json, sha256_of, write_json
from data_prep.export_reader import earlier_manifest

if TYPE_CHECKING:
    from common.experiment import Experiment

REPORT = "report.json"
# The tables of a stage and the split whose ids each must hold.
TABLES = {"probabilities_valid.csv": "valid", "probabilities_test.csv": "test", "submission.csv": "test"}
HEADER = ("id", *PROBABILITY_COLUMNS)
# Rows must sum to 1 within this as written; nine significant digits keep them within 1.5e-9.
SUM_TOLERANCE = 1e-6
# Rounding of float32 sums stays far below this; what exceeds it is a fault and not rounding.
_INPUT_TOLERANCE = 1e-3
_CHUNK = 8192


def write_probabilities(path: Path, ids: Iterable, probabilities: np.ndarray) -> None:
    """Write one row an id in the given order, whole or not at all; ids are text or integers and stay as they are.

    `probabilities` [rows, 3] in the order of `VERDICTS`.
    Raises ArenaError, with all faults together, for NaN, numbers outside 0..1, rows that do not sum to 1,
    ids that are floats, missing or not unique.
    """
    with probability_file(path) as add:
        add(ids, probabilities)


@contextmanager
def probability_file(path: Path) -> Iterator[Callable[[Iterable, np.ndarray], None]]:
    """Yield a function that adds rows as `write_probabilities` does; the file is there, whole, when the block ends.

    Rows that are added together are checked together, also for ids that occur twice.
    """
    with atomic_file(path) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)

        def add(ids: Iterable, probabilities: np.ndarray) -> None:
            names, values = list(ids), np.asarray(probabilities, dtype=np.float64)
            if values.shape != (len(names), 3):
                what = f"{len(names)} ids but probabilities of shape {values.shape}"
                raise ArenaError(what, where=str(path), remedy=_AGAIN)
            _raise([*_id_faults(names), *_value_faults([str(n) for n in names], values, _INPUT_TOLERANCE)], path)
            values = values / values.sum(axis=1, keepdims=True)
            writer.writerows([name, *(f"{p:.9g}" for p in row)] for name, row in zip(names, values, strict=True))

        yield add


def holds_probabilities(path: Path) -> bool:
    """Tell whether a file begins as the tables that are written here do."""
    first = (",".join(HEADER) + "\n").encode()
    try:
        with path.open("rb") as file:
            return file.read(len(first)) == first
    except OSError:
        return False


def check_submission(path: Path, ids: Iterable) -> int:
    """Check a written table against the test set's ids in its order, and return the number of rows.

    Raises ArenaError, with all faults together: header, ids missing, unknown or out of order, NaN, sums.
    The table is read in pieces; `ids` is gone through once more only where the order is not the wanted one.
    """
    wanted, rows = map(str, ids), 0
    order: list[str] | None = None
    faults: list[str] = []
    for names, values in _chunks(path):
        faults += _value_faults(names, values, SUM_TOLERANCE)
        expected = list(islice(wanted, len(names)))
        if order is None and names != expected:
            order = _whole_order_faults(path, rows, [*expected, *wanted])
        rows += len(names)
    if order is None and (missing := list(wanted)):
        order = _whole_order_faults(path, rows, missing)
    _raise([*(order or []), *faults], path)
    return rows


def _whole_order_faults(path: Path, same: int, wanted: list[str]) -> list[str]:
    """Compare all ids of a table, of which the first `same` are as wanted, with these and the `wanted` after them."""
    names = [name for names, _ in _chunks(path) for name in names]
    return _order_faults(names, [*names[:same], *wanted])


def _chunks(path: Path) -> Iterator[tuple[list[str], np.ndarray]]:
    """Yield (ids, probabilities [rows, 3]) of some thousand lines of a table at a time."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            reader = csv.reader(file)
            if tuple(next(reader, ())) != HEADER:
                raise ArenaError(f"the header must be {','.join(HEADER)}", where=str(path), remedy=_AGAIN)
            line = 1
            while rows := list(islice(reader, _CHUNK)):
                short = [number for number, row in enumerate(rows, line + 1) if len(row) != len(HEADER)]
                if short:
                    what = f"line {short[0]} has not {len(HEADER)} cells"
                    raise ArenaError(what, where=str(path), remedy=_AGAIN)
                line += len(rows)
                yield [row[0] for row in rows], np.array([[_number(cell) for cell in row[1:]] for row in rows])
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ArenaError(f"cannot be read: {error}", where=str(path), remedy=_AGAIN) from None


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
    names = list(names)
    return ", ".join(map(name_of, names[:5])) + (" …" if len(names) > 5 else "")


def _raise(faults: list[str], path: Path) -> None:
    if faults:
        raise ArenaError("; ".join(faults), where=str(path), remedy=_AGAIN)


# A folder of its own: test.csv and valid.csv are the names of a result's own tables, and Kaggle's.
FOLDER = "scored"
DATA = Path("data")
# What all stages wrote with --output, by content.
RECORD = Path("outputs") / "scored.json"
_ENDING = re.compile(r"\.(csv\.gz|csv|parquet|zip)$", re.IGNORECASE)


def scored_file(experiment: Experiment, stage: str, source: str | Path) -> Path:
    """Return where the probabilities of a source (a file, a folder, a zip, hf://…) go if nobody says otherwise."""
    given = Path(source)
    name = given.name if given.name not in ("", "..") else given.resolve().name
    return experiment.output_folder(stage) / FOLDER / f"{_ENDING.sub('', name)}.csv"


def require_replaceable(output: Path, source: str | Path, experiment: Experiment) -> None:
    """Raise UsageError where `output` cannot be written without destroying what is not an earlier output.

    Kaggle's sample submission and an arena's truth begin as our tables do. So an earlier output is told by its content,
    which `record_output` wrote down, or by its place in a stage's own folder for them.
    """
    if output.name in TABLES and (output.parent / REPORT).is_file():
        raise _refused(output, "is the place of a finished result's own table")
    if output.exists():
        if _is_same(output, Path(source)):
            raise _refused(output, "is the input itself")
        if not output.is_file():
            raise _refused(output, "is there already, and is no file")
    if is_within(output, DATA):
        raise _refused(output, f"lies in {DATA}/, which holds what is read, and is no place for results")
    for table in _tables_of(experiment):
        if any(is_within(place, table) and is_within(table, place) for place in (output, output.parent)):
            raise _refused(output, f"is a place of {table}, which {experiment.name} was prepared from")
    if output.exists() and not _is_earlier(output):
        raise _refused(output, f"is there already, and is not an earlier output of this command, as {RECORD} knows it")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise _refused(output, f"cannot be made: {above} is no folder")


def record_output(output: Path) -> None:
    """Write down what was made, so that a later call may replace it as long as nobody has changed it."""
    name = printable(str(output))  # which any name of a file may not be in UTF-8
    with only_run(RECORD, wait=lambda _: None):  # another run has it for a moment
        others = {digest: place for digest, place in _recorded().items() if place != name}
        write_json(RECORD, {**others, sha256_of(output): name})


def _recorded() -> dict[str, str]:
    """Return the SHA-256 of every output with its place, newest last; none where there is no such list."""
    try:
        recorded = read_json(RECORD)
    except (OSError, ValueError):
        return {}
    return recorded if isinstance(recorded, dict) else {}


def _is_earlier(output: Path) -> bool:
    if not holds_probabilities(output):
        return False
    place = Path(os.path.realpath(output))
    outputs = Path(os.path.realpath(RECORD.parent))
    in_our_folder = place.is_relative_to(outputs) and place.relative_to(outputs).parts[2:-1] == (FOLDER,)
    return in_our_folder or sha256_of(output) in _recorded()


def _tables_of(experiment: Experiment) -> list[Path]:
    """Return the tables that an experiment's export was made from."""
    manifest = earlier_manifest(experiment.data_folder) or {"sources": {}}
    return [Path(source["file"]) for source in manifest["sources"].values()]


def require_outside(output: Path, table: Path) -> None:
    """Raise UsageError where `output` would be one more part of the folder of parts that is read."""
    if table.is_dir() and output.resolve().is_relative_to(table.resolve()):
        raise _refused(output, f"lies in the folder that is read ({table}), and would be a part of it the next time")


def _is_same(output: Path, source: Path) -> bool:
    try:
        return output.samefile(source)
    except OSError:  # an address on the hub, or a file that is not there: told by whoever reads it
        return False


def _refused(output: Path, what: str) -> UsageError:
    return UsageError(
        what, where=str(output), remedy="name another path with --output, or move it away; nothing was changed"
    )
