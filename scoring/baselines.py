"""The baselines that a result must beat: trained on the same training rows, judged on the same rows.

Frames have the columns id, verdict, text_a, text_b (turns joined, as a judge reads them), and chars_prompt, chars_a,
chars_b, turns of the whole battle, whatever was cut from its texts; no swapped copies.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, hstack, spmatrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from scoring.links import smoothed_prior
from scoring.metrics import verdict_codes

BASELINES = ("uniform", "prior", "length", "tfidf")
# TF-IDF of 57k battles would take minutes: beyond these caps a seeded sample of rows and the head of texts stand in.
TFIDF_ROWS = 20_000
TFIDF_CHARS = 3_000
TFIDF_TERMS = 20_000
# Strength of the L2 penalty (scikit-learn's C = 1 / strength).
_TFIDF_C = 0.3


def baseline_probabilities(train: pd.DataFrame, rows: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    """Return [rows, 3] probabilities of `rows` for each of `BASELINES`, learned from the verdicts of `train`.

    Where the frames have a column `split`, the rows of each split are answered by what was learned from the others: of
    folds that are all trained on and judged, none is judged by what it was learned from.
    Rows of `train` without a verdict are left out. A class that is missing in `train` gets its smoothed share.
    """
    if "split" not in rows or "split" not in train:
        return _learned(train, rows, seed)
    found = {name: np.full((len(rows), 3), np.nan) for name in BASELINES}
    for split in rows["split"].unique():
        here = (rows["split"] == split).to_numpy()
        for name, values in _learned(train[train["split"] != split], rows[here], seed).items():
            found[name][here] = values
    return found


def _learned(train: pd.DataFrame, rows: pd.DataFrame, seed: int) -> dict[str, np.ndarray]:
    truth = verdict_codes(train["verdict"])
    train, truth = train[truth >= 0], truth[truth >= 0]
    prior = smoothed_prior(truth)
    found = {"uniform": np.full((len(rows), 3), 1 / 3), "prior": np.tile(prior, (len(rows), 1))}
    if len(set(truth.tolist())) < 2:
        return {**found, "length": found["prior"], "tfidf": found["prior"]}
    found["length"] = _from_lengths(train, truth, rows, prior)
    if len(train) > TFIDF_ROWS:
        chosen = np.sort(np.random.default_rng(seed).choice(len(train), TFIDF_ROWS, replace=False))
        train, truth = train.iloc[chosen], truth[chosen]
    words = _words(train)
    if words is None:
        return {**found, "tfidf": _from_lengths(train, truth, rows, prior)}
    seen, asked = (_word_gaps(words, frame, train) for frame in (train, rows))
    return {**found, "tfidf": _regression(seen, truth, asked, _TFIDF_C, prior)}


def baseline_notes(train_rows: int) -> dict[str, str]:
    """Return one sentence for each baseline: what it is, and what was left out to keep it fast."""
    sampled = f"a seeded sample of {TFIDF_ROWS} of the {train_rows} training rows"
    rows = sampled if train_rows > TFIDF_ROWS else "all training rows"
    return {
        "uniform": "a third for each class",
        "prior": "the class shares of the training rows",
        "length": "logistic regression on the whole lengths of prompt, A and B, their gap and the number of turns",
        "tfidf": f"logistic regression on TF-IDF of A minus TF-IDF of B, and the lengths; {rows}, "
        f"{TFIDF_CHARS} characters of each answer as the judge reads it, {TFIDF_TERMS} words",
        "base": "the stage base: the untrained base model, calibrated on these rows by cross-fitting",
        "probe": "the stage probe: a linear model on the untrained base's hidden states and on lengths",
    }


def length_features(frame: pd.DataFrame) -> np.ndarray:
    """Return [rows, 9] features made of lengths (characters) and the number of turns only."""
    prompt, a, b = (frame[name].to_numpy(dtype=np.float64) for name in ("chars_prompt", "chars_a", "chars_b"))
    turns = frame["turns"].to_numpy(dtype=np.float64, na_value=1.0)
    logs = np.log1p(prompt), np.log1p(a), np.log1p(b)
    gap, ratio = logs[1] - logs[2], (a - b) / (a + b + 1)
    return np.column_stack([*logs, gap, np.abs(gap), ratio, np.abs(ratio), np.log(np.maximum(turns, 1)), a == b])


def _from_lengths(train: pd.DataFrame, truth: np.ndarray, rows: pd.DataFrame, prior: np.ndarray) -> np.ndarray:
    scaler = StandardScaler().fit(length_features(train))
    seen, asked = (scaler.transform(length_features(frame)) for frame in (train, rows))
    return _regression(seen, truth, asked, 1.0, prior)


def _words(train: pd.DataFrame) -> TfidfVectorizer | None:
    """Return the fitted vocabulary, None where no word occurs twice."""
    # One list of words for all languages, and so no stop words.
    words = TfidfVectorizer(
        sublinear_tf=True, min_df=2, max_features=TFIDF_TERMS, token_pattern=r"\S+", dtype=np.float32
    )
    try:
        return words.fit([*_heads(train["text_a"]), *_heads(train["text_b"])])
    except ValueError:
        return None


def _word_gaps(words: TfidfVectorizer, frame: pd.DataFrame, reference: pd.DataFrame) -> spmatrix:
    """Return sparse [rows, words + lengths]: of A minus of B; lengths standardised by `reference`."""
    base = length_features(reference)
    lengths = (length_features(frame) - base.mean(axis=0)) / (base.std(axis=0) + 1e-9)
    gap = words.transform(_heads(frame["text_a"])) - words.transform(_heads(frame["text_b"]))
    return hstack([gap, csr_matrix(lengths)], format="csr")


def _regression(
    seen: np.ndarray | spmatrix, truth: np.ndarray, asked: np.ndarray | spmatrix, c: float, prior: np.ndarray
) -> np.ndarray:
    """Return [rows, 3] of an L2-penalised multinomial logistic regression; classes not seen get their prior."""
    model = LogisticRegression(C=c, max_iter=500, tol=1e-3).fit(seen, truth)
    full = np.tile(prior, (asked.shape[0], 1))
    full[:, model.classes_] = model.predict_proba(asked) * prior[model.classes_].sum()
    return full


def _heads(texts: pd.Series) -> list[str]:
    return [text[:TFIDF_CHARS] if isinstance(text, str) else "" for text in texts]
