"""Tables of class probabilities as the competition wants them, and where one may be written.

id,winner_model_a,winner_model_b,winner_tie
136060,0.331812,0.358012,0.310176

For a test set of the WSDM Cup the submission is `id,winner` with model_a or model_b, and probabilities lie beside it.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow.csv import ConvertOptions, ParseOptions, read_csv

from common.battle import PROBABILITY_COLUMNS, VERDICTS
from common.console import name_of, printable
from common.errors import ArenaError, UsageError
from common.experiment import Experiment
from common.files import atomic_file, csv_line, is_within, sha256_of
from data_prep.export_reader import earlier_manifest
from scoring.calibration import Calibration

REPORT = "report.json"
HEADER = ("id", *PROBABILITY_COLUMNS)
WINNER_HEADER, _WINNERS = ("id", "winner"), ("model_a", "model_b")
# Rows must sum to 1 within this as written; nine significant digits keep them within 1.5e-9.
SUM_TOLERANCE = 1e-6
# Rounding of float32 sums stays far below this; larger differences are faults.
_INPUT_TOLERANCE = 1e-3
_AGAIN = "score the stage again; please report it if it comes back"
# A folder of its own: test.csv and valid.csv are the names of a result's own tables, and Kaggle's.
FOLDER = "scored"
DATA = Path("data")
# What all stages wrote with --output, by content: lines as sha256sum writes them.
RECORD = Path("outputs") / "scored.sha256"
# Where under outputs/ scored_file names them: EXP/STAGE/scored/NAME, of a fold EXP/STAGE/fold0/scored/NAME.
_SCORED = re.compile(rf"[^/]+/[^/]+/(?:(?:fold\d+|full)/)?{FOLDER}/[^/]+")
_ENDING = re.compile(r"\.(csv\.gz|csv|parquet|zip)$", re.IGNORECASE)


def write_probabilities(path: Path, ids: Iterable, probabilities: np.ndarray) -> None:
    """Write one row an id in the given order, whole or not at all; ids stay as they are.

    `probabilities` [rows, 3] in the order of `VERDICTS`.
    Raises ArenaError, with all faults together, for NaN, numbers outside 0..1, rows that do not sum to 1, and ids that
    are not unique.
    """
    with probability_file(path) as add:
        add(ids, probabilities)


@contextmanager
def probability_file(path: Path, *, winner: bool = False) -> Iterator[Callable[[Iterable, np.ndarray], None]]:
    """Yield a function that adds rows as `write_probabilities` does; the file is there, whole, when the block ends.

    With `winner` a row is id and the likelier of both answers. Rows that are added together are checked together, also
    for ids that occur twice.
    """
    with atomic_file(path) as file:
        file.write(csv_line(WINNER_HEADER if winner else HEADER))

        def add(ids: Iterable, probabilities: np.ndarray) -> None:
            names, values = [str(name) for name in ids], np.asarray(probabilities, dtype=np.float64)
            faults = _value_faults(names, values, _INPUT_TOLERANCE)
            if twice := sorted(name for name, times in Counter(names).items() if times > 1):
                faults.append(f"{len(twice)} id(s) occur twice: {_some(twice)}")
            _raise(faults, path)
            values = values / values.sum(axis=1, keepdims=True)
            for name, row in zip(names, values, strict=True):
                answer = [_WINNERS[int(row[1] > row[0])]] if winner else [f"{p:.9g}" for p in row]
                file.write(csv_line([name, *answer]))

        yield add


def check_submission(path: Path, ids: Iterable, *, winner: bool = False) -> int:
    """Check a written table as `read_probabilities` does, and return the number of rows."""
    if not winner:
        return len(read_probabilities(path, ids))
    table = _table(path, WINNER_HEADER, pa.string())
    known = [f"{WINNER_HEADER[1]} is not one of {', '.join(_WINNERS)}"]
    unknown = [] if set(table["winner"].to_pylist()) <= set(_WINNERS) else known
    _raise(_id_faults(table["id"].to_pylist(), ids) + unknown, path)
    return len(table)


def read_probabilities(path: Path, ids: Iterable) -> np.ndarray:
    """Return the probabilities [rows, 3] of a written table that must hold exactly these ids, in their order.

    Raises ArenaError, with all faults together: header, ids missing, unknown or out of order, NaN, sums.
    """
    names, values = read_table(path)
    _raise(_id_faults(names, ids) + _value_faults(names, values, SUM_TOLERANCE), path)
    return values


def read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """Return ids and probabilities [rows, 3] of a table, an empty cell as NaN; raises ArenaError for another table."""
    table = _table(path, HEADER, pa.float64())
    return table["id"].to_pylist(), np.column_stack([table[name].to_numpy() for name in PROBABILITY_COLUMNS])


def _id_faults(names: list[str], ids: Iterable) -> list[str]:
    if names == (wanted := [str(name) for name in ids]):
        return []
    missing, unknown = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
    found = [f"{len(missing)} id(s) are missing: {_some(missing)}"] if missing else []
    found += [f"{len(unknown)} id(s) are not among the exported: {_some(unknown)}"] if unknown else []
    return found or ["ids occur twice, or the rows are not in the export's order"]


def _table(path: Path, header: tuple[str, ...], kind: pa.DataType) -> pa.Table:
    """Return a table with this header: ids and values of a kind, null for an empty cell."""
    types = pa.schema([("id", pa.string()), *((name, kind) for name in header[1:])])
    try:
        table = read_csv(
            path,
            parse_options=ParseOptions(newlines_in_values=True, ignore_empty_lines=False),
            convert_options=ConvertOptions(column_types=types),
        )
        names = tuple(table.column_names)  # fails where they are not UTF-8
    except (OSError, ValueError) as error:  # Arrow's own errors are ValueErrors
        raise ArenaError(f"cannot be read: {error}", where=str(path), remedy=_AGAIN) from None
    if names != header:
        raise ArenaError(f"the header must be {','.join(header)}", where=str(path), remedy=_AGAIN)
    return table


def _value_faults(names: list[str], values: np.ndarray, tolerance: float) -> list[str]:
    with np.errstate(invalid="ignore"):
        kinds = {
            "NaN or infinite": ~np.isfinite(values).all(axis=1),
            "outside 0..1": ((values < 0) | (values > 1 + tolerance)).any(axis=1),
            "not summing to 1": np.abs(values.sum(axis=1) - 1) > tolerance,
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


@dataclass(frozen=True)
class Answers:
    """Ids and probabilities of rows, some thousand at a time with how many of them were cut (`pieces`), and of rows
    that could not be read: `unread` are the rows before each and its id, `prior` [3] is what they get in their place,
    for a submission that lacks an id is worth nothing."""

    pieces: Callable[[], Iterable[tuple[list[str], np.ndarray, int]]]
    unread: Sequence[tuple[int, str | None]]
    prior: np.ndarray

    @classmethod
    def of(cls, job: Any, calibration: Calibration, unread: Sequence, report: Mapping[str, Any]) -> Answers:
        """Return the answers to a job's rows; the prior is the declared one, else that of the training rows."""
        declared = calibration.used.target_prior
        prior = np.array([declared[name] for name in VERDICTS]) if declared else class_prior(report)

        def pieces() -> Iterator[tuple[list[str], np.ndarray, int]]:
            for table in job.tables():
                yield table["id"].tolist(), calibration.apply(table), int(table["cut"].sum())

        return cls(pieces, unread, prior)

    @cached_property
    def lines(self) -> list[tuple[int, str]]:
        """The unread rows whose id is known and not also that of another row."""
        seen = {name for names, *_ in self.pieces() for name in names} if self.unread else set()
        return [(at, name) for at, name in self.unread if not (name is None or name in seen or seen.add(name))]

    def write(self, path: Path, *, winner: bool = False) -> tuple[int, int]:
        """Write all in the table's order and check what was written; return how many rows, how many cut."""
        ids: list[str] = []
        first = cut = 0
        with probability_file(path, winner=winner) as add:
            for names, chances, shortened in self.pieces():
                here = [(at - first, name) for at, name in self.lines if first <= at < first + len(names)]
                first, cut = first + len(names), cut + shortened
                for at, name in reversed(here):
                    names.insert(at, name)
                add(names, np.insert(chances, [at for at, _ in here], self.prior, axis=0))
                ids += names
            if last := [name for at, name in self.lines if at >= first]:
                add(last, np.tile(self.prior, (len(last), 1)))
        return check_submission(path, ids + last, winner=winner), cut


def class_prior(report: Mapping[str, Any]) -> np.ndarray:
    """Return [3] the class shares of the training rows, as the baseline has them; the judge's own where unknown."""
    if counts := report.get("train_class_counts"):
        values = np.array([float(counts[name]) for name in VERDICTS]) + 1  # as scoring.links.smoothed_prior
        return values / values.sum()
    return np.array([report["calibration"]["source_prior"][name] for name in VERDICTS])


def scored_file(folder: Path, source: str | Path) -> Path:
    """Return where in a stage's or fold's folder the probabilities of a source (a file, hf://…) go without --output."""
    given = Path(source)
    name = given.name if given.name not in ("", "..") else given.resolve().name
    return folder / FOLDER / f"{_ENDING.sub('', name)}.csv"


def require_replaceable(output: Path, source: str | Path, experiment: Experiment) -> None:
    """Raise UsageError where writing `output` would destroy a file that is not an earlier output.

    Kaggle's sample submission and an arena's truth begin as our tables do. So an earlier output is recognised by its
    content, as `record_output` recorded it, or by its place in a stage's own folder for them.
    """
    if output.exists() and not output.is_file():
        raise _refused(output, "exists and is not a file")
    if Path(source).is_dir() and output.resolve().is_relative_to(Path(source).resolve()):
        raise _refused(output, f"lies in the folder that is read ({source}), and would be a part of it the next time")
    if is_within(output, DATA):
        raise _refused(output, f"lies in {DATA}/, which holds inputs and exports")
    manifest = earlier_manifest(experiment.data_folder) or {"sources": {}}
    for table in (Path(source["file"]) for source in manifest["sources"].values()):
        if any(is_within(place, table) and is_within(table, place) for place in (output, output.parent)):
            raise _refused(output, f"is a place of {table}, which {experiment.name} was prepared from")
    if output.exists() and not _is_earlier(output):
        raise _refused(output, f"exists and is not an earlier output of this command, by {RECORD}")
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise _refused(output, f"cannot be created: {above} is not a folder")


def record_output(output: Path) -> None:
    """Record the content of an output, so that a later call may replace it as long as it is unchanged."""
    RECORD.parent.mkdir(exist_ok=True)
    with RECORD.open("a", encoding="utf-8") as file:
        file.write(f"{sha256_of(output)}  {printable(str(output))}\n")  # a file's name need not be valid UTF-8


def _is_earlier(output: Path) -> bool:
    place, outputs = (Path(os.path.realpath(path)) for path in (output, RECORD.parent))
    if place.is_relative_to(outputs) and _SCORED.fullmatch(place.relative_to(outputs).as_posix()):
        return True
    return RECORD.is_file() and sha256_of(output) in RECORD.read_text(encoding="utf-8", errors="replace")


def _refused(output: Path, what: str) -> UsageError:
    remedy = "name another path with --output, or move it away; nothing was changed"
    return UsageError(what, where=str(output), remedy=remedy)
