"""Preparing an experiment: its votes exported as data sets, its missing recipes rendered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.experiment import Experiment
from common.progress import Show
from common.stages import STEPS
from data_prep.audit import warnings_of
from data_prep.export import ensure_views, export
from data_prep.export_folder import check_overwrite
from data_prep.export_reader import earlier_manifest
from data_prep.readers import VoteReader, require_used
from data_prep.sources import Source, votes_at, with_weight
from data_prep.verdict_shares import Soft
from factory.demo import ensure_embedded_base
from factory.recipe_reach import require_fit_base
from factory.recipes import check_first_values, write_recipe
from factory.stage_context import StageContext
from factory.status import refuse_while_at_work


def prepare(
    experiment: Experiment,
    train: Sequence[Path | str],
    test: Path | str | None,
    truth: Path | None,
    *,
    force: bool = False,
    pairs: bool = False,
    workers: int | None = None,
    columns: Mapping[str, str] | None = None,
    folds_from: Path | None = None,
    soft: Path | None = None,
    soft_share: float = 0.9,
    drop_ids: Path | None = None,
    show: Show,
) -> dict[str, Any]:
    """Export the votes of an experiment and render its missing recipes; return the audit.

    `train` are sources of votes, each with its weight where it is not 1 (FILE:0.5), the target first.
    `columns` are the tables' own names for ours.
    An earlier export is replaced, with the pairs of responses if it had them. `force` replaces recipes edited by hand.
    """
    check_first_values(experiment)
    refuse_while_at_work(experiment)
    if folds_from and experiment.folds == 1:
        where, remedy = str(experiment.folder / "experiment.yaml"), "write folds: 5, or as many as the file has"
        raise UsageError("--folds-from gives folds, and this experiment has one", where=where, remedy=remedy)
    given = [with_weight(each) for each in train]
    check_overwrite(experiment.data_folder, (*(name for name, _ in given), test, truth, folds_from, soft, drop_ids))
    # Further sources may lack verdicts where soft labels stand in.
    known = [number == 0 or soft is None for number in range(len(given))]
    votes = [
        Source(votes_at(name, labelled=labelled, columns=columns), weight)
        for (name, weight), labelled in zip(given, known, strict=True)
    ]
    named = [*(name for name, _ in given), test]  # as they were given: an archive's tables lie elsewhere
    test = votes_at(test, labelled=False, columns=columns) if test else None
    # what is not a table of votes is refused before a base is built
    readers = [VoteReader(v.path, labelled=k, columns=columns) for v, k in zip(votes, known, strict=True)]
    if test is not None:
        readers.append(VoteReader(test, labelled=False, columns=columns))
        readers[0].require_same_texts(readers[-1])
    require_used(columns or {}, *readers)
    for reader, name in zip(readers, named, strict=False):
        inside = f", {reader.path.name}" if reader.path != Path(name) else ""
        show.note(f"{name}{inside}: {reader.read_as}")
    ensure_embedded_base(experiment, show)
    require_fit_base(experiment)
    before = earlier_manifest(experiment.data_folder)
    had_pairs = before is not None and "pairs.parquet" in before["files"]
    views = ("judge", "reward") if pairs or had_pairs else ("judge",)
    with show.line(f"prepare {experiment.name}") as line:
        options = {"views": views, "workers": workers, "columns": columns, "folds": folds_from, "drop": drop_ids}
        options["soft"] = soft and Soft(soft, soft_share)
        audit = export(experiment, votes, test, truth, progress=line.update, **options)
    for text in (_summary(experiment, audit), *warnings_of(audit)):
        show.note(text)
    render_recipes(experiment, force=force, show=show)
    return audit


def ensure_pairs(context: StageContext, show: Show) -> None:
    """Export the pairs of responses, from the same tables, for a stage that is the first to read them."""
    if "pairs.parquet" not in context.manifest["files"]:
        context.require_current_settings()
        with show.line(f"prepare {context.experiment.name}") as line:
            ensure_views(context.experiment, ("reward",), line.update)
        context.forget_export()  # the manifest lists the pairs now


def render_recipes(experiment: Experiment, *, force: bool = False, show: Show) -> dict[str, str]:
    """Render the recipes of an experiment, `force` those edited by hand, too; return what became of each file."""
    check_first_values(experiment)
    outcomes = [write_recipe(experiment, step, force=force) for step in STEPS]
    for outcome in outcomes:
        if outcome.state == "hand-edited" and outcome.diff:
            show.note(f"{outcome.path}: edited by hand, kept; --force would replace it by:\n{outcome.diff}")
        elif outcome.state != "unchanged":
            show.note(f"{outcome.path}: {outcome.state}")
    return {str(outcome.path): outcome.state for outcome in outcomes}


def _summary(experiment: Experiment, audit: dict[str, Any]) -> str:
    rows, where = audit["exported"], f"data/{experiment.name}/audit.json"
    votes = [source for name, source in audit["sources"].items() if name != "test"]
    kept, bad = (sum(source[key] for source in votes) for key in ("rows_kept", "rows_rejected"))
    folds = [rows[f"sft_{part}"] for part in experiment.labelled_parts]
    cut = audit["truncation"]["train"]["rows_cut_share"]
    rejected = f", {bad} rejected ({where})" if bad else ""
    test = audit["sources"].get("test", {"rows_rejected": 0, "lines_by_prior": 0})
    by_prior, lost = test["lines_by_prior"], test["rows_rejected"] - test["lines_by_prior"]
    unread = [f"{by_prior:,} more cannot be read and will get the class prior"] if by_prior else []
    unread += [f"{lost:,} without a readable id will be missing"] if lost else []
    unread = f" ({'; '.join(unread)}: {where})" if unread else ""
    both = " (both orders)" if experiment.swap_copies else ""
    if experiment.folds > 1:
        sizes = " to ".join(f"{size:,}" for size in sorted({min(folds), max(folds)}))
        sets = f"{experiment.folds} folds of {sizes} rows{both}, each judged by a model trained on the others"
    else:
        sets = f"{rows['sft_train']:,} training rows{both}, {rows['sft_valid']:,} for validation (other prompts)"
    return (
        f"prepare {experiment.name}: {kept:,} battles kept{rejected}; {sets}, {rows['test']:,} to submit"
        f"{unread}; {cut:.1%} shortened to {experiment.cutoff_len} tokens"
    )
