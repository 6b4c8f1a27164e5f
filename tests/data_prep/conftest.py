"""What tests of the export share: votes, and an experiment on the embedded base, which gives a real tokenizer."""

import pytest

from data_prep.synthetic import write_arena


@pytest.fixture
def experiment(make_experiment, tiny_base, workplace):
    (workplace / "models").mkdir()
    (workplace / "models" / "arena-tiny").symlink_to(tiny_base)
    return make_experiment("exam", model="models/arena-tiny", cutoff_len=300, valid_share=0.2)


@pytest.fixture
def arena(workplace):
    return write_arena(workplace / "arena", seed=5, train_rows=300, test_rows=20)
