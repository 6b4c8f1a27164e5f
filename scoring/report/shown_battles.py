"""The battles that a report's page shows with their texts: those that it lists as the worst and the most biased."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.screen import visible
from common.stages import STEPS
from data_prep.export_reader import iter_battles, iter_pairs, read_rows

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
