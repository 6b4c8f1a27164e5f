"""How long the demo takes and how much of the learnable signal it learns, for several seeds.

    python benchmarks/demo.py --work FOLDER [--seeds 1 2 3] [--readme]

Each seed draws its own arena and base model and runs `run.py demo` in a new folder of its own under FOLDER, where
benchmarks/methods.py goes on; --readme puts the end of what the first run printed into README.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from figures import ROOT, measured_on, put, table
from workbench import Workbench, interval

SESSION = """```console
$ make demo
…
{said}
```

From one run of the demo on two cores without a GPU, the installation done: {seconds:.0f} s."""


def one(work: Path, seed: int) -> tuple[dict, float, str]:
    """Run the demo once; return its report, the seconds it took and what it said."""
    bench = Workbench(work / f"seed{seed}")
    if bench.output("demo", "sft").exists():
        raise SystemExit(f"{bench.folder} holds a run already: give another --work")
    said, seconds = bench.transcript("demo", "--seed", str(seed))
    return bench.report("demo", "sft"), seconds, said


def result_of(said: str) -> str:
    """Return the table of log losses with the figures below it, up to the position bias."""
    lines = [line.rstrip() for line in said.splitlines()]
    first = next(number for number, line in enumerate(lines) if "log loss on" in line)
    last = next(number for number, line in enumerate(lines) if line.startswith("Position bias"))
    return "\n".join(lines[first:last])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    rows, session = [], ""
    for seed in arguments.seeds:
        report, seconds, said = one(arguments.work.resolve(), seed)
        session = session or SESSION.format(said=result_of(said), seconds=seconds)
        rows.append(
            [
                str(seed),
                f"{seconds:.0f} s",
                str(report["rows"]),
                f"{report['baselines']['prior']:.4f}",
                f"{report['baselines']['tfidf']:.4f}",
                f"**{report['log_loss']:.4f}** {interval(report['log_loss_ci95'])}",
                f"{report['bayes']:.4f}",
                f"**{report['learned_share']:.2f}** {interval(report['learned_share_ci95'], 2)}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    headings = ["seed", "run.py demo", "held-out", "prior", "TF-IDF", "judge [95%]", "Bayes", "learned share [95%]"]
    seeds = " ".join(map(str, arguments.seeds))
    text = f"{table(headings, rows)}\n\n{measured_on(f'python benchmarks/demo.py --work FOLDER --seeds {seeds}')}"
    print(text)
    if arguments.readme:
        put(ROOT / "README.md", "session", session)


if __name__ == "__main__":
    main()
