"""Scoring one stage: raw scores, calibration, report, page, plots, probabilities and submission."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.dataset import read_battles, read_manifest, read_rows, truth_of
from data_prep.errors import ArenaError
from data_prep.files import write_json
from factory.progress import duration, loss_curve
from factory.step import STEPS, merge_of
from scoring.calibration import Calibration, calibration_from_json
from scoring.engine import ScoreProgress
from scoring.judge import MANIFEST
from scoring.page import write_page
from scoring.plots import write_plots
from scoring.probabilities import check_submission, write_probabilities
from scoring.provenance import provenance
from scoring.report import build_report
from scoring.scorer import Scorer, scorer_of
from scoring.scores import write_scores

if TYPE_CHECKING:
    import pandas as pd

    from factory.experiment import Experiment
    from factory.progress import Show

REPORT = "report.json"


def score_stage(experiment: Experiment, stage: str, *, show: Show) -> dict[str, Any]:
    """Score the validation fold and the test set of one stage and write its report; return the report.

    Label logits of the validation fold are taken in both orders, for the position bias; those of the test set only
    with `swap_tta`. Raises ArenaError if the model, the export or the scores are not what they should be.
    """
    from factory.state import StageState, only_run

    folder = experiment.output_folder(stage)
    scorer = scorer_of(experiment, stage)
    inputs = {"model": scorer.inputs(), **_inputs(experiment, stage)}
    with only_run(folder):
        state = StageState(folder)
        if state.finished("score", inputs, fresh_remedy=f"move {folder / REPORT} away to score again"):
            show.note(f"{stage}: scores kept, finished {state.record('score').finished_at}")
            return read_report(experiment, stage)
        state.begin("score", inputs)
        started = time.monotonic()
        valid, test = _score_splits(experiment, scorer, folder, stage, show)
        seconds = time.monotonic() - started
        report, probabilities, calibration = _report(experiment, stage, valid, seconds)
        outputs = _write(folder, report, valid, probabilities, test, calibration)
        state.finish("score", outputs, time.monotonic() - started)
    show.note(f"{stage}: scored {len(valid)} validation and {len(test)} test battles in {duration(seconds)}")
    return report


def score_input(experiment: Experiment, stage: str, path: Path, output: Path, *, show: Show) -> int:
    """Score any table of battles with a scored stage's model and calibration; return the number of rows written."""
    calibration = calibration_from_json(read_report(experiment, stage)["calibration"])
    scorer = scorer_of(experiment, stage)
    scorer.open()
    with _bar(show, f"{stage}: {path.name}") as progress:
        scores = scorer.file(path, both_orders=calibration.swap_tta, progress=progress)
    write_probabilities(output, scores["id"], calibration.apply(scores))
    return check_submission(output, scores["id"])


def read_report(experiment: Experiment, stage: str) -> dict[str, Any]:
    """Return a stage's report.json; raises ArenaError if the stage was not scored."""
    path = experiment.output_folder(stage) / REPORT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ArenaError(
            "there is no readable report of this stage",
            where=str(path),
            remedy=f"python run.py {STEPS[stage].asked_by} -e {experiment.name}" if stage in STEPS else "check --stage",
        ) from None


def texts(data: Path, split: str) -> pd.DataFrame:
    """Return the frame that the baselines learn from: id, verdict, text_prompt, text_a, text_b, turns."""
    import pandas as pd

    return pd.DataFrame(
        [
            {
                "id": battle.id,
                "verdict": battle.verdict,
                "text_prompt": "\n".join(battle.prompts),
                "text_a": "\n".join(battle.responses_a),
                "text_b": "\n".join(battle.responses_b),
                "turns": battle.turns + dropped,
            }
            for battle, dropped in read_battles(data, split)
        ],
        columns=["id", "verdict", "text_prompt", "text_a", "text_b", "turns"],
    )


def _inputs(experiment: Experiment, stage: str) -> dict[str, Any]:
    """What the probabilities depend on beside the model: the exported rows, and what is made of the scores."""
    pairs = ("pairs.parquet",) if STEPS[stage].data == "dpo_reward" else ()
    read = ("rows.parquet", "battles.parquet", "truth.csv", *pairs)
    files = read_manifest(experiment.data_folder)["files"]
    return {
        "data": {name: f"sha256:{digest}" for name, digest in files.items() if name in read},
        "swap_tta": experiment.swap_tta,
        "seed": experiment.seed,
        "target_prior": _target_prior(experiment),
    }


def _score_splits(experiment: Experiment, scorer: Scorer, folder: Path, stage: str, show: Show):
    show.note(f"{stage}: loading the trained model")
    scorer.open()
    with _bar(show, f"{stage}: scoring the validation fold") as progress:
        valid = scorer.split("valid", both_orders=True, progress=progress)
    if read_rows(experiment.data_folder, "test").empty:
        test = valid.iloc[:0]
    else:
        with _bar(show, f"{stage}: scoring the test set") as progress:
            test = scorer.split("test", both_orders=experiment.swap_tta, progress=progress)
    write_scores(folder / "scores_valid.parquet", valid)
    write_scores(folder / "scores_test.parquet", test)
    return valid, test


def _report(experiment: Experiment, stage: str, valid: pd.DataFrame, seconds: float):
    """Build the report; return it with the validation rows' probabilities and the calibration."""
    data = experiment.data_folder
    return build_report(
        experiment=experiment.name,
        stage=stage,
        scores=valid,
        train_rows=texts(data, "train"),
        valid_texts=texts(data, "valid"),
        truth=truth_of(data),
        audit=json.loads((data / "audit.json").read_text(encoding="utf-8")),
        loss_curve=loss_curve(experiment.adapter_folder(stage) / "trainer_log.jsonl"),
        provenance=_provenance(experiment, stage, seconds),
        swap_tta=experiment.swap_tta and "ab_a" in valid,
        seed=experiment.seed,
        target_prior=_target_prior(experiment),
    )


def _target_prior(experiment: Experiment) -> dict[str, float] | None:
    return experiment.target_prior.model_dump() if experiment.target_prior else None


def _write(folder: Path, report, valid, probabilities, test, calibration: Calibration) -> list[Path]:
    """Write everything that a person or a program reads; report.json is the last."""
    names = ["probabilities_valid.csv"]
    write_probabilities(folder / names[0], valid["id"], probabilities)
    if len(test):
        found = calibration.apply(test)
        for name in ("probabilities_test.csv", "submission.csv"):
            write_probabilities(folder / name, test["id"], found)
            check_submission(folder / name, test["id"])
            names.append(name)
    plots = write_plots(report, folder / "plots")
    write_page(report, folder / "report.html")
    write_json(folder / REPORT, report)
    return [*(folder / name for name in names), *plots, folder / "report.html", folder / REPORT]


def _provenance(experiment: Experiment, stage: str, seconds: float) -> dict[str, Any]:
    data, step = experiment.data_folder, STEPS[stage]
    files = [
        experiment.folder / "experiment.yaml",
        experiment.recipe(stage),
        experiment.recipe(merge_of(stage)),
        *(data / name for name in ("rows.parquet", "battles.parquet", f"{step.data}_train.jsonl")),
        experiment.merged_folder(stage) / MANIFEST,
    ]
    return {**provenance(seed=experiment.seed, files=files), "scoring_seconds": round(seconds, 2)}


@contextmanager
def _bar(show: Show, label: str) -> Iterator[Callable[[ScoreProgress], None]]:
    """Yield a callback that keeps one live line: prompts done, tokens a second, time left."""
    started = time.monotonic()
    with show.line(label) as line:

        def tell(progress: ScoreProgress) -> None:
            seconds = max(time.monotonic() - started, 1e-3)
            left = seconds * (progress.total_tokens - progress.tokens) / max(progress.tokens, 1)
            detail = f"{progress.tokens / seconds:,.0f} tokens/s, {duration(left)} left"
            line.count(progress.rows, progress.total_rows, detail)

        yield tell
