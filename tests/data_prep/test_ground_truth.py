"""The truth of an arena covers its votes, each id once; that is told by prepare, not by a report after the training."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from pyarrow.parquet import write_table

from common.errors import ArenaError
from data_prep.export_reader import truth_of
from data_prep.ground_truth import check_truth, probabilities_of, require_truth_of

HEAD = "id,winner_model_a,winner_model_b,winner_tie\n"


def truth(ids, path: str = "truth.csv") -> Path:
    Path(path).write_text(HEAD + "".join(f"{name},0.2,0.3,0.5\n" for name in ids), encoding="utf-8")
    return Path(path)


def rows(ids, tests=(), group: int = 7) -> Path:
    split = ["valid" if n % 3 == 0 else "train" for n in range(len(ids))] + ["test"] * len(tests)
    write_table(pa.table({"split": split, "id": [*ids, *tests]}), "rows.parquet", row_group_size=group)
    return Path("rows.parquet")


@pytest.mark.parametrize("more", [[], ["other", "ids"]])
def test_a_truth_of_all_votes_is_taken_in_any_order_and_with_others(workplace, more):
    ids = [f"b{n}" for n in range(50)]
    path = truth([*reversed(ids), *more])
    check_truth(path)
    require_truth_of(rows(ids, tests=["not in it"]), path)


@pytest.mark.parametrize("gone", [0, 1, 25, 48, 49])
def test_a_battle_without_true_probabilities_is_named(workplace, gone):
    ids = [f"b{n}" for n in range(50)]
    path = truth(ids[:gone] + ids[gone + 1 :])
    check_truth(path)
    with pytest.raises(ArenaError, match=rf"of 1 of the 50 battles, the first id is b{gone}\n") as caught:
        require_truth_of(rows(ids), path)
    assert caught.value.where == "truth.csv" and "with these votes" in caught.value.remedy


@pytest.mark.parametrize("known", [0, 1, 30])
def test_all_that_lack_it_are_counted(workplace, known):
    ids = [f"b{n}" for n in range(50)]
    with pytest.raises(ArenaError, match=rf"of {50 - known} of the 50 battles, the first id is b{known}\n"):
        require_truth_of(rows(ids), truth(ids[:known]))


def test_an_id_that_stands_twice_is_refused_and_equal_hashes_alone_are_not(workplace, monkeypatch):
    with pytest.raises(ArenaError, match="the id b1 stands in row 2 and again in row 4"):
        check_truth(truth(["b0", "b1", "b2", "b1"]))
    monkeypatch.setattr("data_prep.ground_truth.hash_of", lambda identity: 7)
    monkeypatch.setattr("data_prep.readers.hash_of", lambda identity: 7)
    check_truth(truth(["b0", "b1", "b2"]))
    with pytest.raises(ArenaError, match="stands in row 1 and again in row 3"):
        check_truth(truth(["b0", "b1", "b0"]))


def test_an_id_reads_as_that_of_the_votes_does(workplace):
    path = truth(["NA", " 12 ", "007", '" null"', "1e3"])
    check_truth(path)
    ids = ["NA", "12", "007", "null", "1e3"]
    require_truth_of(rows(ids), path)
    assert probabilities_of(truth_of(Path()), ids).tolist() == [[0.2, 0.3, 0.5]] * 5


def test_memory_is_eight_bytes_a_row(workplace):
    count = 50_000
    path = truth(range(count))
    table = rows([str(n) for n in range(count)], group=1000)
    check_truth(path)  # imports come before
    require_truth_of(table, path)
    for call in (lambda: check_truth(path), lambda: require_truth_of(table, path)):
        tracemalloc.start()
        try:
            call()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 10 * count + (1 << 20), "an array keeps an eighth of it free; some thousand ids are texts"


def test_probabilities_that_are_missing_or_double_are_no_key_error():
    table = pd.DataFrame([["1", 0.2, 0.3, 0.5], ["2", 0.1, 0.1, 0.8]], columns=HEAD.strip().split(","))
    assert probabilities_of(table, ["2", "1", "2"]).tolist() == [[0.1, 0.1, 0.8], [0.2, 0.3, 0.5], [0.1, 0.1, 0.8]]
    with pytest.raises(ArenaError, match=r"x/truth\.csv: 2 judged row\(s\) have no true probabilities, .* is 3\n"):
        probabilities_of(table, ["1", "3", "4"], "x/truth.csv")
    with pytest.raises(ArenaError, match="the id 1 stands twice"):
        probabilities_of(pd.concat([table, table]), ["1"])
