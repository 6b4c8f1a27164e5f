"""What the methods reach on real votes on a CPU, and what a target prior repairs.

    python benchmarks/real_votes.py --work FOLDER --natural train_natural.csv --clean train_clean.csv.gz
    python benchmarks/real_votes.py … --model models/SmolLM2-135M-Instruct --stages base probe [--set K=V] [--write]

`natural` has the competition's own class balance; `clean` holds the same rows and many more, nearly without ties.
Without --model the base has random weights and a tokenizer trained on these votes: it shows that the chain is honest
on real text. All are judged on the same rows, the validation fold of `natural`; interrupted, it goes on. Two parts:

1. the stages on `natural`, their ensemble with the baselines, baselines on `clean`.
2. sft, rm and probe (with --model the probe alone) on `clean` less the held-out prompts, ties scarce, without and with
   `target_prior` set to the natural class shares.
"""

from __future__ import annotations

import random
from contextlib import chdir
from pathlib import Path

import numpy as np
import pandas as pd
from figures import options, publish, table
from omegaconf import OmegaConf
from workbench import Workbench, battles_of, bootstrap_interval, interval, paired_difference, texts_of, write_votes

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from common.experiment import load_experiment
from common.files import read_json
from common.stages import STAGES, TRAININGS
from data_prep.audit import row_statistics
from data_prep.export_reader import read_rows
from data_prep.folds import prompt_group
from factory.stage_context import StageContext
from scoring.baselines import baseline_probabilities
from scoring.links import correct_prior
from scoring.metrics import row_losses, verdict_codes

BASE = {"vocabulary": 2048, "hidden": 64, "layers": 2, "heads": 4, "feed_forward": 128}
# Optimizer steps of 16 battles: a third of an epoch of the large table, minutes on two cores.
STEPS = 250
# The competition's class shares in its own training table, as its participants knew them.
NATURAL = {"a": 0.35, "b": 0.34, "tie": 0.31}
METHODS = ["method", "trained on", "minutes (train + score)", "log loss [95%]", "below the prior [95%]"]
SCARCE = ["method", "target prior", "log loss on held-out natural rows [95%]", "above the natural prior [95%]"]


def own_methods(bench: Workbench, stages: list[str]) -> list[list[str]]:
    """Run the stages on the natural votes; return one row a method."""
    rows = []
    for stage in stages:
        bench.stage("real", stage)
        rows.append([stage, *trained_on(bench, stage), *judged_as(bench.report("real", stage))])
    if len(stages) > 1:
        members = [word for name in (*stages, "length", "tfidf") for word in ("-e", f"real:{name}")]
        bench.run("ensemble", *members, "--name", "real-all")
        rows.append(["their ensemble with length and tfidf", "", "", *judged_as(bench.report("real-all", "ensemble"))])
    return rows


def trained_on(bench: Workbench, stage: str) -> tuple[str, str]:
    """Return what a stage was trained on, and the minutes of training and of scoring."""
    state = read_json(bench.output("real", stage) / "state.json")["parts"]
    minutes = " + ".join(f"{state[part]['seconds'] / 60:.0f}" for part in ("train", "score") if part in state)
    if stage not in TRAININGS:
        rows = read_json(bench.output("real", stage) / "probe.json")["rows"] if stage == "probe" else 0
        return f"{rows:,} votes" if rows else "nothing", minutes
    with chdir(bench.folder):
        recipe = StageContext(load_experiment("real"), stage).recipe
    steps = read_json(bench.folder / recipe["output_dir"] / "trainer_state.json")["global_step"]
    rows = steps * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    return f"{steps} steps, {rows:,} votes", minutes


def judged_as(report: dict) -> list[str]:
    """Return log loss and gain over the class prior with their intervals."""
    gain = report["baselines"]["prior"] - report["log_loss"]
    ends = interval(report.get("gain_over_prior_ci95"))
    return [f"{report['log_loss']:.4f} {interval(report['log_loss_ci95'])}", f"{gain:+.4f} {ends}"]


def baselines(votes: list[Battle], held: list[Battle], constant: np.ndarray, *, clean: bool) -> list[list[str]]:
    """Return what reads no model, learned from natural votes or from clean ones (then with natural class shares)."""
    train, judged = (pd.DataFrame([frame_row(battle) for battle in each]) for each in (votes, held))
    shares, rows = {verdict: float((train["verdict"] == verdict).mean()) for verdict in VERDICTS}, []
    for name, chances in baseline_probabilities(train, judged, seed=1).items():
        if clean and name in ("uniform", "prior"):
            continue
        found = correct_prior(chances, shares, NATURAL) if clean else chances
        paired = paired_difference(constant, found, *truth_and_groups(held), seed=1)
        gain = f"{paired['difference']:+.4f} {interval(paired['ci95'])}"
        about = f"{len(votes):,} {'clean votes, target prior' if clean else 'votes'}"
        rows.append([f"*{name}*", about, "", loss_of(found, held), gain])
    return rows


def frame_row(battle: Battle) -> dict:
    """Return what the baselines know of a battle."""
    answers = {"text_a": "\n".join(battle.responses_a), "text_b": "\n".join(battle.responses_b)}
    return row_statistics(battle) | answers


def scarce_ties(
    bench: Workbench, held: list[Battle], rest: list[Battle], constant: np.ndarray, stages: list[str]
) -> list[list[str]]:
    """Train where ties are scarce, judge on held-out natural rows; return rows with and without the target prior."""
    write_votes(bench.folder / "held_out.csv", held)
    write_votes(bench.folder / "scarce.csv", rest)
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
    parser.add_argument("--clean-rows", type=int, default=1 << 20, help="of part 2; 0 leaves it out")
    parser.add_argument("--model", type=lambda path: Path(path).resolve(), help="the folder of a pretrained base")
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=list(TRAININGS))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of experiment.yaml")
    asked = parser.parse_args()
    bench, battles = Workbench(asked.work), battles_of(asked.natural)
    if asked.model:
        of, changed = "smollm2-135m", {"model": str(asked.model)}
    else:
        model = bench.base("real-tiny", texts_of(battles), **BASE)
        of, changed = "demo", {"model": model, "cutoff_len": 320, "recipes": {"dpo_judge": {"max_steps": 80}}}
    bench.variant("real", of, **OmegaConf.merge(changed, {"valid_share": 0.3}, OmegaConf.from_dotlist(asked.set)))
    bench.prepare("real", "--train", str(asked.natural))
    ids = set(read_rows(bench.folder / "data" / "real", "valid")["id"])
    held = [battle for battle in battles if battle.id in ids]
    groups = {prompt_group(battle) for battle in held}
    own, rest = ([b for b in each if prompt_group(b) not in groups] for each in (battles, battles_of(asked.clean)))
    verdicts = [battle.verdict for battle in own]
    constant = np.tile([verdicts.count(verdict) / len(own) for verdict in VERDICTS], (len(held), 1))
    rows = [*own_methods(bench, asked.stages), *baselines(own, held, constant, clean=False)]
    text = f"Judged: {len(held)} natural battles.\n\n"
    text += table(METHODS, [*rows, *baselines(rest, held, constant, clean=True)])
    random.Random(1).shuffle(rest)
    scarce = [stage for stage in ("sft", "rm", "probe") if stage in asked.stages and asked.clean_rows]
    if asked.model:
        scarce = [stage for stage in scarce if stage == "probe"]
    if scarce:
        text += f"\n\n{table(SCARCE, scarce_ties(bench, held, rest[: asked.clean_rows], constant, scarce))}"
    publish("real votes" if asked.model else "", text, asked.write)


if __name__ == "__main__":
    main()
