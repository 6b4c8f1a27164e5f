"""scoring.predictions: exactly the competition's table, or an error that names the rows."""

import csv

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import ArenaError
from scoring.predictions import check_submission, write_probabilities

P = np.array([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])


def test_header_order_and_ids_stay_as_they_are(tmp_path):
    path = tmp_path / "submission.csv"
    write_probabilities(path, ["0065089", 'odd, "id"'], P)
    with path.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["id", "winner_model_a", "winner_model_b", "winner_tie"]
    assert rows[1] == ["0065089", "0.2", "0.3", "0.5"]
    assert rows[2][0] == 'odd, "id"'
    assert check_submission(path, ["0065089", 'odd, "id"']) == 2


def test_integer_ids_are_written_without_a_point(tmp_path):
    path = tmp_path / "s.csv"
    write_probabilities(path, np.array([136060, 211333]), P)
    assert path.read_text().splitlines()[1].startswith("136060,0.2")
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
        ([65089.0, 2.0], P, "ids as text"),
        ([None, "y"], P, "ids as text"),
        (["x"], P, "1 ids but"),
    ],
)
def test_what_is_no_table_of_probabilities_is_refused_and_the_old_file_survives(tmp_path, ids, values, words):
    path = tmp_path / "s.csv"
    path.write_text("earlier")
    with pytest.raises(ArenaError, match=words):
        write_probabilities(path, ids, np.array(values))
    assert path.read_text() == "earlier"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("id,a,b,c\n", "header must be"),
        ("", "header must be"),
        ("id,winner_model_a,winner_model_b,winner_tie\n1,0.2,0.3,0.5\n", "1 id.s. are missing: 2"),
        ("id,winner_model_a,winner_model_b,winner_tie\n2,0.2,0.3,0.5\n1,0.2,0.3,0.5\n", "order"),
        ("id,winner_model_a,winner_model_b,winner_tie\n1,0.2,0.3,0.5\n3,0.2,0.3,0.5\n", "not in the test set: 3"),
        ("id,winner_model_a,winner_model_b,winner_tie\n1,0.2,0.3,\n2,0.2,0.3,0.5\n", "NaN or infinite: id 1"),
        ("id,winner_model_a,winner_model_b,winner_tie\n1,0.2,0.3,0.6\n2,0.2,0.3,0.5\n", "not summing to 1: id 1"),
        ("id,winner_model_a,winner_model_b,winner_tie\n1,0.2\n", "line 2"),
    ],
)
def test_a_faulty_submission_is_found(tmp_path, content, words):
    path = tmp_path / "submission.csv"
    path.write_text(content)
    with pytest.raises(ArenaError, match=words):
        check_submission(path, ["1", "2"])


def test_a_missing_submission_is_an_error_with_a_remedy(tmp_path):
    with pytest.raises(ArenaError, match="remedy"):
        check_submission(tmp_path / "none.csv", [])
