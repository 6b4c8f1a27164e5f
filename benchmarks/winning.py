"""What folds, teachers, ensembles and both orders in one step are worth on the synthetic arena, whose truth is known.

    python benchmarks/winning.py --work FOLDER [--seeds 1 2 3] [--folds 5] [--write]

Uses the runs of benchmarks/methods.py in the same FOLDER, or makes them. Finished parts are kept, and an interrupted
training goes on: start it again. Differences are paired on the same battles; below 0 the ingredient helps. Those of
the test set are expected log losses under the true probabilities, for it has no votes.
"""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pandas as pd
from figures import options, publish
from methods import by_seed, difference
from workbench import Workbench, bootstrap_interval, interval

from common.battle import PROBABILITY_COLUMNS

ARENA = Path("data") / "synthetic_arena"
MEMBERS = ("sft", "rm", "dpo_reward")


def run_seed(bench: Workbench, seed: int, folds: int) -> None:
    """Train every arm of one seed; what is finished is kept."""
    if not bench.has("demo", "sft"):
        bench.run("demo", "--seed", str(seed))
    for stage in MEMBERS:
        bench.stage("demo", stage)
    votes = [word for name in ("train", "test", "truth") for word in (f"--{name}", str(ARENA / f"{name}.csv"))]
    arms = {
        "together": ({"orders_together": True}, []),
        "bayes": ({}, ["--soft", str(teacher(bench.folder)), "--soft-share", "1"]),
        "folds": ({"folds": folds}, []),
        "student": ({}, ["--soft", "outputs/folds/sft/probabilities_valid.csv"]),
    }
    for name, (keys, more) in arms.items():
        bench.variant(name, "demo", **keys)
        bench.prepare(name, *votes, *more)
        if not bench.has(name, "sft"):
            bench.run("sft", "-e", name, "--resume")
    if not bench.has("all", "ensemble"):
        bench.run("ensemble", *(word for stage in MEMBERS for word in ("-e", f"demo:{stage}")), "--name", "all")


def teacher(folder: Path) -> Path:
    """Write the true probabilities of the training battles as soft labels; return their file's relative path."""
    path = ARENA / "bayes.csv"
    with (folder / ARENA / "train.csv").open(encoding="utf-8", newline="") as file:
        known = {row["id"] for row in csv.DictReader(file)}
    truth = pd.read_csv(folder / ARENA / "truth.csv", dtype={"id": str})
    truth[truth["id"].isin(known)].to_csv(folder / path, index=False)
    return path


def shares(bench: Workbench) -> dict[str, str]:
    """Return log loss, interval and learned share of every arm."""
    arms = {
        "SFT, one fold": ("demo", "sft"),
        "both orders in one step": ("together", "sft"),
        "Bayes teacher": ("bayes", "sft"),
        "all folds, out-of-fold": ("folds", "sft"),
        "student of the folds": ("student", "sft"),
    }
    found = {name: bench.report(*arm) for name, arm in arms.items()}
    return {
        name: f"{its['log_loss']:.4f} {interval(its['log_loss_ci95'])} **{its['learned_share']:.2f}**"
        for name, its in found.items()
    }


def gains(bench: Workbench) -> dict[str, str]:
    """Return what each ingredient adds to the log loss, with its interval."""
    single = bench.judged("demo", "sft")
    names = {"both orders in one step": "together", "soft labels of Bayes": "bayes", "out-of-fold teacher": "student"}
    found = {name: difference(bench.judged(arm, "sft"), single) for name, arm in names.items()}
    found["mean of the folds against one of them, test set"] = expected(bench, "folds/sft", "folds/sft/fold0")
    found["mean of the folds against SFT on one fold's rest, test set"] = expected(bench, "folds/sft", "demo/sft")
    report = json.loads((bench.folder / "outputs/all/ensemble/report.json").read_text(encoding="utf-8"))
    best = min((row for row in report["table"] if row["name"] != "blend"), key=lambda row: row["log_loss"])["name"]
    pair = next(p for p in report["differences"] if {p["first"], p["second"]} == {best, "blend"})
    sign = 1 if pair["first"] == "blend" else -1
    ends = sorted(sign * end for end in pair["ci95"])
    found["sft + rm + dpo_reward against the best of them"] = (
        f"{sign * pair['difference']:+.4f} {interval(ends)} ({best.split(':')[1]})"
    )
    widths = [np.diff(bench.report(arm, "sft")["log_loss_ci95"])[0] for arm in ("folds", "demo")]
    found["width of the log loss's interval, folds / one fold"] = f"{widths[0]:.4f} / {widths[1]:.4f}"
    return found


def expected(bench: Workbench, first: str, second: str) -> str:
    """Return the difference of two results' expected log losses on the test set, under the true probabilities."""
    tables = [
        pd.read_csv(bench.folder / path, dtype={"id": str}).set_index("id")[list(PROBABILITY_COLUMNS)]
        for path in (
            f"outputs/{first}/probabilities_test.csv",
            f"outputs/{second}/probabilities_test.csv",
            ARENA / "truth.csv",
        )
    ]
    one, other, truth = (table.loc[tables[0].index].to_numpy() for table in tables)
    gap = (truth * (np.log(other) - np.log(one))).sum(axis=1)
    return f"{gap.mean():+.4f} {interval(bootstrap_interval(gap, np.arange(len(gap)), seed=1))}"


def main() -> None:
    parser = options(__doc__, work=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--folds", type=int, default=5)
    asked = parser.parse_args()
    benches = {seed: Workbench(asked.work / f"seed{seed}") for seed in asked.seeds}
    for seed, bench in benches.items():
        run_seed(bench, seed, asked.folds)
    learned, added = ({seed: of(bench) for seed, bench in benches.items()} for of in (shares, gains))
    publish(
        "winning",
        f"{by_seed('log loss [95%], share learned', learned)}\n\n{by_seed('difference [95%]', added)}",
        asked.write,
    )


if __name__ == "__main__":
    main()
