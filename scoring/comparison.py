"""Comparing the stages of an experiment that were scored: outputs/<experiment>/compare/."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.battle import PROBABILITY_COLUMNS
from common.errors import ArenaError
from common.files import read_json, write_json
from common.stages import STEPS, TRAININGS
from data_prep.export_reader import truth_of
from data_prep.ground_truth import probabilities_of
from factory.outdated import outdated_files, require_scored
from scoring.baselines import baseline_ladder
from scoring.compare import CHANCES, compare
from scoring.pipeline import REPORT, texts
from scoring.report.page import write_compare_page

if TYPE_CHECKING:
    import pandas as pd

    from common.experiment import Experiment


def compare_stages(experiment: Experiment) -> dict[str, Any]:
    """Compare every scored stage on identical validation rows; write compare.json and compare.html, return the numbers.

    Raises ArenaError if nothing was scored, or a stage was scored on other rows than those that are exported now.
    """
    frames = {
        stage: _frame(experiment, stage) for stage in TRAININGS if (experiment.output_folder(stage) / REPORT).is_file()
    }
    if not frames:
        raise ArenaError(
            "no stage of this experiment was scored yet",
            where=str(experiment.output_folder("compare").parent),
            remedy=f"python run.py sft -e {experiment.name}, then dpo and rm",
        )
    for stage in frames:
        require_scored(experiment, stage)
    rows = texts(experiment.data_folder, "valid")
    for stage, frame in frames.items():
        _require_own_rows(experiment, stage, frame, rows)
    ladder = baseline_ladder(texts(experiment.data_folder, "train"), rows, experiment.seed)
    truth = truth_of(experiment.data_folder)
    bayes = None
    if truth is not None:
        bayes = probabilities_of(truth, rows["id"].tolist(), str(experiment.data_folder / "truth.csv"))
    result = {"experiment": experiment.name, **compare(frames, experiment.seed, baselines=ladder, bayes=bayes)}
    result["flags"] = {stage: _red_flags(experiment, stage) for stage in frames}
    folder = experiment.output_folder("compare")
    write_compare_page(result, folder / "compare.html")
    write_json(folder / "compare.json", result)
    return result


def _require_own_rows(experiment: Experiment, stage: str, scored: pd.DataFrame, rows: pd.DataFrame) -> None:
    """Raise ArenaError where a stage's figures are not of the exported rows: baselines would be those of others."""
    changed = outdated_files(experiment, stage)
    if changed or scored["id"].tolist() != rows["id"].tolist():
        raise ArenaError(
            f"{stage} was trained or scored on another export than {experiment.data_folder} holds now",
            where=str(experiment.output_folder(stage)),
            remedy=f"prepare the earlier votes again; or python run.py {STEPS[stage].asked_by} -e {experiment.name} "
            "--fresh; a stage whose folder is moved out of outputs/ is left out",
        )


def _red_flags(experiment: Experiment, stage: str) -> list[str]:
    """Return what the stage's report says in red, so that no comparison hides it."""
    path = experiment.output_folder(stage) / REPORT
    try:
        return [str(flag["text"]) for flag in read_json(path).get("flags", []) if flag["level"] == "red"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        again = f"python run.py score -e {experiment.name} --stage {stage} --fresh"
        raise ArenaError(f"its flags cannot be read: {error!r}", where=str(path), remedy=again) from None


def _frame(experiment: Experiment, stage: str) -> pd.DataFrame:
    import pandas as pd

    folder = experiment.output_folder(stage)
    again = f"move {folder / REPORT} away and score again: run.py score -e {experiment.name} --stage {stage}"
    try:
        scores = pd.read_parquet(folder / "scores_valid.parquet", columns=["id", "verdict", "group"])
        chances = pd.read_csv(folder / "probabilities_valid.csv", dtype={"id": str})
        chances = chances[["id", *PROBABILITY_COLUMNS]].astype(dict.fromkeys(PROBABILITY_COLUMNS, float))
    except (OSError, ValueError, KeyError) as error:  # pandas' and pyarrow's own errors are among them
        reason = str(error).splitlines()[0][:200]
        raise ArenaError(f"its scores cannot be read: {reason}", where=str(folder), remedy=again) from None
    if scores["id"].tolist() != chances["id"].tolist():
        raise ArenaError(
            "scores_valid.parquet and probabilities_valid.csv hold different rows",
            where=str(folder),
            remedy=again,
        )
    for name, column in zip(CHANCES, PROBABILITY_COLUMNS, strict=True):
        scores[name] = chances[column].to_numpy()
    return scores
