"""scoring.predictions: exactly the competition's table, or an error that names the rows; no other file is replaced."""

import csv
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import ArenaError, UsageError
from common.files import write_json
from data_prep.export_reader import FORMAT, earlier_manifest
from scoring.predictions import check_submission, record_output, require_replaceable, scored_file, write_probabilities

HEAD = "id,winner_model_a,winner_model_b,winner_tie\n"
P = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])


def test_header_order_and_ids_stay_as_they_are(tmp_path):
    path = tmp_path / "submission.csv"
    write_probabilities(path, ["0065089", 'odd, "id"'], P)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
    assert rows[1] == ["0065089", "0.2", "0.3", "0.5"] and rows[2][0] == 'odd, "id"'
    assert check_submission(path, ["0065089", 'odd, "id"']) == 2
    write_probabilities(path, np.array([136060, 211333]), P)
    assert path.read_text().splitlines()[1].startswith("136060,0.2"), "integers are written without a point"
    assert check_submission(path, [136060, 211333]) == 2


@settings(max_examples=100, deadline=None)
@given(hnp.arrays(np.float32, st.tuples(st.integers(1, 30), st.just(3)), elements=st.floats(-80, 80, width=32)))
def test_rows_sum_to_one_as_written_whatever_the_scores(tmp_path_factory, scores):
    path = tmp_path_factory.mktemp("p") / "s.csv"
    p = np.exp(scores - scores.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)  # float32, so the sums are off by about 1e-7
    write_probabilities(path, range(len(p)), p)
    written = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)[:, 1:]
    assert np.abs(written.sum(axis=1) - 1).max() < 1e-8
    assert written == pytest.approx(p.astype(float), abs=1e-6)
    assert check_submission(path, range(len(p))) == len(p)


@pytest.mark.parametrize(
    ("ids", "values", "words"),
    [
        (["x", "y"], [[0.2, 0.3, 0.5], [np.nan, 0.5, 0.5]], "NaN or infinite: id y"),
        (["x", "y"], [[0.2, 0.3, 0.5], [0.5, 0.5, 0.5]], "not summing to 1: id y"),
        (["x", "y"], [[1.2, -0.2, 0.0], [0.2, 0.3, 0.5]], "outside 0..1: id x"),
        (["x", "x"], P, "occur twice: x"),
    ],
)
def test_what_is_no_table_of_probabilities_is_refused_and_the_old_file_survives(tmp_path, ids, values, words):
    path = tmp_path / "s.csv"
    path.write_text("earlier")
    with pytest.raises(ArenaError, match=words):
        write_probabilities(path, ids, np.array(values))
    assert path.read_text() == "earlier" and list(tmp_path.iterdir()) == [path]


def test_the_usual_place_is_named_after_the_input(workplace):
    Path("parts/x").mkdir(parents=True)
    folder, hub = Path("outputs/exam/sft"), "hf://datasets/lmsys/votes"
    names = {"../other/test.csv": "test", "votes.v2.csv.gz": "votes.v2", "TEST.CSV": "TEST", "parts/x/..": "parts"}
    for source, name in (names | {f"{hub}-1.0": "votes-1.0", f"{hub}/data/test.parquet": "test"}).items():
        assert scored_file(folder, source) == folder / "scored" / f"{name}.csv"


@pytest.fixture
def replaceable(workplace, make_experiment):
    """What `require_replaceable` says for the experiment exam, which was prepared from votes.csv and parts/."""
    experiment = make_experiment()
    files = {"train": "votes.csv", "test": "parts"}
    sources = {name: {"file": file, "sha256": "0", "weight": 1.0} for name, file in files.items()}
    manifest = {"format": FORMAT, "experiment": {}, "views": [], "files": {}, "sources": sources}
    frame = {"prefix_ids": [], "suffix_ids": [], "label_ids": [1, 2, 3], "answer_len": 1, "special_strings": []}
    texts = dict.fromkeys(("template", "before", "after", "answer_before", "answer_after"), "")
    frame |= {**texts, "answer_prefix_ids": [], "answer_suffix_ids": []}
    write_json(experiment.data_folder / "manifest.json", {**manifest, "frame": frame})
    assert earlier_manifest(experiment.data_folder)
    return lambda output, source="battles.csv": require_replaceable(Path(output), source, experiment)


def write_table(path: str, chance: float = 0.3) -> Path:
    write_probabilities(Path(path), ["1"], [[0.2, chance, 0.8 - chance]])
    return Path(path)


def test_an_earlier_output_may_be_replaced_wherever_it_is_now(replaceable):
    replaceable("new/place/out.csv")
    for chance in (0.3, 0.4):
        record_output(write_table("out.csv", chance))
        replaceable("out.csv")
    Path("out.csv").rename("moved.csv")
    replaceable("moved.csv")
    for place in ("rm", "rm/fold2"):  # the folders for outputs
        write_table(f"outputs/another/{place}/scored/x.csv")
        replaceable(f"outputs/another/{place}/scored/x.csv")
    no_text = os.fsdecode(b"out-\xff.csv")
    record_output(write_table(no_text))
    replaceable(no_text)
    Path("outputs/scored.sha256").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="is not an earlier output"):
        replaceable(no_text)
    record_output(Path(no_text))
    replaceable(no_text)


def test_a_table_of_probabilities_that_this_command_did_not_write_is_kept(replaceable):
    record_output(write_table("out.csv"))
    with Path("out.csv").open("a") as file:
        file.write("2,0.2,0.3,0.5\n")  # edited since
    foreign = ("outputs/exam/sft/x.csv", "elsewhere/exam/sft/scored/x.csv", "outputs/exam/sft/mine/scored/x.csv")
    for name in foreign:
        write_table(name, 0.1)
    for name in ("out.csv", *foreign):
        with pytest.raises(UsageError, match="is not an earlier output") as caught:
            replaceable(name)
        assert (caught.value.exit_code, caught.value.where) == (2, name) and "--output" in caught.value.remedy


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("x/../data/mine.csv", "lies in data/"),
        ("linked/mine.csv", "lies in data/"),
        ("parts/one_more.csv", "is a place of parts, which exam was prepared from"),
        ("link.csv", "is not an earlier output"),
        ("x", "is not a file"),
        ("/dev/null", "is not a file"),
        ("battles.csv/out.csv", "is not a folder"),
        ("outputs/exam/rm/submission.csv", "is not an earlier output"),
    ],
)
def test_no_output_is_written_over_inputs_results_or_other_files(replaceable, output, words):
    Path("linked").symlink_to("data/exam")
    Path("x").mkdir()
    Path("outputs/exam/rm").mkdir(parents=True)
    Path("outputs/exam/rm/submission.csv").write_text(HEAD)
    for name, content in (("train.csv", HEAD.replace("\n", ",more\n")), ("battles.csv", "id,prompt\n")):
        Path(name).write_text(content)
    Path("link.csv").hardlink_to("battles.csv")
    with pytest.raises(UsageError, match=words):
        replaceable(output)
    for allowed in ("parts/below/mine.csv", "outputs/exam/rm/scored/submission.csv", "submission.csv"):
        replaceable(allowed)


def test_an_output_is_not_a_part_of_its_own_input(replaceable):
    Path("folder").mkdir()
    with pytest.raises(UsageError, match="lies in the folder that is read"):
        replaceable("folder/../folder/out.csv", "folder")
    replaceable("folder.csv", "folder")
