"""scoring.runner: whatever happens on the way, the scores are those of an undisturbed run."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from common.files import only_run
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


def no_limit(job):
    pace = Pace(lambda _: None, job.tokens)
    pace.begin()
    return pace


def scored(base, scorer=None, show=None, **options) -> pd.DataFrame:
    job, executor = opened(base, scorer, show, **options)
    job.straight(executor, no_limit(job))
    assert job.swapped(executor, no_limit(job)) == job.rows
    return pd.concat(job.tables(), ignore_index=True)


def test_every_row_has_its_own_scores_in_the_order_of_the_input(tmp_path):
    table = scored(tmp_path)
    assert list(table.columns) == [*ROW_FACTS, "ab_a", "ab_b", "ab_tie", "ba_a", "ba_b", "ba_tie"]
    assert table["id"].tolist() == [f"r{n}" for n in range(ROWS)]
    straight = np.array([scores_of(n, False) for n in range(ROWS)])
    swapped = np.array([scores_of(n, True) for n in range(ROWS)])
    np.testing.assert_array_equal(table[["ab_a", "ab_b", "ab_tie"]], straight)
    np.testing.assert_array_equal(table[["ba_a", "ba_b", "ba_tie"]], swapped[:, [1, 0, 2]], "A and B changed places")


def test_the_most_uncertain_rows_are_swapped_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "_RANKED_TOGETHER", 20)
    scorer = FakeScorer()
    scored(tmp_path, scorer)
    order = [number for batch in scorer.asked for number, swapped in batch if swapped]
    assert set(order) == set(range(ROWS))
    assert set(order[:20]) == set(range(20)), "rows with small numbers are the least sure"


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


def test_fresh_asks_everything_again_and_leaves_other_runs_alone(tmp_path):
    expected = scored(tmp_path)
    other = scored(tmp_path, data="sha256:ee")
    scorer = FakeScorer()
    pd.testing.assert_frame_equal(scored(tmp_path, scorer, fresh=True), expected)
    assert sum(len(batch) for batch in scorer.asked) == 2 * ROWS
    untouched = FakeScorer()
    pd.testing.assert_frame_equal(scored(tmp_path, untouched, data="sha256:ee"), other)
    assert untouched.asked == []


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
    again = FakeScorer()
    scored(tmp_path, again)
    assert again.asked == [], "those of the first inputs are still there"


def test_rows_that_were_damaged_are_read_again(tmp_path):
    expected = scored(tmp_path)
    (texts,) = tmp_path.glob("valid-*/rows.jsonl")
    texts.write_bytes(texts.read_bytes()[:-5])
    scorer = FakeScorer()
    pd.testing.assert_frame_equal(scored(tmp_path, scorer), expected)
    assert scorer.asked == []


def test_no_row_is_no_work(tmp_path):
    job, executor = opened(tmp_path, count=0)
    job.straight(executor, no_limit(job))
    assert job.swapped(executor, no_limit(job)) == 0
    assert list(job.tables()) == [] and list(job.ids()) == []


def test_the_folder_goes_when_the_work_is_done(tmp_path):
    job, executor = opened(tmp_path / "scoring")
    job.straight(executor, no_limit(job))
    job.remove()
    assert not (tmp_path / "scoring").exists()


def test_the_lock_of_a_run_that_has_no_shards_yet_is_left_to_it(tmp_path):
    base = tmp_path / "scoring"
    job, executor = opened(base)
    with only_run(base / "input-b.csv"):
        job.straight(executor, no_limit(job))
        job.remove()
        assert [path.name for path in base.iterdir()] == [".input-b.csv.lock"]
        with pytest.raises(ArenaError, match="another run is at work"), only_run(base / "input-b.csv"):
            pass


def test_a_time_limit_swaps_as_many_rows_as_it_allows_the_most_uncertain_first(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_plan, "_RANKED_TOGETHER", 20)
    now, notes, scorer = [100.0], [], FakeScorer()
    scorer.before = lambda prepared: now.__setitem__(0, now[0] + len(prepared) * 0.1)
    job, executor = opened(tmp_path, scorer)
    # each row takes 0.1 s: 30 s for all of them once, and about half as many again within 46 s
    pace = Pace(notes.append, job.tokens, 46.0, clock=lambda: now[0])
    pace.begin()
    job.straight(executor, pace)
    both = job.swapped(executor, pace)
    assert 80 <= both <= 160 and now[0] - 100 <= 46
    table = pd.concat(job.tables(), ignore_index=True)
    assert table[["ab_a", "ab_b", "ab_tie"]].notna().all(axis=None)
    has_both = table["ba_a"].notna()
    assert has_both.sum() == both
    assert table.index[has_both].max() < 20 + both, "the uncertain ones are those with small numbers"
    assert len(notes) == 1 and "tokens/s" in notes[0] and "the most uncertain first" in notes[0]
    # without a limit the next call does the rest, and nothing twice
    rest = FakeScorer()
    expected = scored(tmp_path / "whole")
    pd.testing.assert_frame_equal(scored(tmp_path, rest), expected)
    assert sum(map(len, rest.asked)) == ROWS - both


def test_a_store_gives_back_what_was_written(tmp_path):
    store = RowStore.write(tmp_path, rows(2500))
    facts, texts = zip(*rows(2500), strict=True)
    assert store.inputs([2499, 0, 7]) == [texts[2499], texts[0], texts[7]]
    assert (store.rows, store.tokens) == (2500, sum(f["tokens"] for f in facts))
    assert store.lengths[3:6].tolist() == [f["tokens"] for f in facts[3:6]]
    assert list(store.ids()) == [f["id"] for f in facts]
    assert pd.concat(store.windows())["tokens"].tolist() == [f["tokens"] for f in facts]


def test_the_plan_holds_every_row_once_within_its_budget(tmp_path):
    store = RowStore.write(tmp_path, rows(2500))
    shards = list(shard_plan.straight_shards(store))
    assert sorted(np.concatenate([s.rows for s in shards]).tolist()) == list(range(2500))
    lengths = store.lengths
    for shard in shards:
        assert shard.tokens == lengths[shard.rows].sum() <= 600
        assert (np.diff(lengths[shard.rows]) <= 0).all(), "the longest first"
    assert len(shards) < 1.1 * store.tokens / 600 + 1, "and they are full"
