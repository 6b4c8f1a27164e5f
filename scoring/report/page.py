"""The report and the comparison as one self-contained HTML page each: no network, no script, light, dark and print.

write_page(report, Path("report.html"), shown_battles(Path("data/demo"), "valid", report, "sft"))
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import yaml

from common.console import visible
from common.files import atomic_file
from common.stages import STAGES
from data_prep.export_reader import Split, iter_battles, iter_pairs
from scoring.report import figures
from scoring.report.findings import (
    BASELINE_NAMES,
    CLASS_NAMES,
    LEVELS,
    count,
    findings,
    headline,
    interval,
    main_figures,
    number,
    outcome,
    percent,
    points,
    shares,
    signed,
)

# Characters of one text: a page is for reading; `run.py show` prints all of it, as the model reads it.
LONGEST = 1_200
# Slices with fewer battles say little about the judge.
FEW_ROWS = 50


def write_page(report: Mapping[str, Any], path: Path, battles: Sequence[Mapping[str, Any]] = ()) -> None:
    """Write the report of one stage as an HTML page, whole or not at all.

    `report` is what `build_report` returned; `battles` are the listed rows with their texts (`shown_battles`).
    """
    view = {
        "title": f"{report['experiment']} · {report['stage']}: report",
        "report": report,
        "headline": headline(report),
        "findings": findings(report),
        "main_figures": main_figures(report),
        "log_losses": figures.report_chart(report),
        "confusion": figures.confusion(report["confusion"]),
        "reliability": [
            (name, figures.reliability(report["reliability"][key]))
            for key, name in {"top": "Its first choice", **CLASS_NAMES}.items()
        ],
        "coverage": _coverage(report["agreement"]["curve"]),
        "slices": {family: _slices(rows, report["log_loss"]) for family, rows in report["slices"].items() if rows},
        "curve": figures.curve(report["loss_curve"]),
        "truncation": {k: v for k, v in report["truncation"].items() if k != "judged"},
        "battles": {battle["id"]: battle for battle in battles},
        "worst": {row["id"]: row for row in report["worst"]},
        "most_biased": {row["id"]: row for row in report["most_biased"]},
        "few_rows": FEW_ROWS,
        "levels": LEVELS,
    }
    _write("report.html.j2", view, path)


def write_compare_page(comparison: Mapping[str, Any], path: Path) -> None:
    """Write what `compare_stages` returned as an HTML page, whole or not at all."""
    best = min(comparison["table"], key=lambda row: row["log_loss"])
    models = [
        figures.Mark(
            row["name"], row["log_loss"], row["log_loss_ci95"], note="best of the stages" if row is best else ""
        )
        for row in comparison["table"]
    ]
    differences = [
        figures.Mark(
            f"{pair['first']} − {pair['second']}",
            pair["difference"],
            pair["ci95"],
            note=outcome(pair),
            kind="model" if pair["better"] else "few",
        )
        for pair in comparison["differences"]
    ]
    gap = comparison["baselines"]["prior"] - best["log_loss"]
    beaten = f"{number(abs(gap))} {'below' if gap > 0 else 'above'} the class prior"
    simple = [BASELINE_NAMES[name] for name, loss in comparison["baselines"].items() if loss < best["log_loss"]]
    beaten += f"; better: {', '.join(simple)}" if simple else ""
    view = {
        "title": f"{comparison['experiment']}: comparison",
        "comparison": comparison,
        "headline": f"Best of the stages: {best['name']} with log loss {number(best['log_loss'])}, {beaten}.",
        "flags": [f"{stage}: {text}" for stage, texts in comparison["flags"].items() for text in texts],
        "undecided": [
            pair["second"] if pair["first"] == best["name"] else pair["first"]
            for pair in comparison["differences"]
            if best["name"] in (pair["first"], pair["second"]) and not pair["better"]
        ],
        "log_losses": figures.log_loss_chart(comparison, models),
        "differences": figures.Intervals(differences, 0.0),
        "weights": sorted(comparison["blend"]["weights"].items(), key=lambda item: -item[1]),
    }
    _write("compare.html.j2", view, path)


def write_rank_page(ranked: Any, path: Path) -> None:
    """Write the ratings of models (scoring.rank.Ranked) as an HTML page, whole or not at all."""
    marks = [
        figures.Mark(row.model, row.rating, (row.low, row.high), f"{row.battles:,} battles")
        for row in ranked.table.itertuples(index=False)
    ]
    view = {
        "title": "Ratings",
        "ranked": ranked,
        "ratings": figures.Intervals(marks, float(ranked.table["rating"].mean())),
    }
    _write("rank.html.j2", view, path)


def _write(template: str, view: dict[str, Any], path: Path) -> None:
    html = environment().get_template(template).render(class_names=CLASS_NAMES, **view)
    with atomic_file(path, "wb") as file:
        # Votes may hold lone surrogates, which no encoding can write, and signs that turn the writing round.
        file.write(visible(html).encode("utf-8"))


@functools.cache
def environment() -> jinja2.Environment:
    """Return the environment of the templates: every value is escaped, an unknown name is an error."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shown = {write.__name__: write for write in (number, signed, count, percent, shares, points, interval)}
    made.filters.update(shown, yaml=_as_yaml)
    made.globals.update(shown)
    return made


def shown_battles(data: Path, split: Split, report: Mapping[str, Any], stage: str) -> list[dict[str, Any]]:
    """Return one record for each battle that a report lists, in the order of its lists, each battle once.

    A record holds id, dropped (how many oldest turns the model did not read) and turns, a list of dicts prompt,
    response_a, response_b: the texts as they were fitted to this stage's budget, long ones shortened. A pair is
    one turn, its answers hold the later ones.
    """
    listed = dict.fromkeys(row["id"] for row in (*report["worst"], *report["most_biased"]))
    pairs = STAGES[stage].data == "dpo_reward"
    found = {}
    for row, dropped in iter_pairs(data, split) if pairs else iter_battles(data, split):
        if row.id in listed:
            one_turn = [(row.prompt, row.response_a, row.response_b)] if pairs else None
            turns = one_turn or zip(*row.texts, strict=True)
            texts = [[_shortened(text) for text in turn] for turn in turns]
            names = ("prompt", "response_a", "response_b")
            found[row.id] = {
                "id": row.id,
                "dropped": dropped,
                "turns": [dict(zip(names, turn, strict=True)) for turn in texts],
            }
    return [found[id_] for id_ in listed if id_ in found]


def _shortened(text: str) -> str:
    """Return a text that cannot hide or reorder anything on a page, with its middle left out where it is long."""
    half = LONGEST // 2
    if len(text) > LONGEST:
        text = f"{text[:half]} [… {len(text) - 2 * half:,} characters are not shown here …] {text[-half:]}"
    return visible(text)


def _coverage(points: Sequence[Mapping[str, Any]]) -> figures.Intervals:
    """Return how often the first choice agrees with people, by the share of battles that is answered."""
    marks = [
        figures.Mark(
            percent(point["coverage"]),
            point["agreement"],
            (point["bound"], point["agreement"]),
            note=f"{point['rows']:,} battles",
            extra={"from": point["threshold"]},
        )
        for point in points
    ]
    return figures.Intervals(marks)


def _slices(rows: Sequence[Mapping[str, Any]], log_loss: float) -> figures.Intervals:
    """Return one family of slices as an interval chart around the log loss of all rows."""
    marks = [
        figures.Mark(
            row["name"],
            row["log_loss"],
            row["log_loss_ci95"],
            kind="few" if row["rows"] < FEW_ROWS else "model",
            extra={"battles": row["rows"], "prior": row["prior"], "gain": row["prior"] - row["log_loss"]},
        )
        for row in rows
    ]
    return figures.Intervals(marks, log_loss)


def _as_yaml(record: Mapping[str, Any]) -> str:
    """Return a nested record as YAML, its fractions to four digits."""
    rounded = json.loads(json.dumps(record), parse_float=lambda digits: float(f"{float(digits):.4g}"))
    return yaml.safe_dump(rounded, sort_keys=False, allow_unicode=True, width=100)
