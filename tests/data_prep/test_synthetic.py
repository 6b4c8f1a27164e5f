"""The synthetic arena: its format, its known probabilities, and that it keeps them out of the training file."""

import json
import math

import pytest
from chain import rows_of

from common.battle import PROBABILITY_COLUMNS
from common.errors import ArenaError
from common.files import sha256_of
from data_prep.synthetic import TRAIN_COLUMNS, cell, quality, true_probabilities, write_arena


@pytest.fixture(scope="module")
def arena(tmp_path_factory):
    return write_arena(tmp_path_factory.mktemp("arena"), seed=3, train_rows=3000, test_rows=200)


def test_files_have_the_competitions_columns_and_cells(arena):
    train, test, truth = (rows_of(path) for path in arena)
    assert tuple(train[0]) == TRAIN_COLUMNS and [row["id"] for row in truth] == [row["id"] for row in train + test]
    assert (len(train), len(test)) == (3000, 200)
    for row in train + test:
        turns = [json.loads(row[name]) for name in ("prompt", "response_a", "response_b")]
        assert len({len(column) for column in turns}) == 1
        assert all(isinstance(text, str) and text.strip() for column in turns for text in column)
        assert [cell(column) for column in turns] == [row[name] for name in ("prompt", "response_a", "response_b")]
    assert len({row["id"] for row in train + test}) == 3200
    assert cell(['a/b "c"\n', "é\ud83d"]) == r'["a\/b \"c\"\n","\u00e9\ud83d"]'


def test_truth_follows_from_the_text_of_the_files_alone(arena):
    """A reader of the CSV that knows the topic's kind gets the same probabilities; one of two kinds must fit."""
    for row, true in zip(rows_of(arena.test), rows_of(arena.truth)[3000:], strict=True):
        a, b = json.loads(row["response_a"]), json.loads(row["response_b"])
        told = [float(true[column]) for column in PROBABILITY_COLUMNS]
        kinds = (true_probabilities(quality(k, a), quality(k, b)) for k in ("practical", "playful"))
        assert any(list(chances) == told for chances in kinds)


def test_the_learnable_signal_is_large_and_calibrated(arena):
    train, truth = rows_of(arena.train), rows_of(arena.truth)[:3000]
    chances = [[float(row[column]) for column in PROBABILITY_COLUMNS] for row in truth]
    won = [next(i for i, c in enumerate(PROBABILITY_COLUMNS) if row[c] == "1") for row in train]
    bayes = -sum(math.log(p[i]) for p, i in zip(chances, won, strict=True)) / 3000
    prior = -sum(math.log(won.count(i) / 3000) for i in won) / 3000
    assert 0.7 < bayes < 0.85 and 1.05 < prior < math.log(3)
    for i in range(3):  # drawn from these chances: the observed share is within 4 standard errors
        error = math.sqrt(sum(p[i] * (1 - p[i]) for p in chances))
        assert abs(won.count(i) - sum(p[i] for p in chances)) < 4 * error


def test_a_seed_gives_the_bytes_that_it_always_gave(tmp_path):
    files = write_arena(tmp_path, seed=1, train_rows=6000, test_rows=500)
    assert [sha256_of(path)[:16] for path in files] == ["3bc9785f4404ea86", "5c84e17c9f3847f5", "50a678aa794b9f33"]
    assert sha256_of(write_arena(tmp_path, seed=2, train_rows=60, test_rows=10).test)[:16] != "5c84e17c9f3847f5"


def test_a_number_of_rows_must_be_positive(tmp_path):
    with pytest.raises(ArenaError, match="train_rows is 0; test_rows is -1"):
        write_arena(tmp_path / "arena", seed=1, train_rows=0, test_rows=-1)
    assert not (tmp_path / "arena").exists()
