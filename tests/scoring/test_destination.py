"""scoring.predictions: no result's own table and nobody else's file is replaced by the probabilities of a table."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from common.errors import UsageError
from common.files import write_json
from data_prep.export_reader import FORMAT, earlier_manifest
from scoring.checks.verify import TABLES
from scoring.predictions import record_output, require_outside, require_replaceable, scored_file, write_probabilities


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("../other/test.csv", "test"),
        ("valid.csv", "valid"),
        ("votes.v2.csv.gz", "votes.v2"),
        ("TEST.CSV", "TEST"),
        ("x.parquet", "x"),
        ("lmsys-chatbot-arena.zip", "lmsys-chatbot-arena"),
        ("parts/", "parts"),
        ("parts/.", "parts"),
        ("parts/x/..", "parts"),
        ("battles-0.5", "battles-0.5"),
        ("hf://datasets/lmsys/votes-1.0", "votes-1.0"),
        ("hf://datasets/lmsys/votes/data/test.parquet", "test"),
    ],
)
def test_the_usual_place_is_named_after_the_input_and_is_no_result_s_own(workplace, make_experiment, source, name):
    Path("parts/x").mkdir(parents=True)
    experiment = make_experiment()
    found = scored_file(experiment, "sft", source)
    assert found == experiment.output_folder("sft") / "scored" / f"{name}.csv"
    own = {experiment.output_folder("sft") / table for table in TABLES}
    assert own.isdisjoint({found, found.with_name(f"probabilities_{name}.csv")})


@pytest.fixture
def replaceable(workplace, make_experiment):
    """What `require_replaceable` says for the experiment exam, which was prepared from votes.csv and parts/."""
    experiment = make_experiment()
    sources = {"train": {"file": "votes.csv", "sha256": "0"}, "test": {"file": "parts", "sha256": "0"}}
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


def test_an_earlier_output_may_be_replaced_and_so_may_nothing(replaceable):
    replaceable("new/place/out.csv")
    record_output(write_table("out.csv"))
    replaceable("out.csv")
    record_output(write_table("out.csv", 0.4))
    replaceable("out.csv")
    Path("out.csv").rename("moved.csv")
    replaceable("moved.csv")
    write_table("outputs/another/rm/scored/x.csv")  # a place that nobody else uses
    replaceable("outputs/another/rm/scored/x.csv")


def test_a_table_of_probabilities_that_this_command_did_not_write_is_none_of_its_outputs(replaceable):
    record_output(write_table("out.csv"))
    for name in ("truth.csv", "sample_submission.csv", "outputs/exam/sft/x.csv", "elsewhere/exam/sft/scored/x.csv"):
        before = write_table(name, 0.1).read_bytes()
        with pytest.raises(UsageError, match=r"is not an earlier output of this command, as outputs/scored\.json"):
            replaceable(name)
        assert Path(name).read_bytes() == before
    with Path("out.csv").open("a") as file:
        file.write("2,0.2,0.3,0.5\n")
    with pytest.raises(UsageError, match="is not an earlier output"):
        replaceable("out.csv")  # a person has added to it since


def test_an_output_that_was_replaced_is_known_no_more_and_others_are(replaceable):
    copy = write_table("copy.csv", 0.1).read_bytes()
    for name, chance in (("out.csv", 0.1), ("other.csv", 0.2), ("out.csv", 0.3)):
        record_output(write_table(name, chance))
    assert sorted(json.loads(Path("outputs/scored.json").read_text()).values()) == ["other.csv", "out.csv"]
    replaceable("other.csv")
    with pytest.raises(UsageError, match="is not an earlier output"):
        replaceable("copy.csv")
    assert Path("copy.csv").read_bytes() == copy


@pytest.mark.parametrize("content", ["", "{", "[]", "null", "\xff"])
def test_a_damaged_list_of_outputs_knows_none_and_is_written_anew(replaceable, content):
    record_output(write_table("out.csv"))
    Path("outputs/scored.json").write_text(content, encoding="latin-1")
    with pytest.raises(UsageError, match="is not an earlier output"):
        replaceable("out.csv")
    record_output(Path("out.csv"))
    replaceable("out.csv")


def test_a_name_that_is_no_text_can_be_written_down(replaceable):
    name = os.fsdecode(b"out-\xff.csv")
    record_output(write_table(name))
    replaceable(name)


@pytest.mark.parametrize(
    ("output", "words"),
    [
        ("data/exam/mine.csv", "lies in data/"),
        ("data/mine.csv", "lies in data/"),
        ("x/../data/mine.csv", "lies in data/"),
        ("linked/mine.csv", "lies in data/"),
        ("votes.csv", "is a place of votes.csv, which exam was prepared from"),
        ("parts/one_more.csv", "is a place of parts, which exam was prepared from"),
    ],
)
def test_no_output_is_made_where_inputs_lie(replaceable, output, words):
    Path("linked").symlink_to("data/exam")
    Path("x").mkdir()
    with pytest.raises(UsageError, match=words):
        replaceable(output)
    replaceable("parts/below/mine.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n", "not an earlier output"),
        ("id,winner_model_a,winner_model_b,winner_tie,more\n", "not an earlier output"),
        ("", "not an earlier output"),
    ],
)
def test_any_other_file_is_refused(replaceable, content, words):
    Path("train.csv").write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        replaceable("train.csv", "test.csv")
    assert (caught.value.exit_code, caught.value.where) == (2, "train.csv")
    assert "another path" in caught.value.remedy
    assert Path("train.csv").read_text() == content


def test_the_input_a_folder_and_a_place_below_a_file_are_refused(replaceable):
    Path("battles.csv").write_text("id,prompt\n")
    Path("link.csv").hardlink_to("battles.csv")
    Path("folder").mkdir()
    for output, words in (
        ("battles.csv", "is the input itself"),
        ("link.csv", "is the input itself"),
        ("folder", "is no file"),
        ("battles.csv/out.csv", "is no folder"),
        ("/dev/null", "is no file"),
    ):
        with pytest.raises(UsageError, match=words):
            replaceable(output)


@pytest.mark.parametrize("name", TABLES)
def test_a_result_s_own_tables_are_refused_also_where_one_is_missing(replaceable, name):
    stage = Path("outputs/exam/rm")
    stage.mkdir(parents=True)
    (stage / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="a finished result's own table"):
        replaceable(stage / name)
    write_probabilities(stage / name, ["1"], [[0.2, 0.3, 0.5]])
    with pytest.raises(UsageError, match="a finished result's own table"):
        replaceable(stage / name)
    replaceable(stage / "scored" / name)
    replaceable(name)


def test_an_output_is_not_a_part_of_its_own_input(workplace):
    Path("parts").mkdir()
    with pytest.raises(UsageError, match="lies in the folder that is read"):
        require_outside(Path("parts/../parts/out.csv"), Path("parts"))
    require_outside(Path("parts.csv"), Path("parts"))
    require_outside(Path("battles.csv"), Path("battles.csv"))
