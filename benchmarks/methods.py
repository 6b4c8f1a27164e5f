"""What methods, ingredients, folds, teachers and ensembles are worth on the synthetic arena, whose truth is known.

    python benchmarks/methods.py --work FOLDER [--seeds 1 2 3] [--tables methods winning] [--write]

Every seed has its own arena and base. Finished parts in FOLDER are kept. Differences are paired on the same battles;
below 0 the ingredient helps.

methods  every stage of the demo experiment, then the ablations: without swapped copies, averaging both orders, without
         calibration, and (first seed only: it is the longest training) DPO from the base instead of from SFT
winning  both orders in one step, soft labels of Bayes, an ensemble, all folds and a student of theirs. The test set has
         no votes: its differences are those of the expected log loss under the true probabilities.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
from figures import options, publish, table
from workbench import Workbench, interval, mean

from common.battle import PROBABILITY_COLUMNS, VERDICTS
from common.experiment import read_yaml
from common.files import read_json
from common.stages import TRAININGS
from scoring.links import softmax
from scoring.metrics import row_losses, verdict_codes

NAMES = {
    "sft": "SFT on the label",
    "dpo_judge": "DPO, judge view (from SFT)",
    "dpo_reward": "DPO, reward view",
    "rm": "reward model",
}
CHANCES = [f"p_{verdict}" for verdict in VERDICTS]
ARENA = Path("data") / "synthetic_arena"
VOTES = [word for part in ("train", "test", "truth") for word in (f"--{part}", str(ARENA / f"{part}.csv"))]
MEMBERS = ("sft", "rm", "dpo_reward")
ARMS = {
    "SFT, one fold": ("demo", "sft"),
    "both orders in one step": ("together", "sft"),
    "soft labels of Bayes": ("bayes", "sft"),
    "reward model": ("demo", "rm"),
    "DPO, reward view": ("demo", "dpo_reward"),
    "ensemble of SFT and these two": ("all", "ensemble"),
    "all folds, out-of-fold": ("folds", "sft"),
    "student of the folds": ("student", "sft"),
}


def run_methods(bench: Workbench, from_base: bool) -> None:
    """Run all stages and their ablations; what is finished is kept."""
    for stage in TRAININGS:
        bench.stage("demo", stage)
    if not (bench.output("demo", "compare") / "compare.json").is_file():
        bench.run("compare", "-e", "demo")
    sft, dpo = (read_yaml(bench.folder / "factory_configs" / "demo" / f"{step}.yaml") for step in ("sft", "dpo_judge"))
    # The same number of optimizer steps: twice the epochs where there are no copies.
    recipe = {"num_train_epochs": 2 * float(sft["num_train_epochs"])}
    bench.variant("noswap", *VOTES, swap_copies=False, recipes={"sft": recipe})
    bench.stage("noswap", "sft")
    if from_base:
        # As many optimizer steps from the base as SFT and DPO take together, at SFT's rate.
        log = bench.folder / "saves" / "arena-tiny" / "lora" / "demo_sft" / "trainer_log.jsonl"
        steps = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["total_steps"] + dpo["max_steps"]
        recipe = {"max_steps": steps, "learning_rate": sft["learning_rate"]}
        bench.variant("frombase", *VOTES, start_from={"dpo_judge": "base"}, recipes={"dpo_judge": recipe})
        bench.stage("frombase", "dpo_judge")


def run_winning(bench: Workbench) -> None:
    """Train SFT in other ways, the ensemble, all folds, and a student of their out-of-fold probabilities."""
    ids, truth = (pd.read_csv(bench.folder / ARENA / f"{part}.csv", dtype={"id": str}) for part in ("train", "truth"))
    truth[truth["id"].isin(ids["id"])].to_csv(bench.folder / ARENA / "bayes.csv", index=False)
    soft = {"bayes": [str(ARENA / "bayes.csv"), "--soft-share", "1"]}
    soft |= {"student": ["outputs/folds/sft/probabilities_valid.csv"]}
    arms = {"bayes": {}, "together": {"orders_together": True}, "folds": {"folds": 5}, "student": {}}
    for name, keys in arms.items():
        bench.variant(name, *VOTES, *(["--soft", *soft[name]] if name in soft else []), **keys)
        bench.stage(name, "sft", "--resume")
    for stage in MEMBERS:
        bench.stage("demo", stage)
    if not bench.has("all", "ensemble"):
        bench.run("ensemble", *(word for stage in MEMBERS for word in ("-e", f"demo:{stage}")), "--name", "all")


def learned(its: dict, of: dict) -> str:
    """Return log loss, interval and learned share by the baselines and the Bayes log loss of a report."""
    share = (of["baselines"]["prior"] - its["log_loss"]) / (of["baselines"]["prior"] - of["bayes"])
    return f"{its['log_loss']:.4f} {interval(its['log_loss_ci95'])} **{share:.2f}**"


def method_losses(bench: Workbench) -> dict[str, str]:
    """Return what each method learned, and the log loss of each baseline."""
    whole = read_json(bench.output("demo", "compare") / "compare.json")
    reports = {NAMES[stage]: bench.report("demo", stage) for stage in TRAININGS}
    reports["blend of the four"] = next(row for row in whole["table"] if row["name"] == "blend")
    others = {name: whole["baselines"][name] for name in ("prior", "length", "tfidf")} | {"Bayes": whole["bayes"]}
    return {name: learned(its, whole) for name, its in reports.items()} | {
        f"*{k}*": f"{v:.4f}" for k, v in others.items()
    }


def ablations(bench: Workbench) -> dict[str, str]:
    """Return what each ingredient adds to the log loss, with its interval."""
    sft, dpo, unswapped = (bench.judged(*it) for it in (("demo", "sft"), ("demo", "dpo_judge"), ("noswap", "sft")))
    pairs = {
        "swapped copies in training (SFT, equal steps)": (sft, unswapped),
        "averaging both orders, trained without swapped copies": orders(unswapped)[::-1],
        "averaging both orders, trained with swapped copies": orders(sft)[::-1],
        f"calibration ({NAMES['sft']})": (sft, orders(sft)[1]),
        f"calibration ({NAMES['dpo_judge']})": (dpo, orders(dpo)[1]),
        "DPO, judge view, after SFT instead of SFT alone": (dpo, sft),
    }
    if bench.has("frombase", "dpo_judge"):
        base = bench.judged("frombase", "dpo_judge")
        pairs["DPO, judge view, after SFT instead of from the base (equal steps)"] = (dpo, base)
    return {name: difference(*pair) for name, pair in pairs.items()}


def orders(scores: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the rows with the plain softmax of the AB order, and with the mean of both orders."""
    ab, ba = (softmax(scores[[f"{order}_{v}" for v in VERDICTS]].to_numpy()) for order in ("ab", "ba"))
    return tuple(scores.assign(**dict(zip(CHANCES, p.T, strict=True))) for p in (ab, (ab + ba) / 2))


def difference(first: pd.DataFrame, second: pd.DataFrame) -> str:
    """Return the log loss of the first minus that of the second, on the same rows."""
    truth, second = verdict_codes(first["verdict"]), second.set_index("id").loc[first["id"]]
    one, other = (row_losses(each[CHANCES].to_numpy(), truth) for each in (first, second))
    return mean(one - other, first["group"])


def arm_losses(bench: Workbench) -> dict[str, str]:
    """Return what each way of training learned."""
    return {name: learned(its := bench.report(*arm), its) for name, arm in ARMS.items()}


def gains(bench: Workbench) -> dict[str, str]:
    """Return what each ingredient adds to the log loss, with its interval."""
    arms = {"both orders in one step": "together", "soft labels of Bayes": "bayes", "out-of-fold teacher": "student"}
    found = {name: difference(bench.judged(arm, "sft"), bench.judged("demo", "sft")) for name, arm in arms.items()}
    report, whole = bench.report("all", "ensemble"), bench.report("folds", "sft")
    best = min((row for row in report["table"] if row["name"] != "blend"), key=lambda row: row["log_loss"])["name"]
    pair = next(p for p in report["differences"] if (p["first"], p["second"]) == (best, "blend"))
    ends, of = interval([0 - end for end in reversed(pair["ci95"])]), best.split(":")[1]
    widths = [np.diff(each["log_loss_ci95"])[0] for each in (whole, whole["folds"][0])]
    return found | {
        "ensemble against its best member": f"{0 - pair['difference']:+.4f} {ends} ({of})",
        "mean of the folds against one of them, test set": expected(bench, "folds/sft", "folds/sft/fold0"),
        "mean of the folds against SFT on one fold's rest, test set": expected(bench, "folds/sft", "demo/sft"),
        "width of the log loss's interval, all folds / fold 0": f"{widths[0]:.4f} / {widths[1]:.4f}",
    }


def expected(bench: Workbench, *pair: str) -> str:
    """Return the difference of two results' expected log losses on the test set, under the true probabilities."""
    files = [*(f"outputs/{each}/probabilities_test.csv" for each in pair), ARENA / "truth.csv"]
    tables = [pd.read_csv(bench.folder / file, dtype={"id": str}).set_index("id") for file in files]
    one, other, truth = (each.loc[tables[0].index, list(PROBABILITY_COLUMNS)].to_numpy() for each in tables)
    return mean((truth * (np.log(other) - np.log(one))).sum(axis=1), range(len(truth)))


def by_seed(heading: str, benches: dict[int, Workbench], of: Callable[[Workbench], dict[str, str]]) -> str:
    """Return a table with a row for each name and a column for each seed."""
    found = [of(bench) for bench in benches.values()]
    names = dict.fromkeys(name for cells in found for name in cells)
    rows = [[name, *(cells.get(name, "") for cells in found)] for name in names]
    return table([heading, *(f"seed {seed}" for seed in benches)], rows)


def main() -> None:
    parser = options(__doc__, "work", seeds=(1, 2, 3))
    parser.add_argument("--tables", nargs="+", choices=["methods", "winning"], default=["methods", "winning"])
    asked, share = parser.parse_args(), "log loss [95%], share learned"
    benches = {seed: Workbench(asked.work / f"seed{seed}") for seed in asked.seeds}
    for seed, bench in benches.items():
        if not bench.has("demo", "sft"):
            bench.run("demo", "--seed", str(seed))
        if "methods" in asked.tables:
            run_methods(bench, from_base=seed == asked.seeds[0])
        if "winning" in asked.tables:
            run_winning(bench)
    if "methods" in asked.tables:
        text = f"{by_seed(share, benches, method_losses)}\n\n### What each ingredient adds\n\n"
        text += "Differences of the log loss [95%]; below 0 the ingredient helps.\n\n"
        publish("methods", text + by_seed("ingredient", benches, ablations), asked.write)
    if "winning" in asked.tables:
        arms = by_seed(share, benches, arm_losses)
        publish("winning", f"{arms}\n\n{by_seed('difference [95%]', benches, gains)}", asked.write)


if __name__ == "__main__":
    main()
