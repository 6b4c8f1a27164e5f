"""Where votes come from: a file, a folder, a Kaggle zip or a data set on the hub; found by columns, never by name.

votes_at("lmsys-chatbot-arena.zip", labelled=True)      # data/.sources/<hash>/train.csv
votes_at("hf://datasets/lmsys/chatbot_arena_conversations", labelled=True)
with_weight("more.csv:0.5")                             # ("more.csv", 0.5)
"""

from __future__ import annotations

import errno
import lzma
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from common.console import name_of, one_line
from common.errors import ArenaError, first_line
from common.files import atomic_folder
from data_prep.readers import VoteReader
from data_prep.tables import PARTS, open_table

CACHE = Path("data") / ".sources"
_HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>.+))?")
# A whole competition's tables unpack to a few hundred MB; more than this is no table of votes.
LARGEST_ARCHIVE = 64 * 2**30
# Texts are packed to a third or a fifth; zeros to a thousandth.
_MOST_PACKED, _HARMLESS = 100, 2**28
_LONGEST_NAME = 255  # bytes
# What zipfile and the decompressors under it raise for bytes that make no sense.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError, OverflowError),
)
# What hubs and libraries put beside the tables.
_DESCRIPTIONS = frozenset(
    f"{name}.json" for name in ("dataset_info", "dataset_infos", "dataset_dict", "dataset-metadata")
)
_FORMS = f"a file ({', '.join(PARTS)}), a folder of such parts, Kaggle's zip, or hf://datasets/OWNER/NAME"
_WEIGHTED, _WEIGHT = re.compile("(.+):([^/:]*)", re.DOTALL), re.compile(r"\d+(\.\d+)?|\.\d+")
_LARGEST_WEIGHT = 100.0
# The number of a part, and the hash that the hub puts behind it: train-00000-of-00002-a09b74b3ef9c3b56.parquet
_NUMBER, _HASH = re.compile(r"\d+"), re.compile(r"-[0-9a-f]{16}(?=\.)")


@dataclass(frozen=True)
class Source:
    """A table of votes, and how often on average each of its training rows is trained on."""

    path: Path
    weight: float = 1.0


def with_weight(given: str | Path) -> tuple[str, float]:
    """Return a source and its weight, 1 where FILE:0.5 gives none; raises ArenaError for a weight out of bounds."""
    found = None if Path(given).exists() else _WEIGHTED.fullmatch(str(given))
    is_number = found and _WEIGHT.fullmatch(found[2])
    if not found or not (is_number or Path(found[1]).exists()):
        return str(given), 1.0
    weight = float(found[2]) if is_number else 0.0
    if not 0 < weight <= _LARGEST_WEIGHT:
        what = f"the weight {found[2]!r} is no number above 0, up to {_LARGEST_WEIGHT:.0f}"
        raise ArenaError(what, where=str(given), remedy=f"write {found[1]}:0.5, say; or leave the source out")
    return found[1], weight


def votes_at(source: str | Path, *, labelled: bool, columns: Mapping[str, str] | None = None) -> Path:
    """Return the file, or the folder of parts, that holds the votes of a source.

    Of several tables (Kaggle's train, test and sample submission) the one is taken whose columns are those of votes:
    with a verdict where `labelled`, without one otherwise. Raises ArenaError where none or several fit.
    """
    text, path = str(source), Path(source)
    if text.startswith("hf://"):
        path = _from_hub(text)
    elif not path.exists():
        raise ArenaError("does not exist", where=text, remedy=f"give the path of {_FORMS}")
    elif path.suffix.lower() == ".zip" and path.is_file() and zipfile.is_zipfile(path):
        folder = _unpacked(path)
        try:
            return _fitting(folder, labelled, columns)
        except ArenaError:
            shutil.rmtree(folder)
            raise
    return _fitting(path, labelled, columns) if path.is_dir() else path


def _is_table(name: str) -> bool:
    return name.endswith(PARTS) and name not in _DESCRIPTIONS and not name.startswith((".", "_"))


def _fitting(folder: Path, labelled: bool, columns: Mapping[str, str] | None) -> Path:
    """Return what in a folder holds votes: a file, or a folder with the numbered parts of one name."""
    found = _by_name(path for path in sorted(folder.iterdir()) if _is_table(path.name))
    fit = found if len(found) == 1 else [parts for parts in found if _holds_votes(parts[0], labelled, columns)]
    if len(fit) == 1:
        open_table(fit[0][0])  # raises where it holds no table
        return _joined(folder, fit[0])
    if not found:
        return folder  # its reader says what it holds instead
    kind = "votes (prompt, responses, winner)" if labelled else "battles without a winner"
    names = one_line(", ".join(_named(parts) for parts in (fit or found)[:5]))
    raise ArenaError(
        f"{'several tables hold' if fit else 'no table holds'} {kind}: {names}",
        where=str(folder),
        remedy="give the path of the one that is meant (several of votes: --train for each); files are joined where "
        "they are the parts of one name, numbered without a gap, else move those of one table to a folder of their own",
    )


def _by_name(tables: Iterable[Path]) -> list[list[Path]]:
    """Return files in groups: those whose names differ in one number alone, which counts them, and each other one."""
    alike: dict[str, list[Path]] = {}
    for path in tables:
        alike.setdefault(_NUMBER.sub("#", _HASH.sub("", path.name)), []).append(path)
    found = []
    for parts in alike.values():
        numbers = [list(map(int, _NUMBER.findall(_HASH.sub("", path.name)))) for path in parts]
        counting = [set(column) for column in zip(*numbers, strict=True) if len(set(column)) > 1]
        whole = len(counting) == 1 and max(counting[0]) - min(counting[0]) + 1 == len(parts) == len(counting[0])
        found += [parts] if whole else [[path] for path in parts]
    return found


def _named(parts: list[Path]) -> str:
    return parts[0].name + (f" … {parts[-1].name} ({len(parts)} parts)" if len(parts) > 1 else "")


def _joined(folder: Path, parts: list[Path]) -> Path:
    """Return the file, the folder where it holds these parts alone, or a folder of links to them."""
    if len(parts) == 1:
        return parts[0]
    if {path.name for path in folder.iterdir() if not path.name.startswith((".", "_"))} == {p.name for p in parts}:
        return folder
    stamp = "\n".join(str(path.absolute()) for path in parts)
    target = CACHE / blake2b(stamp.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    if not target.is_dir():
        with atomic_folder(target) as links:
            for path in parts:
                (links / path.name).symlink_to(path.absolute())
    return target


def _holds_votes(path: Path, labelled: bool, columns: Mapping[str, str] | None) -> bool:
    try:
        return VoteReader(path, labelled=labelled, columns=columns).has_verdicts == labelled
    except ArenaError:
        return False


def _unpacked(path: Path) -> Path:
    """Return a folder with the tables of a zip archive, unpacked once; nothing is written outside of it."""
    status = path.stat()
    stamp = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    target = CACHE / blake2b(stamp.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    if target.is_dir():
        return target
    try:
        with zipfile.ZipFile(path) as archive, atomic_folder(target) as folder:
            for name, member in _tables_in(archive, path).items():
                with archive.open(member) as packed, (folder / name).open("wb") as file:
                    shutil.copyfileobj(packed, file, 1 << 20)
    except _DAMAGE as error:
        # A full disk or missing permissions are no fault of the archive; of a damaged one bzip2 raises an OSError
        # without a number, and a seek to a place outside of it EINVAL.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ArenaError(f"cannot be unpacked: {error}", where=str(path), remedy="download it again") from None
    return target


def _tables_in(archive: zipfile.ZipFile, path: Path) -> dict[str, zipfile.ZipInfo]:
    """Return the archive's tables by the plain names that they get; folders in it and its paths mean nothing."""
    members = [member for member in archive.infolist() if not member.is_dir()]
    named = [(PurePosixPath(member.filename.replace("\\", "/")).name, member) for member in members]
    found = [(name, member) for name, member in named if _is_table(name)]
    if not found or len(dict(found)) < len(found):
        what = "two tables of one name" if found else f"no table ({', '.join(PARTS)})"
        raise ArenaError(f"holds {what}", where=str(path), remedy="unpack it and give the path of the file")
    size, packed = (sum(getattr(each, key) for _, each in found) for key in ("file_size", "compress_size"))
    free, would = shutil.disk_usage(".").free, f"would unpack from {packed / 2**20:,.1f} MiB to {size / 2**30:,.1f} GiB"
    fault, remedy = "", "unpack it yourself and give the path of the file"
    if long := [name for name, _ in found if len(os.fsencode(name)) > _LONGEST_NAME]:
        fault = f"a table's name is longer than {_LONGEST_NAME} bytes: {name_of(long[0])}"
    elif odd := [name for name, _ in found if not name.isprintable()]:
        fault = f"a table's name holds control characters: {name_of(odd[0])}"
    elif size > LARGEST_ARCHIVE or (size > _HARMLESS and size > _MOST_PACKED * packed):
        fault, remedy = f"{would}: no table of texts is packed so well", f"check where it comes from, or {remedy}"
    elif size > free:
        fault, remedy = f"{would}, and {free / 2**30:,.1f} GiB are free", "free disk space"
    if fault:
        raise ArenaError(fault, where=str(path), remedy=remedy)
    return dict(found)


def _from_hub(source: str) -> Path:
    """Return the local copy of a hub data set's file or folder; HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE apply."""
    given = _HUB.fullmatch(source)
    if given is None:
        raise ArenaError(
            "is not a data set's address",
            where=source,
            remedy="write hf://datasets/OWNER/NAME, hf://datasets/OWNER/NAME@REVISION or …/NAME/path/to/file.parquet",
        )
    from huggingface_hub import snapshot_download

    path, options = given["path"] or "", {"repo_type": "dataset", "revision": given["revision"]}
    try:
        patterns = [path] if path.endswith(PARTS) else [f"{f'{path}/' if path else ''}*{end}" for end in PARTS]
        folder = Path(snapshot_download(given["repo"], allow_patterns=patterns, **options)) / path
    except Exception as error:  # offline, gated, unknown, no disk: the library has a class for each
        raise ArenaError(
            f"cannot be had from the hub: {first_line(error)}",
            where=source,
            remedy="check the name; log in (hf auth login) and accept the data set's terms; or download it and give "
            "its path. With HF_HUB_OFFLINE=1 only what is in the cache is found",
        ) from None
    if folder.is_file():
        return folder
    # hubs keep the tables in data/
    folders = sorted({table.parent for table in folder.rglob("*") if _is_table(table.name)})
    if len(folders) == 1:
        return folders[0]
    listed = ", ".join(str(each.relative_to(folder)) for each in folders[:5])
    what = f"tables in several folders: {listed}" if folders else f"no table ({', '.join(PARTS)})"
    raise ArenaError(f"holds {what}", where=source, remedy=f"write {source}/FOLDER")
