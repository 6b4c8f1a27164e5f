"""What the methods reach on real votes on a CPU, and what a target prior repairs.

    python benchmarks/real_votes.py --work FOLDER --natural train_natural.csv --clean train_clean.csv.gz [--write]
    python benchmarks/real_votes.py … --model models/SmolLM2-135M-Instruct --stages base probe --precision bf16

`natural` has the competition's own class balance; `clean` holds the same rows and many more, nearly without ties.
Without --model the base has random weights and a tokenizer trained on these votes: it shows that the chain is honest
on real text. Two parts:

1. the stages on `natural`, judged on its validation fold.
2. sft, rm and probe on `clean` less the held-out prompts, ties scarce, judged on held-out natural rows without and with
   `target_prior` set to the natural class shares.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pandas as pd
from figures import options, publish, table
from workbench import Workbench, battles_of, bootstrap_interval, interval, paired_difference, texts_of, write_votes

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from common.stages import STAGES, TRAININGS
from data_prep.folds import prompt_group
from scoring.metrics import row_losses, verdict_codes

BASE = {"vocabulary": 2048, "hidden": 64, "layers": 2, "heads": 4, "feed_forward": 128}
HELD_OUT = 500
# Optimizer steps of 16 battles: a third of an epoch of the large table, minutes on two cores.
STEPS = 250
# The competition's class shares in its own training table, as its participants knew them.
NATURAL = {"a": 0.35, "b": 0.34, "tie": 0.31}
METHODS = ["method", "log loss [95%]", "below the prior [95%]", "beats the prior"]
SCARCE = ["method", "target prior", "log loss on held-out natural rows [95%]", "above the natural prior [95%]"]


def own_methods(bench: Workbench, natural: Path, stages: list[str]) -> list[list[str]]:
    """Run the stages on the natural votes; return one row a method and baseline."""
    bench.prepare("real", "--train", str(natural))
    rows = []
    for stage in stages:
        bench.stage("real", stage)
        report = bench.report("real", stage)
        gain = f"{report['gain_over_prior']:+.4f} {interval(report['gain_over_prior_ci95'])}"
        loss = f"{report['log_loss']:.4f} {interval(report['log_loss_ci95'])}"
        rows.append([stage, loss, gain, "yes" if report["beats_prior"] else "**no** (flagged)"])
    for name, loss in report["baselines"].items():
        rows.append([f"*{name}*", f"{loss:.4f} {interval(report['baselines_ci95'].get(name))}", "", ""])
    return rows


def scarce_ties(bench: Workbench, battles: list[Battle], clean: Path, stages: list[str]) -> list[list[str]]:
    """Train where ties are scarce, judge on held-out natural rows; return rows with and without the target prior."""
    by_group: dict[str, list[Battle]] = {}
    for battle in battles:
        by_group.setdefault(prompt_group(battle), []).append(battle)
    groups, held = sorted(by_group), []
    random.Random(1).shuffle(groups)
    while len(held) < HELD_OUT and groups:
        held += by_group.pop(groups.pop(0))
    groups_held = {prompt_group(battle) for battle in held}
    rest = [battle for battle in battles_of(clean) if prompt_group(battle) not in groups_held]
    write_votes(bench.folder / "held_out.csv", held)
    write_votes(bench.folder / "scarce.csv", rest)
    left = [battle.verdict for group in by_group.values() for battle in group]
    constant = np.tile([left.count(verdict) / len(left) for verdict in VERDICTS], (len(held), 1))
    rows = [scarce_row(bench, stage, prior, held, constant) for stage in stages for prior in (None, NATURAL)]
    ties = sum(battle.verdict == "tie" for battle in rest) / len(rest)
    said = f"*training: {len(rest):,} battles, {ties:.1%} ties; judged: {len(held)} natural battles*"
    return [*rows, ["*natural class prior*", "", loss_of(constant, held), ""], [said, "", "", ""]]


def scarce_row(bench: Workbench, stage: str, prior: dict | None, held: list[Battle], constant: np.ndarray) -> list[str]:
    """Score the judge trained on scarce ties with or without the target prior; return the table's row."""
    # The prior enters after the training: the same judge is scored twice.
    steps = {"sft": {"max_steps": STEPS}, "rm": {"num_train_epochs": 1.0}}
    bench.variant("scarce", "real", target_prior=prior, swap_copies=False, recipes=steps)
    bench.prepare("scarce", "--train", "scarce.csv")
    (bench.output("scarce", stage) / "report.json").unlink(missing_ok=True)
    bench.stage("scarce", stage)
    output = f"held_out_{stage}_{'plain' if prior is None else 'corrected'}.csv"
    bench.run("score", "-e", "scarce", "--stage", stage, "--input", "held_out.csv", "--output", output)
    scored = pd.read_csv(bench.folder / output, dtype={"id": str}).set_index("id")
    found = scored.loc[[battle.id for battle in held], list(PROBABILITY_COLUMNS)].to_numpy()
    paired = paired_difference(found, constant, *truth_and_groups(held), seed=1)
    against = f"{paired['difference']:+.4f} {interval(paired['ci95'])}"
    return [stage, "declared natural" if prior else "none", loss_of(found, held), against]


def truth_and_groups(held: list[Battle]) -> tuple[np.ndarray, list[str]]:
    """Return the verdicts' codes and the prompt groups, by which intervals are drawn."""
    return verdict_codes(battle.verdict for battle in held), [prompt_group(battle) for battle in held]


def loss_of(probabilities: np.ndarray, held: list[Battle]) -> str:
    """Return the log loss of probabilities [battles, 3] with its interval."""
    truth, groups = truth_and_groups(held)
    values = row_losses(probabilities, truth)
    return f"{values.mean():.4f} {interval(bootstrap_interval(values, groups, seed=1))}"


def main() -> None:
    parser = options(__doc__, work=True)
    parser.add_argument("--natural", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--clean", type=lambda path: Path(path).resolve(), required=True)
    parser.add_argument("--model", type=lambda path: Path(path).resolve(), help="the folder of a pretrained base")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(TRAININGS))
    parser.add_argument("--precision", default="auto")
    asked = parser.parse_args()
    bench, battles = Workbench(asked.work), battles_of(asked.natural)
    same = {"valid_share": 0.3, "precision": asked.precision}
    if asked.model:
        bench.variant("real", "smollm2-135m", model=str(asked.model), **same)
    else:
        model, recipes = bench.base("real-tiny", texts_of(battles), **BASE), {"dpo_judge": {"max_steps": 80}}
        bench.variant("real", "demo", model=model, cutoff_len=320, recipes=recipes, **same)
    print(f"{asked.model or 'A tiny base with random weights'}, on {asked.natural.name}:\n")
    publish("", table(METHODS, own_methods(bench, asked.natural, asked.stages)))
    scarce = [stage for stage in ("sft", "rm", "probe") if stage in asked.stages]
    name = "pretrained" if asked.model else "scarce ties"
    publish(name, table(SCARCE, scarce_ties(bench, battles, asked.clean, scarce)), asked.write)


if __name__ == "__main__":
    main()
