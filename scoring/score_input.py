"""Scoring any table of battles with a scored stage's judge and calibration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from common.files import only_run, sha256_of_table
from common.progress import Show
from data_prep.cells import is_formula
from data_prep.readers import VoteReader, require_used
from data_prep.sources import votes_at
from factory.stage_context import StageContext
from scoring.calibration import Calibration
from scoring.executor import Executor
from scoring.out_of_fold import MeanOfJobs
from scoring.predictions import record_output, require_replaceable
from scoring.runner import open_job
from scoring.score_stage import ScoreOptions, read_report, write_table
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
) -> int:
    """Write the probabilities of any table of battles to `output`; return the number of rows written.

    `source` is what `prepare` takes as votes: a file, a folder of parts, Kaggle's zip, or an address on the hub.
    `columns` are its own names for ours.
    Memory does not grow with the texts, only by some bytes a row. Raises ArenaError that names a row that cannot be
    scored, and UsageError, before any work, where `output` is a file that this command did not write.
    """
    options, stage = options or ScoreOptions(), context.name
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
        rows, cut = write_table(output, MeanOfJobs(jobs), calibration)
        record_output(output)
        formulas = sum(map(is_formula, jobs[0].ids()))
        for job in jobs:
            job.remove()
    if cut:
        show.note(f"{stage}: {cut:,} of {rows:,} rows ({cut / rows:.1%}) were shortened to the judge's token budget")
    remove_empty(base)  # its own lock lay in there until now
    if formulas:
        show.note(f"warning: {formulas} id(s) begin as a spreadsheet's formula does: do not open {output} in one")
    return rows


def _note_other_engine(report: dict[str, Any], executor: Executor, stage: str, show: Show) -> None:
    """Print a note where the calibration was fitted on the scores of another engine or precision."""
    fitted, now = report.get("scoring"), (executor.engine, executor.precision)
    if fitted and (fitted["engine"], fitted["precision"]) != now:
        show.note(
            f"{stage}: the calibration was fitted on scores of {fitted['engine']} in {fitted['precision']}, "
            f"these are of {now[0]} in {now[1]}: run.py score --fresh with the same options fits it again"
        )
