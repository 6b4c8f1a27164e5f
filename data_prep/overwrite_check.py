"""The overwrite check: an export replaces its folder as a whole, so it stops where a file there is not its own.

check_overwrite(Path("data/demo"), ["votes.csv", None])    # ArenaError: holds 1 file(s) that no export wrote: notes.md
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from common.errors import ArenaError
from common.files import is_within, read_json
from data_prep.dataset_info import SET
from data_prep.export_reader import MANIFEST

# What exports of all versions wrote, for a manifest that is damaged or names nothing.
_WRITTEN = re.compile(
    rf"{SET}\.jsonl|(battles|pairs|rows)\.parquet|(dataset_info|audit|manifest)\.json"
    r"|judge_prompt\.j2|truth\.csv"
)
# What file managers leave in every folder that is opened.
_LITTER = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_NAMED = 5


def check_overwrite(
    folder: Path,
    inputs: Iterable[str | Path | None] = (),
    own: Callable[[str], object] | None = None,
    maker: str = "export",
) -> None:
    """Raise ArenaError where replacing a folder would delete one of the `inputs` or a file that `maker` did not write.

    `own` tells, by its path in the folder, whether `maker` wrote a file; without it the export's manifest tells.
    """
    for given in inputs:
        if given is not None and not str(given).startswith("hf://") and is_within(given, folder):
            raise ArenaError(
                f"lies in {folder}, and an export replaces this folder as a whole",
                where=str(given),
                remedy=f"move it to a place outside of {folder} and give its new path; nothing was changed",
            )
    if folder.exists() and not folder.is_dir():
        raise ArenaError(f"is a file, where the {maker} makes a folder", where=str(folder), remedy="move it away")
    own = own or _exported(folder)
    if foreign := sorted(name for name in _files(folder) if not own(name) and Path(name).name not in _LITTER):
        named = ", ".join(foreign[:_NAMED]) + (", …" if len(foreign) > _NAMED else "")
        raise ArenaError(
            f"holds {len(foreign)} file(s) that no {maker} wrote, and the {maker} replaces this folder as a whole: "
            f"{named}",
            where=str(folder),
            remedy=f"move what you want to keep to a place outside of {folder}, delete the rest, and give the same "
            "command again; nothing was changed",
        )


def _files(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, links to folders included, as paths in it."""
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*names, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def _exported(folder: Path) -> Callable[[str], object]:
    """Return the test whether an export wrote a file: its manifest names it.

    Where a manifest cannot be read, an export's usual names count; without one, or with another program's, no name.
    """
    try:
        manifest = read_json(folder / MANIFEST)
    except FileNotFoundError:
        return lambda _: False
    except (OSError, ValueError):
        return _WRITTEN.fullmatch
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        return lambda _: False
    files = manifest.get("files")
    return {*files, MANIFEST}.__contains__ if isinstance(files, dict) else _WRITTEN.fullmatch
