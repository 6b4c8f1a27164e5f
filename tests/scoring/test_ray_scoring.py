"""scoring.ray_scoring: Ray's actors give what one process gives. Skipped where the extra is not installed."""

from __future__ import annotations

import importlib.util

import pandas as pd
import pytest

from common.errors import ArenaError
from scoring import ray_scoring
from scoring import score_store as shard_plan
from scoring.executor import InProcess
from scoring.ray_scoring import LOCAL, RayActors
from tests.scoring.fakes import FakeScorer, FakeSpec, quiet_show
from tests.scoring.test_workers import scored


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setattr(ray_scoring, "find_spec", lambda _: None)
    with pytest.raises(ArenaError, match="Ray is not installed") as caught:
        RayActors(FakeSpec(), lambda _: None, address=LOCAL, actors=2)
    assert caught.value.remedy == "make extra-ray"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="the extra ray is not installed (make extra-ray)")
def test_two_actors_on_a_local_cluster_give_what_one_process_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_TOKENS", 2500)
    expected = scored(tmp_path / "one", InProcess(FakeScorer()), quiet_show())
    show = quiet_show()
    executor = RayActors(FakeSpec(), show.note, address=LOCAL, actors=2)
    import ray

    assert {node["NodeManagerAddress"] for node in ray.nodes()} == {"127.0.0.1"}
    assert (executor.engine, executor.precision, executor.device) == ("fake", "fp32", "cpu")
    pd.testing.assert_frame_equal(scored(tmp_path / "ray", executor, show), expected)
    assert "Ray: 2 actor(s) on 1 machine(s)" in show.stream.getvalue()
    assert "Ray: out of memory: continuing with 512 tokens a batch" in show.stream.getvalue()
    assert not ray.is_initialized()
