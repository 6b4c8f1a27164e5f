"""Strangers: what an export is about to delete although no export made it, since it replaces its folder as a whole.

refuse_loss(Path("data/demo"), ["votes.csv", None])    # ArenaError: holds 1 file(s) that no export wrote: notes.md
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
    rf"{SET}(\.jsonl|/part-\d+\.jsonl)|(battles|pairs|rows)\.parquet|(dataset_info|audit|manifest)\.json"
    r"|judge_prompt\.j2|truth\.csv"
)
# What file managers leave in every folder that somebody looks at.
_NOBODYS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_NAMED = 5


def refuse_loss(folder: Path, inputs: Iterable[str | Path | None] = ()) -> None:
    """Raise ArenaError where replacing an export's folder would delete an input or any file that no export wrote."""
    for given in inputs:
        if given is not None and not str(given).startswith("hf://") and is_within(given, folder):
            raise ArenaError(
                f"lies in {folder}, and an export replaces this folder as a whole",
                where=str(given),
                remedy=f"move it to a place outside of {folder} and give its new path; nothing was changed",
            )
    refuse_strangers(folder)


def refuse_strangers(folder: Path, own: Callable[[str], object] | None = None, maker: str = "export") -> None:
    """Raise ArenaError where a folder that is replaced as a whole holds what its `maker` did not write, or is a file.

    `own` tells whether a file was written by it, by its path in the folder; without it exports of all versions count.
    """
    if folder.exists() and not folder.is_dir():
        raise ArenaError(f"is a file, where the {maker} makes a folder", where=str(folder), remedy="move it away")
    strangers = strangers_in(folder, own or _exported(folder))
    if strangers:
        named = ", ".join(strangers[:_NAMED]) + (", …" if len(strangers) > _NAMED else "")
        raise ArenaError(
            f"holds {len(strangers)} file(s) that no {maker} wrote, and the {maker} replaces this folder as a whole: "
            f"{named}",
            where=str(folder),
            remedy=f"move what you want to keep to a place outside of {folder}, delete the rest, and give the same "
            "command again; nothing was changed",
        )


def strangers_in(folder: Path, own: Callable[[str], object]) -> list[str]:
    """Return the files (and links) below a folder that are not its own, as paths in it, sorted."""
    return sorted(name for name in _files(folder) if not own(name) and Path(name).name not in _NOBODYS)


def _files(folder: Path) -> Iterator[str]:
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if Path(place, name).is_symlink()]
        for name in (*names, *links):
            yield Path(place, name).relative_to(folder).as_posix()


def _exported(folder: Path) -> Callable[[str], object]:
    """Return what tells whether an export wrote a file of this name.

    That is what the manifest names. A manifest that cannot be read was ours, too; without any, or with one of another
    program, the folder is somebody else's.
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
