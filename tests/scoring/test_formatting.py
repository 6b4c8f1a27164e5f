"""Numbers as text."""

import math

import pytest

from scoring.report import formatting


@pytest.mark.parametrize(
    ("write", "texts"),
    [
        (formatting.number, {0.95123: "0.951", -0.0001: "0.000", -1.5: "−1.500", None: "–", math.inf: "–"}),
        (formatting.signed, {0.01: "+0.010", -0.01: "−0.010", 0.0001: "0.000", None: "–"}),
        (formatting.percent, {0.071: "7.1%", 0.62: "62%", 0: "0%", 1: "100%", -0.2: "−20%", 0.0996: "10%", None: "–"}),
        (formatting.points, {0.17: "17", 0.041: "4.1", 0.0012: "0.12", 3.9e-7: "less than 0.01", 0.0: "0", None: "–"}),
        (formatting.count, {57477: "57,477", 0.5: "0.5", math.nan: "–"}),
        (formatting.interval, {(0.93, 0.97): "0.930 to 0.970", None: "–"}),
        (formatting.shares, {(0.7, 0.2, None): "70% / 20% / –"}),
    ],
)
def test_a_number_has_one_form(write, texts):
    assert {value: write(value) for value in texts} == texts
