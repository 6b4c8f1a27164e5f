"""scoring.baselines: proper probabilities, something learned, and nothing that crashes on thin data."""

import numpy as np
import pandas as pd
import pytest

from scoring import baselines, metrics
from tests.votes import drawn


def arena(rows: int, seed: int = 0) -> pd.DataFrame:
    """Battles in which the longer answer wins more often, and so does the one that says `indeed`."""
    random = np.random.default_rng(seed)
    words = np.array(["the", "a", "cat", "dog", "runs", "sleeps", "over", "under", "hill", "river", "moon", "sun"])

    def answer() -> str:
        text = " ".join(random.choice(words, random.integers(3, 40)))
        return text + (" indeed" if random.random() < 0.5 else "")

    a, b = [answer() for _ in range(rows)], [answer() for _ in range(rows)]
    s = np.array(
        [1.5 * np.log(len(x) / len(y)) + 2 * (("indeed" in x) - ("indeed" in y)) for x, y in zip(a, b, strict=True)]
    )
    logits = np.column_stack([s / 2, -s / 2, np.full(rows, -0.3)])
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    verdict = np.array(["a", "b", "tie"])[drawn(p, random)]
    return measured(pd.DataFrame({"id": range(rows), "verdict": verdict, "text_a": a, "text_b": b, "turns": 1}), "why?")


def measured(frame: pd.DataFrame, prompts: object) -> pd.DataFrame:
    """Return the frame with the lengths of its texts, from which nothing was cut."""
    texts = {"chars_prompt": pd.Series(prompts, frame.index), "chars_a": frame["text_a"], "chars_b": frame["text_b"]}
    return frame.assign(**{name: column.fillna("").map(len) for name, column in texts.items()})


def test_each_rung_learns_more_than_the_one_below():
    train, rows = arena(2_000), arena(800, seed=1)
    ladder = baselines.baseline_probabilities(train, rows, seed=0)
    assert tuple(ladder) == baselines.BASELINES
    for p in ladder.values():
        assert p.shape == (800, 3) and p.sum(axis=1) == pytest.approx(np.ones(800))
    found = {name: metrics.log_loss(p, metrics.verdict_codes(rows["verdict"])) for name, p in ladder.items()}
    assert found["uniform"] == pytest.approx(np.log(3)) and found["length"] < found["prior"] - 0.05
    assert found["tfidf"] < found["length"] - 0.05


def test_the_verdicts_of_the_judged_rows_are_never_read():
    train, rows = arena(500), arena(100, seed=1).assign(verdict=None)
    counts = train["verdict"].value_counts()
    expected = (np.array([counts[v] for v in ("a", "b", "tie")]) + 1) / 503
    assert baselines.baseline_probabilities(train, rows, 0)["prior"][0] == pytest.approx(expected)


@pytest.mark.parametrize("left", [["a", "b"], ["a", "tie"], ["tie"], []])
def test_classes_missing_in_training_get_their_smoothed_share(left):
    train = arena(300)
    train = train[train["verdict"].isin(left)]
    rows = arena(40, seed=1)
    for name, p in baselines.baseline_probabilities(train, rows, 0).items():
        assert p.sum(axis=1) == pytest.approx(np.ones(40)), name
        assert (p > 0).all(), name
    if left == ["a", "b"]:
        assert p[:, 2] == pytest.approx(np.full(40, 1 / (len(train) + 3)))


@pytest.mark.parametrize("text", ["", None, "\ud800", "一二三", "same"])
def test_identical_or_odd_texts_everywhere_do_not_crash(text):
    train, rows = (measured(frame.assign(text_a=text, text_b=text), text) for frame in (arena(200), arena(20, 1)))
    for p in baselines.baseline_probabilities(train, rows, 0).values():
        assert np.isfinite(p).all()


def test_a_large_training_set_is_sampled_and_the_note_says_so(monkeypatch):
    monkeypatch.setattr(baselines, "TFIDF_ROWS", 200)
    train, rows = arena(600), arena(50, seed=1)
    first, second = (baselines.baseline_probabilities(train, rows, seed)["tfidf"] for seed in (0, 0))
    assert (first == second).all()
    assert not np.allclose(first, baselines.baseline_probabilities(train, rows, 1)["tfidf"])
    assert "a seeded sample of 200 of the 600" in baselines.baseline_notes(600)["tfidf"]
    assert "all training rows" in baselines.baseline_notes(200)["tfidf"]
