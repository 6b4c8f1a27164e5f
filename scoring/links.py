"""Links: raw scores in, three class probabilities out; fitted by maximum likelihood.

    label logits [rows, 3]                       →  SoftmaxLink   (temperature, class bias)
    reward and log-length differences [rows] × 2 →  DavidsonLink  (scale, tie parameter, position bias, length term)

Both are conditional logits (McFadden 1974) that are linear in their parameters, so one convex fit serves both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, ClassVar

import numpy as np
from scipy.optimize import minimize

from common.battle import VERDICTS
from common.errors import ArenaError

# Every parameter, in units of one standard deviation of its input, has a normal prior with mean 0 and standard
# deviation 10: too weak to be seen on ordinary data, strong enough that separable data stays finite.
PRIOR_DEVIATION = 10.0
# A standardised score beyond this is set to it: one reward that exploded must not rule the fit.
CLIP = 100.0
# A larger score is refused: no model gives it. Smaller spreads are rounding: dividing by them would blow noise up.
LARGEST_SCORE = 1e150
_SMALLEST, _SMALLEST_LENGTH = 1e-150, 1e-9
TIE = VERDICTS.index("tie")
# Where no tie was seen, one imagined tie between equal rewards (Laplace's rule) keeps the tie parameter above 0.
_IMAGINED_TIE = np.array([[0.0, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
# L-BFGS-B sometimes stops far from the optimum; it goes on when it is started again from there.
_STARTS = 20


def log_softmax(scores: np.ndarray) -> np.ndarray:
    """Return log probabilities along the last axis; never overflows."""
    shifted = scores - scores.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def softmax(scores: np.ndarray) -> np.ndarray:
    """Return probabilities along the last axis; never overflows."""
    return np.exp(log_softmax(scores))


def penalised_loss(
    parameters: np.ndarray, design: np.ndarray, truth: np.ndarray
) -> tuple[float, np.ndarray, np.ndarray]:
    """Return the negative log posterior of a conditional logit (a sum, in nats), its gradient [k] and Hessian [k, k].

    `design` [rows, classes, k]; the class scores are design @ parameters (McFadden 1974).
    """
    logs = log_softmax(design @ parameters)
    chances = np.exp(logs)
    rows = np.arange(len(truth))
    expected = np.einsum("nc,nck->nk", chances, design)
    gradient = (expected - design[rows, truth]).sum(axis=0)
    spread = design - expected[:, None, :]
    hessian = np.einsum("nc,ncj,nck->jk", chances, spread, spread, optimize=True)
    precision = PRIOR_DEVIATION**-2
    loss = -logs[rows, truth].sum() + precision / 2 * float(parameters @ parameters)
    return loss, gradient + precision * parameters, hessian + precision * np.eye(len(parameters))


def fit_conditional_logit(design: np.ndarray, truth: np.ndarray, lower: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the parameters [k] of largest posterior, none below `lower` [k], and their covariance [k, k].

    `design` [rows, classes, k] in standardised units, `truth` [rows] class codes. The covariance is the inverse of the
    observed information, the prior's included. Raises ArenaError if the optimiser does not converge.
    """
    rows = max(1, len(truth))

    def mean_loss(parameters: np.ndarray) -> tuple[float, np.ndarray]:
        loss, gradient, _ = penalised_loss(parameters, design, truth)
        return loss / rows, gradient / rows

    found = np.maximum(np.zeros(len(lower)), lower)
    options = {"maxiter": 1000, "ftol": 1e-15, "gtol": 1e-9}
    for _ in range(_STARTS):
        ended = minimize(mean_loss, found, jac=True, bounds=[(low, None) for low in lower], options=options)
        found = ended.x
        loss, gradient, hessian = penalised_loss(found, design, truth)
        free = (found > lower) | (gradient < 0)
        slope = np.abs(gradient[free]).max(initial=0) / rows
        if np.isfinite(loss) and slope <= 1e-6:
            return found, np.linalg.inv(hessian)
    raise ArenaError(
        f"the link did not converge ({ended.message})",
        where="calibration",
        remedy="look at the raw scores of the validation fold: they may be broken",
    )


def robust_scale(values: np.ndarray) -> float:
    """Return a typical size of `values` about zero: 1.4826 · median |v|, or the mean |v| where that is 0.

    0.0 where every value is as good as 0. The factor makes it the standard deviation for normal values (Huber 1981).
    """
    sizes = np.abs(values)
    typical = 1.4826 * float(np.median(sizes)) or float((sizes / len(sizes)).sum())
    return typical if typical > _SMALLEST else 0.0


@dataclass(frozen=True)
class Link:
    """What both links share. `errors`: the standard errors of the fitted values; None where nothing was fitted."""

    kind: ClassVar[str]
    errors: Mapping[str, float] | None = field(default=None, kw_only=True)

    def to_json(self) -> dict[str, Any]:
        """Return the link as plain values; `link_from_json` is the inverse."""
        return {"kind": self.kind, **asdict(self)}


@dataclass(frozen=True)
class SoftmaxLink(Link):
    """softmax(logits · inverse_temperature + bias): temperature scaling with a class bias (Guo et al., ICML 2017).

    `bias` sums to 0. An inverse temperature of 0 means that the logits carry nothing.
    Centred logits beyond ±`limit` count as ±`limit`; None is no limit.
    """

    kind: ClassVar[str] = "softmax"
    inverse_temperature: float = 1.0
    bias: tuple[float, float, float] = (0.0, 0.0, 0.0)
    limit: float | None = None

    @classmethod
    def fit(cls, logits: np.ndarray, truth: np.ndarray) -> SoftmaxLink:
        """Fit on label logits [rows, 3] and class codes [rows]; the inverse temperature is never negative."""
        centred = _centred(logits)
        unit = robust_scale(centred.ravel()) or 1.0
        design = np.zeros((len(truth), 3, 3))
        design[:, :, 0] = np.clip(centred / unit, -CLIP, CLIP)
        design[:, 0, 1], design[:, 1, 2], design[:, 2, 1:] = 1.0, 1.0, -1.0
        (slope, first, second), covariance = fit_conditional_logit(design, truth, np.array([0.0, -np.inf, -np.inf]))
        deviations = [*np.sqrt(np.diag(covariance)), np.sqrt(covariance[1:, 1:].sum())]
        names = ("inverse_temperature", "bias_a", "bias_b", "bias_tie")
        errors = dict(zip(names, map(float, deviations), strict=True))
        errors["inverse_temperature"] /= unit
        bias = (float(first), float(second), float(-first - second))
        return cls(float(slope / unit), bias, CLIP * unit, errors=errors)

    @property
    def temperature(self) -> float | None:
        """1 / inverse temperature; None where it is infinite or as good as that."""
        return 1 / self.inverse_temperature if self.inverse_temperature > _SMALLEST else None

    def probabilities(self, logits: np.ndarray) -> np.ndarray:
        """Return [rows, 3] probabilities of label logits [rows, 3]."""
        limit = np.inf if self.limit is None else self.limit
        centred = np.clip(_centred(logits), -limit, limit)
        return softmax(centred * self.inverse_temperature + np.array(self.bias))

    def to_json(self) -> dict[str, Any]:
        """Return the link as plain values, the temperature for readers among them."""
        return {**super().to_json(), "temperature": self.temperature}


@dataclass(frozen=True)
class DavidsonLink(Link):
    """P(a) : P(b) : P(tie) = exp(s/2) : exp(−s/2) : tie, s = scale·(ra − rb) + position_bias + length·z.

    Davidson 1970, "On extending the Bradley–Terry model to accommodate ties", JASA 65; the order effect after
    Davidson & Beaver 1977, Biometrics 33. z = (log chars of A − log chars of B) / length_unit.
    `scale` is per unit of reward, `position_bias` and `length` are log odds of A over B, `tie` is ν > 0.
    Reward differences beyond ±`limit` count as ±`limit`.
    """

    kind: ClassVar[str] = "davidson"
    scale: float
    position_bias: float
    length: float
    tie: float
    length_unit: float
    limit: float

    @classmethod
    def fit(cls, difference: np.ndarray, log_lengths: np.ndarray, truth: np.ndarray) -> DavidsonLink:
        """Fit on reward differences ra − rb [rows], log-length differences [rows] and class codes [rows].

        The scale is never negative: a link does not turn a preference around.
        """
        unit = robust_scale(difference) or 1.0
        length_unit = float(np.std(log_lengths))
        length_unit = length_unit if length_unit > _SMALLEST_LENGTH else 1.0
        columns = np.clip(difference / unit, -CLIP, CLIP), np.ones(len(truth)), log_lengths / length_unit
        design = np.zeros((len(truth), 3, 4))
        design[:, 0, :3] = np.column_stack(columns) / 2
        design[:, 1, :3] = -design[:, 0, :3]
        design[:, 2, 3] = 1.0
        if not (truth == TIE).any():
            design, truth = np.concatenate([design, [_IMAGINED_TIE]]), np.append(truth, TIE)
        fitted, covariance = fit_conditional_logit(design, truth, np.array([0.0, -np.inf, -np.inf, -np.inf]))
        scale, position, length, log_tie = map(float, fitted)
        names = ("scale", "position_bias", "length", "log_tie")
        errors = dict(zip(names, map(float, np.sqrt(np.diag(covariance))), strict=True))
        errors["scale"] /= unit
        tie = float(np.exp(log_tie))
        errors["tie"] = tie * errors["log_tie"]  # delta method
        return cls(scale / unit, position, length, tie, length_unit, CLIP * unit, errors=errors)

    def probabilities(self, difference: np.ndarray, log_lengths: np.ndarray) -> np.ndarray:
        """Return [rows, 3] probabilities of reward differences [rows] and log-length differences [rows]."""
        bounded = np.clip(difference, -self.limit, self.limit)
        s = self.scale * bounded + self.position_bias + self.length * log_lengths / self.length_unit
        return softmax(np.column_stack([s / 2, -s / 2, np.full(len(s), np.log(self.tie))]))


def link_from_json(value: Mapping[str, Any]) -> Link:
    """Return the link that `to_json` described; raises ArenaError for an unknown kind or missing values."""
    links = {link.kind: link for link in (SoftmaxLink, DavidsonLink)}
    try:
        link = links[value["kind"]]
        values = {each.name: value[each.name] for each in fields(link)}
        return link(**{name: tuple(each) if isinstance(each, list) else each for name, each in values.items()})
    except (TypeError, KeyError) as error:
        raise ArenaError(f"the saved link is broken: {error!r}", where="calibration", remedy="score again") from None


def correct_prior(probabilities: np.ndarray, source: Mapping[str, float], target: Mapping[str, float]) -> np.ndarray:
    """Return [rows, 3] probabilities for a class prior `target`, given ones that were learned under `source`.

    p'(c) ∝ p(c) · target(c) / source(c): Saerens, Latinne & Decaestecker, Neural Computation 14 (2002), eq. 2.4.
    """
    old, new = (np.array([prior[name] for name in VERDICTS]) for prior in (source, target))
    weighted = np.asarray(probabilities, dtype=np.float64) * (new / old)
    return weighted / weighted.sum(axis=1, keepdims=True)


def smoothed_prior(truth: np.ndarray) -> np.ndarray:
    """Return [3] class shares with one pseudo-row a class (Laplace), so that none is 0; rows of code −1 are ignored."""
    counts = np.bincount(truth[truth >= 0], minlength=3) + 1.0
    return counts / counts.sum()


def _centred(logits: np.ndarray) -> np.ndarray:
    """Return logits less their row mean: the same probabilities, and numbers of the size of the differences."""
    values = np.asarray(logits, dtype=np.float64)
    return values - values.mean(axis=1, keepdims=True)
