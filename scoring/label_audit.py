"""The verdicts that a stage's judge finds least likely: to look at, or to leave out by `prepare --drop-ids`.

Only battles that the judge did not train on are listed: with folds all, else those of the validation fold.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from common.battle import VERDICTS
from common.files import atomic_file, csv_line
from data_prep.export_reader import read_rows
from factory.stage_context import StageContext
from scoring.compare import stage_probabilities
from scoring.metrics import verdict_codes

FILE = "label_audit.csv"
_HEADER = ("id", "verdict", "p_verdict", "first_choice", "p_first_choice")
_SHOWN = 10


def audit_labels(context: StageContext, most: int) -> dict[str, Any]:
    """Write the battles whose verdict is least likely, that one first; return the file's name and its first rows."""
    rows = read_rows(context.experiment.data_folder, context.parts("valid"))
    probabilities = stage_probabilities(context, rows["id"].tolist())
    given = probabilities[np.arange(len(rows)), verdict_codes(rows["verdict"])]
    chosen = np.argsort(given, kind="stable")[:most]
    first = probabilities.argmax(axis=1)
    ids, verdicts = rows["id"].tolist(), rows["verdict"].tolist()
    cells = [(ids[i], verdicts[i], given[i], VERDICTS[first[i]], probabilities[i, first[i]]) for i in chosen]
    listed = [
        {
            name: round(float(cell), 6) if name.startswith("p_") else cell
            for name, cell in zip(_HEADER, each, strict=True)
        }
        for each in cells
    ]
    path = context.folder / FILE
    with atomic_file(path) as file:
        file.writelines(map(csv_line, [_HEADER, *(each.values() for each in listed)]))
    return {"file": str(path), "judged": len(rows), "rows": listed}


def in_words(found: dict[str, Any]) -> list[str]:
    """Return the audit as lines for people."""
    lines = [
        f"{row['id']}: voted {row['verdict']}, which has {row['p_verdict']:.1%}; its choice is {row['first_choice']} "
        f"({row['p_first_choice']:.1%})"
        for row in found["rows"][:_SHOWN]
    ]
    return [
        *lines,
        f"{found['file']}: the {len(found['rows']):,} least likely of {found['judged']:,} verdicts; "
        "`run.py show ID` prints a battle, `run.py prepare --drop-ids FILE` trains without them",
    ]
