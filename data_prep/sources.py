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
from hashlib import blake2b
from pathlib import Path, PurePosixPath

from common.errors import ArenaError
from common.files import atomic_folder
from data_prep.readers import VoteReader
from data_prep.tables import PARTS, open_table

CACHE = Path("data") / ".sources"
_HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[^/@]+))?(?:/(?P<path>.+))?")
# A whole competition's tables unpack to a few hundred MB; more than this is no table of votes.
LARGEST_ARCHIVE = 64 * 2**30
# What zipfile and the decompressors under it raise for bytes that make no sense.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, OSError),
    *(RuntimeError, NotImplementedError, ValueError, OverflowError),
)
_FORMS = "a .csv, .csv.gz or .parquet file, a folder of such parts, Kaggle's zip, or hf://datasets/OWNER/NAME"


def votes_at(source: str | Path, *, labelled: bool) -> Path:
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
        path = _unpacked(path)
    return _fitting(path, labelled) if path.is_dir() else path


def _is_table(name: str) -> bool:
    return name.endswith(PARTS) and not name.startswith((".", "_"))


def _fitting(folder: Path, labelled: bool) -> Path:
    """Return what in a folder holds votes: one file, or the folder itself where all of its files are parts of one."""
    tables = {path: open_table(path).columns for path in sorted(folder.iterdir()) if _is_table(path.name)}
    if all(columns == next(iter(tables.values())) for columns in tables.values()):
        return folder
    fit = [path for path in tables if _holds_votes(path, labelled)]
    if len(fit) == 1:
        return fit[0]
    kind = "votes (prompt, responses, winner)" if labelled else "battles without a winner"
    names = ", ".join(path.name for path in (fit or list(tables))[:5])
    raise ArenaError(
        f"{'several tables hold' if fit else 'no table holds'} {kind}: {names}",
        where=str(folder),
        remedy="give the path of the one file that is meant",
    )


def _holds_votes(path: Path, labelled: bool) -> bool:
    try:
        return VoteReader(path, labelled=labelled).has_verdicts == labelled
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
        what = "two tables of one name" if found else "no table (.csv, .csv.gz, .parquet)"
        raise ArenaError(f"holds {what}", where=str(path), remedy="unpack it and give the path of the file")
    if (size := sum(member.file_size for _, member in found)) > LARGEST_ARCHIVE:
        raise ArenaError(f"would unpack to {size / 2**30:,.0f} GiB", where=str(path), remedy="is it the right archive?")
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
            f"cannot be had from the hub: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
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
    what = f"tables in several folders: {listed}" if folders else "no table (.csv, .csv.gz, .parquet)"
    raise ArenaError(f"holds {what}", where=source, remedy=f"write {source}/FOLDER")
