"""Scoring one stage: raw scores, calibration, report, page, probabilities and submission."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import duration
from common.errors import ArenaError, UsageError
from common.files import atomic_file, only_run, read_json, sha256_of_table, write_json
from common.stages import STEPS, merge_of
from data_prep.export_reader import (
    read_audit,
    read_battles,
    read_manifest,
    read_rows,
    readable,
    require_intact,
    truth_of,
)
from data_prep.readers import VoteReader
from data_prep.schemas import is_formula
from data_prep.sources import votes_at
from factory.stage_context import StageContext
from factory.state import require_own_settings, require_own_votes, require_scored
from factory.trainer_log import loss_curve
from scoring.calibration import Calibration
from scoring.checks.merge_check import check_merge
from scoring.checks.provenance import provenance
from scoring.checks.run_checks import require_sound, run_checks, stopping
from scoring.judge import MANIFEST
from scoring.predictions import (
    REPORT,
    check_submission,
    probability_file,
    record_output,
    require_outside,
    require_replaceable,
    write_probabilities,
)
from scoring.report.build import build_report
from scoring.report.page import shown_battles, write_page
from scoring.runner import Job, open_job
from scoring.score_store import remove_empty
from scoring.scorer import Scorer, ScorerSpec, own_precision
from scoring.time_limit import Pace, parse_duration
from scoring.workers import Executor, open_executor

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd

    from common.experiment import Experiment
    from common.progress import Show

_LABELS = {"valid": "scoring the validation fold", "test": "scoring the test set"}


@dataclass(frozen=True)
class ScoreOptions:
    """How to score: what computes, in which precision (None: the experiment's), how often side by side, how long.

    `time_limit` is in seconds from `started` (time.monotonic) on; `ray` the address of a cluster, "local" for one of
    its own; `fresh` uses nothing that was scored before, and puts an earlier report aside.
    """

    engine: str = "torch"
    precision: str | None = None
    workers: int | None = None
    ray: str | None = None
    time_limit: float | None = None
    fresh: bool = False
    started: float = field(default_factory=time.monotonic)

    @classmethod
    def of(cls, *, time_limit: str | None = None, **options: Any) -> ScoreOptions:
        """Return the options of a command line, where a time limit is text such as 1h30m; raises UsageError."""
        return cls(time_limit=parse_duration(time_limit) if time_limit else None, **options)

    def spec(self, experiment: Experiment, stage: str) -> ScorerSpec:
        """Return which scorer is asked; raises UsageError for options that exclude each other."""
        if self.ray is not None and self.time_limit is not None:
            raise UsageError(
                "a time limit needs shards that are given out one by one, and Ray takes all of them at once",
                where="--time-limit --ray",
                remedy="give one of the two",
            )
        precision = self.precision or own_precision(experiment, stage)
        return ScorerSpec(StageContext(experiment, stage), self.engine, precision)


def score_stage(
    experiment: Experiment, stage: str, *, show: Show, options: ScoreOptions | None = None
) -> dict[str, Any]:
    """Score the validation fold and the test set of one stage and write its report; return the report.

    Label logits of the validation fold are taken in both orders, for the position bias; those of the test set only
    with `swap_tta` or, as far as it goes, a time limit. Raises ArenaError if the model, the export or the scores are
    not what they should be.
    """
    from factory.state import StageState, archive

    options, folder = options or ScoreOptions(), experiment.output_folder(stage)
    spec = options.spec(experiment, stage)
    scorer = spec.scorer()
    require_intact(experiment.data_folder, _exported(stage))
    require_own_settings(experiment, stage)
    require_own_votes(experiment, stage)
    scorer.require_own_export()
    compared = check_merge(StageContext(experiment, stage), show=show)
    again = f"python run.py score -e {experiment.name} --stage {stage} --fresh"
    inputs = {"model": scorer.inputs(), **_inputs(experiment, stage), **_asked(spec)}
    with only_run(folder):
        state = StageState(folder)
        if not options.fresh and state.finished("score", inputs, fresh_remedy=again):
            show.note(f"{stage}: scores kept, finished {state.record('score').finished_at}")
            report = read_report(experiment, stage, remedy=again)
            require_sound(report.get("checks", []), folder / REPORT)
            return report
        started = time.monotonic()
        with closing(_opened(spec, stage, options, show)) as executor:
            # Only now: a model that cannot be loaded leaves the earlier result as it is.
            places = (experiment.adapter_folder(stage), folder)
            for old in archive(folder / REPORT, places=places) if options.fresh else ():
                show.note(f"{stage}: the earlier report is now {old}")
            state.begin("score", inputs)
            jobs, scoring = _score_splits(experiment, stage, scorer, executor, options, show)
        scoring["seconds"] = seconds = round(time.monotonic() - started, 2)
        report, outputs = _write(experiment, stage, jobs, scoring, compared)
        state.finish("score", outputs, time.monotonic() - started)
        for job in jobs.values():
            job.remove()
    require_sound(report["checks"], folder / REPORT)
    show.note(
        f"{stage}: scored {jobs['valid'].rows} validation and {jobs['test'].rows} test battles in {duration(seconds)}"
    )
    return report


def score_input(
    experiment: Experiment,
    stage: str,
    source: str | Path,
    output: Path,
    *,
    show: Show,
    options: ScoreOptions | None = None,
) -> int:
    """Score any table of battles with a scored stage's model and calibration; return the number of rows written.

    `source` is what `prepare` takes as votes: a file, a folder of parts, Kaggle's zip, or an address on the hub.
    Memory does not grow with the number of rows, except by the ids (checked for doubles) and, with the swapped order,
    by eight bytes a row. Raises ArenaError that names a row that cannot be scored, and UsageError, before any work,
    where `output` is somebody else's file.
    """
    options = options or ScoreOptions()
    require_replaceable(output, source, experiment)
    spec, report = options.spec(experiment, stage), read_report(experiment, stage)
    calibration = Calibration.from_json(report)
    wanted = calibration.used.swap_tta
    if wanted and options.time_limit is not None:
        calibration.require(1)
    scorer, path = spec.scorer(), votes_at(source, labelled=False)
    require_outside(output, path)
    VoteReader(path, labelled=False)  # a file that is none is told before the model is loaded
    require_scored(experiment, stage, scorer.inputs())
    base, target = _base(experiment, stage), f"input-{output.name}"
    inputs = {"data": f"sha256:{sha256_of_table(path)}", "both_orders": wanted}
    with only_run(base / target):
        with closing(_opened(spec, stage, options, show)) as executor:
            _tell_mismatch(report, executor, stage, show)
            job = open_job(
                base,
                target,
                scorer,
                executor,
                inputs=inputs,
                rows=lambda: scorer.read(path),
                label=f"{stage}: {Path(source).name}",
                show=show,
                fresh=options.fresh,
            )
            pace = _pace([job], options, show)
            job.straight(executor, pace)
            if wanted or (options.time_limit is not None and 2 in calibration.links):
                _tell_partial(job.swapped(executor, pace), job.rows, stage, options, show)
        rows = _write_table(output, job, calibration)
        record_output(output)
        formulas = sum(map(is_formula, job.ids()))
        cut = job.cut_rows()
        job.remove()
    if cut:
        show.note(f"{stage}: {cut:,} of {rows:,} rows ({cut / rows:.1%}) were shortened to the judge's token budget")
    remove_empty(base)  # its own lock lay in there until now
    if formulas:
        show.note(f"warning: {formulas} id(s) begin as a spreadsheet's formula does: do not open {output} in one")
    return rows


def read_report(experiment: Experiment, stage: str, *, remedy: str | None = None) -> dict[str, Any]:
    """Return a stage's report.json; raises ArenaError if the stage was not scored or, with `remedy`, it is damaged."""
    path = experiment.output_folder(stage) / REPORT
    try:
        report = read_json(path)
        if not isinstance(report["calibration"], dict):
            raise TypeError
        return report
    except (OSError, ValueError, KeyError, TypeError):
        raise ArenaError(
            "there is no readable report of this stage",
            where=str(path),
            remedy=remedy or f"python run.py {STEPS[stage].command} -e {experiment.name}"
            if stage in STEPS
            else "check --stage",
        ) from None


def texts(data: Path, split: str) -> pd.DataFrame:
    """Return the frame that the baselines learn from (see scoring.baselines).

    The answers are as they were fitted to the judge prompt, lengths and turns as in the vote.
    """
    import pandas as pd

    lengths = ["chars_prompt", "chars_a", "chars_b", "turns"]
    fitted = pd.DataFrame(
        [
            {
                "id": battle.id,
                "verdict": battle.verdict,
                "text_a": "\n".join(battle.responses_a),
                "text_b": "\n".join(battle.responses_b),
            }
            for battle, _ in read_battles(data, split)
        ],
        columns=["id", "verdict", "text_a", "text_b"],
    )
    with readable(data / "rows.parquet"):
        return fitted.join(read_rows(data, split)[lengths])


def _opened(spec: ScorerSpec, stage: str, options: ScoreOptions, show: Show) -> Executor:
    show.note(f"{stage}: loading the trained model")
    return open_executor(spec, show.note, workers=options.workers, ray=options.ray)


def _score_splits(
    experiment: Experiment, stage: str, scorer: Scorer, executor: Executor, options: ScoreOptions, show: Show
) -> tuple[dict[str, Job], dict[str, Any]]:
    """Score both splits; return their jobs, and what the report says of how they were scored."""
    jobs = {
        split: open_job(
            _base(experiment, stage),
            split,
            scorer,
            executor,
            inputs={"data": _data(experiment, stage)},
            rows=lambda split=split: scorer.exported(split),
            label=f"{stage}: {label}",
            show=show,
            fresh=options.fresh,
        )
        for split, label in _LABELS.items()
    }
    valid, test = jobs.values()
    pace = _pace(jobs.values(), options, show)
    for job in jobs.values():
        job.straight(executor, pace)
    both = {"valid": 0, "test": 0}
    if not scorer.label_ids:
        pass  # rewards have no order
    elif pace.allows(valid.tokens):
        both["valid"] = valid.swapped(executor, pace, whole=True)
        if experiment.swap_tta or options.time_limit is not None:
            both["test"] = test.swapped(executor, pace)
            _tell_partial(both["test"], test.rows, stage, options, show)
    else:
        show.note(f"{stage}: the time limit leaves no room for the other order of the answers: no row was swapped")
    scoring = {"engine": executor.engine, "precision": executor.precision, "device": executor.device}
    limit = {} if options.time_limit is None else {"time_limit_seconds": options.time_limit}
    return jobs, {**scoring, "rows_in_both_orders": both, **limit}


def _pace(jobs, options: ScoreOptions, show: Show) -> Pace:
    pace = Pace(show.note, sum(job.tokens for job in jobs), options.time_limit, started=options.started)
    pace.begin()
    return pace


def _tell_partial(both: int, rows: int, stage: str, options: ScoreOptions, show: Show) -> None:
    """Say how far a time limit went with the other order."""
    if options.time_limit is not None and rows:
        words = f"{both:,} of {rows:,} rows ({both / rows:.0%}) were scored in both orders, the most uncertain first"
        show.note(f"{stage}: within the time limit {words}")


def _tell_mismatch(report: dict[str, Any], executor: Executor, stage: str, show: Show) -> None:
    """Say it where the calibration was fitted on the scores of another engine or precision."""
    fitted, now = report.get("scoring"), (executor.engine, executor.precision)
    if fitted and (fitted["engine"], fitted["precision"]) != now:
        show.note(
            f"{stage}: the calibration was fitted on scores of {fitted['engine']} in {fitted['precision']}, "
            f"these are of {now[0]} in {now[1]}: run.py score --fresh with the same options fits it anew"
        )


def _report(
    experiment: Experiment,
    stage: str,
    valid: pd.DataFrame,
    rows: dict[str, int],
    scoring: dict[str, Any],
    trust: dict[str, Any],
) -> tuple[dict[str, Any], np.ndarray, Calibration]:
    """Build the report; return it with the validation rows' probabilities and the calibration."""
    data = experiment.data_folder
    report, probabilities, calibration = build_report(
        experiment=experiment.name,
        stage=stage,
        scores=valid,
        train_rows=texts(data, "train"),
        valid_texts=texts(data, "valid"),
        truth=truth_of(data),
        audit=audit_for(data, stage),
        loss_curve=loss_curve(experiment.adapter_folder(stage) / "trainer_log.jsonl"),
        provenance=_provenance(experiment, stage, scoring.pop("seconds")),
        swap_tta=experiment.swap_tta and bool(scoring["rows_in_both_orders"]["valid"]),
        seed=experiment.seed,
        target_prior=_target_prior(experiment),
        **trust,
    )
    report["scoring"] = scoring
    both = scoring["rows_in_both_orders"]["test"]
    if 0 < both < rows["test"] or (experiment.swap_tta and both < rows["test"]):
        text = f"{both:,} of {rows['test']:,} test rows were scored in both orders, the others in one: a time limit."
        report["flags"].append({"level": "info", "code": "one_order", "text": text})
    return report, probabilities, calibration


def audit_for(data: Path, stage: str) -> dict[str, Any]:
    """Return the export's audit with the truncation of what this stage is fed, the judge prompt or the pair."""
    audit = read_audit(data)
    if STEPS[stage].data != "dpo_reward":
        return audit
    with readable(data / "audit.json"):
        return {**audit, "truncation": audit["pairs"]["reward"]["truncation"]}


def _write(
    experiment: Experiment,
    stage: str,
    jobs: dict[str, Job],
    scoring: dict[str, Any],
    compared: dict[str, Any] | None,
) -> tuple[dict[str, Any], list[Path]]:
    """Write everything that a person or a program reads, report.json the last; return the report and the files."""
    import pandas as pd

    folder = experiment.output_folder(stage)
    for split, job in jobs.items():
        _write_scores(folder / f"scores_{split}.parquet", job)
    with readable(folder / "scores_valid.parquet", "score the stage again"):
        valid = pd.read_parquet(folder / "scores_valid.parquet")
    rows = {split: job.rows for split, job in jobs.items()}
    trust = _trust(experiment, stage, valid, jobs["test"], scoring, compared)
    report, probabilities, calibration = _report(experiment, stage, valid, rows, scoring, trust)
    names = ["probabilities_valid.csv"]
    write_probabilities(folder / names[0], valid["id"], probabilities)
    (folder / "submission.csv").unlink(missing_ok=True)
    if rows["test"]:
        for name in ("probabilities_test.csv", *(() if stopping(report["checks"]) else ("submission.csv",))):
            _write_table(folder / name, jobs["test"], calibration)
            names.append(name)
    write_page(report, folder / "report.html", shown_battles(experiment.data_folder, "valid", report, stage))
    write_json(folder / REPORT, report)
    names += [f"scores_{split}.parquet" for split in jobs]
    return report, [*(folder / name for name in names), folder / "report.html", folder / REPORT]


def _trust(
    experiment: Experiment,
    stage: str,
    valid: pd.DataFrame,
    test: Job,
    scoring: dict[str, Any],
    compared: dict[str, Any] | None,
) -> dict[str, Any]:
    """Return what the report says of whether it may be trusted: the merge check and the run checks."""
    checks = run_checks(
        StageContext(experiment, stage),
        scores=valid,
        test_ids=list(test.ids()),
        loss_curve=loss_curve(experiment.adapter_folder(stage) / "trainer_log.jsonl"),
        compared=compared,
        precision=scoring["precision"],
    )
    return {"merge_gate": compared and compared["merge_gate"], "checks": [check.to_json() for check in checks]}


def _write_table(path: Path, job: Job, calibration: Calibration) -> int:
    """Write a job's probabilities, piece by piece, and check what was written; return the number of rows."""
    with probability_file(path) as add:
        for table in job.tables():
            add(table["id"], calibration.apply(table))
    return check_submission(path, job.ids())


def _write_scores(path: Path, job: Job) -> None:
    """Write a job's raw scores as parquet, piece by piece, whole or not at all."""
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    schema = job.schema()
    with atomic_file(path, "wb") as file, ParquetWriter(file, schema, compression="zstd") as writer:
        for table in job.tables():
            writer.write_table(pa.Table.from_pandas(table, schema=schema, preserve_index=False))


def _base(experiment: Experiment, stage: str) -> Path:
    """Return where unfinished scores wait."""
    return experiment.output_folder(stage) / "scoring"


def _inputs(experiment: Experiment, stage: str) -> dict[str, Any]:
    """What the probabilities depend on beside the model: the exported rows, and what is made of the scores."""
    return {
        "data": _data(experiment, stage),
        "swap_tta": experiment.swap_tta,
        "seed": experiment.seed,
        "target_prior": _target_prior(experiment),
    }


def _data(experiment: Experiment, stage: str) -> dict[str, str]:
    """The exported files that rows, texts and known probabilities are read from."""
    files = read_manifest(experiment.data_folder)["files"]
    return {name: f"sha256:{digest}" for name, digest in files.items() if name in _exported(stage)}


def _exported(stage: str) -> tuple[str, ...]:
    pairs = ("pairs.parquet",) if STEPS[stage].data == "dpo_reward" else ()
    return ("rows.parquet", "battles.parquet", "truth.csv", *pairs)


def _asked(spec: ScorerSpec) -> dict[str, str]:
    """Engine and precision where they are not what they were before there was a choice: earlier runs stay finished."""
    asked = {"engine": (spec.engine, "torch"), "precision": (spec.precision, "auto")}
    return {name: value for name, (value, usual) in asked.items() if value != usual}


def _target_prior(experiment: Experiment) -> dict[str, float] | None:
    return experiment.target_prior.model_dump() if experiment.target_prior else None


def _provenance(experiment: Experiment, stage: str, seconds: float) -> dict[str, Any]:
    data, step = experiment.data_folder, STEPS[stage]
    files = [
        experiment.folder / "experiment.yaml",
        experiment.recipe(stage),
        experiment.recipe(merge_of(stage)),
        *(data / name for name in ("rows.parquet", "battles.parquet", "truth.csv", "judge_prompt.j2")),
        *(data / f"{step.data}_{split}.jsonl" for split in ("train", "valid")),
        *sorted((data / f"{step.data}_train").glob("*.jsonl")),  # a large set is a folder of parts
        *((data / "pairs.parquet",) if step.data == "dpo_reward" else ()),
        experiment.merged_folder(stage) / MANIFEST,
        *_weights(experiment, stage),
    ]
    return {**provenance(seed=experiment.seed, files=files), "scoring_seconds": round(seconds, 2)}


def _weights(experiment: Experiment, stage: str) -> list[Path]:
    adapter, merged = experiment.adapter_folder(stage), experiment.merged_folder(stage)
    return [*sorted(adapter.glob("*.safetensors")), *sorted(merged.glob("*.safetensors"))]
