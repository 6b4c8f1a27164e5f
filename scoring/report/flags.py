"""Flags: what a reader of a report must not overlook, in plain words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from common.battle import VERDICTS
from scoring.report.formatting import final_flips

if TYPE_CHECKING:
    from scoring.calibration import Calibration

# From here on a figure is worth a warning.
FEW_ROWS, FLIP_RATE, CUT_SHARE, ECE, PRIOR_SHIFT = 200, 0.15, 0.1, 0.03, 0.1


def flags_of(report: Mapping[str, Any], calibration: Calibration, train_prior: np.ndarray) -> list[dict[str, str]]:
    """Return what a reader must not overlook, gravest first."""
    flags: list[tuple[str, str, str]] = []
    if not report["beats_prior"]:
        flags.append(("red", "not_better_than_prior", _prior_words(report)))
    if calibration.kind == "rewards" and not calibration.kept:
        flags.append(("red", "no_link", calibration.reason))
    if report["merge_gate"] and report["merge_gate"].get("passed") is False:
        flags.append(("red", "merge_gate", "The merged model does not say what the trained adapter says."))
    for check in report["checks"]:
        if check["passed"] is False and check["name"] != "merge gate":
            level = "red" if check["stops"] else "amber"
            flags.append((level, "check", f"The check “{check['name']}” failed: {check['detail']}."))
    if (report["target_prior"] or {}).get("log_loss") is not None:
        found = report["target_prior"]
        if found["log_loss"] >= found["prior"]:
            figures = f"it reaches {found['log_loss']:.3f}, the prior alone {found['prior']:.3f}"
            text = f"Under the declared target prior {figures}."
            flags.append(("red", "target_prior_not_beaten", text))
    flags += _cautions(report, calibration)
    shift = float(np.abs(_shares(report["class_counts"]) - train_prior).sum() / 2)
    if shift > PRIOR_SHIFT and not calibration.target_prior:
        text = f"The class shares of the training rows differ from these rows' by {shift:.0%}: declare a target prior."
        flags.append(("amber", "prior_shift", text))
    if not (calibration.kind == "rewards" and not calibration.kept):
        uncalibrated = calibration.log_loss_cross_fitted is None
        flags.append(("amber" if uncalibrated else "info", "calibration", calibration.reason))
    return [{"level": level, "code": code, "text": text} for level, code, text in flags]


def _cautions(report: Mapping[str, Any], calibration: Calibration) -> list[tuple[str, str, str]]:
    """Return the amber flags."""
    found, loss = [], report["log_loss"]
    ahead = [
        f"{name} ({report['baselines'][name]:.3f})" for name in ("length", "tfidf") if report["baselines"][name] < loss
    ]
    if ahead:
        found.append(("baseline_ahead", f"A simple baseline is better ({loss:.3f} here): {', '.join(ahead)}."))
    if calibration.link is not None and calibration.link.learned is False:
        found.append(
            ("scores_say_nothing", "The link hardly uses the model's scores (within two standard errors of 0).")
        )
    missing = [name for name, count in report["class_counts"].items() if not count]
    if missing:
        found.append(("class_missing", f"No judged row of class {', '.join(missing)}."))
    if report["rows"] < FEW_ROWS:
        found.append(("few_rows", f"Only {report['rows']} rows: the figures are rough."))
    bias = report["position_bias"]
    if bias and bias["flip_rate"] > FLIP_RATE:
        final = final_flips(bias, averaged=calibration.swap_tta, decimals=0)
        changed = f"{bias['flip_rate']:.0%} of its first choices change with the order of the answers"
        found.append(("position_bias", f"{changed}{final}."))
    cut = report["truncation"].get("judged", {}).get("rows_cut_share", 0)
    if cut > CUT_SHARE:
        found.append(("truncation", f"{cut:.0%} of the rows were shortened to fit: a larger cutoff_len may help."))
    if report["ece"] > max(ECE, report["ece_by_chance"]):
        found.append(
            ("ece", f"First choices are off by {report['ece']:.1%} on average: the probabilities are not honest.")
        )
    return [("amber", code, text) for code, text in found]


def _prior_words(report: Mapping[str, Any]) -> str:
    prior, loss, ends = report["baselines"]["prior"], report["log_loss"], report["gain_over_prior_ci95"]
    if loss >= prior:
        return f"Log loss {loss:.4f} does not beat the class prior ({prior:.4f}): this judge is useless as it is."
    if loss >= report["baselines"]["uniform"]:
        return f"Log loss {loss:.4f} is worse than a third for each class (1.0986): the prior is wrong for these rows."
    if ends is None:
        return f"Log loss {loss:.4f} against {prior:.4f} of the class prior, on one prompt only: nothing is shown."
    return (
        f"Log loss {loss:.4f} is below the class prior's {prior:.4f}, but the 95% interval of the gain "
        f"({ends[0]:.4f} to {ends[1]:.4f}) holds 0: nothing is shown."
    )


def _shares(counts: Mapping[str, int]) -> np.ndarray:
    values = np.array([counts[name] for name in VERDICTS], dtype=np.float64)
    return values / values.sum()
