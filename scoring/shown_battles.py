"""The battles that a report's page shows with their texts: those that it lists as the worst and the most biased."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data_prep.dataset import iter_battles
from data_prep.neutral import visible

# Characters of one text: a page is for reading; `run.py show` prints all of it, as it was fed.
LONGEST = 1_200


def shown_battles(data: Path, split: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one record for each battle that a report lists, in the order of its lists, each battle once.

    A record holds id, verdict, dropped (the number of oldest turns that the judge did not get) and turns, a list of
    dicts prompt, response_a, response_b: the texts as they were fitted to the judge prompt, long ones shortened.
    """
    listed = dict.fromkeys(str(row["id"]) for name in ("worst", "most_biased") for row in report.get(name) or ())
    found = {
        battle.id: {
            "id": battle.id,
            "verdict": battle.verdict,
            "dropped": dropped,
            "turns": [
                dict(zip(("prompt", "response_a", "response_b"), map(_shortened, texts), strict=True))
                for texts in zip(battle.prompts, battle.responses_a, battle.responses_b, strict=True)
            ],
        }
        for battle, dropped in iter_battles(data, split)
        if battle.id in listed
    }
    return [found[name] for name in listed if name in found]


def _shortened(text: str) -> str:
    """Return a text that cannot hide or reorder anything on a page, with its middle left out where it is long."""
    half = LONGEST // 2
    if len(text) > LONGEST:
        text = f"{text[:half]} [… {len(text) - 2 * half:,} characters are not shown here …] {text[-half:]}"
    return visible(text)
