"""What tests of the export share: an experiment on the embedded base, which gives a real tokenizer and template."""

import pytest


@pytest.fixture
def experiment(make_experiment, tiny_base, workplace):
    (workplace / "models").mkdir()
    (workplace / "models" / "arena-tiny").symlink_to(tiny_base)
    return make_experiment("exam", model="models/arena-tiny", cutoff_len=300, valid_share=0.2)
