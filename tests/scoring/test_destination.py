"""scoring.destination: no result's own table and nobody else's file is replaced by the probabilities of a table."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.errors import UsageError
from scoring.destination import require_outside, require_replaceable, scored_file
from scoring.probabilities import write_probabilities
from scoring.verify import TABLES


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


def test_an_earlier_output_may_be_replaced_and_so_may_nothing(workplace):
    require_replaceable(Path("new/place/out.csv"), "battles.csv")
    write_probabilities(Path("out.csv"), ["1"], [[0.2, 0.3, 0.5]])
    require_replaceable(Path("out.csv"), "battles.csv")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n", "not an earlier output"),
        ("id,winner_model_a,winner_model_b,winner_tie,more\n", "not an earlier output"),
        ("", "not an earlier output"),
    ],
)
def test_any_other_file_is_refused(workplace, content, words):
    Path("train.csv").write_text(content)
    with pytest.raises(UsageError, match=words) as caught:
        require_replaceable(Path("train.csv"), "test.csv")
    assert (caught.value.exit_code, caught.value.where) == (2, "train.csv")
    assert "another path" in caught.value.remedy
    assert Path("train.csv").read_text() == content


def test_the_input_a_folder_and_a_place_below_a_file_are_refused(workplace):
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
            require_replaceable(Path(output), "battles.csv")


@pytest.mark.parametrize("name", TABLES)
def test_a_result_s_own_tables_are_refused_also_where_one_is_missing(workplace, name):
    stage = Path("outputs/exam/rm")
    stage.mkdir(parents=True)
    (stage / "report.json").write_text("{}")
    with pytest.raises(UsageError, match="a finished result's own table"):
        require_replaceable(stage / name, "battles.csv")
    write_probabilities(stage / name, ["1"], [[0.2, 0.3, 0.5]])
    with pytest.raises(UsageError, match="a finished result's own table"):
        require_replaceable(stage / name, "battles.csv")
    require_replaceable(stage / "scored" / name, "battles.csv")
    require_replaceable(Path(name), "battles.csv")


def test_an_output_is_not_a_part_of_its_own_input(workplace):
    Path("parts").mkdir()
    with pytest.raises(UsageError, match="lies in the folder that is read"):
        require_outside(Path("parts/../parts/out.csv"), Path("parts"))
    require_outside(Path("parts.csv"), Path("parts"))
    require_outside(Path("battles.csv"), Path("battles.csv"))
