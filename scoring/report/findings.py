"""What a report says: numbers as a reader sees them, names of classes and baselines, and sentences.

number(0.95123) == "0.951", percent(0.071) == "7.1%", interval([0.93, 0.97]) == "0.930 to 0.970"
findings(report)["position"] == ["25% of its first choices change with the order of the answers, …", …]
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

# Shown where a value was not measured.
MISSING = "–"
CLASS_NAMES = {"a": "A wins", "b": "B wins", "tie": "Tie"}
# Name and meaning of each baseline, from the one that knows nothing to the one that nothing can beat.
BASELINES = {
    "uniform": ("Uniform, 1/3 each", "reads no text, knows no shares"),
    "prior": ("Class prior", "always the shares of the classes; reads no text"),
    "length": ("Length features", "logistic regression on the lengths of the texts"),
    "tfidf": ("TF-IDF", "logistic regression on words and phrases"),
    "base": ("Untrained base", "asked as the judge is, and calibrated"),
    "probe": ("Linear probe", "a linear model on the untrained base's hidden states"),
    "bayes": ("Bayes: the best possible", "knows the true probabilities"),
}
BASELINE_NAMES = {key: name for key, (name, _) in BASELINES.items()}
# Beyond these a figure is worth a warning.
FEW_ROWS, FLIP_RATE, CUT_SHARE, ECE, PRIOR_SHIFT = 200, 0.15, 0.1, 0.03, 0.1
LEVELS = {"red": "Stop", "amber": "Caution", "info": "Note"}  # gravest first, as the report lists them


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with a fixed count of decimals and a true minus sign."""
    if not _measured(value):
        return MISSING
    return f"{round(value, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: float | None, digits: int = 3) -> str:
    """Return a difference with its sign always shown."""
    text = number(value, digits)
    return f"+{text}" if _measured(value) and round(value, digits) > 0 else text


def count(value: float | None) -> str:
    """Return a whole number with thousands separated; fractions keep up to four digits."""
    if not _measured(value):
        return MISSING
    return (f"{int(value):,}" if value == int(value) else f"{value:,.4g}").replace("-", "−")


def percent(share: float | None) -> str:
    """Return a share as a percentage: one decimal below 10%, none above."""
    if not _measured(share):
        return MISSING
    decimals = 0 if abs(share) >= 0.0995 or share == 0 else 1
    return f"{100 * share:.{decimals}f}%".replace("-", "−")


def shares(values: Iterable[float | None]) -> str:
    """Return the probabilities of the three classes as "70% / 20% / 10%"."""
    return " / ".join(map(percent, values))


def points(share: float | None) -> str:
    """Return a difference of two shares as percentage points, without the words; a tiny one as "less than 0.01"."""
    if not _measured(share):
        return MISSING
    if 0 < abs(share) < 1e-4:
        return "less than 0.01"
    return f"{100 * share:.2g}" if abs(share) < 0.1 else f"{100 * share:.0f}"


def interval(ends: Sequence[float] | None, digits: int = 3) -> str:
    """Return an interval as "low to high"."""
    return MISSING if ends is None else f"{number(ends[0], digits)} to {number(ends[1], digits)}"


def _measured(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def flags_of(report: Mapping[str, Any], test_rows: int) -> list[dict[str, str]]:
    """Return what a reader must not overlook (level, code, text), gravest first; `test_rows`: those of the test set."""
    flags = [*_failures(report), *_cautions(report, test_rows)]
    flags.sort(key=lambda flag: list(LEVELS).index(flag[0]))
    return [{"level": level, "code": code, "text": text} for level, code, text in flags]


def _failures(report: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Yield what makes a result useless or wrong."""
    loss, prior, gain = report["log_loss"], report["baselines"]["prior"], report["gain_over_prior_ci95"]
    if not report["beats_prior"]:
        if loss >= prior:
            text = f"Log loss {loss:.4f} does not beat the class prior ({prior:.4f}): this judge is useless as it is."
        elif loss >= report["baselines"]["uniform"]:
            text = f"Log loss {loss:.4f} is worse than 1/3 for each class (1.0986): the prior is wrong for these rows."
        else:
            why = f"the 95% interval of the gain ({interval(gain, 4)}) holds 0" if gain else "there is one prompt only"
            text = f"Log loss {loss:.4f} is below the class prior's {prior:.4f}, but {why}: nothing is shown."
        yield "red", "not_better_than_prior", text
    calibration = report["calibration"]
    if calibration["scores"] == "rewards" and not calibration["kept"]:
        yield "red", "no_link", _sentence(calibration["reason"])
    for check in report["checks"]:
        if check["passed"] is False:
            level = "red" if check["stops"] else "amber"
            yield level, "check", f"The check “{check['name']}” failed: {check['detail']}."
    target = report["target_prior"]
    if target and target["log_loss"] is not None and target["log_loss"] >= target["prior"]:
        reached = f"it reaches {target['log_loss']:.3f}, the prior alone {target['prior']:.3f}"
        yield "red", "target_prior_not_beaten", f"Under the declared target prior {reached}."


def _cautions(report: Mapping[str, Any], test_rows: int) -> Iterator[tuple[str, str, str]]:
    """Yield what limits a result, and how its probabilities were calibrated."""
    loss, bias, cut = report["log_loss"], report["position_bias"], report["truncation"].get("judged")
    calibration, scoring = report["calibration"], report["scoring"]
    ignorant = ("uniform", "prior")  # these read no text
    better = {name: its for name, its in report["baselines"].items() if its < loss and name not in ignorant}
    if better:
        named = ", ".join(f"{BASELINE_NAMES[name]} ({value:.3f})" for name, value in better.items())
        both = report["with_baselines"]
        way = f" A blend (run.py ensemble) reaches {both['log_loss']:.3f} on these battles." if both else ""
        yield "amber", "baseline_ahead", f"Better than this judge ({loss:.3f}), and simple: {named}.{way}"
    if folds := report["folds"]:
        losses = ", ".join(number(fold["log_loss"], 4) for fold in folds)
        yield (
            *("info", "out_of_fold"),
            f"Each battle is judged by the one of {len(folds)} judges that did not train on its prompt (log losses "
            f"{losses}). The test set's answers ({report['scoring']['answer']}) are measured on no battle.",
        )
    if (choice := report["checkpoint"]) and "curve" in choice:
        points = (f"{point['checkpoint']} {number(point['log_loss'], 4)}" for point in choice["curve"])
        curve = ", ".join(points) or "the curves are in the folds' reports"
        yield (
            *("info", "checkpoint"),
            f"Chosen by log loss on {count(choice['rows'])} of these battles: "
            f"{choice['chosen'] or 'the last checkpoint'} ({curve}). Choosing flatters this report: chosen on "
            f"other battles than those judged, the figure is {number(choice['cross_fitted'], 4)} "
            f"instead of {number(choice['log_loss'], 4)}.",
        )
    if report["rows"] < FEW_ROWS:
        yield "amber", "few_rows", f"Only {report['rows']} rows: the figures are rough."
    if bias and bias["flip_rate"] > FLIP_RATE:
        yield "amber", "position_bias", _flips(report)
    if cut and cut["rows_cut_share"] > CUT_SHARE:
        yield "amber", "truncation", f"{_cut(cut)} A larger cutoff_len may help."
    if report["ece"] > max(ECE, report["ece_by_chance"]):
        text = f"First choices are off by {report['ece']:.1%} on average: the probabilities are not honest."
        yield "amber", "ece", text
    judged, trained = (np.array(list(report[key].values())) for key in ("class_counts", "train_class_counts"))
    shift = float(np.abs(judged / judged.sum() - (trained + 1) / (trained + 1).sum()).sum() / 2)
    if shift > PRIOR_SHIFT and not calibration["target_prior"]:
        text = f"The class shares of the training rows differ from these rows' by {shift:.0%}: declare a target prior."
        yield "amber", "prior_shift", text
    if calibration["scores"] == "logits" or calibration["kept"]:
        level = "amber" if calibration["log_loss_cross_fitted"] is None else "info"
        yield level, "calibration", f"Calibration, a last correction of the probabilities: {calibration['reason']}."
    limited = "time_limit_seconds" in scoring and calibration["scores"] == "logits"
    if limited and scoring["rows_in_both_orders"]["test"] < test_rows:
        yield "info", "one_order", "The test rows were scored in one order of the answers: a time limit."


def findings(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what a report (report.json's content) says, as sentences by section of the page."""
    sections = {
        "calibration": _calibration,
        "position": _position,
        "truncation": _truncation,
        "merge": _merge,
        "checks": _checks,
    }
    return {name: list(sentences(report)) for name, sentences in sections.items()}


def headline(report: Mapping[str, Any]) -> str:
    """Return the result in one sentence: against the class prior and, where Bayes is known, against the possible."""
    if not report["beats_prior"]:
        return "This judge is not shown to be better than guessing."
    low, high = report["gain_over_prior_ci95"]
    share = report["learned_share"]
    learned = "" if share is None else f" and learned {percent(share)} of what could be learned"
    return (
        f"The judge beats the class prior by {number(report['gain_over_prior'])} ± {number((high - low) / 2)}{learned}."
    )


def main_figures(report: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return the main figures as (name, value, what it means)."""
    ends, share_ends = report["log_loss_ci95"], report["learned_share_ci95"]
    learned = "of the way from the class prior to the best possible judge"
    if report["learned_share"] is None:
        learned = "the best possible judge is not known for human votes"
    elif share_ends:
        learned += f"; 95% interval {percent(share_ends[0])} to {percent(share_ends[1])}"
    honest = "how far its probabilities are from the facts, on average; 0% is honest"
    return [
        ("Log loss", number(report["log_loss"]), f"95% interval {interval(ends)}" if ends else "no interval"),
        ("Accuracy", percent(report["accuracy"]), "its first choice was the verdict; guessing gives 33%"),
        ("Calibration error", percent(report["ece"]), honest),
        ("Learned", percent(report["learned_share"]), learned),
    ]


def _calibration(report: Mapping[str, Any]) -> Iterator[str]:
    target = report["target_prior"]
    yield _sentence(report["calibration"]["reason"])
    if not target:
        return
    declared = ", ".join(f"{CLASS_NAMES[key]} {percent(share)}" for key, share in target["declared"].items())
    yield f"The battles to come are declared to have other class shares: {declared}."
    if target["log_loss"] is None:
        yield f"Its effect is not known: {target['reason']}."
    else:
        yield (
            f"With these battles weighted to those shares, the corrected log loss is {number(target['log_loss'])}; "
            f"uncorrected it is {number(target['log_loss_uncorrected'])}, and the declared prior alone reaches "
            f"{number(target['prior'])}."
        )


def _position(report: Mapping[str, Any]) -> Iterator[str]:
    bias = report["position_bias"]
    if not bias:
        yield f"Not measured: {report['position_bias_reason']}."
        return
    moves = points(bias["mean_abs_diff"])
    yield f"When the same two answers change places, P(A) moves by {moves} percentage points on average."
    yield _flips(report)
    gain, ends = bias["tta_gain"], bias["tta_gain_ci95"]
    chance = " (within chance)" if ends and ends[0] <= 0 <= ends[1] else ""
    yield f"Averaging both orders {'lowers' if gain > 0 else 'raises'} the log loss by {number(abs(gain))}{chance}."


def _flips(report: Mapping[str, Any]) -> str:
    """Return how many first choices change with the order, and what that means for the final answer."""
    bias = report["position_bias"]
    final = "swap_tta is false, so the final answer is the one with A first"
    if report["calibration"]["swap_tta"]:
        final = f"averaged over both orders {percent(bias['final_flip_rate'])} do"
    return f"{percent(bias['flip_rate'])} of its first choices change with the order of the answers; {final}."


def _truncation(report: Mapping[str, Any]) -> Iterator[str]:
    judged = report["truncation"].get("judged")
    if judged:
        yield _cut(judged) if judged["rows_cut"] else "No judged battle was shortened."


def _cut(judged: Mapping[str, Any]) -> str:
    """Return how many battles were shortened to fit, and whether they are judged worse."""
    cut, whole = number(judged["log_loss_cut"]), number(judged["log_loss_whole"])
    return (
        f"{count(judged['rows_cut'])} of the judged battles ({percent(judged['rows_cut_share'])}) were shortened to "
        f"fit cutoff_len: log loss {cut}, against {whole} of the whole ones."
    )


def _merge(report: Mapping[str, Any]) -> Iterator[str]:
    merge = report["merge_gate"]
    if not merge:
        why = {"dpo_reward": "no merged model is scored", "base": "there is none", "probe": "there is none"}
        scored = why.get(report["stage"], "an adapter on a base is needed")
        yield f"The merged model was not compared with the trained adapter: {scored}."
        return
    losses = [number(merge[f"log_loss_{model}"], 4) for model in ("adapter", "merged")]
    yield (
        f"{count(merge['rows'])} battles were scored by the trained adapter on its base, as in training, and by the "
        f"model that it was merged into, {merge['merged_into']} ({merge['measure']}): the largest difference is "
        f"{points(merge['max_abs_diff'])} percentage points ({points(merge['mean_abs_diff'])} on average); up to "
        f"{points(merge['threshold'])} are allowed. Log losses: {losses[0]} and {losses[1]}."
    )


def _checks(report: Mapping[str, Any]) -> Iterator[str]:
    outcomes = [check["passed"] for check in report["checks"]]
    if outcomes:
        names = {True: "passed", False: "failed", None: "not applicable"}
        yield ", ".join(f"{outcomes.count(outcome)} {name}" for outcome, name in names.items()) + "."


def outcome(pair: Mapping[str, Any]) -> str:
    """Return who is better in a paired difference of `compare`, or that chance explains it."""
    if pair["ci95"] is None:
        return "one prompt only: not measured"
    return f"{pair['better']} is better" if pair["better"] else "no difference beyond chance"


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}."
