"""scoring.executor: several processes give what one gives; one that dies is reported, and loses nothing."""

import importlib.util

import pandas as pd
import pytest

from common.errors import ArenaError
from scoring import executor as executor_module
from scoring import score_store as shard_plan
from scoring.executor import LOCAL, InProcess, RayActors, Workers, default_workers, visible_gpus
from scoring.runner import Pace, open_job
from tests.scoring.fakes import FakeScorer, FakeSpec, quiet_show, rows


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_TOKENS", 600)


def scored(base, executor, show):
    scorer = FakeScorer()
    scorer.open()
    job = open_job(base, "valid", scorer, executor, inputs={}, rows=lambda: rows(200), label="sft", show=show)
    pace = Pace(job.tokens)
    try:
        job.score(executor, pace)
        job.score(executor, pace, swapped=True)
    finally:
        executor.close()
    return pd.concat(job.tables(), ignore_index=True)


@pytest.mark.slow
def test_a_killed_worker_ends_the_run_and_the_next_one_keeps_what_is_scored(tmp_path):
    show, spec = quiet_show(), FakeSpec(deadly=158, flag=str(tmp_path / "died"))  # a short row, and so late
    with pytest.raises(ArenaError, match="a scoring worker was killed, for want of memory") as caught:
        scored(tmp_path / "two", Workers(spec, show.note, 2), show)
    assert "goes on from what is scored" in caught.value.remedy
    kept = list((tmp_path / "two").rglob("*.scores"))
    executor = Workers(spec, show.note, 2)
    assert kept and (executor.engine, executor.precision, executor.device) == ("fake", "fp32", "cpu")
    table = scored(tmp_path / "two", executor, show)
    pd.testing.assert_frame_equal(table, scored(tmp_path / "one", InProcess(FakeScorer()), quiet_show()))
    told = show.stream.getvalue()
    assert "rows were scored by an earlier call, and kept" in told
    assert "a worker: out of memory: continuing with 512 tokens a batch" in told


@pytest.mark.slow
def test_a_fault_in_a_worker_comes_out_as_it_is(tmp_path):
    with pytest.raises(ArenaError, match="id r7: has no finite score") as caught:
        scored(tmp_path, Workers(FakeSpec(fault=True), quiet_show().note, 1), quiet_show())
    assert caught.value.remedy == "look at the weights"


def test_each_visible_gpu_gets_a_process_by_the_name_that_the_user_gave(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-aa, 3")
    assert visible_gpus() == ["GPU-aa", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert visible_gpus() == ["0", "1"]
    assert (default_workers("torch"), default_workers("llama.cpp")) == (2, 1)
    with pytest.raises(ArenaError, match=r"3 workers for 2 visible GPU(.|\n)*at most 2"):
        Workers(FakeSpec(engine="torch"), lambda _: None, 3)


def test_without_the_extra_its_name_is_told(monkeypatch):
    monkeypatch.setattr(executor_module, "find_spec", lambda _: None)
    with pytest.raises(ArenaError, match="Ray is not installed") as caught:
        RayActors(FakeSpec(), lambda _: None, address=LOCAL, actors=2)
    assert caught.value.remedy == "make extra-ray"


def test_a_ray_that_does_not_start_is_told(monkeypatch):
    ray = pytest.importorskip("ray", reason="the extra ray is not installed (make extra-ray)")

    def start(**_):
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(ray, "init", start)
    with pytest.raises(ArenaError, match="Ray cannot be reached: The current node timed out"):
        RayActors(FakeSpec(), lambda _: None, address=LOCAL, actors=2)


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
