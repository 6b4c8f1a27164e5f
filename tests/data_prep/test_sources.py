"""Where votes come from: files, folders, Kaggle's zip, a hub data set; told apart by columns."""

import csv
import errno
import zipfile

import pytest

from common.battle import PROBABILITY_COLUMNS
from common.errors import ArenaError
from data_prep.readers import VoteReader
from data_prep.sources import votes_at, with_weight
from data_prep.synthetic import write_arena


@pytest.fixture
def kaggle(tmp_path, monkeypatch):
    """A folder as Kaggle's download unpacks, with other names than Kaggle's."""
    monkeypatch.chdir(tmp_path)
    arena = write_arena(tmp_path / "arena", seed=1, train_rows=30, test_rows=5)
    folder = tmp_path / "download"
    folder.mkdir()
    arena.train.rename(folder / "x.csv")
    arena.test.rename(folder / "y.csv")
    with (folder / "z.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["id", *PROBABILITY_COLUMNS], ["1", 0.3, 0.3, 0.4]])
    return folder


def zipped(folder, names=None, prefix=""):
    path = folder.parent / "lmsys.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            archive.write(file, prefix + (names or {}).get(file.name, file.name))
    return path


def rows(path, labelled):
    return len(list(VoteReader(path, labelled=labelled)))


def test_of_kaggles_folder_the_right_table_is_taken_by_its_columns(kaggle):
    assert votes_at(kaggle / "x.csv", labelled=True) == kaggle / "x.csv"
    assert votes_at(kaggle, labelled=True).name == "x.csv"
    assert votes_at(kaggle, labelled=False).name == "y.csv"


def test_of_kaggles_zip_too_and_it_is_unpacked_once(kaggle):
    archive = zipped(kaggle)
    train, test = votes_at(str(archive), labelled=True), votes_at(archive, labelled=False)
    assert rows(train, True) == 30 and rows(test, False) == 5
    assert train.parent == test.parent and train.parent.parent.as_posix() == "data/.sources"
    before = train.stat().st_mtime_ns
    assert votes_at(archive, labelled=True).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("names", "joined"),
    [
        (["train-0.csv", "train-1.csv", "train-2.csv"], 3),
        (["0001.csv", "0002.csv"], 2),
        (["train-00000-of-00002-a09b74b3ef9c3b56.csv", "train-00001-of-00002-c6afcc8ea7c3f7b1.csv"], 2),
        (["part-9-5e2b.csv", "part-10-5e2b.csv"], 2),
        (["train-1.csv", "train-2.csv", "test.csv"], 2),  # the test set has no winner
        (["a_train.csv", "b_valid.csv"], 0),
        (["arena_33k.csv", "arena_55k.csv"], 0),  # two data sets, and not parts 33 to 55
        (["train-00000-of-00003.csv", "train-00002-of-00003.csv"], 0),  # one is missing
        (["train-1.csv", "train-2.csv", "valid-1.csv", "valid-2.csv"], 0),
    ],
)
def test_files_of_a_folder_are_joined_where_they_are_numbered_parts_of_one_name(kaggle, names, joined):
    folder = kaggle.parent / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes((kaggle / ("y.csv" if name == "test.csv" else "x.csv")).read_bytes())
    if joined:
        assert len(VoteReader(votes_at(folder, labelled=True), labelled=True).parts) == joined
        (folder / "README.md").write_text("of the same folder")
        assert len(VoteReader(votes_at(folder, labelled=True), labelled=True).parts) == joined
        return
    with pytest.raises(ArenaError, match="several tables hold votes") as caught:
        votes_at(folder, labelled=True)
    assert names[0] in str(caught.value) and names[-1] in str(caught.value) and "--train for each" in str(caught.value)


def test_a_weight_stands_behind_a_colon(kaggle):
    (kaggle / "odd:2").write_text("")
    given = ("x.csv", "x.csv:0.5", "hf://datasets/a/b@v1:3", "x.csv:.5", "x.csv:half", kaggle / "odd:2")
    assert [with_weight(each)[1] for each in given] == [1, 0.5, 3, 0.5, 1, 1]
    assert with_weight("hf://datasets/a/b@v1:3")[0] == "hf://datasets/a/b@v1"
    for wrong in ("x.csv:0", "x.csv:1000", *(f"{kaggle / 'x.csv'}:{weight}" for weight in ("-1", "nan", "1e-3", ""))):
        with pytest.raises(ArenaError, match="is no number above 0"):
            with_weight(wrong)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES, errno.EIO])
def test_a_full_disk_is_no_fault_of_the_archive(kaggle, monkeypatch, number):
    def copyfileobj(*_):
        raise OSError(number, "the system's word")

    archive = zipped(kaggle)
    monkeypatch.setattr("shutil.copyfileobj", copyfileobj)
    with pytest.raises(OSError, match="the system's word") as caught:
        votes_at(archive, labelled=True)
    assert caught.value.errno == number
    assert not any((kaggle.parent / "data" / ".sources").iterdir())


@pytest.mark.parametrize("source", ["hf://datasets/justone", "hf://models/a/b", "hf://datasets//x", "hf://"])
def test_an_invalid_address_is_refused(source):
    with pytest.raises(ArenaError, match="is not a data set's address"):
        votes_at(source, labelled=True)


def test_a_hub_data_set_is_downloaded_and_its_folder_of_parts_found(kaggle, monkeypatch):
    asked = {}

    def snapshot(repo, **options):
        asked.update(options, repo=repo)
        target = kaggle.parent / "snapshot"
        (target / "data").mkdir(parents=True, exist_ok=True)
        for number in (0, 1):
            (target / "data" / f"train-{number}.csv").write_bytes((kaggle / "x.csv").read_bytes())
        (target / "dataset_infos.json").write_text("{}")  # describes the tables, is none
        return str(target)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = votes_at("hf://datasets/lmsys/votes@v1", labelled=True)
    assert found.name == "data" and asked["repo"] == "lmsys/votes" and asked["revision"] == "v1"
    assert asked["repo_type"] == "dataset" and "*.parquet" in asked["allow_patterns"]
    one = "data/train-1.csv"
    assert votes_at(f"hf://datasets/a/b/{one}", labelled=True) == kaggle.parent / "snapshot" / one
    assert asked["allow_patterns"] == [one]


def test_offline_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ArenaError) as caught:
        votes_at("hf://datasets/nobody/nothing", labelled=True)
    assert "hf://datasets/nobody/nothing" in str(caught.value) and "HF_HUB_OFFLINE" in caught.value.remedy
