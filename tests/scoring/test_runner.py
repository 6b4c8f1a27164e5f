"""scoring.runner: the scores are those of an undisturbed run, whatever happens; limits are kept, or refused early."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError, UsageError
from scoring import score_store as shard_plan
from scoring.executor import InProcess
from scoring.runner import Pace, open_job, parse_duration
from scoring.score_store import ROW_FACTS, RowStore
from tests.scoring.fakes import FakeScorer, quiet_show, rows, scores_of

ROWS = 300


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_TOKENS", 600)


def scored(base, scorer=None, show=None, fresh=False, **inputs) -> pd.DataFrame:
    scorer = scorer or FakeScorer()
    executor = InProcess(scorer)
    more = {"rows": lambda: rows(ROWS), "label": "sft", "show": show or quiet_show(), "fresh": fresh}
    inputs = {"data": "sha256:dd", "model": scorer.inputs()} | inputs
    job = open_job(base, "valid", scorer, executor, inputs=inputs, **more)
    for swapped in (False, True):
        job.score(executor, Pace(job.tokens), swapped=swapped)
    return pd.concat(job.tables(), ignore_index=True)


def test_every_row_has_its_own_scores_in_the_order_of_the_input(tmp_path):
    table = scored(tmp_path)
    assert list(table.columns) == [*ROW_FACTS, "ab_a", "ab_b", "ab_tie", "ba_a", "ba_b", "ba_tie"]
    assert table["id"].tolist() == [f"r{n}" for n in range(ROWS)]
    straight = np.array([scores_of(n, False) for n in range(ROWS)])
    swapped = np.array([scores_of(n, True) for n in range(ROWS)])
    np.testing.assert_array_equal(table[["ab_a", "ab_b", "ab_tie"]], straight)
    np.testing.assert_array_equal(table[["ba_a", "ba_b", "ba_tie"]], swapped[:, [1, 0, 2]], "A and B changed places")


@pytest.mark.parametrize("moment", [0, 1, 7, 25])
def test_an_interrupted_run_goes_on_and_asks_nothing_twice(tmp_path, moment):
    whole = FakeScorer()
    expected = scored(tmp_path / "whole", whole)

    first, second, show = FakeScorer(), FakeScorer(), quiet_show()

    def stop(_):
        if len(first.asked) == moment:
            raise KeyboardInterrupt

    first.before = stop
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "cut", first)
    found = scored(tmp_path / "cut", second, show)
    pd.testing.assert_frame_equal(found, expected)
    assert first.asked + second.asked == whole.asked, "the same batches, each once"
    assert ("rows were scored by an earlier call" in show.stream.getvalue()) == (moment > 0)


@pytest.mark.parametrize("damage", ["torn", "flipped", "foreign", "emptied", "text"])
def test_a_shard_that_is_not_what_it_should_be_is_named_and_scored_again(tmp_path, damage):
    expected = scored(tmp_path / "a")
    if damage == "foreign":
        scored(tmp_path / "b", FakeScorer(weights="sha256:bb"))
    (victim,) = tmp_path.glob("a/valid-*/ab-00003.scores")
    content = victim.read_bytes()
    changed = {"torn": content[: len(content) // 2], "emptied": b"", "text": b"[1, 2]\nnothing"}
    changed["flipped"] = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    for other in tmp_path.glob("b/valid-*/ab-00003.scores"):
        changed["foreign"] = other.read_bytes()
    victim.write_bytes(changed[damage])
    scorer, show = FakeScorer(), quiet_show()
    pd.testing.assert_frame_equal(scored(tmp_path / "a", scorer, show), expected)
    assert len(scorer.asked) == 1, "only that shard"
    assert "ab-00003.scores" in show.stream.getvalue() and "scored again" in show.stream.getvalue()
    assert victim.read_bytes() == content


@pytest.mark.parametrize("changed", ["weights", "precision", "data"])
def test_scores_of_other_inputs_are_never_taken(tmp_path, changed):
    scored(tmp_path)
    scorer, show = FakeScorer(**({changed: "sha256:cc"} if changed != "data" else {})), quiet_show()
    scored(tmp_path, scorer, show, **({"data": "sha256:cc"} if changed == "data" else {}))
    assert sum(map(len, scorer.asked)) == 2 * ROWS, "everything again"
    assert "with other inputs are not used" in show.stream.getvalue()
    again, fresh = FakeScorer(), FakeScorer()
    scored(tmp_path, again)
    assert again.asked == [], "those of the first inputs are still there"
    scored(tmp_path, fresh, fresh=True)
    assert sum(map(len, fresh.asked)) == 2 * ROWS


def test_rows_that_were_damaged_are_read_again(tmp_path):
    expected = scored(tmp_path)
    (texts,) = tmp_path.glob("valid-*/rows.jsonl")
    texts.write_bytes(texts.read_bytes()[:-5])
    scorer = FakeScorer()
    pd.testing.assert_frame_equal(scored(tmp_path, scorer), expected)
    assert scorer.asked == []


def test_a_store_gives_back_what_was_written_and_the_plan_holds_every_row_once(tmp_path):
    store = RowStore.write(tmp_path, rows(2500))
    facts, texts = zip(*rows(2500), strict=True)
    assert store.inputs([2499, 0, 7]) == [texts[2499], texts[0], texts[7]]
    assert (store.rows, store.tokens) == (2500, sum(f["tokens"] for f in facts))
    assert list(store.ids()) == [f["id"] for f in facts]
    shards = list(shard_plan.shards(store, shard_plan.STRAIGHT))
    assert sorted(np.concatenate([s.rows for s in shards]).tolist()) == list(range(2500))
    for shard in shards:
        assert shard.tokens == store.lengths[shard.rows].sum() <= 600
        assert (np.diff(store.lengths[shard.rows]) <= 0).all(), "the longest first"
    assert len(shards) < 1.1 * store.tokens / 600 + 1, "and they are full"


def test_lengths_of_time():
    texts = {"9h": 32400, "90m": 5400, "1h30m": 5400, "3600s": 3600, "1.5H": 5400, " 2m5s ": 125}
    assert {text: parse_duration(text) for text in texts} == texts
    for text in ("", "9", "nine hours", "-1h", "0m", "30m1h", "1d", "nan"):
        with pytest.raises(UsageError, match=r"is not a length of time(.|\n)*1h30m"):
            parse_duration(text)


def paced(limit, must=100_000):
    clock = SimpleNamespace(now=0.0)
    return Pace(must, limit, clock=lambda: clock.now), clock


def test_what_cannot_fit_is_refused_on_the_first_batches():
    pace, clock = paced(3600)
    clock.now = 40.0
    with pytest.raises(ArenaError, match="every row once takes") as caught:
        pace.update(500, must=True)  # 12.5 tokens a second: 8,000 s for all
    assert "8bit" in caught.value.remedy and "goes on from what is scored" in caught.value.remedy
    assert "no table of probabilities is written" in caught.value.what and "1:00:00" in caught.value.where


def test_a_slow_beginning_alone_refuses_nothing():
    pace, clock = paced(1000)
    clock.now = 12.0
    pace.update(1100, must=True)  # 1,090 s for all: the longest rows come first, so this may still get faster
    clock.now = 200.0
    with pytest.raises(ArenaError, match="every row once takes"):
        pace.update(15_000, must=True)


def test_the_other_order_is_allowed_where_it_fits():
    pace, clock = paced(100)
    assert not pace.allows(1), "nothing was measured yet"
    clock.now = 40.0
    pace.update(100_000, must=True)  # 2,500 tokens a second, 58 s left less the reserve
    assert pace.allows(130_000) and not pace.allows(150_000)
    assert Pace(100_000).allows(10**9), "no limit"


def test_what_an_earlier_call_scored_is_not_forecast():
    pace, clock = paced(1000)
    pace.skip(90_000)
    clock.now = 20.0
    pace.update(1000, must=True)  # 50 tokens a second: 10,000 tokens fit in 1,000 s, 100,000 would not
