"""The geometry: everything stays inside its drawing and lies where its value is."""

from hypothesis import given
from hypothesis import strategies as st

from scoring.report import figures

REAL = st.floats(-1e6, 1e6).filter(lambda value: value == 0 or abs(value) > 1e-6)


@given(st.lists(REAL, min_size=1, max_size=20))
def test_an_axis_holds_its_values_in_order_with_round_ticks(values):
    axis = figures.axis_of(values)
    places = [axis.at(value) for value in sorted(values)]
    assert places == sorted(places) and 0 <= places[0] <= places[-1] <= 100
    assert len(axis.ticks) <= 8 and list(axis.ticks) == sorted(set(axis.ticks))
    labels = [f"{tick:.{axis.digits}f}" for tick in axis.ticks]
    assert len(set(labels)) == len(labels), "the decimals tell the ticks apart"


def test_the_curve_is_drawn_in_step_order_and_thinned():
    points = [{"step": step, "loss": 3 - step / 1000} for step in range(2000, 0, -1)]
    drawing = figures.curve([*points, {"step": 500, "eval_loss": 2.0}])
    line = [tuple(map(float, point.split(","))) for point in drawing["train"].split()]
    assert len(line) <= figures.CURVE_POINTS and line == sorted(line)
    assert all(0 <= x <= 100 and 0 <= y <= 100 for x, y in line) and drawing["evals"] == [(500, 2.0)]
    assert figures.curve([{"step": 1, "loss": None}]) is None
    x, y = map(float, figures.curve([{"step": 10, "loss": 1.2}])["train"].split(","))
    assert x == 50 and 40 < y < 60, "one point lies in the middle"


def test_a_first_loss_far_above_the_others_is_cut_off_and_told():
    late = [{"step": step, "loss": 1.1 - step / 1000} for step in range(3, 101)]
    drawing = figures.curve([{"step": 1, "loss": 12.0}, *late])
    assert drawing["clipped"] == 12 and drawing["losses"].high < 1.2
    assert figures.curve(late)["clipped"] is None
