"""How long the demo takes and how much of the learnable signal it learns, for several seeds.

    python benchmarks/demo.py [--seeds 1 2 3] [--readme]

Each seed draws its own arena and base model and runs `run.py demo` in a folder of its own; --readme puts the table
into README.md.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from figures import ROOT, measured_on, put, table


def place(folder: Path) -> None:
    """Lay out what run.py reads from the current folder."""
    for name in ("templates", "factory_configs"):
        shutil.copytree(ROOT / name, folder / name)


def one(seed: int) -> tuple[dict, float]:
    """Run the demo once; return its report and the seconds it took."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        place(folder)
        started = time.monotonic()
        call = [sys.executable, str(ROOT / "run.py"), "demo", "--seed", str(seed), "--json"]
        done = subprocess.run(call, cwd=folder, stdout=subprocess.PIPE, text=True, check=True)
        return json.loads(done.stdout), time.monotonic() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--readme", action="store_true")
    arguments = parser.parse_args()
    rows = []
    for seed in arguments.seeds:
        report, seconds = one(seed)
        low, high = report["log_loss_ci95"]
        share = report["learned_share_ci95"]
        rows.append(
            [
                str(seed),
                f"{seconds:.0f} s",
                str(report["rows"]),
                f"{report['baselines']['prior']:.4f}",
                f"{report['baselines']['tfidf']:.4f}",
                f"**{report['log_loss']:.4f}** [{low:.3f}, {high:.3f}]",
                f"{report['bayes']:.4f}",
                f"**{report['learned_share']:.2f}** [{share[0]:.2f}, {share[1]:.2f}]",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    headings = ["seed", "run.py demo", "held-out", "prior", "TF-IDF", "judge [95%]", "Bayes", "learned share [95%]"]
    seeds = " ".join(map(str, arguments.seeds))
    text = f"{table(headings, rows)}\n\n{measured_on(f'python benchmarks/demo.py --seeds {seeds}')}"
    print(text)
    if arguments.readme:
        put(ROOT / "README.md", "demo figures", text)


if __name__ == "__main__":
    main()
