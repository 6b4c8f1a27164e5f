"""scoring.runner: whatever happens on the way, the scores are those of an undisturbed run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from scoring import score_store as shard_plan
from scoring.executor import InProcess
from scoring.runner import open_job
from scoring.score_store import ROW_FACTS, RowStore
from scoring.time_limit import Pace
from tests.scoring.fakes import FakeScorer, quiet_show, rows, scores_of

ROWS = 300


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(shard_plan, "SHARD_TOKENS", 600)


def opened(base, scorer=None, show=None, count=ROWS, target="valid", fresh=False, **inputs):
    scorer = scorer or FakeScorer()
    executor = InProcess(scorer)
    job = open_job(
        base,
        target,
        scorer,
        executor,
        inputs={"data": "sha256:dd", "model": scorer.inputs()} | inputs,
        rows=lambda: rows(count),
        label="sft",
        show=show or quiet_show(),
        fresh=fresh,
    )
    return job, executor


def scored(base, scorer=None, show=None, **options) -> pd.DataFrame:
    job, executor = opened(base, scorer, show, **options)
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
    changed = {
        "torn": content[: len(content) // 2],
        "flipped": content[:-3] + bytes([content[-3] ^ 1]) + content[-2:],
        "emptied": b"",
        "text": b"[1, 2]\nnothing",
    }
    if damage == "foreign":
        (other,) = tmp_path.glob("b/valid-*/ab-00003.scores")
        victim.write_bytes(other.read_bytes())
    else:
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
