"""The truth of an arena covers its votes, each id once; prepare says so, not a report after the training."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from common.errors import ArenaError
from data_prep.export_reader import truth_of
from data_prep.ground_truth import probabilities_of, read_truth_ids, require_truth_of

HEAD = "id,winner_model_a,winner_model_b,winner_tie\n"
IDS = [f"b{n}" for n in range(50)]


def truth(ids) -> Path:
    Path("truth.csv").write_text(HEAD + "".join(f"{name},0.2,0.3,0.5\n" for name in ids), encoding="utf-8")
    return Path("truth.csv")


def rows(ids, tests=()) -> Path:
    source = ["train"] * len(ids) + ["test"] * len(tests)
    write_table(pa.table({"source": source, "id": [*ids, *tests]}), "rows.parquet", row_group_size=7)
    return Path("rows.parquet")


@pytest.mark.parametrize("more", [[], ["other", "ids"]])
def test_a_truth_of_all_votes_is_taken_in_any_order_and_with_others(workplace, more):
    path = truth([*reversed(IDS), *more])
    require_truth_of(rows(IDS, tests=["not in it"]), read_truth_ids(path), path)


def test_an_id_reads_as_that_of_the_votes_does(workplace):
    path, ids = truth(["NA", " 12 ", "007", '" null"', "1e3"]), ["NA", " 12 ", "007", " null", "1e3"]
    require_truth_of(rows(ids), read_truth_ids(path), path)
    assert probabilities_of(truth_of(Path()), ids).tolist() == [[0.2, 0.3, 0.5]] * 5


def test_probabilities_that_are_missing_or_double_are_no_key_error():
    table = pd.DataFrame([["1", 0.2, 0.3, 0.5], ["2", 0.1, 0.1, 0.8]], columns=HEAD.strip().split(","))
    assert probabilities_of(table, ["2", "1", "2"]).tolist() == [[0.1, 0.1, 0.8], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]
    with pytest.raises(ArenaError, match=r"x/truth\.csv: 2 judged row\(s\) have no true .* is 3\n"):
        probabilities_of(table, ["1", "3", "4"], "x/truth.csv")
    with pytest.raises(ArenaError, match=r"1 judged row.*first id is 1"):
        probabilities_of(pd.concat([table, table]), ["1"])
