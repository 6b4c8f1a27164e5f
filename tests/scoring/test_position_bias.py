"""scoring.calibration: a row goes through the calibration of what was scored of it."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from scoring.calibration import AB_COLUMNS, BA_COLUMNS, calibrate, fit_orders, orders_of

ROWS = 600


def table(seed: int = 0) -> pd.DataFrame:
    """Logits in both orders that are far too sharp, with verdicts that they tell something of."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 3, ROWS)
    made = pd.DataFrame({"id": [f"r{n}" for n in range(ROWS)], "group": np.arange(ROWS)})
    made["verdict"] = np.array(["a", "b", "tie"])[truth]
    for columns, shift in ((AB_COLUMNS, 2.0), (BA_COLUMNS, -2.0)):
        logits = random.normal(0, 6, (ROWS, 3)) + 4 * np.eye(3)[truth] + np.array([shift, 0, 0])
        made[list(columns)] = logits
    return made


def used(valid: pd.DataFrame, swap_tta: bool):
    options = {"groups": valid["group"], "verdicts": valid["verdict"], "seed": 1, "swap_tta": swap_tta}
    return calibrate(valid, "logits", **options)


@pytest.mark.parametrize("swap_tta", [True, False])
def test_rows_with_one_order_and_with_both_have_calibrations_of_their_own(swap_tta):
    valid = table()
    found = fit_orders(valid, used(valid, swap_tta), seed=1, target_prior=None)
    assert found.one.kept and found.both.kept
    assert found.one.link != found.both.link
    fresh = table(1)
    fresh.loc[::3, list(BA_COLUMNS)] = np.nan
    probabilities = found.apply(fresh)
    np.testing.assert_allclose(probabilities.sum(axis=1), 1)
    alone = np.arange(ROWS) % 3 == 0
    np.testing.assert_array_equal(probabilities[alone], found.one.apply(fresh[alone]))
    np.testing.assert_array_equal(probabilities[~alone], found.both.apply(fresh[~alone]))


def test_a_report_keeps_both_and_an_earlier_one_has_what_it_used():
    valid = table()
    calibration = used(valid, True)
    found = fit_orders(valid, calibration, seed=1, target_prior=None)
    report = {"calibration": calibration.to_json(), "calibrations": found.to_json()}
    again, fresh = orders_of(report), table(2)
    fresh.loc[:9, list(BA_COLUMNS)] = np.nan
    np.testing.assert_allclose(again.apply(fresh), found.apply(fresh), atol=1e-12)
    earlier = orders_of({"calibration": calibration.to_json()})
    np.testing.assert_allclose(earlier.apply(fresh[10:]), found.apply(fresh[10:]), atol=1e-12)
    with pytest.raises(ArenaError, match="no calibration for rows with this number of orders") as caught:
        earlier.apply(fresh)
    assert "--fresh" in caught.value.remedy
    with pytest.raises(ArenaError):
        earlier.require_one()


def test_rewards_have_one_calibration():
    valid = table()[["id", "group", "verdict"]].assign(reward_a=0.5, reward_b=1.0, chars_a=3, chars_b=4)
    calibration = calibrate(valid, "rewards", groups=valid["group"], verdicts=valid["verdict"], seed=1)
    found = fit_orders(valid, calibration, seed=1, target_prior=None)
    assert found.both is None
    np.testing.assert_array_equal(found.apply(valid), calibration.apply(valid))
