"""From `git clone` to the first useful screen: commands and seconds.  python benchmarks/first_screen.py [--readme]

The seconds count from the last command on, with the installation done: the demo until its report is there; LLaMA Board
and the watch page until they answer. Everything happens in a new folder of its own.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from figures import ROOT, measured_on, put, table
from workbench import Workbench

PAGES = {
    "LLaMA Board with the experiments": ("board",),
    "the watch page": ("watch", "-e", "demo", "--stage", "sft"),
}


def until_it_answers(folder: Path, *arguments: str) -> float:
    """Start a page and return the seconds until it answers; end it again."""
    call = [sys.executable, str(ROOT / "run.py"), *arguments, "--no-open"]
    started = time.perf_counter()
    process = subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        url = next("http://" + line.split("http://")[1].split()[0] for line in process.stdout if "http://" in line)
        with urllib.request.urlopen(url, timeout=30) as answer:
            assert b"gradio" in answer.read()
        return time.perf_counter() - started
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Workbench(Path(work) / "place")
        rows = [
            ["the demo's result, with its report", "`git clone`, `cd`, `make demo`", "3", f"{bench.run('demo'):.0f} s"]
        ]
        assert (bench.output("demo", "sft") / "report.html").is_file()
        for page, command in PAGES.items():
            seconds = until_it_answers(bench.folder, *command)
            rows.append([page, f"… then `.venv/bin/python run.py {' '.join(command)}`", "4", f"{seconds:.0f} s"])
    text = table(["first useful screen", "commands", "how many", "the last one took"], rows)
    text += f"\n\n{measured_on('python benchmarks/first_screen.py')}"
    print(text)
    if arguments.readme:
        put(ROOT / "README.md", "first screen", text)


if __name__ == "__main__":
    main()
