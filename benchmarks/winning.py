"""What folds, teachers, ensembles and both orders in one step are worth on the synthetic arena, whose truth is known.

    python benchmarks/winning.py --work FOLDER [--seeds 1 2 3] [--folds 5] [--fold-seeds 1] [--tables] [--write]

Uses the runs of benchmarks/methods.py in the same FOLDER, or makes them. Finished parts are kept, and an interrupted
training goes on: start it again. Differences are paired on the same battles; below 0 the ingredient helps. Those of
the test set are expected log losses under the true probabilities, for it has no votes.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
from figures import options, publish
from methods import by_seed, difference
from workbench import Workbench, bootstrap_interval, interval

from common.battle import PROBABILITY_COLUMNS

ARENA = Path("data") / "synthetic_arena"
MEMBERS = ("sft", "rm", "dpo_reward")


def run_labels(bench: Workbench, seed: int) -> None:
    """Train SFT, and SFT with both orders together and with soft labels of Bayes."""
    if not bench.has("demo", "sft"):
        bench.run("demo", "--seed", str(seed))
    train(bench, "bayes", {}, "--soft", str(teacher(bench.folder)), "--soft-share", "1")
    train(bench, "together", {"orders_together": True})


def run_members(bench: Workbench) -> None:
    """Train the other members of the ensemble, and blend them."""
    for stage in MEMBERS:
        bench.stage("demo", stage)
    if not bench.has("all", "ensemble"):
        bench.run("ensemble", *(word for stage in MEMBERS for word in ("-e", f"demo:{stage}")), "--name", "all")


def run_folds(bench: Workbench, folds: int) -> None:
    """Train all folds, and a student of their out-of-fold probabilities."""
    train(bench, "folds", {"folds": folds})
    train(bench, "student", {}, "--soft", "outputs/folds/sft/probabilities_valid.csv")


def train(bench: Workbench, name: str, keys: dict, *more: str) -> None:
    """Train SFT of an experiment like the demo's, with other keys and votes; what is finished is kept."""
    votes = [word for part in ("train", "test", "truth") for word in (f"--{part}", str(ARENA / f"{part}.csv"))]
    bench.variant(name, "demo", **keys)
    bench.prepare(name, *votes, *more)
    if not bench.has(name, "sft"):
        bench.run("sft", "-e", name, "--resume")


def teacher(folder: Path) -> Path:
    """Write the true probabilities of the training battles as soft labels; return their file's relative path."""
    path = ARENA / "bayes.csv"
    with (folder / ARENA / "train.csv").open(encoding="utf-8", newline="") as file:
        known = {row["id"] for row in csv.DictReader(file)}
    truth = pd.read_csv(folder / ARENA / "truth.csv", dtype={"id": str})
    truth[truth["id"].isin(known)].to_csv(folder / path, index=False)
    return path


def shares(bench: Workbench) -> dict[str, str]:
    """Return log loss, interval and learned share of every arm that was run."""
    arms = {
        "SFT, one fold": ("demo", "sft"),
        "both orders in one step": ("together", "sft"),
        "soft labels of Bayes": ("bayes", "sft"),
        "reward model": ("demo", "rm"),
        "DPO, reward view": ("demo", "dpo_reward"),
        "ensemble of SFT and these two": ("all", "ensemble"),
        "all folds, out-of-fold": ("folds", "sft"),
        "student of the folds": ("student", "sft"),
    }
    found = {}
    for name, arm in arms.items():
        if bench.has(*arm):
            its = bench.report(*arm)
            baselines, bayes = its["baselines"], its["bayes"]
            share = (baselines["prior"] - its["log_loss"]) / (baselines["prior"] - bayes)
            found[name] = f"{its['log_loss']:.4f} {interval(its['log_loss_ci95'])} **{share:.2f}**"
    return found


def gains(bench: Workbench) -> dict[str, str]:
    """Return what each ingredient that was run adds to the log loss, with its interval."""
    single = bench.judged("demo", "sft")
    names = {"both orders in one step": "together", "soft labels of Bayes": "bayes", "out-of-fold teacher": "student"}
    found = {name: difference(bench.judged(arm, "sft"), single) for name, arm in names.items() if bench.has(arm, "sft")}
    if bench.has("all", "ensemble"):
        report = bench.report("all", "ensemble")
        best = min((row for row in report["table"] if row["name"] != "blend"), key=lambda row: row["log_loss"])["name"]
        pair = next(p for p in report["differences"] if (p["first"], p["second"]) == (best, "blend"))
        ends, of = interval([0 - end for end in reversed(pair["ci95"])]), best.split(":")[1]
        found["ensemble against its best member"] = f"{0 - pair['difference']:+.4f} {ends} ({of})"
    if bench.has("folds", "sft"):
        found["mean of the folds against one of them, test set"] = expected(bench, "folds/sft", "folds/sft/fold0")
        found["mean of the folds against SFT on one fold's rest, test set"] = expected(bench, "folds/sft", "demo/sft")
        whole = bench.report("folds", "sft")
        widths = [np.diff(each["log_loss_ci95"])[0] for each in (whole, whole["folds"][0])]
        found["width of the log loss's interval, all folds / fold 0"] = f"{widths[0]:.4f} / {widths[1]:.4f}"
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
    parser.add_argument("--fold-seeds", nargs="*", type=int, help="only these seeds train the folds and their student")
    parser.add_argument("--tables", action="store_true", help="of what is finished; train nothing")
    asked = parser.parse_args()
    asked.fold_seeds = asked.seeds if asked.fold_seeds is None else asked.fold_seeds
    benches = {seed: Workbench(asked.work / f"seed{seed}") for seed in asked.seeds}
    if not asked.tables:
        for seed, bench in benches.items():
            run_labels(bench, seed)
        for bench in benches.values():
            run_members(bench)
        for seed in asked.fold_seeds:
            run_folds(benches[seed], asked.folds)
    learned, added = ({seed: of(bench) for seed, bench in benches.items()} for of in (shares, gains))
    publish(
        "winning",
        f"{by_seed('log loss [95%], share learned', learned)}\n\n{by_seed('difference [95%]', added)}",
        asked.write,
    )


if __name__ == "__main__":
    main()
