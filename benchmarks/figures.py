"""What the tables of figures share: where and with what they were measured, and their place in a document."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def measured_on(command: str) -> str:
    """Return one line: hardware, versions, date and command."""
    from scoring.checks.provenance import hardware

    machine = hardware()
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("llamafactory", "torch", "transformers"))
    return (
        f"Measured on {date.today()}: {machine['cpu']}, {os.cpu_count()} cores, {machine['memory_gib']} GiB, {gpus}; "
        f"Python {platform.python_version()}, {versions}. Command: `{command}`"
    )


def put(document: Path, mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` in a document."""
    whole = document.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    head, rest = whole.split(begin)
    tail = rest.split(end)[1]
    document.write_text(f"{head}{begin}\n{text.strip()}\n{end}{tail}", encoding="utf-8")


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
