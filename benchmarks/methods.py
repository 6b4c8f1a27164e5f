"""What each method is worth on the synthetic arena, whose truth is known, and what each ingredient adds.

    python benchmarks/methods.py --work FOLDER [--seeds 1 2 3] [--collect] [--docs]

Runs every stage of the demo experiment for each seed (its own arena, its own base model), then the ablations:
without swapped copies, averaging both orders, without calibration, and (first seed only: it is the longest training)
DPO from the base instead of from SFT. Finished parts in FOLDER are kept. --docs puts the tables into docs/methods.md;
what the fitted links say of the generator's parameters is printed only.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

from figures import ROOT, measured_on, put, table
from workbench import STAGES, Workbench, interval, paired

NAMES = {
    "sft": "SFT on the label",
    "dpo_judge": "DPO, judge view (from SFT)",
    "dpo_reward": "DPO, reward view",
    "rm": "reward model",
    "blend": "blend of the four",
}


def run_seed(work: Path, seed: int, from_base: bool) -> Workbench:
    """Run all stages of one seed and then its ablations; what is finished is kept."""
    bench = Workbench(work / f"seed{seed}")
    if not bench.output("demo", "sft").exists():
        bench.run("demo", "--seed", str(seed))
    for stage in STAGES:
        bench.stage("demo", stage)
    if not (bench.output("demo", "compare") / "compare.json").is_file():
        bench.run("compare", "-e", "demo")
    votes = ["--train", "data/synthetic_arena/train.csv", "--truth", "data/synthetic_arena/truth.csv"]
    # The same number of optimizer steps: twice the epochs where there are no copies.
    epochs = 2 * float(recipe(bench, "sft")["num_train_epochs"])
    bench.variant("noswap", "demo", swap_copies=False, recipes={"sft": {"num_train_epochs": epochs}})
    bench.prepare("noswap", *votes)
    bench.stage("noswap", "sft")
    if from_base:
        run_from_base(bench, votes)
    return bench


def run_from_base(bench: Workbench, votes: list[str]) -> None:
    """Run DPO's judge view without SFT before it."""
    # As many optimizer steps from the base as SFT and DPO take together, at SFT's rate.
    steps = {"max_steps": sft_steps(bench) + recipe(bench, "dpo_judge")["max_steps"]}
    rate = {"learning_rate": recipe(bench, "sft")["learning_rate"]}
    bench.variant("frombase", "demo", start_from={"dpo_judge": "base"}, recipes={"dpo_judge": steps | rate})
    bench.prepare("frombase", *votes)
    bench.stage("frombase", "dpo_judge")


def sft_steps(bench: Workbench) -> int:
    """Return the number of optimizer steps that the demo's SFT took."""
    log = bench.folder / "saves" / "arena-tiny" / "lora" / "demo_sft" / "trainer_log.jsonl"
    return json.loads(log.read_text(encoding="utf-8").splitlines()[-1])["total_steps"]


def recipe(bench: Workbench, step: str) -> dict:
    """Return a recipe of the demo."""
    from common.experiment import read_yaml

    return read_yaml(bench.folder / "factory_configs" / "demo" / f"{step}.yaml")


def method_losses(bench: Workbench) -> dict[str, str]:
    """Return log loss, interval and share learned of each method, and the log loss of each baseline."""
    found = {}
    for stage in STAGES:
        report = bench.report("demo", stage)
        found[NAMES[stage]] = _cell(report["log_loss"], report["log_loss_ci95"], report["learned_share"])
    comparison = json.loads((bench.output("demo", "compare") / "compare.json").read_text(encoding="utf-8"))
    blend = next(row for row in comparison["table"] if row["name"] == "blend")
    prior, bayes = comparison["baselines"]["prior"], comparison["bayes"]
    share = (prior - blend["log_loss"]) / (prior - bayes)
    found[NAMES["blend"]] = _cell(blend["log_loss"], blend["log_loss_ci95"], share)
    baselines = {**{name: comparison["baselines"][name] for name in ("prior", "length", "tfidf")}, "Bayes": bayes}
    return found | {f"*{name}*": f"{loss:.4f}" for name, loss in baselines.items()}


def _cell(loss: float, ends: list[float] | None, share: float) -> str:
    return f"{loss:.4f} {interval(ends)} **{share:.2f}**"


def davidson_rows(bench: Workbench, seed: int) -> list[list[str]]:
    """Return what the fitted links say of the generator's tie parameter and position bias, and how far off that is."""
    from data_prep.synthetic import TRUTH

    rows = []
    for stage in ("rm", "dpo_reward"):
        link = bench.report("demo", stage)["calibration"]["parameters"]
        if link is None:
            rows.append([str(seed), NAMES[stage], "no link kept", ""])
            continue
        cells = []
        for name, true in (("log_tie", math.log(TRUTH.tie)), ("position_bias", TRUTH.position_bias)):
            value, error = link[name]["value"], link[name]["standard_error"]
            cells.append(f"{value:.2f} ± {error:.2f} (true {true:.2f}; {abs(value - true) / error:.1f} SE)")
        rows.append([str(seed), NAMES[stage], *cells])
    return rows


def ablations(bench: Workbench) -> dict[str, str]:
    """Return what each ingredient adds to the log loss, with its interval; below 0 it helps."""
    sft = bench.judged("demo", "sft")
    found = {}

    def add(name: str, with_it, without) -> None:
        difference, ends = paired(with_it, without)
        found[name] = f"{difference:+.4f} {interval(ends)}"

    if bench.has("noswap", "sft"):
        unswapped = bench.judged("noswap", "sft")
        add("swapped copies in training (SFT, equal steps)", sft, unswapped)
        one, both = _orders(unswapped)
        add("averaging both orders, trained without swapped copies", both, one)
    one, both = _orders(sft)
    add("averaging both orders, trained with swapped copies", both, one)
    for stage in ("sft", "dpo_judge"):
        plain, _ = _orders(bench.judged("demo", stage))
        add(f"calibration ({NAMES[stage]})", bench.judged("demo", stage), plain)
    dpo = bench.judged("demo", "dpo_judge")
    add("DPO, judge view, after SFT instead of SFT alone", dpo, sft)
    if bench.has("frombase", "dpo_judge"):
        base = bench.judged("frombase", "dpo_judge")
        add("DPO, judge view, after SFT instead of from the base (equal steps)", dpo, base)
    return found


def _orders(scores):
    """Return the rows with the plain softmax of the AB order, and with the mean of both orders."""
    from scoring.links import softmax

    one, both = scores.copy(), scores.copy()
    ab, ba = (softmax(scores[[f"{o}_a", f"{o}_b", f"{o}_tie"]].to_numpy()) for o in ("ab", "ba"))
    one[["p_a", "p_b", "p_tie"]] = ab
    both[["p_a", "p_b", "p_tie"]] = (ab + ba) / 2
    return one, both


def by_seed(heading: str, found: dict[int, dict[str, str]]) -> str:
    """Return a table with a row for each name and a column for each seed."""
    names = dict.fromkeys(name for cells in found.values() for name in cells)
    rows = [[name, *(cells.get(name, "") for cells in found.values())] for name in names]
    return table([heading, *(f"seed {seed}" for seed in found)], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--collect", action="store_true", help="run nothing, tabulate what FOLDER holds")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    methods, links, added = {}, [], {}
    for seed in arguments.seeds:
        work = arguments.work.resolve()
        if arguments.collect:
            bench = Workbench(work / f"seed{seed}")
        else:
            bench = run_seed(work, seed, from_base=seed == arguments.seeds[0])
        methods[seed], added[seed] = method_losses(bench), ablations(bench)
        links += davidson_rows(bench, seed)
    how = measured_on(f"python benchmarks/methods.py --work FOLDER --seeds {' '.join(map(str, arguments.seeds))}")
    text = (
        f"{by_seed('log loss [95%], share learned', methods)}\n\n### What each ingredient adds\n\n"
        f"Differences of the log loss [95%]; below 0 the ingredient helps.\n\n{by_seed('ingredient', added)}\n\n{how}"
    )
    print(text)
    print(table(["seed", "method", "log of the tie parameter ν", "position bias"], links))
    if arguments.docs:
        put(ROOT / "docs" / "methods.md", "methods", text)


if __name__ == "__main__":
    main()
