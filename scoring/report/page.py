"""The report and the comparison as one self-contained HTML page each: no network, no script, light, dark and print.

write_page(json.loads(Path("report.json").read_text()), Path("report.html"))
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.battle import VERDICTS
from common.console import visible
from common.files import atomic_file
from common.stages import STEPS
from data_prep.export_reader import iter_battles, iter_pairs, read_rows
from scoring.report import figures as charts
from scoring.report import formatting as words

if TYPE_CHECKING:
    import jinja2

# Characters of one text: a page is for reading; `run.py show` prints all of it, as it was fed.
LONGEST = 1_200
_TEXTS = ("prompt", "response_a", "response_b")


def shown_battles(data: Path, split: str, report: dict[str, Any], stage: str) -> list[dict[str, Any]]:
    """Return one record for each battle that a report lists, in the order of its lists, each battle once.

    A record holds id, verdict, dropped (the number of oldest turns that were not fed) and turns, a list of dicts
    prompt, response_a, response_b: the texts as they were fitted to what this stage is fed, long ones shortened. A
    pair is one turn, its answers hold the later ones.
    """
    listed = dict.fromkeys(str(row["id"]) for name in ("worst", "most_biased") for row in report.get(name) or ())
    fed = _pairs if STEPS[stage].data == "dpo_reward" else _battles
    found = {
        name: {
            "id": name,
            "verdict": verdict,
            "dropped": dropped,
            "turns": [dict(zip(_TEXTS, map(_shortened, texts), strict=True)) for texts in turns],
        }
        for name, verdict, dropped, turns in fed(data, split)
        if name in listed
    }
    return [found[name] for name in listed if name in found]


_Fed = tuple[
    str, str | None, int, list[tuple[str, str, str]]
]  # id, verdict, dropped turns, (prompt, A, B) of each turn


def _battles(data: Path, split: str) -> Iterator[_Fed]:
    for battle, dropped in iter_battles(data, split):
        turns = list(zip(battle.prompts, battle.responses_a, battle.responses_b, strict=True))
        yield battle.id, battle.verdict, dropped, turns


def _pairs(data: Path, split: str) -> Iterator[_Fed]:
    for verdict, (pair, dropped) in zip(read_rows(data, split)["verdict"], iter_pairs(data, split), strict=True):
        yield pair.id, verdict, dropped, [(pair.prompt, pair.response_a, pair.response_b)]


def _shortened(text: str) -> str:
    """Return a text that cannot hide or reorder anything on a page, with its middle left out where it is long."""
    half = LONGEST // 2
    if len(text) > LONGEST:
        text = f"{text[:half]} [… {len(text) - 2 * half:,} characters are not shown here …] {text[-half:]}"
    return visible(text)


# Longer tables go on in report.json: a page is for reading.
MOST_ROWS = 20
MOST_SLICES = 12
MOST_FACTS = 200
# Slices with fewer battles say little about the judge.
FEW_ROWS = 50
LEVELS = ("red", "amber", "info")
_REPORT_KEYS = (
    *("experiment", "stage", "set", "rows", "class_counts", "log_loss", "log_loss_ci95", "accuracy", "ece"),
    *("per_class_log_loss", "baselines", "baselines_ci95", "bayes", "learned_share", "beats_prior", "flags"),
    *("position_bias", "merge_gate", "truncation", "calibration", "reliability", "confusion", "slices"),
    *("loss_curve", "worst", "most_biased", "provenance", "gain_over_prior_ci95", "learned_share_ci95"),
    *("baseline_notes", "position_bias_reason", "target_prior", "checks"),
)
# Names of values between 0 and 1 that read better as a percentage.
_SHARES = ("share", "rate", "fraction")
_SETS = {"valid": "validation fold, which was not trained on", "test": "test set"}


def write_page(report: dict, path: Path, battles: Sequence[dict] = ()) -> None:
    """Write the report of one stage as an HTML page, whole or not at all.

    `report` is report.json's content; a key that is missing, null or empty becomes a sentence that says so.
    `battles` are the listed rows with their texts (scoring.report.page), which the lists then link to.
    """
    _write("report.html.j2", report_view(report, battles), path)


def write_compare_page(comparison: dict, path: Path) -> None:
    """Write a comparison of stages on the same rows as an HTML page, whole or not at all.

    `comparison` holds rows, table [{name, log_loss, log_loss_ci95, …}], differences [{first, second, difference
    (log loss of first − of second), ci95}], baselines and blend {weights}; each of them may be missing.
    """
    _write("compare.html.j2", compare_view(comparison), path)


def _write(template: str, view: dict, path: Path) -> None:
    html = _environment().get_template(template).render(**view)
    with atomic_file(path, "wb") as file:
        # Votes may hold lone surrogates, which no encoding can write.
        file.write(html.encode("utf-8", "replace"))


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    names = "number signed count percent interval humanised plain"
    environment.filters.update({name: getattr(words, name) for name in names.split()})
    return environment


def report_view(report: dict, battles: Sequence[dict] = ()) -> dict:
    """Return everything that the report's template shows: sentences, tables and chart positions."""
    report = dict.fromkeys(_REPORT_KEYS) | report
    stage = " · ".join(str(report[key]) for key in ("experiment", "stage") if report[key])
    points = report["reliability"] or {}
    return {
        "title": f"{stage or 'judge'}: report",
        "stage": stage or "judge",
        "held_out": _SETS.get(report["set"], report["set"]),
        "report": report,
        "flags": flags_of(report),
        "headline": words.headline(report),
        "lead": words.lead(report),
        "verdict": _verdict(report),
        "cards": _cards(report),
        "ladder": charts.ladder(report),
        "rung_notes": facts(report["baseline_notes"]),
        "learned": words.finite(report["learned_share"]),
        "classes": _classes(report),
        "confusion": charts.confusion(report["confusion"]),
        "confusion_words": words.confusion(charts.confusion(report["confusion"])),
        "class_names": words.CLASS_NAMES,
        "reliability": [
            {"name": name, "bins": charts.reliability(points.get(key) or [])}
            for key, name in (("top", "Its first choice"), *words.CLASS_NAMES.items())
        ],
        "reliability_words": words.reliability(points.get("top") or []),
        "position_words": words.position_bias(
            report["position_bias"],
            report["position_bias_reason"],
            averaged=bool((report["calibration"] or {}).get("swap_tta")),
        ),
        "calibration_words": words.calibration(report["calibration"]),
        "target_words": words.target_prior(report["target_prior"]),
        "parameters": facts(words.link_of(report["calibration"])),
        "merge_words": words.merge_gate(report["merge_gate"], report["stage"]),
        "checks": _checks(report["checks"] or []),
        "slices": _slices(report),
        "truncation": side_by_side(report["truncation"]),
        "cut_words": words.cut_rows((report["truncation"] or {}).get("judged")),
        "curve": charts.curve(report["loss_curve"] or []),
        "worst": _worst(report["worst"] or []),
        "most_biased": _most_biased(report["most_biased"] or []),
        "battles": _battles_page(report, battles),
        "provenance": facts(report["provenance"]),
        "few_rows": FEW_ROWS,
    }


def _verdict(report: dict) -> str:
    """Name the colour of the headline: good, bad or open."""
    if words.finite(report["log_loss"]) is None or report["beats_prior"] is None:
        return "open"
    return "good" if report["beats_prior"] else "bad"


def flags_of(report: dict) -> list[dict]:
    """Return the flags, gravest first; a result that does not beat the prior has a red one in any case."""
    flags = [
        {
            "level": flag.get("level") if flag.get("level") in LEVELS else "info",
            "code": flag.get("code") or "",
            "text": _sentence(flag.get("text") or flag.get("code") or ""),
        }
        for flag in report["flags"] or []
    ]
    red = [flag["code"] for flag in flags if flag["level"] == "red"]
    if report["beats_prior"] is False and not any("prior" in code for code in red):
        text = "This result does not beat the class prior: do not use it as a judge."
        flags.append({"level": "red", "code": "below_prior", "text": text})
    return sorted(flags, key=lambda flag: LEVELS.index(flag["level"]))


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}"


def _cards(report: dict) -> list[dict]:
    """Return the four figures at the top, each with what it means."""
    ends = words.interval(report["log_loss_ci95"])
    bayes = words.finite(report["bayes"])
    share_ends = words.pair(report["learned_share_ci95"])
    learned = "of the way from the class prior to the best possible judge"
    if share_ends:
        learned += f"; 95% interval {words.percent(share_ends[0])} to {words.percent(share_ends[1])}"
    if bayes is None:
        learned = "the best possible judge is not known for human votes"
    return [
        {
            "name": "Log loss",
            "value": words.number(report["log_loss"]),
            "note": f"95% interval {ends}" if ends != words.MISSING else "no interval",
        },
        {
            "name": "Accuracy",
            "value": words.percent(report["accuracy"]),
            "note": "its first choice was the verdict; guessing gives 33%",
        },
        {
            "name": "Calibration error",
            "value": words.percent(report["ece"]),
            "note": "how far its probabilities are from the facts, on average; 0% is honest",
        },
        {"name": "Learned", "value": words.percent(report["learned_share"]), "note": learned},
    ]


def _classes(report: dict) -> list[dict]:
    """Return one row a class: battles, share, log loss, and from the confusion how often found and how often right."""
    counts, losses = report["class_counts"] or {}, report["per_class_log_loss"] or {}
    cells = charts.confusion(report["confusion"])
    total = sum(words.finite(counts.get(key)) or 0 for key in VERDICTS)
    if not (counts or losses or cells):
        return []
    rows = []
    for index, key in enumerate(VERDICTS):
        size = words.finite(counts.get(key))
        chosen = sum(row[index]["count"] for row in cells) if cells else 0
        rows.append(
            {
                "name": words.CLASS_NAMES[key],
                "rows": size,
                "share": size / total if size is not None and total else None,
                "log_loss": words.finite(losses.get(key)),
                "found": cells[index][index]["share"] if cells else None,
                "right": cells[index][index]["count"] / chosen if chosen else None,
            }
        )
    return rows


def _checks(checks: list[dict]) -> list[dict]:
    """Return one row a check with its outcome in a word."""
    outcomes = {True: "passed", False: "failed"}
    return [
        {
            "name": words.plain(check.get("name")),
            "outcome": outcomes.get(check.get("passed"), "not applicable"),
            "detail": words.plain(check.get("detail")),
        }
        for check in checks
    ]


def _slices(report: dict) -> list[dict]:
    """Return the families of slices (length, turns, language), each as an interval chart; long tails are cut off."""
    families = []
    for family, rows in (report["slices"] or {}).items():
        rows = [row for row in rows or [] if row]
        shown = _largest(rows)
        marks = [
            charts.mark(
                _named(row.get("name")),
                row.get("log_loss"),
                row.get("log_loss_ci95"),
                kind="few" if (words.finite(row.get("rows")) or 0) < FEW_ROWS else "model",
                rows=words.finite(row.get("rows")),
                prior=words.finite(row.get("prior")),
                gain=_gain(row),
            )
            for row in shown
        ]
        families.append(
            {
                "name": words.humanised(family),
                "chart": charts.intervals(marks, words.finite(report["log_loss"])),
                "left_out": len(rows) - len(shown),
            }
        )
    return families


def _largest(rows: list[dict]) -> list[dict]:
    """Keep the slices with most battles, in their given order."""
    by_size = sorted(range(len(rows)), key=lambda index: -(words.finite(rows[index].get("rows")) or 0))
    return [rows[index] for index in sorted(by_size[:MOST_SLICES])]


def _named(name: Any) -> str:
    return words.plain(name) if name not in (None, "") else "not stated"


def _gain(row: dict) -> float | None:
    model, prior = words.finite(row.get("log_loss")), words.finite(row.get("prior"))
    return None if model is None or prior is None else prior - model


def _worst(rows: list[dict]) -> list[dict]:
    """Return the worst rows with their probabilities in class order."""
    return [
        {
            "id": words.plain(row.get("id")),
            "verdict": words.CLASS_NAMES.get(row.get("verdict"), words.plain(row.get("verdict"))),
            "probabilities": _in_class_order(row.get("probabilities")),
            "log_loss": words.finite(row.get("log_loss")),
        }
        for row in rows[:MOST_ROWS]
    ]


def _battles_page(report: dict, battles: Sequence[dict]) -> dict[str, dict]:
    """Return the battles that are shown with their texts, by id, each with its anchor and what the lists say of it."""
    worst = {words.plain(row.get("id")): row for row in report["worst"] or []}
    biased = {words.plain(row.get("id")): row for row in report["most_biased"] or []}
    shown = {}
    for number, battle in enumerate(battles, 1):
        name = words.plain(battle["id"])
        said = [("final", worst.get(name, {}).get("probabilities"))]
        said += [(f"{first} first", biased.get(name, {}).get(f"{first.lower()}_first")) for first in "AB"]
        shown[name] = {
            **battle,
            "anchor": f"battle-{number}",
            "verdict": words.CLASS_NAMES.get(battle["verdict"], words.plain(battle["verdict"])),
            "said": [(order, _in_class_order(values)) for order, values in said if values is not None],
        }
    return shown


def _in_class_order(probabilities: Any) -> list[float | None]:
    if isinstance(probabilities, dict):
        return [words.finite(probabilities.get(key)) for key in VERDICTS]
    values = [words.finite(value) for value in probabilities or []]
    return (values + [None] * 3)[:3]


def _most_biased(rows: list[dict]) -> dict:
    """Return the rows that the order moved most, their probabilities as percentages like all others of the page."""

    def shown(key: str, value: Any) -> Any:
        if key == "change":
            return f"{words.points(value)} points"
        values = value.values() if isinstance(value, dict) else value
        return " / ".join(map(words.percent, values)) if isinstance(value, list | tuple | dict) else value

    return free_table([{k: shown(k, v) for k, v in row.items()} for row in rows if isinstance(row, dict)])


def free_table(rows: list[dict]) -> dict:
    """Return a table (`columns`, `rows`) of rows whose keys are not known beforehand."""
    rows = [row for row in rows if isinstance(row, dict)][:MOST_ROWS]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    return {
        "columns": [words.humanised(key) for key in columns],
        "rows": [[_cell(row.get(key)) for key in columns] for row in rows],
    }


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return " / ".join(_cell(item) for item in value)
    if isinstance(value, dict):
        return " / ".join(_cell(item) for item in value.values())
    return words.number(value) if isinstance(value, float) else words.plain(value)


def facts(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Return a nested record as flat (name, text) rows: {"versions": {"torch": "2"}} → ("versions: torch", "2")."""
    if isinstance(value, dict):
        rows = []
        for key, item in value.items():
            label = words.humanised(key)
            rows += facts(item, f"{name}: {label}" if name else label)
        return rows[:MOST_FACTS]
    share = words.finite(value) if name.split(" ")[-1] in _SHARES or name.split(" ")[0] in _SHARES else None
    text = words.plain(value) if share is None else words.percent(share)
    return [(name, text)] if name else []


def side_by_side(value: dict | None) -> dict:
    """Return a table (`columns`, `rows`) of records that share their keys, one column each; plain facts otherwise."""
    records = {
        key: dict(facts(item)) for key, item in (value or {}).items() if isinstance(item, dict) and key != "judged"
    }
    single = {key: item for key, item in (value or {}).items() if not isinstance(item, dict)}
    if not records or single:
        rows = [(name, [text]) for name, text in facts({k: v for k, v in (value or {}).items() if k != "judged"})]
        return {"columns": [""], "rows": rows}
    names = list(dict.fromkeys(name for record in records.values() for name in record))[:MOST_FACTS]
    rows = [(name, [record.get(name, words.MISSING) for record in records.values()]) for name in names]
    return {"columns": [words.humanised(key) for key in records], "rows": rows}


def compare_view(comparison: dict) -> dict:
    """Return everything that the comparison's template shows."""
    keys = (
        "experiment",
        "set",
        "rows",
        "table",
        "differences",
        "baselines",
        "baselines_ci95",
        "bayes",
        "blend",
        "flags",
    )
    comparison = dict.fromkeys(keys) | comparison
    table = [row for row in comparison["table"] or [] if row]
    baselines, ends = comparison["baselines"] or {}, comparison["baselines_ci95"] or {}
    named = {str(row.get("name")) for row in table}
    marks = [
        charts.mark(rung, baselines.get(key), ends.get(key), note=note, kind="baseline")
        for key, (rung, note) in words.RUNGS.items()
        if key in baselines and not {key, rung} & named
    ]
    best = _best(table)
    marks += [
        charts.mark(
            _named(row.get("name")),
            row.get("log_loss"),
            row.get("log_loss_ci95"),
            note="the lowest log loss" if row is best else "",
            kind=_kind(row, baselines),
        )
        for row in table
    ]
    if words.finite(comparison["bayes"]) is not None:
        marks.append(charts.mark("Bayes", comparison["bayes"], None, note="the best possible", kind="bayes"))
    return {
        "title": f"{comparison['experiment'] or 'stages'}: comparison",
        "held_out": _SETS.get(comparison["set"], comparison["set"]),
        "comparison": comparison,
        "headline": _compare_headline(best, comparison),
        "flags": [f"{stage}: {text}" for stage, texts in (comparison["flags"] or {}).items() for text in texts],
        "undecided": _undecided(best, comparison["differences"] or []),
        "ladder": charts.intervals(marks, words.finite(baselines.get("prior"))),
        "table": free_table([_flat(row) for row in table]),
        "differences": _differences(comparison["differences"] or []),
        "weights": _weights(comparison["blend"] or {}),
        "blend": facts({k: v for k, v in (comparison["blend"] or {}).items() if k != "weights"}),
    }


def _kind(row: dict, baselines: dict) -> str:
    return "baseline" if row.get("name") in baselines or row.get("kind") == "baseline" else "model"


def _best(table: list[dict]) -> dict | None:
    measured = [row for row in table if words.finite(row.get("log_loss")) is not None]
    return min(measured, key=lambda row: words.finite(row["log_loss"]), default=None)


def _flat(row: dict) -> dict:
    """Give a row's numbers fixed decimals and its intervals words, and spread a nested record over columns."""
    flat: dict[str, Any] = {}
    for key, value in row.items():
        if key == "rows":  # the same for every row; it stands in the heading
            continue
        ends = words.pair(value) if str(key).endswith("ci95") else None
        if ends:
            flat[key.replace("_ci95", "_95%_interval")] = words.interval(ends)
        elif key == "per_class_log_loss" and isinstance(value, dict):
            flat |= {f"log loss: {words.CLASS_NAMES.get(inner, inner)}": item for inner, item in value.items()}
        elif isinstance(value, dict):
            flat |= {f"{key}: {inner}": item for inner, item in value.items()}
        elif key in ("accuracy", "ece", "learned_share"):
            flat[key] = words.percent(value)
        else:
            flat[key] = value
    return flat


def _compare_headline(best: dict | None, comparison: dict) -> str:
    if best is None:
        return "No stage has a measured log loss: there is nothing to compare."
    prior = words.finite((comparison["baselines"] or {}).get("prior"))
    loss = words.finite(best["log_loss"])
    text = f"Lowest log loss: {_named(best.get('name'))} with {words.number(loss)}"
    if prior is None:
        return f"{text}."
    return f"{text}, {words.number(abs(prior - loss))} {'below' if loss < prior else 'above'} the class prior."


def _undecided(best: dict | None, differences: list[dict]) -> list[str]:
    """Return the names that chance alone may have put behind the best one."""
    name = best.get("name") if best else None
    names = []
    for row in differences:
        sides, ends = [row.get("first"), row.get("second")], words.pair(row.get("ci95"))
        if name in sides and ends and ends[0] <= 0 <= ends[1]:
            names.append(_named(sides[1 - sides.index(name)]))
    return names


def _weights(blend: dict) -> list[tuple[str, str]]:
    """Return the weights of the blend under the stages' own names, the heaviest first."""
    weights = blend.get("weights")
    if not isinstance(weights, dict):
        return facts(weights, "weights") if weights else []
    ranked = sorted(weights.items(), key=lambda item: -(words.finite(item[1]) or 0.0))
    return [(str(name), words.plain(value)) for name, value in ranked]


def _differences(rows: list[dict]) -> charts.Intervals:
    """Return the paired differences around zero; the note says who is better, or that chance explains it."""
    marks = []
    for row in rows:
        first, second = _named(row.get("first")), _named(row.get("second"))
        ends, value = words.pair(row.get("ci95")), words.finite(row.get("difference"))
        if value is None or ends is None:
            note, kind = "not measured", "few"
        elif ends[0] <= 0 <= ends[1]:
            note, kind = "no difference beyond chance", "few"
        else:
            note, kind = f"{first if value < 0 else second} is better", "model"
        marks.append(charts.mark(f"{first} − {second}", value, ends, note=note, kind=kind))
    return charts.intervals(marks, 0.0 if marks else None)
