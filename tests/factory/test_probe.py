"""The probe of this machine's CPU: a product's first, slow calls do not make its figure."""

import subprocess
import sys

import pytest

from factory import gpu as probe


def test_a_forecast_says_only_what_concerns_its_reader():
    code = (
        "from factory import probe; from types import SimpleNamespace as S;"
        "print(probe.probe_cpu(S(hidden=64, feed_forward=64), nf4=True).dequantise > 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"
    assert "gemm_4bit_forward" not in done.stderr


def test_slow_first_calls_do_not_count(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(probe.time, "perf_counter", lambda: now[0])

    def wakes_up():
        calls.append(1)
        now[0] += 0.01 if len(calls) <= 8 else 0.0005

    assert probe._seconds(wakes_up) == pytest.approx(0.0005)
    assert now[0] >= 0.25, "long enough for a clock"
