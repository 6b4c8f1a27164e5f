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


def until_it_answers(folder: Path, *arguments: str) -> float:
    """Start a page and return the seconds until it answers; end it again."""
    call = [sys.executable, str(ROOT / "run.py"), *arguments, "--no-open"]
    started = time.perf_counter()
    process = subprocess.Popen(call, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        for line in process.stdout:
            if "http://" in line:
                url = "http://" + line.split("http://")[1].split()[0]
                with urllib.request.urlopen(url, timeout=30) as answer:
                    assert answer.status == 200 and b"gradio" in answer.read()
                return time.perf_counter() - started
        raise SystemExit(f"{' '.join(arguments)} ended without a page")
    finally:
        process.send_signal(signal.SIGINT)
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        bench = Workbench(Path(work) / "place")
        demo = bench.run("demo")
        report = bench.output("demo", "sft") / "report.html"
        assert report.stat().st_size > 10_000
        watch = until_it_answers(bench.folder, "watch", "-e", "demo", "--stage", "sft")
        board = until_it_answers(bench.folder, "board")
    rows = [
        ["the demo's result, with its report", "`git clone`, `cd`, `make demo`", "3", f"{demo:.0f} s"],
        ["LLaMA Board with the experiments", "… then `.venv/bin/python run.py board`", "4", f"{board:.0f} s"],
        ["the watch page", "… then `.venv/bin/python run.py watch -e demo --stage sft`", "4", f"{watch:.0f} s"],
    ]
    text = table(["first useful screen", "commands", "how many", "the last one took"], rows)
    text += f"\n\n{measured_on('python benchmarks/first_screen.py')}"
    print(text)
    if arguments.readme:
        put(ROOT / "README.md", "first screen", text)


if __name__ == "__main__":
    main()
