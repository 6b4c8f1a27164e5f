"""Where the probabilities of any table go: under a name that no result uses, and onto no file of anybody else's.

outputs/EXP/STAGE/scored/NAME.csv      unless another place is named
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.errors import UsageError
from scoring.probabilities import HEADER, holds_probabilities
from scoring.verify import REPORT, TABLES

if TYPE_CHECKING:
    from factory.experiment import Experiment

# A folder of its own: test.csv and valid.csv are the names of a result's own tables, and Kaggle's.
FOLDER = "scored"
_ENDING = re.compile(r"\.(csv\.gz|csv|parquet|zip)$", re.IGNORECASE)


def scored_file(experiment: Experiment, stage: str, source: str | Path) -> Path:
    """Return where the probabilities of a source (a file, a folder, a zip, hf://…) go if nobody says otherwise."""
    given = Path(source)
    name = given.name if given.name not in ("", "..") else given.resolve().name
    return experiment.output_folder(stage) / FOLDER / f"{_ENDING.sub('', name)}.csv"


def require_replaceable(output: Path, source: str | Path) -> None:
    """Raise UsageError where `output` cannot be written without destroying what is not an earlier output.

    An earlier output is told by its first line, which is that of a table of probabilities.
    """
    if output.name in TABLES and (output.parent / REPORT).is_file():
        raise _refused(output, "is the place of a finished result's own table")
    if output.exists():
        if _is_same(output, Path(source)):
            raise _refused(output, "is the input itself")
        if not output.is_file():
            raise _refused(output, "is there already, and is no file")
        if not holds_probabilities(output):
            raise _refused(
                output,
                f"is there already, and is not an earlier output of this command: it does not begin with "
                f"{','.join(HEADER)}",
            )
    above = next(folder for folder in output.absolute().parents if folder.exists())
    if not above.is_dir():
        raise _refused(output, f"cannot be made: {above} is no folder")


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
    return UsageError(what, where=str(output), remedy="name another path with --output; nothing was changed")
