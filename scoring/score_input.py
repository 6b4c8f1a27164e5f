"""Scoring any table of battles with a scored stage's judge and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.battle import PROBABILITY_COLUMNS
from common.console import name_of
from common.files import only_run, sha256_of_table
from common.progress import Show
from data_prep.cells import is_formula
from data_prep.export_reader import PREFIX, read_columns, readable
from data_prep.readers import VoteReader, require_used
from data_prep.sources import votes_at
from factory.stage_context import StageContext
from scoring import metrics
from scoring.baselines import TFIDF_CHARS, baseline_probabilities
from scoring.calibration import Calibration
from scoring.executor import Executor
from scoring.out_of_fold import MeanOfJobs
from scoring.predictions import record_output, require_replaceable
from scoring.runner import open_job
from scoring.score_stage import Answers, ScoreOptions, class_prior, read_report, texts
from scoring.score_store import remove_empty
from scoring.time_limit import Pace


def score_input(
    context: StageContext,
    source: str | Path,
    output: Path,
    columns: Mapping[str, str] | None = None,
    *,
    show: Show,
    options: ScoreOptions | None = None,
) -> dict[str, Any]:
    """Write the probabilities of any table of battles to `output`; return `rows`, `output` and how good they are.

    `source` is what `prepare` takes as votes: a file, a folder of parts, Kaggle's zip, or an address on the hub;
    `columns` are its own names for ours. For a test set of the WSDM Cup `output` is `id,winner`, and `probabilities`
    lie beside it. A row that cannot be read gets the class prior (`by_prior` of them). Where rows have verdicts,
    `judged` has their log loss and the baselines'. Without verdicts memory does not grow with the texts, only by some
    bytes a row. Raises ArenaError, and UsageError, before any work, where `output` is a file that this command did not
    write.
    """
    options, stage = options or ScoreOptions(), context.name
    beside = output.with_name(f"{output.stem}_probabilities.csv")
    require_replaceable(output, source, context.experiment)
    report = read_report(context if context.fold is None else context.of(None))
    calibration = Calibration.from_json(report)
    wanted = calibration.used.swap_tta
    if wanted and options.time_limit is not None:
        calibration.require(1)
    specs = [options.spec(each) for each in context.answering]
    scorers, path = [spec.scorer() for spec in specs], votes_at(source, labelled=False, columns=columns)
    # what is not a table of battles is refused before the model is loaded
    reader = VoteReader(path, labelled=False, columns=columns)
    require_used(columns or {}, reader)
    if reader.is_wsdm:
        require_replaceable(beside, source, context.experiment)
    show.note(f"{path}: {reader.read_as}")
    models = [scorer.inputs() for scorer in scorers]
    for spec, model in zip(specs, models, strict=True):
        spec.context.require_scored(model)
    context.require_scored()
    target, jobs = f"input-{output.name}", []
    base = context.folder / "scoring"
    data = {"data": f"sha256:{sha256_of_table(path)}", **({"columns": columns} if columns else {})}
    with only_run(base / target):
        for spec, scorer, model in zip(specs, scorers, models, strict=True):
            with closing(options.open(spec, scorer, show)) as executor:
                _note_other_engine(report, executor, stage, show)
                job = open_job(
                    spec.context.folder / "scoring",
                    target,
                    scorer,
                    executor,
                    inputs={**data, "both_orders": wanted, "model": model},
                    rows=lambda scorer=scorer: scorer.read(path, columns),
                    label=f"{spec.context.label}: {Path(source).name}",
                    show=show,
                    fresh=options.fresh,
                )
                jobs.append(job)
                pace = Pace(job.tokens * (len(specs) + 1 - len(jobs)), options.time_limit, started=options.started)
                job.straight(executor, pace)
                if wanted or (options.time_limit is not None and 2 in calibration.links):
                    job.swapped(executor, pace)
        answered = MeanOfJobs(jobs)
        unread = [(row["before"], row["id"]) for row in answered.unread]
        answers = Answers.of(answered, calibration, unread, report)
        rows, cut = answers.write(output, winner=reader.is_wsdm)
        record_output(output)
        made: dict[str, Any] = {"rows": rows, "output": str(output), "by_prior": len(answers.lines)}
        if reader.is_wsdm:
            answers.write(beside)
            record_output(beside)
            made["probabilities"] = str(beside)
        made |= judge_answers(context, answered, calibration, report)
        formulas = sum(map(is_formula, jobs[0].ids()))
        for job in jobs:
            job.remove()
    remove_empty(base)  # its own lock lay in there until now
    if unread:
        first, lost = answered.unread[0], len(unread) - len(answers.lines)
        missing = f"; {lost:,} without an id of their own have no line" if lost else ""
        show.note(
            f"warning: {len(unread):,} row(s) cannot be read: {len(answers.lines):,} get the class prior{missing}; "
            f"the first is {first['file']} row {first['row']} (id {name_of(first['id'] or 'missing')}): "
            f"{first['reason']}"
        )
    if cut:
        show.note(f"{stage}: {cut:,} of {rows:,} rows ({cut / rows:.1%}) were shortened to the judge's token budget")
    if formulas:
        show.note(f"warning: {formulas} id(s) begin as a spreadsheet's formula does: do not open {output} in one")
    return made


def judge_answers(
    context: StageContext, job: MeanOfJobs, calibration: Calibration, report: Mapping[str, Any]
) -> dict[str, Any]:
    """Return `judged`: log loss, interval and accuracy on the rows with a verdict, and the baselines' log losses.

    The baselines learn from the exported training rows; where these are not here, only those that read no text stand
    there. Returns nothing where no row has a verdict.
    """
    tables, first = [], 0
    for table in job.tables():
        table[list(PROBABILITY_COLUMNS)] = calibration.apply(table)
        table["number"] = range(first, first + len(table))
        first += len(table)
        tables.append(table[table["verdict"].notna()])
    rows = pd.concat(tables, ignore_index=True)
    if not len(rows):
        return {}
    truth, chances = metrics.verdict_codes(rows["verdict"]), rows[list(PROBABILITY_COLUMNS)].to_numpy()
    losses, baselines = metrics.row_losses(chances, truth), _baselines(context, job, rows, report)
    bootstrap = metrics.GroupBootstrap(metrics.as_groups(rows["group"]), context.experiment.seed)
    judged = {
        "rows": len(rows),
        "log_loss": float(losses.mean()),
        "log_loss_ci95": bootstrap.interval(losses),
        "accuracy": metrics.accuracy(chances, truth),
        "baselines": {name: metrics.log_loss(each, truth) for name, each in baselines.items()},
        "training_rows": _trained(context, rows),
    }
    return {"judged": judged}


def _baselines(
    context: StageContext, job: MeanOfJobs, rows: pd.DataFrame, report: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    data = context.experiment.data_folder
    if not (data / "battles.parquet").is_file():  # a judge that was brought here alone
        return {"uniform": np.full((len(rows), 3), 1 / 3), "prior": np.tile(class_prior(report), (len(rows), 1))}
    fed = job.inputs(rows["number"])  # of a pair each response is one text
    for side in "ab":
        answers = [row[f"responses_{side}"] if f"responses_{side}" in row else [row[f"response_{side}"]] for row in fed]
        rows[f"text_{side}"] = ["\n".join(turns)[:TFIDF_CHARS] for turns in answers]
    return baseline_probabilities(texts(data, context.parts("train")), rows, context.experiment.seed)


def _trained(context: StageContext, rows: pd.DataFrame) -> int:
    """Return how many rows are training rows by rows.parquet (same id, same prompt); 0 where that is not here."""
    path = context.experiment.data_folder / "rows.parquet"
    if not path.is_file():
        return 0
    with readable(path):
        trained = read_columns(path, ["id", "group"], where=("split", context.parts("train"))).to_pandas()
    keys = set(zip(trained["id"].str.replace(PREFIX, "", regex=True), trained["group"], strict=True))
    return sum(key in keys for key in zip(rows["id"], rows["group"], strict=True))


def _note_other_engine(report: dict[str, Any], executor: Executor, stage: str, show: Show) -> None:
    """Print a note where the calibration was fitted on the scores of another engine or precision."""
    fitted, now = report.get("scoring"), (executor.engine, executor.precision)
    if fitted and (fitted["engine"], fitted["precision"]) != now:
        show.note(
            f"{stage}: the calibration was fitted on scores of {fitted['engine']} in {fitted['precision']}, "
            f"these are of {now[0]} in {now[1]}: run.py score --fresh with the same options fits it again"
        )
