"""What each method is worth on the synthetic arena, whose truth is known, and what each ingredient adds.

    python benchmarks/methods.py --work FOLDER [--seeds 1 2 3] [--write]

Runs every stage of the demo experiment for each seed (its own arena, its own base model), then the ablations:
without swapped copies, averaging both orders, without calibration, and (first seed only: it is the longest training)
DPO from the base instead of from SFT. Finished parts in FOLDER are kept.
"""

from __future__ import annotations

import json

import pandas as pd
from figures import options, publish, table
from workbench import Workbench, interval, paired_difference

from common.battle import VERDICTS
from common.experiment import read_yaml
from common.stages import TRAININGS
from scoring.links import softmax
from scoring.metrics import verdict_codes

NAMES = {
    "sft": "SFT on the label",
    "dpo_judge": "DPO, judge view (from SFT)",
    "dpo_reward": "DPO, reward view",
    "rm": "reward model",
}
CHANCES = [f"p_{verdict}" for verdict in VERDICTS]


def run_seed(bench: Workbench, seed: int, from_base: bool) -> None:
    """Run all stages of one seed and then its ablations; what is finished is kept."""
    if not bench.has("demo", "sft"):
        bench.run("demo", "--seed", str(seed))
    for stage in TRAININGS:
        bench.stage("demo", stage)
    if not (bench.output("demo", "compare") / "compare.json").is_file():
        bench.run("compare", "-e", "demo")
    votes = ["--train", "data/synthetic_arena/train.csv", "--truth", "data/synthetic_arena/truth.csv"]
    sft, dpo = (read_yaml(bench.folder / "factory_configs" / "demo" / f"{step}.yaml") for step in ("sft", "dpo_judge"))
    # The same number of optimizer steps: twice the epochs where there are no copies.
    epochs = 2 * float(sft["num_train_epochs"])
    bench.variant("noswap", "demo", swap_copies=False, recipes={"sft": {"num_train_epochs": epochs}})
    bench.prepare("noswap", *votes)
    bench.stage("noswap", "sft")
    if from_base:
        # As many optimizer steps from the base as SFT and DPO take together, at SFT's rate.
        log = bench.folder / "saves" / "arena-tiny" / "lora" / "demo_sft" / "trainer_log.jsonl"
        steps = json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["total_steps"] + dpo["max_steps"]
        recipe = {"max_steps": steps, "learning_rate": sft["learning_rate"]}
        bench.variant("frombase", "demo", start_from={"dpo_judge": "base"}, recipes={"dpo_judge": recipe})
        bench.prepare("frombase", *votes)
        bench.stage("frombase", "dpo_judge")


def method_losses(bench: Workbench) -> dict[str, str]:
    """Return log loss, interval and share learned of each method, and the log loss of each baseline."""
    reports = {NAMES[stage]: bench.report("demo", stage) for stage in TRAININGS}
    comparison = json.loads((bench.output("demo", "compare") / "compare.json").read_text(encoding="utf-8"))
    baselines, bayes = comparison["baselines"], comparison["bayes"]
    blend = next(row for row in comparison["table"] if row["name"] == "blend")
    share = (baselines["prior"] - blend["log_loss"]) / (baselines["prior"] - bayes)
    reports["blend of the four"] = blend | {"learned_share": share}
    found = {
        name: f"{its['log_loss']:.4f} {interval(its['log_loss_ci95'])} **{its['learned_share']:.2f}**"
        for name, its in reports.items()
    }
    others = {name: baselines[name] for name in ("prior", "length", "tfidf")} | {"Bayes": bayes}
    return found | {f"*{name}*": f"{loss:.4f}" for name, loss in others.items()}


def ablations(bench: Workbench) -> dict[str, str]:
    """Return what each ingredient adds to the log loss, with its interval; below 0 it helps."""
    sft, dpo, unswapped = (bench.judged(*it) for it in (("demo", "sft"), ("demo", "dpo_judge"), ("noswap", "sft")))
    pairs = {
        "swapped copies in training (SFT, equal steps)": (sft, unswapped),
        "averaging both orders, trained without swapped copies": orders(unswapped)[::-1],
        "averaging both orders, trained with swapped copies": orders(sft)[::-1],
        f"calibration ({NAMES['sft']})": (sft, orders(sft)[0]),
        f"calibration ({NAMES['dpo_judge']})": (dpo, orders(dpo)[0]),
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
    second = second.set_index("id").loc[first["id"]]
    chances, truth = (first[CHANCES].to_numpy(), second[CHANCES].to_numpy()), verdict_codes(first["verdict"])
    found = paired_difference(*chances, truth, first["group"], seed=1)
    return f"{found['difference']:+.4f} {interval(found['ci95'])}"


def by_seed(heading: str, found: dict[int, dict[str, str]]) -> str:
    """Return a table with a row for each name and a column for each seed."""
    names = dict.fromkeys(name for cells in found.values() for name in cells)
    rows = [[name, *(cells.get(name, "") for cells in found.values())] for name in names]
    return table([heading, *(f"seed {seed}" for seed in found)], rows)


def main() -> None:
    parser = options(__doc__, work=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    asked = parser.parse_args()
    benches = {seed: Workbench(asked.work / f"seed{seed}") for seed in asked.seeds}
    for seed, bench in benches.items():
        run_seed(bench, seed, from_base=seed == asked.seeds[0])
    methods, added = ({seed: of(bench) for seed, bench in benches.items()} for of in (method_losses, ablations))
    text = (
        f"{by_seed('log loss [95%], share learned', methods)}\n\n### What each ingredient adds\n\n"
        f"Differences of the log loss [95%]; below 0 the ingredient helps.\n\n{by_seed('ingredient', added)}"
    )
    publish("methods", text, asked.write)


if __name__ == "__main__":
    main()
