"""What the tables of figures share: their options, where and with what they were measured, their place in the docs."""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from datetime import date
from importlib import metadata
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def options(doc: str, *paths: str, required: bool = True, write: bool = True, **own: Any) -> argparse.ArgumentParser:
    """Return a script's parser: options for `paths` (`votes` takes several), its own by their defaults, --write."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in paths:
        many = "+" if name == "votes" else None
        parser.add_argument(f"--{name}", nargs=many, type=lambda path: Path(path).resolve(), required=required)
    for name, default in own.items():
        first, many = (default[0], "+") if isinstance(default, tuple) else (default, None)
        parser.add_argument(f"--{name.replace('_', '-')}", nargs=many, type=type(first), default=default)
    if write:
        parser.add_argument("--write", action="store_true", help="put the tables into README.md and docs/")
    return parser


def measured_on() -> str:
    """Return one line: hardware, versions, date and command."""
    from scoring.checks.provenance import hardware

    words = [word for word in sys.argv[1:] if word != "--write"]
    words = ["FOLDER" if last == "--work" else Path(word).name for last, word in pairwise(["", *words])]
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])
    machine = hardware()
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("llamafactory", "torch", "transformers"))
    return (
        f"Measured on {date.today()}: {machine['cpu']}, {os.cpu_count()} cores, {machine['memory_gib']} GiB, {gpus}; "
        f"Python {platform.python_version()}, {versions}. Command: `{command}`"
    )


def publish(mark: str, text: str, write: bool = False) -> None:
    """Print figures with their machine and command; `write` puts them where a document has their mark, if any."""
    text = f"{text.strip()}\n\n{measured_on()}"
    print(text, end="\n\n")
    if write and mark:
        put(mark, text)


def put(mark: str, text: str) -> None:
    """Replace what stands between `<!-- mark -->` and `<!-- /mark -->` in README.md or a page of docs/."""
    place = re.compile(f"(<!-- {mark} -->).*?(<!-- /{mark} -->)", re.DOTALL)
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        whole, found = place.subn(lambda its: f"{its[1]}\n{text.strip()}\n{its[2]}", document.read_text("utf-8"))
        if found:
            document.write_text(whole, encoding="utf-8")
            return
    raise SystemExit(f"neither README.md nor a page of docs/ has the lines <!-- {mark} --> and <!-- /{mark} -->")


def table(headings: list[str], rows: list[list[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def row(*cells: object) -> list[str]:
    """Return a row of a table, and print it: some take minutes."""
    print(" | ".join(map(str, cells)), flush=True)
    return [str(cell) for cell in cells]
