"""Scoring any table of battles with a scored stage's judge and calibration."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.battle import PROBABILITY_COLUMNS
from common.console import name_of
from common.errors import UsageError
from common.files import only_run, sha256_of_table
from common.progress import Show
from data_prep.cells import is_formula
from data_prep.export_reader import PREFIX, read_columns, readable
from data_prep.readers import VoteReader, require_used
from data_prep.sources import votes_at
from factory.stage_context import StageContext
from scoring import metrics
from scoring.agreement import Agreement, write_choices
from scoring.baselines import TFIDF_CHARS, baseline_probabilities
from scoring.calibration import Calibration
from scoring.executor import Executor
from scoring.out_of_fold import MeanOfJobs
from scoring.predictions import Answers, class_prior, record_output, require_replaceable
from scoring.runner import ONE_ORDER, Pace, open_job
from scoring.score_stage import ScoreOptions, read_report, texts
from scoring.score_store import remove_empty


@dataclass(frozen=True)
class Cascade:
    """The second judge, who answers the battles from which the first abstains by this promise."""

    context: StageContext
    agreement: Agreement


@dataclass(frozen=True)
class _Table:
    """A table to score: where it lies, what its columns are called; name and `inputs` of the jobs on it."""

    path: Path
    columns: Mapping[str, str] | None
    name: str
    target: str
    inputs: Mapping[str, Any]


class _TableJudge:
    """The judge of a scored stage on its way through a table; no model is loaded before `score`."""

    def __init__(self, context: StageContext, options: ScoreOptions):
        self.context, self._options, self._jobs = context, options, []
        self.report = read_report(context)
        self.calibration = Calibration.from_json(self.report)
        self._both_orders = self.calibration.used.swap_tta
        if self._both_orders and options.time_limit is not None:
            self.calibration.require(1)
        self._specs = [options.spec(each) for each in context.answering]
        self._scorers = [spec.scorer() for spec in self._specs]

    def require_scored(self) -> None:
        """Raise ArenaError where its report is of an earlier judge."""
        self._models = [scorer.inputs() for scorer in self._scorers]
        for spec, model in zip(self._specs, self._models, strict=True):
            spec.context.require_scored(model)
        self.context.require_scored()

    def score(self, table: _Table, show: Show, only: Collection[str] | None = None) -> None:
        """Score the table's battles, or those with the ids `only`."""
        options, inputs = self._options, {**table.inputs, "both_orders": self._both_orders}
        if only is not None:
            inputs["only"] = hashlib.sha256("\n".join(sorted(only)).encode("utf-8", "surrogatepass")).hexdigest()
        for spec, scorer, model in zip(self._specs, self._scorers, self._models, strict=True):
            with closing(options.open(spec, scorer, show)) as executor:
                _note_other_engine(self.report, executor, self.context.name, show)
                job = open_job(
                    spec.context.folder / "scoring",
                    table.target,
                    scorer,
                    executor,
                    inputs={**inputs, "model": model},
                    rows=lambda scorer=scorer: (
                        row for row in scorer.read(table.path, table.columns) if only is None or row[0]["id"] in only
                    ),
                    label=f"{spec.context.label}: {table.name}",
                    show=show,
                    fresh=options.fresh,
                )
                self._jobs.append(job)
                judges_left = len(self._specs) + 1 - len(self._jobs)
                pace = Pace(job.tokens * judges_left, options.time_limit, started=options.started)
                job.score(executor, pace)
                if self._both_orders or (options.time_limit is not None and 2 in self.calibration.links):
                    if pace.allows(job.tokens * (2 * judges_left - 1)):
                        job.score(executor, pace, swapped=True)
                    else:
                        show.note(f"{spec.context.label}: {ONE_ORDER}")
        self.answered = MeanOfJobs(self._jobs)
        unread = [(row["before"], row["id"]) for row in self.answered.unread]
        self.answers = Answers.of(self.answered, self.calibration, unread, self.report)

    @property
    def tokens(self) -> int:
        """The tokens that it read: of both orders, where it averages them, and in every fold that answers."""
        return sum(job.tokens for job in self._jobs) * (2 if self._both_orders else 1)

    def remove(self) -> None:
        """Delete what was kept for a call that goes on."""
        for job in self._jobs:
            job.remove()


def score_input(
    context: StageContext,
    source: str | Path,
    output: Path,
    columns: Mapping[str, str] | None = None,
    *,
    show: Show,
    options: ScoreOptions | None = None,
    cascade: Cascade | None = None,
) -> dict[str, Any]:
    """Write the probabilities of any table of battles to `output`; return `rows`, `output` and how good they are.

    `source` is what `prepare` takes as votes: a file, a folder of parts, Kaggle's zip, or an address on the hub;
    `columns` are its own names for ours. For a test set of the WSDM Cup `output` is `id,winner`, and `probabilities`
    lie beside it. A row that cannot be read gets the class prior (`by_prior` of them). Where rows have verdicts,
    `judged` has their log loss and the baselines'. In a `cascade` a row has the probabilities of the judge that
    answered it. Without verdicts memory does not grow with the texts, only by some bytes a row. Raises ArenaError, and
    UsageError, before any work, where `output` is a file that this command did not write.
    """
    options = options or ScoreOptions()
    require_replaceable(output, source, context.experiment)
    if cascade and cascade.context.folder == context.folder:
        raise UsageError("is the first judge itself", where="--cascade", remedy="name another experiment or stage")
    judges = [_TableJudge(each, options) for each in (context, *([cascade.context] if cascade else []))]
    path = votes_at(source, labelled=False, columns=columns)
    # what is not a table of battles is refused before the model is loaded
    reader = VoteReader(path, labelled=False, columns=columns)
    require_used(columns or {}, reader)
    if reader.is_wsdm:
        require_replaceable(_beside(output), source, context.experiment)
    show.note(f"{path}: {reader.read_as}")
    for each in judges:
        each.require_scored()
    data = {"data": f"sha256:{sha256_of_table(path)}", **({"columns": columns} if columns else {})}
    table, folders = _Table(path, columns, Path(source).name, f"input-{output.name}", data), []
    with ExitStack() as locks:
        for each in judges:
            folders.append(each.context.folder / "scoring")
            locks.enter_context(only_run(folders[-1] / table.target))
        judges[0].score(table, show)
        made = _write(judges, cascade, table, output, reader.is_wsdm, show)
        for each in judges:
            each.remove()
    for folder in folders:
        remove_empty(folder)  # its own lock lay in there until now
    return made


def _beside(output: Path) -> Path:
    return output.with_name(f"{output.stem}_probabilities.csv")


def _write(
    judges: Sequence[_TableJudge], cascade: Cascade | None, table: _Table, output: Path, is_wsdm: bool, show: Show
) -> dict[str, Any]:
    """Write what the first judge says, and the second of what it is handed; return what `score_input` does."""
    judge, answers, second = judges[0], judges[0].answers, {}
    if cascade:
        first = _all_of(answers)
        second = _second_answers(judges[1], cascade.agreement, first, table, show)
        answers = replace(answers, pieces=lambda: _with_second(judge.answers, second))
    rows, cut = answers.write(output, winner=is_wsdm)
    record_output(output)
    made: dict[str, Any] = {"rows": rows, "output": str(output), "by_prior": len(answers.lines)}
    if is_wsdm:
        answers.write(_beside(output))
        record_output(_beside(output))
        made["probabilities"] = str(_beside(output))
    if cascade:
        choices, answered, read = write_choices(Path(made.get("probabilities", output)), cascade.agreement, first)
        names, tokens = [_name(each.context) for each in judges], [each.tokens for each in judges]
        answered_by = dict(zip(names, (answered, read - answered), strict=True))
        made["cascade"] = {"answered": answered_by, "tokens": dict(zip(names, tokens, strict=True))}
        made["cascade"] |= {"agreement": cascade.agreement.in_words(), "choices": str(choices)}
    if unread := judge.answered.unread:
        row, lost = unread[0], len(unread) - len(answers.lines)
        missing = f"; {lost:,} without an id of their own have no line" if lost else ""
        show.note(
            f"warning: {len(unread):,} row(s) cannot be read: {len(answers.lines):,} get the class prior{missing}; "
            f"the first is {row['file']} row {row['row']} (id {name_of(row['id'] or 'missing')}): {row['reason']}"
        )
    if cut:
        name = judge.context.name
        show.note(f"{name}: {cut:,} of {rows:,} rows ({cut / rows:.1%}) were shortened to the judge's token budget")
    if formulas := sum(map(is_formula, judge.answered.ids())):
        show.note(f"warning: {formulas} id(s) begin as a spreadsheet's formula does: do not open {output} in one")
    return made | judge_answers(judges, second)


def _name(context: StageContext) -> str:
    return f"{context.experiment.name}:{context.label}"


def _all_of(answers: Answers) -> tuple[list[str], np.ndarray]:
    """Return ids and probabilities [rows, 3] of all rows that were read."""
    pieces = [(names, chances) for names, chances, _ in answers.pieces()]
    return [name for names, _ in pieces for name in names], np.concatenate([np.empty((0, 3)), *(c for _, c in pieces)])


def _second_answers(
    judge: _TableJudge, agreement: Agreement, first: tuple[list[str], np.ndarray], table: _Table, show: Show
) -> dict[str, np.ndarray]:
    """Return the second judge's probabilities [3] of the battles from which the first abstains, by id."""
    names, chances = first
    passed_on = {name for name, answers in zip(names, agreement.answers(chances), strict=True) if not answers}
    if not passed_on:
        return {}  # its model is not even loaded
    judge.score(table, show, passed_on)
    return dict(zip(*_all_of(judge.answers), strict=True))


def _with_second(answers: Answers, second: Mapping[str, np.ndarray]) -> Iterator[tuple[list[str], np.ndarray, int]]:
    for names, chances, cut in answers.pieces():
        yield names, np.array([second.get(name, row) for name, row in zip(names, chances, strict=True)]), cut


def judge_answers(judges: Sequence[_TableJudge], second: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return `judged`: log loss, interval and accuracy on the rows with a verdict, and the baselines' log losses.

    The baselines learn from the exported training rows; where these are not here, only those that read no text stand
    there. `second` are a second judge's answers by id: the figures are then the cascade's, and `parts` has those of
    the first judge alone, and of both on the rows that it passed on. Returns nothing where no row has a verdict.
    """
    judge, tables, first = judges[0], [], 0
    for table in judge.answered.tables():
        table[list(PROBABILITY_COLUMNS)] = judge.calibration.apply(table)
        table["number"] = range(first, first + len(table))
        first += len(table)
        tables.append(table[table["verdict"].notna()])
    rows = pd.concat(tables, ignore_index=True)
    if not len(rows):
        return {}
    truth, chances = metrics.verdict_codes(rows["verdict"]), rows[list(PROBABILITY_COLUMNS)].to_numpy()
    alone, passed_on = metrics.row_losses(chances, truth), rows["id"].isin(second).to_numpy()
    chances = np.array([second.get(name, row) for name, row in zip(rows["id"], chances, strict=True)])
    losses = metrics.row_losses(chances, truth)
    baselines = _baselines(judge.context, judge.answered, rows, judge.report)
    bootstrap = metrics.GroupBootstrap(metrics.as_groups(rows["group"]), judge.context.experiment.seed)
    judged = {
        "rows": len(rows),
        "log_loss": float(losses.mean()),
        "log_loss_ci95": bootstrap.interval(losses),
        "accuracy": metrics.accuracy(chances, truth),
        "baselines": {name: metrics.log_loss(each, truth) for name, each in baselines.items()},
        "training_rows": int(np.any([_trained(each.context, rows) for each in judges], axis=0).sum()),
    }
    if passed_on.any():
        judged["parts"] = {
            "first_alone": float(alone.mean()),
            "passed_on": int(passed_on.sum()),
            "first_there": float(alone[passed_on].mean()),
            "second_there": float(losses[passed_on].mean()),
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


def _trained(context: StageContext, rows: pd.DataFrame) -> np.ndarray:
    """Tell which rows are training rows by rows.parquet (same id, same prompt); none where that is not here."""
    path = context.experiment.data_folder / "rows.parquet"
    if not path.is_file():
        return np.zeros(len(rows), dtype=bool)
    with readable(path):
        trained = read_columns(path, ["id", "group"], where=("split", context.parts("train"))).to_pandas()
    keys = set(zip(trained["id"].str.replace(PREFIX, "", regex=True), trained["group"], strict=True))
    return np.array([key in keys for key in zip(rows["id"], rows["group"], strict=True)])


def _note_other_engine(report: dict[str, Any], executor: Executor, stage: str, show: Show) -> None:
    """Print a note where the calibration was fitted on the scores of another engine or precision."""
    fitted, now = report.get("scoring"), (executor.engine, executor.precision)
    if fitted and (fitted["engine"], fitted["precision"]) != now:
        show.note(
            f"{stage}: the calibration was fitted on scores of {fitted['engine']} in {fitted['precision']}, "
            f"these are of {now[0]} in {now[1]}: run.py score --fresh with the same options fits it again"
        )
