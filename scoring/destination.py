"""Where the probabilities of any table go: under a name that no result uses, and onto no file of anybody else's.

outputs/EXP/STAGE/scored/NAME.csv      unless another place is named
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

from common.errors import UsageError
from common.files import is_within, read_json, sha256_of, write_json
from common.lock import only_run
from common.screen import printable
from data_prep.export_reader import earlier_manifest
from scoring.checks.verify import REPORT, TABLES
from scoring.predictions import holds_probabilities

if TYPE_CHECKING:
    from common.experiment import Experiment

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
