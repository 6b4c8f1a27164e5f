"""What the methods reach on real votes with a tiny base model on a CPU, and what a target prior repairs.

    python benchmarks/real_votes.py --work FOLDER --natural train_natural.csv --clean train_clean.csv.gz [--docs]

`natural` has the competition's own class balance; `clean` holds the same rows and many more, nearly without ties.
The base has random weights and a tokenizer trained on these votes: it shows that the chain is honest on real text,
not what a pretrained model would reach. Two parts:

1. sft, dpo and rm trained on `natural`, judged on its validation fold.
2. sft and rm trained on `clean` less the held-out prompts, ties scarce, judged on held-out natural rows: without and
   with `target_prior` set to the natural class shares.
"""

from __future__ import annotations

import argparse
import csv
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from figures import ROOT, measured_on, put, table
from workbench import STAGES, Workbench, interval

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from data_prep.folds import prompt_group
from data_prep.readers import VoteReader
from data_prep.synthetic import TRAIN_COLUMNS, cell

HELD_OUT = 500
# Optimizer steps of 16 battles: a third of an epoch of the large table, minutes on two cores.
STEPS = 250
# The competition's class shares in its own training table, as its participants knew them.
NATURAL = {"a": 0.35, "b": 0.34, "tie": 0.31}


def write_votes(path: Path, battles: Iterable[Battle]) -> None:
    """Write battles in the competition's schema."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(TRAIN_COLUMNS)
        for battle in battles:
            cells = [cell(texts) for texts in (battle.prompts, battle.responses_a, battle.responses_b)]
            writer.writerow([battle.id, "x", "y", *cells, *(int(battle.verdict == v) for v in VERDICTS)])


def build_base(bench: Workbench, battles: list[Battle]) -> None:
    """Build the base model with a tokenizer of real text."""
    from factory.base_model import BaseModelSize, build_base_model

    texts = (text for b in battles for text in (*b.prompts, *b.responses_a, *b.responses_b))
    size = BaseModelSize(vocabulary=2048, hidden=64, layers=2, heads=4, feed_forward=128)
    build_base_model(bench.folder / "models" / "real-tiny", texts, seed=1, size=size)


def own_methods(bench: Workbench, natural: Path) -> list[list[str]]:
    """Train every stage on the natural votes; return one row a method and rung of the ladder."""
    bench.prepare("real", "--train", str(natural))
    rows = []
    for stage in STAGES:
        bench.stage("real", stage)
        report = bench.report("real", stage)
        gain = f"{report['gain_over_prior']:+.4f} {interval(report['gain_over_prior_ci95'])}"
        loss = f"{report['log_loss']:.4f} {interval(report['log_loss_ci95'])}"
        rows.append([stage, loss, gain, "yes" if report["beats_prior"] else "**no** (flagged)"])
    for name, loss in report["baselines"].items():
        rows.append([f"*{name}*", f"{loss:.4f} {interval(report['baselines_ci95'].get(name))}", "", ""])
    return rows


def scarce_ties(bench: Workbench, natural: Path, clean: Path) -> list[list[str]]:
    """Train where ties are scarce, judge on held-out natural rows; return rows with and without the target prior."""
    battles = [battle for _, battle in VoteReader(natural, labelled=True)]
    groups = sorted({prompt_group(battle) for battle in battles})
    random.Random(1).shuffle(groups)
    held, groups_held = [], set()
    by_group = {}
    for battle in battles:
        by_group.setdefault(prompt_group(battle), []).append(battle)
    for group in groups:
        if len(held) < HELD_OUT:
            held += by_group[group]
            groups_held.add(group)
    rest = [battle for _, battle in VoteReader(clean, labelled=True) if prompt_group(battle) not in groups_held]
    write_votes(bench.folder / "held_out.csv", held)
    write_votes(bench.folder / "scarce.csv", rest)
    shares = [sum(b.verdict == v for b in battles if prompt_group(b) not in groups_held) for v in VERDICTS]
    constant = [s / sum(shares) for s in shares]
    rows = [scarce_row(bench, stage, prior, held, constant) for stage in ("sft", "rm") for prior in (None, NATURAL)]
    loss, ends = losses(np.tile(constant, (len(held), 1)), held)
    rows.append(["*natural class prior*", "", f"{loss:.4f} {interval(ends)}", ""])
    ties = sum(b.verdict == "tie" for b in rest) / len(rest)
    rows.append(
        [f"*training: {len(rest):,} battles, {ties:.1%} ties; judged: {len(held)} natural battles*", "", "", ""]
    )
    return rows


def scarce_row(bench: Workbench, stage: str, prior: dict | None, held: list[Battle], constant: list[float]) -> list:
    """Score the judge trained on scarce ties with or without the target prior; return the table's row."""
    # The prior enters after the training: the same judge is scored twice.
    steps = {"sft": {"max_steps": STEPS}, "rm": {"num_train_epochs": 1.0}}
    bench.variant("scarce", "real", target_prior=prior, swap_copies=False, recipes=steps)
    bench.prepare("scarce", "--train", "scarce.csv")
    (bench.output("scarce", stage) / "report.json").unlink(missing_ok=True)
    bench.stage("scarce", stage)
    output = f"held_out_{stage}_{'plain' if prior is None else 'corrected'}.csv"
    bench.run("score", "-e", "scarce", "--stage", stage, "--input", "held_out.csv", "--output", output)
    found = probabilities(bench.folder / output, held)
    loss, ends = losses(found, held)
    against = against_prior(found, np.tile(constant, (len(held), 1)), held)
    return [stage, "declared natural" if prior else "none", f"{loss:.4f} {interval(ends)}", against]


def probabilities(path: Path, held: list[Battle]) -> np.ndarray:
    """Return a written table's probabilities [battles, 3] in the order of `held`."""
    with path.open(newline="", encoding="utf-8") as file:
        found = {row["id"]: [float(row[c]) for c in PROBABILITY_COLUMNS] for row in csv.DictReader(file)}
    return np.array([found[b.id] for b in held])


def against_prior(found: np.ndarray, constant: np.ndarray, held: list[Battle]) -> str:
    """Return how far the log loss lies above (+) or below (-) that of the constant shares, paired."""
    from scoring.metrics import paired_difference, verdict_codes

    groups = [prompt_group(b) for b in held]
    paired = paired_difference(found, constant, verdict_codes([b.verdict for b in held]), groups, seed=1)
    return f"{paired['difference']:+.4f} {interval(paired['ci95'])}"


def losses(probabilities: np.ndarray, held: list[Battle]) -> tuple[float, list[float] | None]:
    """Return the log loss of probabilities [battles, 3] and its interval."""
    from scoring.metrics import bootstrap_interval, row_losses, verdict_codes

    values = row_losses(probabilities, verdict_codes([b.verdict for b in held]))
    return float(values.mean()), bootstrap_interval(values, [prompt_group(b) for b in held], seed=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--natural", type=Path, required=True)
    parser.add_argument("--clean", type=Path, required=True)
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    natural, clean = arguments.natural.resolve(), arguments.clean.resolve()
    bench = Workbench(arguments.work.resolve())
    build_base(bench, [battle for _, battle in VoteReader(natural, labelled=True)])
    recipes = {"dpo_judge": {"max_steps": 80}}
    bench.variant("real", "demo", model="models/real-tiny", cutoff_len=320, valid_share=0.3, recipes=recipes)
    first = table(["method", "log loss [95%]", "below the prior [95%]", "beats the prior"], own_methods(bench, natural))
    headings = ["method", "target prior", "log loss on held-out natural rows [95%]", "above the natural prior [95%]"]
    second = table(headings, scarce_ties(bench, natural, clean))
    how = measured_on(f"python benchmarks/real_votes.py --work FOLDER --natural {natural.name} --clean {clean.name}")
    print(f"A tiny base with random weights, trained on {natural.name}:\n\n{first}\n")
    text = f"{second}\n\n{how}"
    print(text)
    if arguments.docs:
        put(ROOT / "docs" / "methods.md", "scarce ties", text)


if __name__ == "__main__":
    main()
