"""The probe of this machine's CPU: a product's first, slow calls do not make its figure."""

import time

from factory import probe


def test_slow_first_calls_do_not_count():
    calls = []

    def wakes_up():
        calls.append(1)
        time.sleep(0.01 if len(calls) <= 8 else 0.0005)

    assert 0.0005 <= probe._seconds(wakes_up) < 0.005
