"""Where votes come from: a file, a folder, a Kaggle zip or a data set on the hub; found by columns, never by name.

votes_at("lmsys-chatbot-arena.zip", labelled=True)      # data/.sources/<hash>/train.csv
votes_at("hf://datasets/lmsys/chatbot_arena_conversations", labelled=True)
"""

from __future__ import annotations

import errno
import lzma
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from common.battle import PROBABILITY_COLUMNS
from common.errors import ArenaError
from common.files import atomic_folder
from data_prep.readers import VoteReader
from data_prep.tables import PARTS, open_table

CACHE = Path("data") / ".sources"
_HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>.+))?")
# A whole competition's tables unpack to a few hundred MB; more than this is no table of votes.
_LARGEST = 64 * 2**30
# What zipfile and the decompressors under it raise for bytes that make no sense.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError),
    *(RuntimeError, NotImplementedError, ValueError, OverflowError),
)
_LONGEST_NAME = 255  # what file systems take
_FORMS = "a .csv, .csv.gz or .parquet file, a folder of such parts, Kaggle's zip, or hf://datasets/OWNER/NAME"
_VERDICTS = frozenset({*PROBABILITY_COLUMNS, "winner"})


def votes_at(source: str | Path, *, labelled: bool) -> Path:
    """Return the file, or the folder of parts, that holds the votes of a source.

    Of several tables (Kaggle's train, test and sample submission) the one is taken whose columns are those of votes:
    with a verdict where `labelled`, without one otherwise. Raises ArenaError where none or several are.
    """
    text = str(source)
    if text.startswith("hf://"):
        return _fitting(_from_hub(text), labelled)
    path = Path(source)
    if len(path.name) > _LONGEST_NAME:
        raise ArenaError("cannot be read: File name too long", where=f"{text[:80]}…", remedy="check the path")
    if path.is_file() and zipfile.is_zipfile(path) and path.suffix.lower() == ".zip":
        return _fitting(_unpacked(path), labelled)
    if not path.exists():
        raise ArenaError("does not exist", where=text, remedy=f"give the path of {_FORMS}")
    return _fitting(path, labelled) if path.is_dir() else path


def _fitting(folder: Path, labelled: bool) -> Path:
    """Return what in a folder holds votes: one file, or the folder itself where all of its files are parts of one."""
    if folder.is_file():
        return folder
    tables = sorted(p for p in folder.iterdir() if p.is_file() and p.name.endswith(PARTS) and p.name[0] not in "._")
    columns = {path: tuple(open_table(path).columns) for path in tables}
    if len(set(columns.values())) <= 1:
        return folder
    fit = [path for path in tables if _holds_votes(path, columns[path], labelled)]
    if len(fit) == 1:
        return fit[0]
    kind = "votes (prompt, responses, winner)" if labelled else "battles without a winner"
    names = ", ".join(path.name for path in (fit or tables)[:5])
    raise ArenaError(
        f"{'several tables hold' if fit else 'no table holds'} {kind}: {names}",
        where=str(folder),
        remedy="give the path of the one file that is meant",
    )


def _holds_votes(path: Path, columns: tuple[str, ...], labelled: bool) -> bool:
    try:
        VoteReader(path, labelled=labelled)
    except ArenaError:
        return False
    return labelled or not _VERDICTS & set(columns)


def _unpacked(path: Path) -> Path:
    """Return a folder with the tables of a zip archive, unpacked once; nothing is written outside of it."""
    status = path.stat()
    stamp = f"{path.resolve()} {status.st_size} {status.st_mtime_ns}"
    target = CACHE / blake2b(stamp.encode(errors="surrogatepass"), digest_size=8).hexdigest()
    if target.is_dir():
        return target
    with _told(path), zipfile.ZipFile(path) as archive, atomic_folder(target) as folder:
        for member, name in _tables_in(archive, path):
            with archive.open(member) as packed, (folder / name).open("wb") as file:
                shutil.copyfileobj(packed, file, 1 << 20)
    return target


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Within the block, whatever is wrong with an archive (torn, encrypted, odd) is an ArenaError.

    What the system says (a full disk, missing rights) is left to it. It is told by its number: bzip2 says OSError
    without one, and a damaged directory leads to places where no file begins.
    """
    try:
        yield
    except (*_DAMAGE, OSError) as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise ArenaError(f"cannot be unpacked: {error}", where=str(path), remedy="download it again") from None


def _tables_in(archive: zipfile.ZipFile, path: Path) -> list[tuple[zipfile.ZipInfo, str]]:
    """Return the archive's tables with the plain names that they get; folders in it and its paths mean nothing."""
    found = [(m, PurePosixPath(m.filename.replace("\\", "/")).name) for m in archive.infolist() if not m.is_dir()]
    found = [(member, name) for member, name in found if name.endswith(PARTS) and name[0] not in "._"]
    names = [name for _, name in found]
    if not found or len(set(names)) < len(names):
        what = "two tables of one name" if found else "no table (.csv, .csv.gz, .parquet)"
        raise ArenaError(f"holds {what}", where=str(path), remedy="unpack it and give the path of the file")
    if (size := sum(member.file_size for member, _ in found)) > _LARGEST:
        raise ArenaError(f"would unpack to {size / 2**30:,.0f} GiB", where=str(path), remedy="is it the right archive?")
    return found


def _from_hub(source: str) -> Path:
    """Return the local copy of a hub data set's file or folder; HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE are heeded."""
    given = _HUB.fullmatch(source)
    if given is None:
        raise ArenaError(
            "is not a data set's address",
            where=source,
            remedy="write hf://datasets/OWNER/NAME, hf://datasets/OWNER/NAME@REVISION or …/NAME/path/to/file.parquet",
        )
    from huggingface_hub import hf_hub_download, snapshot_download

    repo, revision, path = given["repo"], given["revision"], given["path"]
    options = {"repo_type": "dataset", "revision": revision}
    try:
        if path and path.endswith(PARTS):
            return Path(hf_hub_download(repo, path, **options))
        patterns = [f"{f'{path}/' if path else ''}*{end}" for end in PARTS]
        return _tables_folder(Path(snapshot_download(repo, allow_patterns=patterns, **options)) / (path or ""), source)
    except ArenaError:
        raise
    except Exception as error:  # offline, gated, unknown, no disk: the library has a class for each
        raise ArenaError(
            f"cannot be had from the hub: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            where=source,
            remedy="check the name; log in (hf auth login) and accept the data set's terms; or download it and give "
            "its path. With HF_HUB_OFFLINE=1 only what is in the cache is found",
        ) from None


def _tables_folder(folder: Path, source: str) -> Path:
    """Return the one folder under a snapshot that holds tables; hubs keep them in data/."""
    folders = sorted({p.parent for end in PARTS for p in folder.rglob(f"*{end}")}) if folder.is_dir() else []
    if len(folders) != 1:
        what = "tables in several folders" if folders else "no table (.csv, .csv.gz, .parquet)"
        listed = ", ".join(str(f.relative_to(folder)) for f in folders[:5])
        raise ArenaError(
            f"holds {what}{f': {listed}' if listed else ''}", where=source, remedy=f"write {source}/FOLDER"
        )
    return folders[0]
