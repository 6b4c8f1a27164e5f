"""How long every --help takes, as a whole process: python benchmarks/help_time.py [--runs 5] [--docs]"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time

from figures import ROOT, measured_on, put, table


def seconds(arguments: list[str]) -> float:
    """Return the wall seconds of one call."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "run.py", *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--docs", action="store_true", help="put the table into docs/figures.md")
    arguments = parser.parse_args()
    import run

    calls = [["--help"], *([name, "--help"] for name in sorted(run.cli.commands))]
    rows = []
    for call in calls:
        seconds(call)
        found = [seconds(call) for _ in range(arguments.runs)]
        rows.append([f"`run.py {' '.join(call)}`", f"{statistics.median(found):.2f} s", f"{max(found):.2f} s"])
    text = f"{table(['command', 'median', 'slowest'], rows)}\n\n{measured_on('python benchmarks/help_time.py')}"
    print(text)
    if arguments.docs:
        put(ROOT / "docs" / "figures.md", "help figures", text)


if __name__ == "__main__":
    main()
