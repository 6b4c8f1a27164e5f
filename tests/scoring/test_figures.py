"""The chart geometry: everything stays inside its drawing and stands where its value is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scoring.report import figures as charts

REAL = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(st.lists(REAL, min_size=1, max_size=20))
def test_an_axis_holds_its_values_in_order_with_round_ticks(values):
    axis = charts.axis_of(values)
    places = [axis.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert 0 <= places[0] <= places[-1] <= 100
    assert len(axis.ticks) <= 8
    assert list(axis.ticks) == sorted(set(axis.ticks))


def test_marks_stand_at_their_values():
    drawn = charts.intervals([charts.mark("a", 1.0, [0.9, 1.1]), charts.mark("b", 2.0, None)], reference=1.5)
    first, second = drawn.marks
    assert first.x_low < first.x < first.x_high < drawn.reference < second.x
    assert drawn.reference == pytest.approx((first.x + second.x) / 2, abs=0.01)
    assert second.x_low is None
    assert all(0 <= x <= 100 for _, x in drawn.ticks)


def test_missing_and_constant_intervals_are_not_drawn():
    assert charts.mark("uniform", 1.0986, [1.0986, 1.0986 + 1e-12]).ends is None
    drawn = charts.intervals([charts.mark("a", float("nan"), None)])
    assert drawn.axis is None
    assert drawn.ticks == []
    assert drawn.marks[0].x is None


def test_curve_is_drawn_in_step_order_and_thinned():
    points = [{"step": step, "loss": 3 - step / 1000} for step in range(2000, 0, -1)] + [
        {"step": 500, "eval_loss": 2.0}
    ]
    drawing = charts.curve(points)
    raw = [tuple(map(float, point.split(","))) for point in drawing["raw"].split()]
    assert len(raw) <= charts.CURVE_POINTS
    assert raw == sorted(raw)
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in raw)
    assert drawing["smooth"]
    assert drawing["last_eval"] == (500, 2.0)
    assert charts.curve([{"step": 1, "loss": None}]) is None


def test_smoothing_keeps_a_straight_line_and_both_ends():
    line = [(float(step), 2.0 - 0.01 * step) for step in range(100)]
    assert charts.smoothed(line) == [pytest.approx(point) for point in line]
    assert charts.smoothed(line[:5]) == []


def test_reliability_area_stands_for_the_count():
    bins = charts.reliability(
        [
            {"confidence": 0.8, "frequency": 0.5, "count": 400},
            {"confidence": 0.4, "frequency": 0.25, "count": 100},
            {"confidence": 0.1, "frequency": 0.0, "count": 0},
        ]
    )
    assert [(row["x"], row["y"]) for row in bins] == [(40.0, 75.0), (80.0, 50.0)]
    assert bins[1]["radius"] == pytest.approx(2 * bins[0]["radius"])


@pytest.mark.parametrize("broken", [None, [], [[1, 2, 3]], [[1, 2], [3, 4], [5, 6]], "abc"])
def test_a_broken_confusion_table_is_none(broken):
    assert charts.confusion(broken) is None


def test_confusion_shares_are_of_the_row():
    cells = charts.confusion([[3, 1, 0], [0, 0, 0], [1, 1, 2]])
    assert [cell["share"] for cell in cells[0]] == [0.75, 0.25, 0.0]
    assert [cell["share"] for cell in cells[1]] == [None] * 3


def test_a_curve_of_one_point_can_be_drawn():
    drawing = charts.curve([{"step": 10, "loss": 1.2}])
    assert drawing["first"] == drawing["last"] == (10, 1.2)
    x, y = map(float, drawing["raw"].split()[0].split(","))
    assert x == 50 and 40 < y < 60
