"""What the methods reach on real votes on a CPU, and what a target prior repairs.

    python benchmarks/real_votes.py --work FOLDER --natural train_natural.csv --clean train_clean.csv.gz \\
        --model SmolLM2-135M-Instruct [--stages base probe] [--clean-stages rm] [--clean-rows N] [--set KEY=VALUE ...]

`natural` has the competition's class balance; `clean` holds the same rows and many more, nearly without ties; --set
changes experiment.yaml. All are judged on the validation fold of `natural`; interrupted, it goes on. Two parts:

1. the stages on `natural`, their ensemble with the baselines, baselines on `clean`.
2. the probe, and other stages that are asked for, on `clean` less the held-out prompts, ties scarce: with
   `target_prior` set to the natural class shares, the probe without it, too; --clean-rows 0 leaves this out.
"""

from __future__ import annotations

import random
from contextlib import chdir
from typing import Any

import numpy as np
import pandas as pd
from figures import options, publish, table
from omegaconf import OmegaConf
from workbench import Workbench, battles_of, interval, mean, write_votes

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

# The competition's class shares in its own training table, as its participants knew them.
NATURAL = {"a": 0.35, "b": 0.34, "tie": 0.31}
METHODS = ["method", "trained on", "minutes (train + score)", "log loss [95%]", "below the prior [95%]"]
SCARCE = ["method", "trained on", "target prior", "log loss [95%]", "above the prior [95%]", "above TF-IDF [95%]"]


def own_methods(bench: Workbench, stages: list[str]) -> list[list[str]]:
    """Run the stages on the natural votes; return one row a method."""
    rows = []
    for stage in stages:
        bench.stage("real", stage)
        rows.append([stage, *trained_on(bench, "real", stage), *judged_as(bench.report("real", stage))])
    if len(stages) > 1:
        members = [word for name in (*stages, "length", "tfidf") for word in ("-e", f"real:{name}")]
        bench.run("ensemble", *members, "--name", "real-all")
        rows.append(["their ensemble with length and tfidf", "", "", *judged_as(bench.report("real-all", "ensemble"))])
    return rows


def trained_on(bench: Workbench, experiment: str, stage: str) -> tuple[str, str]:
    """Return what a stage was trained on, and the minutes of training and of scoring."""
    state = read_json(bench.output(experiment, stage) / "state.json")["parts"]
    minutes = " + ".join(f"{state[part]['seconds'] / 60:.0f}" for part in ("train", "score") if part in state)
    if stage not in TRAININGS:
        rows = read_json(bench.output(experiment, stage) / "probe.json")["rows"] if stage == "probe" else 0
        return f"{rows:,} votes" if rows else "nothing", minutes
    with chdir(bench.folder):
        recipe = StageContext(load_experiment(experiment), stage).recipe
    steps = read_json(bench.folder / recipe["output_dir"] / "trainer_state.json")["global_step"]
    rows = steps * recipe["per_device_train_batch_size"] * recipe["gradient_accumulation_steps"]
    return f"{steps} steps, {rows:,} votes", minutes


def judged_as(report: dict) -> list[str]:
    """Return log loss and gain over the class prior with their intervals."""
    gain = report["baselines"]["prior"] - report["log_loss"]
    ends = interval(report["log_loss_ci95"]), interval(report.get("gain_over_prior_ci95"))
    return [f"{report['log_loss']:.4f} {ends[0]}", f"{gain:+.4f} {ends[1]}"]


class HeldOut:
    """The natural battles that all are judged on, and the class prior of the others."""

    def __init__(self, battles: list[Battle], others: list[Battle]):
        self.battles = battles
        self.groups = [prompt_group(battle) for battle in battles]
        self._truth = verdict_codes(battle.verdict for battle in battles)
        verdicts = [battle.verdict for battle in others]
        shares = [verdicts.count(verdict) / len(others) for verdict in VERDICTS]
        self.prior = self.losses(np.tile(shares, (len(battles), 1)))

    def losses(self, probabilities: np.ndarray) -> np.ndarray:
        """Return the log loss [rows] of probabilities [rows, 3]."""
        return row_losses(probabilities, self._truth)

    def baselines(self, votes: list[Battle], *, clean: bool) -> dict[str, np.ndarray]:
        """Return the losses of what reads no model, learned from natural votes or, with their shares, from clean."""
        train, judged = map(known_of, (votes, self.battles))
        shares = {verdict: float((train["verdict"] == verdict).mean()) for verdict in VERDICTS}
        found = baseline_probabilities(train, judged, seed=1)
        names = [name for name in found if not clean or name not in ("uniform", "prior")]
        return {n: self.losses(correct_prior(found[n], shares, NATURAL) if clean else found[n]) for n in names}

    def rows(self, baselines: dict[str, np.ndarray], trained_on: str) -> list[list[str]]:
        """Return the table's rows of such losses."""
        below = {name: mean(self.prior - losses, self.groups) for name, losses in baselines.items()}
        return [[f"*{n}*", trained_on, "", mean(of, self.groups, ".4f"), below[n]] for n, of in baselines.items()]

    def after_scarce_ties(self, bench: Workbench, stages: list[str], votes: list[Battle], tfidf: Any) -> list:
        """Train where ties are scarce; return the stages' rows with the target prior, the probe's also without it."""
        rows, ids = [], [battle.id for battle in self.battles]
        write_votes(bench.folder / "held_out.csv", self.battles)
        write_votes(bench.folder / "scarce.csv", votes)
        for stage, prior in [("probe", None)] * ("probe" in stages) + [(stage, NATURAL) for stage in stages]:
            bench.variant("scarce", "--train", "scarce.csv", of="real", target_prior=prior, swap_copies=False)
            bench.run(*STAGES[stage].command.split(), "-e", "scarce")
            output = f"held_out_{stage}_{'plain' if prior is None else 'corrected'}.csv"
            bench.run("score", "-e", "scarce", "--stage", stage, "--input", "held_out.csv", "--output", output)
            scored = pd.read_csv(bench.folder / output, dtype={"id": str}).set_index("id")
            losses = self.losses(scored.loc[ids, list(PROBABILITY_COLUMNS)].to_numpy())
            above = [mean(losses - other, self.groups) for other in (self.prior, tfidf)]
            figures = mean(losses, self.groups, ".4f"), *above
            rows.append([stage, trained_on(bench, "scarce", stage)[0], "natural" if prior else "none", *figures])
        return [*rows, ["*natural class prior*", "", "", mean(self.prior, self.groups, ".4f"), "", ""]]


def known_of(battles: list[Battle]) -> pd.DataFrame:
    """Return what the baselines know of battles."""
    both = ({"text_a": "\n".join(b.responses_a), "text_b": "\n".join(b.responses_b)} for b in battles)
    return pd.DataFrame([row_statistics(b) | texts for b, texts in zip(battles, both, strict=True)])


def main() -> None:
    parser = options(__doc__, "work", "natural", "clean", "model", clean_rows=1 << 20)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(TRAININGS))
    parser.add_argument("--clean-stages", nargs="+", choices=STAGES, default=["probe"])
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    asked = parser.parse_args()
    bench, battles = Workbench(asked.work), battles_of(asked.natural)
    changed = OmegaConf.merge({"model": str(asked.model), "valid_share": 0.3}, OmegaConf.from_dotlist(asked.set))
    bench.variant("real", "--train", str(asked.natural), of="smollm2-135m", **changed)
    ids = set(read_rows(bench.folder / "data" / "real", "valid")["id"])
    judged = [battle for battle in battles if battle.id in ids]
    groups = {prompt_group(battle) for battle in judged}
    own, rest = ([b for b in each if prompt_group(b) not in groups] for each in (battles, battles_of(asked.clean)))
    held = HeldOut(judged, own)
    simple = {f"{len(own):,} votes": held.baselines(own, clean=False)}
    simple[f"{len(rest):,} clean votes, target prior"] = scarce = held.baselines(rest, clean=True)
    rows = own_methods(bench, asked.stages) + [row for on, losses in simple.items() for row in held.rows(losses, on)]
    text = f"Judged: {len(judged)} natural battles.\n\n{table(METHODS, rows)}"
    random.Random(1).shuffle(rest)
    if few := rest[: asked.clean_rows]:
        text += f"\n\n{table(SCARCE, held.after_scarce_ties(bench, asked.clean_stages, few, scarce['tfidf']))}"
    publish("real votes", text, asked.write)


if __name__ == "__main__":
    main()
