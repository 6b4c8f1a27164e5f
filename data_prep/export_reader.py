"""Reading an exported data folder back: its manifest, its audit, its rows, its fitted texts."""

from __future__ import annotations

import csv
import json
import shlex
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import pandas as pd
import pyarrow as pa
from pyarrow import compute
from pyarrow.parquet import ParquetFile, read_schema
from pydantic import AfterValidator, BaseModel, ValidationError

from common.battle import PROBABILITY_COLUMNS, TEXTS, Battle
from common.errors import ArenaError, first_line
from common.files import read_json, sha256_of
from data_prep.chat_template import ChatFrame
from data_prep.preference_pairs import Pair

SPLITS = ("train", "valid", "test")
# One of the column `split`, or several (Experiment.parts).
Split = str | Collection[str]
# What stands before the ids of another source than the first.
PREFIX = r"^train_\d+:"
# Of rows.parquet's metadata, see `test_lines`.
TEST_LINES = b"test_lines"
MANIFEST = "manifest.json"
# Of the manifest and the files that it names.
FORMAT = 7
_BATCH = 1024
_NAMED = 5  # experiments that a remedy names
_SUM_TOLERANCE = 1e-3


@contextmanager
def readable(path: Path, remedy: str | None = None) -> Iterator[None]:
    """Within the block, whatever is wrong with a file of ours (gone, damaged, not what we wrote) is an ArenaError.

    Without a `remedy` it is to prepare again, which makes all that lies in a data folder.
    """
    try:
        yield
    except (pa.ArrowException, OSError, LookupError, ValueError, TypeError, AttributeError, csv.Error) as error:
        reason = first_line(error)[:200]
        if isinstance(error, ValidationError):
            first = error.errors()[0]
            reason = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
        again = f"run prepare again: python run.py prepare -e {path.parent.name}"
        raise ArenaError(f"is damaged: {reason}", where=str(path), remedy=remedy or again) from None


def _inside(name: str) -> str:
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise ValueError("leads out of the folder")
    return name


class _Source(BaseModel):
    file: str
    sha256: str
    weight: float


class _Manifest(BaseModel):
    experiment: dict[str, Any]
    views: list[str]
    sources: dict[str, _Source]
    frame: ChatFrame
    files: dict[Annotated[str, AfterValidator(_inside)], str]


def read_manifest(folder: Path) -> dict[str, Any]:
    """Return a data folder's manifest; raises ArenaError if nothing was exported there or it is damaged."""
    path = folder / MANIFEST
    if not path.exists():
        raise ArenaError("there is no exported data", where=str(folder), remedy=how_to_export(folder))
    with readable(path):
        manifest = read_json(path)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise ArenaError("was exported by another version", where=str(folder), remedy="run prepare again")
        _Manifest.model_validate(manifest)
    return manifest


def how_to_export(folder: Path) -> str:
    """Return how to fill a data folder, and which others beside it are filled: -e may just have been left out."""
    filled = sorted(path.parent.name for path in folder.parent.glob(f"*/{MANIFEST}") if path.parent != folder)
    command = f"python run.py prepare -e {shlex.quote(folder.name)} --train FILE"
    if not filled:
        return command
    named = f"{', '.join(filled[:_NAMED])}{' and others' if len(filled) > _NAMED else ''}"
    return f"{command}; {named} {'hold' if len(filled) > 1 else 'holds'} exported data: -e {shlex.quote(filled[0])}"


def earlier_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of what an export is about to replace, None where there is none that can be read."""
    try:
        return read_manifest(folder)
    except ArenaError:
        return None


def require_intact(folder: Path, names: Collection[str], files: Mapping[str, str]) -> None:
    """Raise ArenaError unless the exported files of these names have the sums that the manifest's `files` lists.

    Names that were not exported are left out. Else training and scoring would use rows that were cut off or edited.
    """
    for name, digest in files.items():
        if name in names:
            with readable(folder / name):
                if not (folder / name).is_file():
                    raise ValueError("the file is gone")
                if sha256_of(folder / name) != digest:
                    raise ValueError(f"its content is not what was exported ({MANIFEST} has its SHA-256)")


def read_audit(folder: Path) -> dict[str, Any]:
    """Return what `prepare` counted and left out; raises ArenaError if that is no audit."""
    with readable(folder / "audit.json"):
        audit = read_json(folder / "audit.json")
        if not isinstance(audit, dict) or {type(audit.get(key)) for key in ("sources", "truncation")} != {dict}:
            raise ValueError("not what prepare writes")
    return audit


def read_columns(
    path: Path, columns: list[str] | None = None, where: tuple[str, str | Collection[str]] | None = None
) -> pa.Table:
    """Return columns of a parquet file (None: all), of every row or where a column has a value, or one of several.

    Without threads: where memory is too short to start them, Arrow waits for them all the same.
    """
    wanted = columns and list(dict.fromkeys([*columns, *(where or ())[:1]]))
    with ParquetFile(path, pre_buffer=False) as file:
        table = file.read(columns=wanted, use_threads=False)
    table = table if where is None else table.filter(_is_one_of(table[where[0]], where[1]))
    return table.select(columns) if columns else table


def _is_one_of(column: Any, values: str | Collection[str]) -> Any:
    wanted = [values] if isinstance(values, str) else list(values)
    return compute.is_in(column, value_set=pa.array(wanted, pa.string()))


def read_rows(folder: Path, split: Split) -> pd.DataFrame:
    """Return rows.parquet's rows of one split, in the order of the input, one row a battle."""
    with readable(folder / "rows.parquet"):
        return read_columns(folder / "rows.parquet", where=("split", split)).to_pandas()


def read_battles(folder: Path, split: Split) -> list[tuple[Battle, int]]:
    """Return the fitted battles of one split with the number of turns dropped from each, in the input's order."""
    return list(iter_battles(folder, split))


def iter_battles(folder: Path, split: Split) -> Iterator[tuple[Battle, int]]:
    """Yield what `read_battles` returns, without holding more than some hundred texts."""
    known = ("verdict", "language", "shares", "dropped")
    for row in rows_of(folder, split, "battles.parquet", ("id", *TEXTS), known):
        turns = (tuple(row[name]) for name in TEXTS)
        shares = row["shares"] and tuple(row["shares"])
        yield Battle(row["id"], *turns, row["verdict"], row["language"], shares), row["dropped"]


def iter_pairs(folder: Path, split: Split) -> Iterator[tuple[Pair, int]]:
    """Yield the fitted pairs of one split, ties included, each with its dropped turns, in the order of `read_rows`.

    Raises ArenaError where the reward view was not exported.
    """
    require_pairs(folder)
    texts = ("id", "prompt", "response_a", "response_b")
    for row in rows_of(folder, split, "pairs.parquet", (*texts, "dropped")):
        yield Pair(*(row[name] for name in texts)), row["dropped"]


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


def rows_of(
    folder: Path, split: Split, table: str, columns: Collection[str], known: Collection[str] = ()
) -> Iterator[dict[str, Any]]:
    """Yield the rows of one split of a table, which lies row by row beside rows.parquet, with `known` columns of it."""
    with readable(folder / "rows.parquet"):
        rows = read_columns(folder / "rows.parquet", ["split", *known])
    at = 0
    with readable(folder / table), ParquetFile(folder / table, pre_buffer=False) as file:
        for batch in file.iter_batches(batch_size=_BATCH, columns=list(columns), use_threads=False):
            beside = rows.slice(at, len(batch)).combine_chunks()
            for name in known:
                batch = batch.append_column(name, beside[name].combine_chunks())
            yield from batch.filter(_is_one_of(beside["split"], split).combine_chunks()).to_pylist()
            at += len(batch)
        if at != len(rows):
            raise ValueError(f"it has {at} rows, rows.parquet {len(rows)}")


def test_lines(folder: Path) -> tuple[bool, list[tuple[int, str]]]:
    """Return what the test table asks for besides its rows: whether `id,winner` (WSDM), and the lines of rows that
    could not be read, each as the number of test rows before it and its id."""
    with readable(folder / "rows.parquet"):
        found = json.loads((read_schema(folder / "rows.parquet").metadata or {}).get(TEST_LINES, "[false, []]"))
        return bool(found[0]), [(int(before), str(identity)) for before, identity in found[1]]


def truth_of(folder: Path) -> pd.DataFrame | None:
    """Return the known probabilities of a synthetic arena's battles (id and `PROBABILITY_COLUMNS`), or None."""
    path = folder / "truth.csv"
    if not path.is_file():
        return None
    with readable(path):
        truth = pd.read_csv(path, dtype={"id": str}, keep_default_na=False)  # an id may be NA
        values = truth.set_index("id")[list(PROBABILITY_COLUMNS)].to_numpy(float)
        if not (abs(values.sum(axis=1) - 1) <= _SUM_TOLERANCE).all() or not (values >= 0).all():
            raise ValueError("its probabilities are not between 0 and 1, or do not sum to 1")
    return truth
