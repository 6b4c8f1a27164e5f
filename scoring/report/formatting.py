"""Numbers of a report as words: what a figure says, for a reader who never met its name.

number(0.95123) == "0.951", percent(0.071) == "7.1%", interval([0.93, 0.97]) == "0.930 to 0.970"
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# What stands where a value was not measured.
MISSING = "–"
CLASS_NAMES = {"a": "A wins", "b": "B wins", "tie": "Tie"}
# Name and meaning of each rung, from the one that knows nothing to the one that nothing can beat.
RUNGS = {
    "uniform": ("Uniform", "one third for each class; knows nothing"),
    "prior": ("Class prior", "always the shares of the classes; reads no text"),
    "length": ("Length", "logistic regression on the lengths of the texts"),
    "tfidf": ("TF-IDF", "logistic regression on words and phrases"),
}
# What each kind of raw score is turned into probabilities by.
_LINKS = {"logits": "temperature and class bias", "rewards": "Davidson link from rewards to probabilities"}
_KEY_NAMES = {
    "ece": "expected calibration error",
    "sha256": "SHA-256",
    "tta": "test-time augmentation",
}


def finite(value: Any) -> float | None:
    """Return a real, finite number as a float; None for everything else (booleans, text, NaN, nothing)."""
    if isinstance(value, bool) or value is None or isinstance(value, str | bytes | list | tuple | dict):
        return None
    try:
        result = float(value)
    except (TypeError, ValueError):
        return None
    return result if math.isfinite(result) else None


def pair(value: Any) -> tuple[float, float] | None:
    """Return [low, high] as two finite floats in rising order, or None."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    low, high = finite(value[0]), finite(value[1])
    return None if low is None or high is None else (min(low, high), max(low, high))


def number(value: Any, digits: int = 3) -> str:
    """Return a number with a fixed count of decimals and a true minus sign."""
    real = finite(value)
    if real is None:
        return MISSING
    return f"{round(real, digits) + 0.0:.{digits}f}".replace("-", "−")


def signed(value: Any, digits: int = 3) -> str:
    """Return a difference with its sign always shown."""
    real = finite(value)
    text = number(real, digits)
    return f"+{text}" if real is not None and round(real, digits) > 0 else text


def count(value: Any) -> str:
    """Return a whole number with thousands separated; fractions keep up to four digits."""
    real = finite(value)
    if real is None:
        return MISSING
    return (f"{int(real):,}" if real == int(real) else f"{real:,.4g}").replace("-", "−")


def percent(value: Any) -> str:
    """Return a share as a percentage: one decimal below 10%, none above."""
    real = finite(value)
    if real is None:
        return MISSING
    share = 100 * real
    text = f"{share:.0f}" if abs(share) >= 9.95 or share == 0 else f"{share:.1f}"
    return f"{text}%".replace("-", "−")


def points(share: Any) -> str:
    """Return a difference of two shares as percentage points, without the words; one too small to matter says so."""
    real = finite(share)
    if real is None:
        return MISSING
    if 0 < abs(real) < 1e-4:
        return "less than 0.01"
    return f"{100 * real:.2g}" if abs(real) < 0.1 else f"{100 * real:.0f}"


def interval(value: Any, digits: int = 3) -> str:
    """Return an interval as "low to high"."""
    ends = pair(value)
    return MISSING if ends is None else f"{number(ends[0], digits)} to {number(ends[1], digits)}"


def humanised(key: Any) -> str:
    """Return a key as words: `tokens_lost` → "tokens lost"."""
    return _KEY_NAMES.get(str(key), str(key).replace("_", " "))


def plain(value: Any) -> str:
    """Return any value of a report as one short text, for tables whose keys are not known beforehand."""
    if value is None:
        return MISSING
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{humanised(key)} {plain(item)}" for key, item in value.items()) or MISSING
    if isinstance(value, list | tuple):
        return ", ".join(plain(item) for item in value) or MISSING
    real = finite(value)
    return str(value) if real is None else count(real)


def headline(report: dict) -> str:
    """Return the result in one sentence: against the class prior and, where Bayes is known, against the possible."""
    gain, low_high = gain_over_prior(report)
    if finite(report["log_loss"]) is None:
        return "No log loss was measured: this report has no result."
    if gain is None:
        return f"The judge's log loss is {number(report['log_loss'])}; there is no class prior to compare it with."
    spread = f" ± {number((low_high[1] - low_high[0]) / 2)}" if low_high else ""
    share = finite(report["learned_share"])
    learned = f" and learned {percent(share)} of what could be learned" if share is not None else ""
    if report["beats_prior"] and gain > 0:
        return f"The judge beats the class prior by {number(gain)}{spread}{learned}."
    if gain > 0:
        return f"The judge is ahead of the class prior by {number(gain)}{spread}, but not by more than chance."
    if round(gain, 3) == 0:
        return "The judge does not beat the class prior: it is no better than not reading the texts."
    return f"The judge does not beat the class prior: it is worse by {number(-gain)}{spread}."


def gain_over_prior(report: dict) -> tuple[float | None, tuple[float, float] | None]:
    """Return prior − model in log loss (positive: the model is better) and its paired interval where given."""
    model, prior = finite(report["log_loss"]), finite((report["baselines"] or {}).get("prior"))
    gain = None if model is None or prior is None else prior - model
    return gain, pair(report.get("gain_over_prior_ci95"))


def lead(report: dict) -> list[str]:
    """Return the sentences under the headline: the log loss, what it means, and any simpler rung that is better."""
    model = finite(report["log_loss"])
    if model is None:
        return []
    ends = interval(report["log_loss_ci95"])
    within = f" (95% interval {ends})" if ends != MISSING else ""
    on_rows = f" on {count(report['rows'])} battles" if finite(report["rows"]) is not None else ""
    sentences = [
        f"Its log loss is {number(model)}{within}{on_rows}. Lower is better.",
        f"Put simply: it gave the verdict that people really chose a probability of {percent(math.exp(-model))} "
        "(the geometric mean); blind guessing gives 33%.",
    ]
    better = [
        f"{RUNGS[key][0]} ({number(value)})"
        for key, value in (report["baselines"] or {}).items()
        if key in RUNGS and key not in ("uniform", "prior") and (finite(value) or math.inf) < model
    ]
    # The flag of the same name says it too, and louder.
    if better and not any(flag.get("code") == "baseline_ahead" for flag in report["flags"] or []):
        sentences.append(f"A much simpler method is better than it here: {' and '.join(better)}.")
    return sentences


def reliability(points: list[dict]) -> str:
    """Return what the reliability of the first choice says: over-confident, timid or honest.

    The gap is mean confidence − hit rate, weighted by the count of each bin.
    """
    rows = [(finite(p.get("confidence")), finite(p.get("frequency")), finite(p.get("count"))) for p in points]
    rows = [row for row in rows if None not in row and row[2] > 0]
    total = sum(row[2] for row in rows)
    if not total:
        return "Not measured: the report holds no bins of the first choice."
    said, happened = (sum(row[i] * row[2] for row in rows) / total for i in (0, 1))
    text = f"On average the judge gave its first choice {percent(said)} and it came true in {percent(happened)}"
    gap = said - happened
    if abs(gap) < 0.02:
        return f"{text}: on average its probabilities mean what they say."
    kind = "overconfident" if gap > 0 else "too timid"
    return f"{text}: {kind} by {number(100 * abs(gap), 0)} percentage points."


def confusion(cells: list[list[dict]] | None) -> list[str]:
    """Return the commonest mistake of a 3 × 3 table (rows = truth) and the classes that are never said."""
    if not cells:
        return []
    names = list(CLASS_NAMES.values())
    wrong = [(cells[t][s]["count"], t, s) for t in range(3) for s in range(3) if t != s]
    size, truth, said = max(wrong, key=lambda item: item[0])
    sentences = []
    if size:
        sentences.append(
            f"The commonest mistake: “{names[truth]}” taken for “{names[said]}”, in {count(size)} battles."
        )
    silent = [names[s] for s in range(3) if not any(row[s]["count"] for row in cells)]
    if silent:
        listed = " or ".join(f"“{name}”" for name in silent)
        sentences.append(
            f"It never puts {listed} first. With rare or doubtful classes that may be right: a class can have a "
            "fair probability without being the most probable."
        )
    return sentences


def position_bias(bias: dict | None, reason: str | None = None, *, averaged: bool = False) -> list[str]:
    """Return what happens when the two answers change places, or why (`reason`) it is not known.

    `averaged` says whether the final probabilities average both orders.
    """
    if not bias and reason:
        return [f"Not measured: {reason}."]
    if not bias:
        return [
            "Not measured: each battle was scored in one order only. Scoring with swap test-time augmentation "
            "shows both orders to the judge and fills this section."
        ]
    sentences = []
    moved, flips = finite(bias.get("mean_abs_diff")), finite(bias.get("flip_rate"))
    if moved is not None:
        sentences.append(
            f"When the same two answers change places, the probability that the first one wins moves by "
            f"{number(100 * moved, 1)} percentage points on average; a judge without a bias would not move."
        )
    if flips is not None:
        final = final_flips(bias, averaged=averaged)
        sentences.append(f"In {percent(flips)} of the battles the first choice itself changes{final}.")
    slot = finite(bias.get("first_slot_advantage"))
    if slot is not None:
        verb = "gains" if slot >= 0 else "loses"
        sentences.append(
            f"Being shown first, an answer {verb} {number(100 * abs(slot), 1)} percentage points on average."
        )
    return sentences + _tta(bias)


def final_flips(bias: Mapping[str, Any], *, averaged: bool, decimals: int | None = None) -> str:
    """Return how many of the final first choices flip, as the end of a sentence; nothing where no report tells it."""
    rate = finite(bias.get("final_flip_rate"))
    if rate is None:
        return ""
    how = "averages both orders" if averaged else "has A first: swap_tta is false"
    share = percent(rate) if decimals is None else f"{rate:.{decimals}%}"
    return f", {share} in the final answer, which {how}"


def _tta(bias: dict) -> list[str]:
    """Say what averaging both orders does to the log loss; `tta_gain` is what it saves."""
    gain, ends = finite(bias.get("tta_gain")), pair(bias.get("tta_gain_ci95"))
    if gain is None:
        return []
    if ends and ends[0] <= 0 <= ends[1]:
        within = f"{signed(-ends[1])} to {signed(-ends[0])}"
        return [
            f"Averaging both orders changes the log loss by {signed(-gain)}: within chance (95% interval {within})."
        ]
    within = f" (95% interval {interval([abs(end) for end in ends])})" if ends else ""
    return [f"Averaging both orders {'lowers' if gain > 0 else 'raises'} the log loss by {number(abs(gain))}{within}."]


def link_of(found: dict | None) -> dict | None:
    """Return the fitted values of a calibration, whichever of its two names they have."""
    if not found:
        return None
    return found.get("parameters") or found.get("link")


def calibration(found: dict | None) -> list[str]:
    """Return whether the calibration was kept, what it changed on rows it was not fitted on, and why."""
    if not found:
        return ["No calibration was tried: the probabilities are the model's own."]
    name = _LINKS.get(found.get("kind"), humanised(found.get("kind") or "calibration"))
    before, after = number(found.get("log_loss_before")), number(found.get("log_loss_cross_fitted"))
    # Rewards have no probabilities of their own, so their link is measured against a class prior.
    rewards = "rewards" in (found.get("kind"), found.get("scores"))
    start = f"{before} (a class prior, fitted in the same way)" if rewards else before
    change = f"the log loss from {start} to {after} on battles that it was not fitted on (cross-fitting)"
    reason = str(found.get("reason") or "")
    if MISSING in (before, after):
        sentences = [f"{'Kept' if found.get('kept') else 'Not kept'}: {name}; its effect was not measured."]
    elif found.get("kept"):
        sentences = [f"Kept: {name}. It takes {change}."]
    else:
        sentences = [f"Not kept: {name}. It would take {change}, so the probabilities stay without it."]
    if reason and (MISSING in (before, after) or "cross-fitted log loss" not in reason):
        sentences.append(f"Reason: {reason.rstrip('.')}.")
    return sentences + _temperature(found)


def _temperature(found: dict) -> list[str]:
    """Say what a kept temperature means: above 1 the raw model was too sure (softmax of logits / temperature)."""
    link = link_of(found)
    value = finite(link.get("temperature")) if isinstance(link, dict) else None
    if value is None or not found.get("kept") or 0.97 < value < 1.03:
        return []
    was, made = ("too sure", "softer") if value > 1 else ("too timid", "sharper")
    return [f"The raw model was {was}: a temperature of {number(value, 2)} makes its probabilities {made}."]


def target_prior(found: dict | None) -> list[str]:
    """Return what the correction to a declared class prior would reach, estimated on these rows."""
    if not found:
        return []
    declared = found.get("declared") or {}
    shares = ", ".join(f"{CLASS_NAMES.get(key, key)} {percent(value)}" for key, value in declared.items())
    sentences = [f"The battles to come are declared to have other class shares: {shares}." if shares else ""]
    loss, raw, prior = (number(found.get(key)) for key in ("log_loss", "log_loss_uncorrected", "prior"))
    if loss != MISSING:
        ends = interval(found.get("log_loss_ci95"))
        within = f" (95% interval {ends})" if ends != MISSING else ""
        sentences.append(
            f"With these battles weighted to those shares, the corrected log loss is {loss}{within}; "
            f"uncorrected it is {raw}, and the declared prior alone reaches {prior}."
        )
    elif found.get("reason"):
        sentences.append(f"Its effect is not known: {found['reason']}.")
    return [sentence for sentence in sentences if sentence]


def cut_rows(judged: dict | None) -> list[str]:
    """Return how many of the judged battles were shortened and whether they are judged worse."""
    if not judged or finite(judged.get("rows_cut")) is None:
        return []
    if not judged["rows_cut"]:
        return ["None of the judged battles was shortened."]
    share, size = percent(judged.get("rows_cut_share")), count(judged["rows_cut"])
    cut, whole = number(judged.get("log_loss_cut")), number(judged.get("log_loss_whole"))
    return [
        f"{size} of the judged battles ({share}) were shortened: log loss {cut}, against {whole} of the whole ones."
    ]


def merge_gate(gate: dict | None, stage: str | None = None) -> list[str]:
    """Return whether the merged model still says what the trained adapter said."""
    if not gate and stage == "dpo_reward":
        return [
            "Nothing merged is scored: the reward is the adapter switched on and off, on the base as it was trained."
        ]
    if not gate:
        return ["Not measured: the merged model was not compared with the trained adapter."]
    adapter, merged = number(gate.get("log_loss_adapter"), 4), number(gate.get("log_loss_merged"), 4)
    rows = f"{count(gate['rows'])} battles" if finite(gate.get("rows")) is not None else "The same battles"
    head = f"{rows} were scored by the trained adapter on its quantised base and by the merged model"
    losses = f"their log losses are {adapter} and {merged}"
    largest, mean = finite(gate.get("max_abs_diff")), finite(gate.get("mean_abs_diff"))
    if largest is None:
        return [f"{head}: {losses}."]
    words = f"{head}: the largest difference of a probability is {points(largest)} percentage points"
    words += f" ({points(mean)} on average)" if mean is not None else ""
    limit, base = finite(gate.get("threshold")), gate.get("merged_into")
    told = [f"{words}, and {losses}."]
    told += [f"Allowed are {points(limit)} points: {'passed' if gate.get('passed') else 'failed'}."] if limit else []
    told += [f"What was measured: {gate['measure']}."] if gate.get("measure") else []
    return told + ([f"It was merged into {base}."] if base else [])
