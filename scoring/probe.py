"""The linear probe: class probabilities from the hidden states of an untrained model and from lengths.

    P(tie) = σ(lengths · v + b),  P(A | no tie) = σ((states of A − states of B) · w + differences of lengths)

Exchanging A and B exchanges their probabilities exactly: what the two models are fitted on changes its sign with them,
or does not change at all. So both orders are one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from sklearn.linear_model import LogisticRegression

from common.errors import ArenaError
from common.files import atomic_file
from scoring.baselines import length_features
from scoring.calibration import grouped_parts, too_few_to_fit
from scoring.metrics import log_loss

PROBE = "probe.npz"
LENGTHS = ("chars_prompt", "chars_a", "chars_b", "turns")
POOLS = ("mean", "last")  # over an answer's tokens, and at its end
# Strengths that are tried: scikit-learn's C. Many weights and few votes want small ones.
STRENGTHS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
# Of the columns of `length_features` those that change their sign with the order of the answers.
_ODD, _PROMPT, _ANSWERS, _EVEN = [3, 5], [0], [1, 2], [4, 6, 7, 8]
_TIE_STRENGTH = 0.1


@dataclass(frozen=True)
class Probe:
    """A fitted probe on the states behind `layers`, of which it uses `pools`; `precision` is what they were made in."""

    layers: tuple[int, ...]
    pools: tuple[str, ...]
    precision: str
    arrays: Mapping[str, np.ndarray]  # scale [columns], weights [columns], mean, spread [even], tie [even + 1]

    def logits(self, states: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return the log-probabilities [n, 3] of states [n, 2, layers x POOLS x hidden] and lengths [n, LENGTHS]."""
        chosen = _columns(states.shape[2], self.layers, self.layers, self.pools)
        odd = _odd(states[:, 0] - states[:, 1], lengths, chosen)
        a = odd / self.arrays["scale"] @ self.arrays["weights"]
        return _joined(a, _tie_logits(self.arrays, lengths))

    def save(self, path: Path) -> None:
        """Write it as a file of arrays, whole or not at all."""
        with atomic_file(path, "wb") as file:
            np.savez(file, layers=self.layers, pools=self.pools, precision=self.precision, **self.arrays)

    @classmethod
    def load(cls, path: Path) -> Probe:
        """Read a saved probe; raises ArenaError where it is damaged."""
        try:
            with np.load(path, allow_pickle=False) as found:
                arrays = {name: found[name] for name in ("scale", "weights", "mean", "spread", "tie")}
                layers, pools = tuple(map(int, found["layers"])), tuple(map(str, found["pools"]))
                return cls(layers, pools, str(found["precision"]), arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError) as error:
            what = f"is no readable probe: {error}"
            raise ArenaError(what, where=str(path), remedy="fit it again: run.py probe -e EXP --fresh") from None


def fit_probe(
    states: np.ndarray,
    lengths: np.ndarray,
    truth: np.ndarray,
    groups: np.ndarray,
    *,
    layers: Sequence[int],
    precision: str,
    seed: int,
) -> tuple[Probe, list[dict[str, Any]]]:
    """Return the probe of the layer, pooling and strength with the lowest cross-fitted loss, and all that were tried.

    `states` [n, columns] are those of A minus those of B, `truth` class codes [n], `groups` the prompts that stay
    together. Raises ArenaError where the votes are too few.
    """
    if reason := too_few_to_fit(truth, groups):
        what = reason.replace("validation rows", "training rows").replace("validation fold", "training set")
        raise ArenaError(what, where="probe", remedy="prepare more votes")
    parts = list(grouped_parts(groups, seed))
    tie = np.empty(len(truth))
    for fit, judge in parts:
        tie[judge] = _tie_logits(_fit_tie(lengths[fit], truth[fit]), lengths[judge])
    tried = []
    for used in [(layer,) for layer in layers] + [tuple(layers)] * (len(layers) > 1):
        for pools in (("mean",), ("last",), POOLS):
            odd = _odd(states, lengths, _columns(states.shape[1], layers, used, pools))
            for strength in STRENGTHS:
                a = np.empty(len(truth))
                for fit, judge in parts:
                    scale, weights = _fit_answers(odd[fit], truth[fit], strength)
                    a[judge] = odd[judge] / scale @ weights
                loss = log_loss(np.exp(_joined(a, tie)), truth)
                tried.append({"layers": used, "pools": pools, "strength": strength, "log_loss": loss})
    best = min(tried, key=lambda each: each["log_loss"])
    odd = _odd(states, lengths, _columns(states.shape[1], layers, best["layers"], best["pools"]))
    scale, weights = _fit_answers(odd, truth, best["strength"])
    arrays = {"scale": scale, "weights": weights, **_fit_tie(lengths, truth)}
    return Probe(best["layers"], best["pools"], precision, arrays), tried


def _columns(count: int, layers: Sequence[int], used: Sequence[int], pools: Sequence[str]) -> np.ndarray:
    """Return which of the columns, layers x POOLS x hidden, belong to the used layers and pools."""
    places = np.arange(count).reshape(len(layers), len(POOLS), -1)
    return places[[list(layers).index(each) for each in used]][:, [POOLS.index(pool) for pool in pools]].ravel()


def _odd(states: np.ndarray, lengths: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Return what changes its sign when A and B are exchanged, [n, columns + 2] float32; the lengths are the last."""
    return np.column_stack([states[:, columns], _lengths(lengths)[:, _ODD]]).astype(np.float32)


def _even(lengths: np.ndarray) -> np.ndarray:
    """Return what stays when A and B are exchanged, [n, 6]."""
    found = _lengths(lengths)
    return np.column_stack([found[:, _PROMPT], found[:, _ANSWERS].sum(axis=1), found[:, _EVEN]])


def _lengths(lengths: np.ndarray) -> np.ndarray:
    return length_features(pd.DataFrame(lengths, columns=list(LENGTHS)))


def _fit_answers(odd: np.ndarray, truth: np.ndarray, strength: float) -> tuple[np.ndarray, np.ndarray]:
    """Return the scale of each column and its weight, fitted on the votes for A or B."""
    decided = truth < 2
    rows, scale = odd[decided], np.sqrt(np.square(odd[decided]).mean(axis=0)) + 1e-6
    # The two lengths say much for their number: a tenth of the scale is a hundredth of the penalty.
    scale[-len(_ODD) :] /= 10
    model = LogisticRegression(C=strength, fit_intercept=False, max_iter=200, tol=1e-3)
    model.fit(rows / scale, (truth[decided] == 0).astype(int))
    return scale, model.coef_[0]


def _fit_tie(lengths: np.ndarray, truth: np.ndarray) -> dict[str, np.ndarray]:
    even = _even(lengths)
    mean, spread = even.mean(axis=0), even.std(axis=0) + 1e-6
    model = LogisticRegression(C=_TIE_STRENGTH, max_iter=200).fit((even - mean) / spread, truth == 2)
    return {"mean": mean, "spread": spread, "tie": np.append(model.coef_[0], model.intercept_)}


def _tie_logits(fitted: Mapping[str, np.ndarray], lengths: np.ndarray) -> np.ndarray:
    return (_even(lengths) - fitted["mean"]) / fitted["spread"] @ fitted["tie"][:-1] + fitted["tie"][-1]


def _joined(a: np.ndarray, tie: np.ndarray) -> np.ndarray:
    """Return log-probabilities [n, 3] of the log-odds of A against B and of a tie against a decision."""
    decided = -np.logaddexp(0, tie)
    return np.column_stack([decided - np.logaddexp(0, -a), decided - np.logaddexp(0, a), tie + decided])
