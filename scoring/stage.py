"""Scoring one stage: raw scores, calibration, report, page, plots, probabilities and submission."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.dataset import read_battles, read_manifest, read_rows
from data_prep.errors import ArenaError
from data_prep.files import sha256_of, write_json
from scoring.calibration import Calibration, calibration_from_json
from scoring.engine import ScoreProgress, device_name, load_model
from scoring.judge import MANIFEST, Judge, load_judge
from scoring.page import write_page
from scoring.plots import write_plots
from scoring.probabilities import check_submission, write_probabilities
from scoring.provenance import provenance
from scoring.report import build_report
from scoring.scores import score_file, score_split, write_scores

if TYPE_CHECKING:
    import pandas as pd

    from factory.experiment import Experiment
    from factory.progress import Show

REPORT = "report.json"


def score_stage(experiment: Experiment, stage: str, *, show: Show) -> dict[str, Any]:
    """Score the validation fold and the test set of one stage and write its report; return the report.

    The validation fold is scored in both orders, for the position bias; the test set in both only with `swap_tta`.
    Raises ArenaError if the merged model, the export or the scores are not what they should be.
    """
    from factory.progress import loss_curve
    from factory.state import StageState, only_run

    folder = experiment.output_folder(stage)
    judge = load_judge(experiment.merged_folder(stage))
    inputs = _inputs(experiment, judge)
    with only_run(folder):
        state = StageState(folder)
        if state.finished("score", inputs, fresh_remedy="move report.json away to score again"):
            show.note(f"{stage}: scores kept, finished {state.record('score').finished_at}")
            return read_report(experiment, stage)
        state.begin("score", inputs)
        started = time.monotonic()
        valid, test = _score_splits(experiment, judge, folder, stage, show)
        report, probabilities, calibration = build_report(
            experiment=experiment.name,
            stage=stage,
            scores=valid,
            train_rows=texts(experiment.data_folder, "train"),
            valid_texts=texts(experiment.data_folder, "valid"),
            truth=_truth(experiment.data_folder),
            audit=json.loads((experiment.data_folder / "audit.json").read_text(encoding="utf-8")),
            loss_curve=loss_curve(experiment.adapter_folder(stage) / "trainer_log.jsonl"),
            provenance=_provenance(experiment, stage, judge, time.monotonic() - started),
            swap_tta=experiment.swap_tta,
            seed=experiment.seed,
            target_prior=experiment.target_prior.model_dump() if experiment.target_prior else None,
        )
        outputs = _write(folder, report, valid, probabilities, test, calibration)
        state.finish("score", outputs, time.monotonic() - started)
    show.note(f"{stage}: scored {len(valid)} validation and {len(test)} test battles")
    return report


def score_input(experiment: Experiment, stage: str, path: Path, output: Path, *, show: Show) -> int:
    """Score any table of battles with a scored stage's judge and calibration; return the number of rows written."""
    judge = load_judge(experiment.merged_folder(stage))
    calibration = calibration_from_json(read_report(experiment, stage)["calibration"])
    model = load_model(judge.folder, device_name())
    with _bar(show, f"{stage}: {path.name}") as progress:
        scores = score_file(judge, model, path, tta=calibration.swap_tta, progress=progress)
    write_probabilities(output, scores["id"], calibration.apply(scores))
    return check_submission(output, scores["id"])


def read_report(experiment: Experiment, stage: str) -> dict[str, Any]:
    """Return a stage's report.json; raises ArenaError if the stage was not scored."""
    path = experiment.output_folder(stage) / REPORT
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise ArenaError(
            "there is no readable report of this stage", where=str(path), remedy=f"run.py {stage} -e {experiment.name}"
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


def _inputs(experiment: Experiment, judge: Judge) -> dict[str, Any]:
    """What the probabilities depend on: the judge, the exported rows, and how they are scored."""
    weights = sorted(judge.folder.glob("*.safetensors"))
    return {
        "judge": {p.name: f"sha256:{sha256_of(p)}" for p in [judge.folder / MANIFEST, *weights]},
        "data": {
            name: f"sha256:{digest}"
            for name, digest in read_manifest(experiment.data_folder)["files"].items()
            if name in ("rows.parquet", "battles.parquet", "truth.csv")
        },
        "swap_tta": experiment.swap_tta,
        "seed": experiment.seed,
        "target_prior": experiment.target_prior.model_dump() if experiment.target_prior else None,
    }


def _score_splits(experiment: Experiment, judge: Judge, folder: Path, stage: str, show: Show):
    data = experiment.data_folder
    _same_frame(experiment, judge)
    show.note(f"{stage}: loading the merged model")
    model = load_model(judge.folder, device_name())
    with _bar(show, f"{stage}: scoring the validation fold") as progress:
        valid = score_split(judge, model, data, "valid", tta=True, progress=progress)
    if read_rows(data, "test").empty:
        test = valid.iloc[:0]
    else:
        with _bar(show, f"{stage}: scoring the test set") as progress:
            test = score_split(judge, model, data, "test", tta=experiment.swap_tta, progress=progress)
    write_scores(folder / "scores_valid.parquet", valid)
    write_scores(folder / "scores_test.parquet", test)
    return valid, test


def _same_frame(experiment: Experiment, judge: Judge) -> None:
    from dataclasses import asdict

    exported = read_manifest(experiment.data_folder)["frame"]
    if json.loads(json.dumps(asdict(judge.frame))) != exported:
        raise ArenaError(
            "the data was exported for another tokenizer or chat template than this judge was trained with",
            where=str(judge.folder),
            remedy=f"run.py prepare -e {experiment.name} again, then train with --fresh",
        )


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


def _truth(data: Path) -> pd.DataFrame | None:
    import pandas as pd

    path = data / "truth.csv"
    return pd.read_csv(path, dtype={"id": str}) if path.is_file() else None


def _provenance(experiment: Experiment, stage: str, judge: Judge, seconds: float) -> dict[str, Any]:
    from factory.step import merge_of

    data = experiment.data_folder
    files = [
        experiment.folder / "experiment.yaml",
        experiment.recipe(stage),
        experiment.recipe(merge_of(stage)),
        *(data / name for name in ("manifest.json", f"{stage}_train.jsonl", "rows.parquet")),
        judge.folder / MANIFEST,
    ]
    return {**provenance(seed=experiment.seed, files=files), "scoring_seconds": round(seconds, 2)}


@contextmanager
def _bar(show: Show, label: str) -> Iterator[Callable[[ScoreProgress], None]]:
    """Yield a callback that keeps one live line: prompts done, tokens a second, time left."""
    from factory.progress import duration

    started = time.monotonic()
    with show.line(label) as line:

        def tell(progress: ScoreProgress) -> None:
            seconds = max(time.monotonic() - started, 1e-3)
            left = seconds * (progress.total_tokens - progress.tokens) / max(progress.tokens, 1)
            detail = f"{progress.tokens / seconds:,.0f} tokens/s, {duration(left)} left"
            line.count(progress.rows, progress.total_rows, detail)

        yield tell
