"""Every stage with every kind of base, really run: trained, merged, asked before and after the merge, scored.

    python benchmarks/bits.py --work FOLDER [--steps 12] [--docs]

On the demo's tiny base and a synthetic arena, with recipes of a few steps: it shows that each combination works and how
far the merged model is from the trained one, not how good a judge becomes. What is finished is kept.
"""

from __future__ import annotations

import argparse
import subprocess
from pathlib import Path

from figures import ROOT, measured_on, put, table
from workbench import STAGES, Workbench

BITS = {"4": 4, "8": 8, "none": None}
ROWS = {"train_rows": 600, "test_rows": 60}


def outcome(bench: Workbench, experiment: str, bits: str, stage: str) -> list[str]:
    """Train, merge and score one stage; return its line of the table."""
    try:
        bench.stage(experiment, stage)
    except subprocess.CalledProcessError as error:
        return [bits, stage, f"exit code {error.returncode}", "", "", ""]
    report = bench.report(experiment, stage)
    gate, passed = report["merge_gate"], [check["passed"] for check in report["checks"]]
    merge = f"{gate['max_abs_diff']:.1e}" if gate else "not merged"
    checks = f"{passed.count(True)} passed, {passed.count(False)} failed"
    return [bits, stage, "yes", merge, f"{report['log_loss']:.4f}", checks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--docs", action="store_true", help="write the table into docs/presets.md")
    asked = parser.parse_args()
    from data_prep.synthetic import write_arena

    bench = Workbench(asked.work.resolve())
    write_arena(bench.folder / "arena", seed=1, **ROWS)  # the same bytes each time
    votes = ("--train", "arena/train.csv", "--test", "arena/test.csv", "--truth", "arena/truth.csv")
    short = {stage: {"max_steps": asked.steps, "eval_strategy": "no"} for stage in STAGES}
    lines = []
    for name, bits in BITS.items():
        experiment = f"bits_{name}"
        bench.variant(experiment, "demo", quantization_bit=bits, recipes=short)
        bench.prepare(experiment, *votes, "--pairs")
        for stage in STAGES:
            lines.append(outcome(bench, experiment, name, stage))
            print(" | ".join(lines[-1]), flush=True)
    headings = ["bits", "stage", "run to its report", "merge: largest difference", "log loss", "run checks"]
    text = (
        f"{table(headings, lines)}\n\n{measured_on(f'python benchmarks/bits.py --work FOLDER --steps {asked.steps}')}"
    )
    if asked.docs:
        put(ROOT / "docs" / "presets.md", "bits", text)
    print(text)


if __name__ == "__main__":
    main()
