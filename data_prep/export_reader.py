"""Reading an exported data folder back: its rows, its fitted texts, its manifest."""

from __future__ import annotations

import csv
import shlex
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.battle import PROBABILITY_COLUMNS, Battle
from common.errors import ArenaError
from common.files import read_json, sha256_of
from data_prep.chat_template import ChatFrame
from data_prep.preference_pairs import Pair

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

SPLITS = ("train", "valid", "test")
MANIFEST = "manifest.json"
# Of the manifest and the files that it names.
FORMAT = 4
_BATCH = 1024
_NAMED = 5  # experiments that a remedy names
_SUM_TOLERANCE = 1e-3


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a data folder's manifest; raises ArenaError if nothing was exported there or it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = read_json(path)
    except FileNotFoundError:
        raise ArenaError(
            "there is no exported data",
            where=str(folder),
            remedy=to_export(folder),
        ) from None
    except (OSError, ValueError):
        raise _damaged(path) from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ArenaError("was exported by another version", where=str(folder), remedy="run prepare again")
    if not _is_manifest(manifest):
        raise _damaged(path)
    return manifest


def to_export(folder: Path) -> str:
    """Return how a data folder is filled, and which others beside it are: -e may just have been left out."""
    filled = sorted(path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}") if path.parent != folder)
    told = f"python run.py prepare -e {shlex.quote(folder.name)} --train FILE"
    if not filled:
        return told
    named = f"{', '.join(filled[:_NAMED])}{' and others' if len(filled) > _NAMED else ''}"
    return f"{told}; {named} {'hold' if len(filled) > 1 else 'holds'} exported data: -e {shlex.quote(filled[0])}"


def earlier_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of what an export is about to replace, None where there is none that can be read."""
    try:
        return read_manifest(folder)
    except ArenaError:
        return None


def require_intact(folder: Path, names: Collection[str]) -> None:
    """Raise ArenaError unless the exported files of these names are as `prepare` wrote them.

    A name also stands for the parts of a folder; names that were not exported are left out. What was cut off or edited
    would be trained on, or scored, without a word.
    """
    files = read_manifest(folder)["files"]
    for name, digest in files.items():
        if name not in names and name.partition("/")[0] not in names:
            continue
        path = folder / name
        if not path.is_file():
            raise _damaged(path, "the file is gone")
        if sha256_of(path) != digest:
            raise _damaged(path, f"its content is not what was exported ({MANIFEST} has its SHA-256)")


def _is_manifest(manifest: dict[str, Any]) -> bool:
    files, sources, views = (manifest.get(key) for key in ("files", "sources", "views"))
    if not isinstance(files, dict) or not isinstance(sources, dict) or not isinstance(views, list):
        return False
    if not isinstance(manifest.get("experiment"), dict):
        return False
    inside = (not Path(name).is_absolute() and ".." not in Path(name).parts for name in files)
    if not all(inside) or not all(isinstance(digest, str) for digest in files.values()):
        return False
    if not all(isinstance(s, dict) and {type(s.get(k)) for k in ("file", "sha256")} == {str} for s in sources.values()):
        return False
    try:
        ChatFrame.from_dict(manifest.get("frame"))
    except ValueError:
        return False
    return True


def _damaged(path: Path, why: str = "", remedy: str | None = None) -> ArenaError:
    what = f"is damaged: {why}" if why else "is damaged"
    again = f"run prepare again: python run.py prepare -e {path.parent.name}"
    return ArenaError(what, where=str(path), remedy=remedy or again)


@contextmanager
def readable(path: Path, remedy: str | None = None) -> Iterator[None]:
    """Within the block, whatever is wrong with a file of ours (gone, damaged, another's) is an ArenaError.

    The `remedy` of a table of the export is to prepare again; what else made the file needs its own.
    """
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, OSError, KeyError, ValueError, csv.Error) as error:
        raise _damaged(path, (str(error) or repr(error)).splitlines()[0][:200], remedy) from None


def read_audit(folder: Path) -> dict[str, Any]:
    """Return what `prepare` counted and left out; raises ArenaError if that is no audit."""
    path = folder / "audit.json"
    with readable(path):
        audit = read_json(path)
    if not isinstance(audit, dict) or not all(isinstance(audit.get(key), dict) for key in ("truncation", "sources")):
        raise ArenaError("is no audit", where=str(path), remedy="run prepare again")
    return audit


def read_rows(folder: Path, split: str) -> pd.DataFrame:
    """Return rows.parquet's rows of one split, in the order of the input, one row a battle."""
    from pyarrow.parquet import read_table

    with readable(folder / "rows.parquet"):
        return read_table(folder / "rows.parquet", filters=[("split", "==", split)]).to_pandas()


def read_battles(folder: Path, split: str) -> list[tuple[Battle, int]]:
    """Return the fitted battles of one split with the number of turns dropped from each, in the input's order."""
    return list(iter_battles(folder, split))


def iter_battles(folder: Path, split: str) -> Iterator[tuple[Battle, int]]:
    """Yield what `read_battles` returns, without holding more than some hundred texts."""
    from pyarrow.parquet import read_table

    columns = ["split", "verdict", "language", "dropped"]
    with readable(folder / "rows.parquet"):
        rows = read_table(folder / "rows.parquet", columns=columns, filters=[("split", "==", split)])
    known = zip(*(_cells(rows[name]) for name in columns[1:]), strict=True)
    texts = _of_split(folder, split, folder / "battles.parquet", ["id", "prompts", "responses_a", "responses_b"])
    with readable(folder / "battles.parquet"):
        for text, (verdict, language, dropped) in zip(texts, known, strict=True):
            turns = (tuple(text[name]) for name in ("prompts", "responses_a", "responses_b"))
            yield Battle(text["id"], *turns, verdict, language), dropped


def _cells(column: pa.ChunkedArray) -> Iterator[Any]:
    """Yield a column's cells as Python values, some thousand at a time."""
    for start in range(0, len(column), _BATCH):
        yield from column.slice(start, _BATCH).to_pylist()


def _of_split(folder: Path, split: str, path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of a table beside rows.parquet that belong to one split."""
    from pyarrow import compute
    from pyarrow.parquet import ParquetFile, read_table

    with readable(folder / "rows.parquet"):
        wanted = compute.equal(read_table(folder / "rows.parquet", columns=["split"])["split"], split)
    at = 0
    with readable(path), ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=columns):
            mine = wanted.slice(at, len(batch)).combine_chunks()
            yield from batch.filter(mine).to_pylist()
            at += len(batch)
    if at != len(wanted):
        raise ArenaError(f"has {at} rows, rows.parquet {len(wanted)}", where=str(path), remedy="run prepare again")


def truth_of(folder: Path) -> pd.DataFrame | None:
    """Return the known probabilities of a synthetic arena's battles (id and `PROBABILITY_COLUMNS`), or None."""
    import pandas as pd

    path = folder / "truth.csv"
    if not path.is_file():
        return None
    try:
        truth = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)  # an id may be NA
        truth["id"] = truth["id"].str.strip()  # as those of the votes
        values = truth.set_index("id")[list(PROBABILITY_COLUMNS)].to_numpy(float)
    except (ValueError, KeyError, OSError) as error:  # pandas' own errors are ValueErrors
        raise _damaged(path, str(error).splitlines()[0][:200]) from None
    if not (abs(values.sum(axis=1) - 1) <= _SUM_TOLERANCE).all() or not (values >= 0).all():
        raise _damaged(path, "its probabilities are not between 0 and 1, or do not sum to 1")
    return truth


def read_pairs(folder: Path, split: str) -> list[Pair]:
    """Return the fitted pairs of one split, ties included, in the order of `read_rows`.

    Raises ArenaError where the reward view was not exported.
    """
    return [pair for pair, _ in iter_pairs(folder, split)]


def iter_pairs(folder: Path, split: str) -> Iterator[tuple[Pair, int]]:
    """Yield the pairs that `read_pairs` returns, each with the number of turns dropped from it."""
    path = require_pairs(folder)
    with readable(path):
        for row in _of_split(folder, split, path, ["id", "prompt", "response_a", "response_b", "dropped"]):
            dropped = row.pop("dropped")
            yield Pair(**row), dropped


def require_pairs(folder: Path) -> Path:
    """Return the path of pairs.parquet; raises ArenaError where the reward view was not exported."""
    path = folder / "pairs.parquet"
    if not path.is_file():
        raise ArenaError(
            "the reward view (pairs of responses) was not exported",
            where=str(folder),
            remedy=f"python run.py prepare -e {folder.name} --train FILE --pairs",
        )
    return path
