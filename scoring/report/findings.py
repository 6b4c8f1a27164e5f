"""What a report says, as sentences: the flags of report.json, and what the page and the terminal say in each section.

findings(report)["position"] == ["25% of its first choices change with the order of the answers, …", …]
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from scoring.calibration import FittedLink
from scoring.report.formatting import BASELINE_NAMES, CLASS_NAMES, count, interval, number, percent, points

# Beyond these a figure is worth a warning.
FEW_ROWS, FLIP_RATE, CUT_SHARE, ECE, PRIOR_SHIFT = 200, 0.15, 0.1, 0.03, 0.1
LEVELS = ("red", "amber", "info")


def flags_of(report: Mapping[str, Any], fitted: FittedLink, train_prior: np.ndarray) -> list[dict[str, str]]:
    """Return what a reader must not overlook (level, code, text), gravest first."""
    flags = [*_failures(report, fitted), *_cautions(report, fitted, train_prior)]
    flags.sort(key=lambda flag: LEVELS.index(flag[0]))
    return [{"level": level, "code": code, "text": text} for level, code, text in flags]


def _failures(report: Mapping[str, Any], fitted: FittedLink) -> Iterator[tuple[str, str, str]]:
    """Yield what makes a result useless or wrong."""
    loss, prior, gain = report["log_loss"], report["baselines"]["prior"], report["gain_over_prior_ci95"]
    if not report["beats_prior"]:
        if loss >= prior:
            text = f"Log loss {loss:.4f} does not beat the class prior ({prior:.4f}): this judge is useless as it is."
        elif loss >= report["baselines"]["uniform"]:
            text = f"Log loss {loss:.4f} is worse than 1/3 for each class (1.0986): the prior is wrong for these rows."
        else:
            why = (
                "there is one prompt only"
                if gain is None
                else f"the 95% interval of the gain ({interval(gain, 4)}) holds 0"
            )
            text = f"Log loss {loss:.4f} is below the class prior's {prior:.4f}, but {why}: nothing is shown."
        yield "red", "not_better_than_prior", text
    if fitted.kind == "rewards" and not fitted.kept:
        yield "red", "no_link", _sentence(fitted.reason)
    for check in report["checks"]:
        if check["passed"] is False:
            level = "red" if check["stops"] else "amber"
            yield level, "check", f"The check “{check['name']}” failed: {check['detail']}."
    target = report["target_prior"]
    if target and target["log_loss"] is not None and target["log_loss"] >= target["prior"]:
        reached = f"it reaches {target['log_loss']:.3f}, the prior alone {target['prior']:.3f}"
        yield "red", "target_prior_not_beaten", f"Under the declared target prior {reached}."


def _cautions(report: Mapping[str, Any], fitted: FittedLink, train_prior: np.ndarray) -> Iterator[tuple[str, str, str]]:
    """Yield what limits a result, and how its probabilities were calibrated."""
    loss, bias, cut = report["log_loss"], report["position_bias"], report["truncation"].get("judged")
    better = {name: report["baselines"][name] for name in ("length", "tfidf") if report["baselines"][name] < loss}
    if better:
        named = ", ".join(f"{BASELINE_NAMES[name]} ({value:.3f})" for name, value in better.items())
        yield "amber", "baseline_ahead", f"A simple baseline is better ({loss:.3f} here): {named}."
    if fitted.link is not None and fitted.link.learned is False:
        text = "The link hardly uses the model's scores (within two standard errors of 0)."
        yield "amber", "scores_say_nothing", text
    missing = [name for name, rows in report["class_counts"].items() if not rows]
    if missing:
        yield "amber", "class_missing", f"No judged row of class {', '.join(missing)}."
    if report["rows"] < FEW_ROWS:
        yield "amber", "few_rows", f"Only {report['rows']} rows: the figures are rough."
    if bias and bias["flip_rate"] > FLIP_RATE:
        yield "amber", "position_bias", _flips(report)
    if cut and cut["rows_cut_share"] > CUT_SHARE:
        yield "amber", "truncation", f"{_cut(cut)} A larger cutoff_len may help."
    if report["ece"] > max(ECE, report["ece_by_chance"]):
        text = f"First choices are off by {report['ece']:.1%} on average: the probabilities are not honest."
        yield "amber", "ece", text
    observed = np.array(list(report["class_counts"].values())) / report["rows"]
    shift = float(np.abs(observed - train_prior).sum() / 2)
    if shift > PRIOR_SHIFT and not fitted.target_prior:
        text = f"The class shares of the training rows differ from these rows' by {shift:.0%}: declare a target prior."
        yield "amber", "prior_shift", text
    if fitted.kind == "logits" or fitted.kept:
        level = "amber" if fitted.log_loss_cross_fitted is None else "info"
        yield level, "calibration", _sentence(fitted.reason)


def findings(report: Mapping[str, Any]) -> dict[str, list[str]]:
    """Return what a report (report.json's content) says, as sentences by section of the page."""
    sections = {
        "result": _result,
        "confusion": _confusion,
        "reliability": _reliability,
        "calibration": _calibration,
        "position": _position,
        "training": _training,
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


def _result(report: Mapping[str, Any]) -> Iterator[str]:
    loss, rows = number(report["log_loss"]), count(report["rows"])
    yield f"Its log loss is {loss}{_within(report['log_loss_ci95'])} on {rows} battles. Lower is better."
    chosen = percent(math.exp(-report["log_loss"]))
    yield (
        f"Put simply: it gave the verdict that people really chose a probability of {chosen} (the geometric mean); "
        "blind guessing gives 33%."
    )


def _confusion(report: Mapping[str, Any]) -> Iterator[str]:
    cells, names = report["confusion"], list(CLASS_NAMES.values())
    wrong = [(cells[truth][said], truth, said) for truth in range(3) for said in range(3) if truth != said]
    size, truth, said = max(wrong, key=lambda item: item[0])
    if size:
        yield f"The commonest mistake: “{names[truth]}” taken for “{names[said]}”, in {count(size)} battles."
    never = [f"“{name}”" for said, name in enumerate(names) if not any(row[said] for row in cells)]
    if never:
        yield (
            f"It never puts {' or '.join(never)} first. With rare or doubtful classes that may be right: a class can "
            "have a fair probability without being the most probable."
        )


def _reliability(report: Mapping[str, Any]) -> Iterator[str]:
    """Compare confidence and hit rate of the first choice over all bins, weighted by their counts."""
    bins = report["reliability"]["top"]
    said, came_true = (
        sum(point[key] * point["count"] for point in bins) / report["rows"] for key in ("confidence", "frequency")
    )
    gap = said - came_true
    text = f"On average the judge gave its first choice {percent(said)} and it came true in {percent(came_true)}"
    if abs(gap) < 0.02:
        yield f"{text}: on average its probabilities mean what they say."
    else:
        yield f"{text}: {'overconfident' if gap > 0 else 'too timid'} by {100 * abs(gap):.0f} percentage points."


def _calibration(report: Mapping[str, Any]) -> Iterator[str]:
    found, target = report["calibration"], report["target_prior"]
    yield _sentence(found["reason"])
    temperature = (found["link"] or {}).get("temperature")
    if temperature is not None and not 0.97 < temperature < 1.03:
        was, makes = ("too sure", "softer") if temperature > 1 else ("too timid", "sharper")
        yield f"The raw model was {was}: a temperature of {number(temperature, 2)} makes its probabilities {makes}."
    if target:
        declared = ", ".join(f"{CLASS_NAMES[key]} {percent(share)}" for key, share in target["declared"].items())
        yield f"The battles to come are declared to have other class shares: {declared}."
        if target["log_loss"] is None:
            yield f"Its effect is not known: {target['reason']}."
        else:
            yield (
                f"With these battles weighted to those shares, the corrected log loss is {number(target['log_loss'])}"
                f"{_within(target['log_loss_ci95'])}; uncorrected it is {number(target['log_loss_uncorrected'])}, and "
                f"the declared prior alone reaches {number(target['prior'])}."
            )


def _position(report: Mapping[str, Any]) -> Iterator[str]:
    bias = report["position_bias"]
    if not bias:
        yield f"Not measured: {report['position_bias_reason']}."
        return
    yield (
        f"When the same two answers change places, P(A) moves by {points(bias['mean_abs_diff'])} percentage points on "
        "average; a judge without a bias would not move."
    )
    yield _flips(report)
    slot = bias["first_slot_advantage"]
    verb = "gains" if slot >= 0 else "loses"
    yield f"Being shown first, an answer {verb} {points(abs(slot))} percentage points on average."
    gain, ends = bias["tta_gain"], bias["tta_gain_ci95"]
    chance = " (within chance)" if ends and ends[0] <= 0 <= ends[1] else ""
    yield f"Averaging both orders {'lowers' if gain > 0 else 'raises'} the log loss by {number(abs(gain))}{chance}."


def _flips(report: Mapping[str, Any]) -> str:
    """Return how many first choices change with the order, in the raw and in the final answer."""
    bias = report["position_bias"]
    how = "averages both orders" if report["calibration"]["swap_tta"] else "has A first: swap_tta is false"
    changed = f"{percent(bias['flip_rate'])} of its first choices change with the order of the answers"
    return f"{changed}, {percent(bias['final_flip_rate'])} in the final answer, which {how}."


def _training(report: Mapping[str, Any]) -> Iterator[str]:
    for key, name in (("loss", "Training"), ("eval_loss", "Validation")):
        points_of = [point for point in report["loss_curve"] if point.get(key) is not None]
        if points_of:
            first, last = points_of[0], points_of[-1]
            ends = [f"{number(point[key])} at step {count(point['step'])}" for point in (first, last)]
            yield f"{name} loss from {ends[0]} to {ends[1]}."


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
    if not merge and report["stage"] == "dpo_reward":
        yield "Nothing merged is scored: the reward is the adapter switched on and off, on the base it was trained on."
    if not merge:
        yield "The merged model was not compared with the trained adapter."
        return
    yield (
        f"{count(merge['rows'])} battles were scored by the trained adapter on its quantised base and by the merged "
        f"model ({merge['measure']}): the largest difference is {points(merge['max_abs_diff'])} percentage points "
        f"({points(merge['mean_abs_diff'])} on average); up to {points(merge['threshold'])} are allowed."
    )
    losses = [number(merge[f"log_loss_{model}"], 4) for model in ("adapter", "merged")]
    yield f"Their log losses are {losses[0]} and {losses[1]}. The adapter was merged into {merge['merged_into']}."


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


def _within(ends: list[float] | None) -> str:
    return "" if ends is None else f" (95% interval {interval(ends)})"
