"""The export: votes from a table to data/<experiment>/, the folder that LLaMA-Factory and scoring read.

sft_{train,valid}.jsonl          sharegpt rows: the judge prompt and the true verdict's label
dpo_judge_{train,valid}.jsonl    preference rows on the same prompts: the true verdict's label and a wrong one
dpo_reward_{train,valid}.jsonl   preference rows on the users' prompts: the winning response and the losing one
battles.parquet                  the texts fitted to the judge prompt, one row a battle
pairs.parquet                    prompt and two responses fitted as a pair, one row a battle, ties included
rows.parquet                     what is known of each battle: split, verdict, group, tokens, cuts
dataset_info.json                LLaMA-Factory's list of data sets
audit.json                       rows read, kept, rejected; tokens lost; pairs left out
manifest.json                    what all this was made from

With `folds` in experiment.yaml there is a set a fold, sft_fold0.jsonl, …, in place of train and valid: each is trained
on by all other folds, so that a text lies on disk once.

The preference rows are written for the views that are asked for; pairs.parquet belongs to the reward view. The votes
are read once: battles are fitted as they come and written to the parquet tables; then the verdicts of all are known,
the folds are made, and the data sets are written from the tables. Memory grows by some ten bytes a battle.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.battle import Battle
from common.errors import ArenaError
from common.experiment import Experiment
from common.files import atomic_file, atomic_folder, only_run, sha256_of, sha256_of_table, write_json
from data_prep.audit import check_overlap, preferences_audit, refuse_same_table, truncation_audit
from data_prep.chat_template import ChatFrame, load_frame
from data_prep.export_folder import check_overwrite, dataset_entries, entries_of_others, listed_sets
from data_prep.export_reader import FORMAT, read_manifest
from data_prep.export_rows import RowMaker, open_pool
from data_prep.export_writer import CHUNK, Written, write_sets, write_tables
from data_prep.folds import read_folds, read_ids
from data_prep.preference_pairs import VIEWS, View
from data_prep.prompt import JudgePrompt
from data_prep.readers import VoteReader
from data_prep.sources import Source
from data_prep.truncation import in_chunks
from data_prep.verdict_shares import Soft, Teacher, read_truth_ids, require_truth_of

DATA = Path("data")
# The files that name all sets: one more set changes them.
_LISTS = ("dataset_info.json", "audit.json")


# What `prepare` is doing and, where it is known, the share that is done (common.progress.Line.update).
Progress = Callable[[str, float | None], None]


def export(
    experiment: Experiment,
    train: Path | Sequence[Source],
    test: Path | None = None,
    truth: Path | None = None,
    progress: Progress = lambda text, share: None,
    views: Collection[View] = ("judge",),
    unchanged: Mapping[str, str] | None = None,
    workers: int | None = None,
    columns: Mapping[str, str] | None = None,
    folds: Path | None = None,
    soft: Soft | None = None,
    drop: Path | None = None,
) -> dict[str, Any]:
    """Read, fold, fit and write one experiment's data folder, whole or not at all; return the audit.

    The first source of `train` is the target, from which alone battles validate; ids of the others get the source's
    name in front (train_2:…).
    `truth` is a table of known probabilities of all votes (synthetic arena only), copied beside the data.
    `views` are the preference sets to write beside those of SFT; "reward" may follow later with `ensure_views`.
    `unchanged` are SHA-256 sums of files that must come out as they were. `workers` is the number of processes that
    fit (0: a thread; None: what suits the machine). `columns` are the tables' own names for ours. `folds` is a table of
    each battle's fold. With `soft` labels the further sources may lack verdicts. The ids of the table `drop` are judged
    and not trained on. Raises ArenaError; an earlier export then stays as it was.
    """
    folder = experiment.data_folder
    votes = [Source(train)] if isinstance(train, Path) else train
    votes = {f"train_{number}" if number > 1 else "train": each for number, each in enumerate(votes, 1)}
    paths = [each.path for each in votes.values()]
    check_overwrite(folder, [*paths, test, None if unchanged else truth])  # a later view takes the copy in the folder
    for each in (DATA, folder):
        listed_sets(each / "dataset_info.json")  # a fault in it is reported now, not after the work
    truth_ids = read_truth_ids(truth) if truth else ()
    given = read_folds(folds, experiment.folds) if folds else None
    dropped = read_ids(drop) if drop else frozenset()
    refuse_same_table(paths, test)
    teacher = Teacher(soft) if soft else None
    tables = {name: (each.path, not soft or name == "train") for name, each in votes.items()}
    tables |= {"test": (test, False)} if test else {}
    readers = {name: VoteReader(path, labelled=known, columns=columns) for name, (path, known) in tables.items()}
    frame, tokenizer = load_frame(experiment)
    prompt = JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)
    pool = open_pool(RowMaker(experiment, frame, tokenizer, views, prompt.source), workers)
    with only_run(folder), atomic_folder(folder) as fresh, pool as work:
        weights = {name: each.weight for name, each in votes.items()}
        fitted = work("fit", _chunks(readers, teacher, progress))
        written = write_tables(fresh, fitted, experiment, weights, given, readers.get("test"), dropped)
        _require_dropped(written, len(dropped), drop)
        counts = write_sets(fresh, experiment, views, work)
        audit = _audit(experiment, readers, weights, written, counts, views)
        audit |= {"soft_labels": teacher.softened if teacher else 0, "dropped": len(dropped)}
        rows = fresh / "rows.parquet"
        if reader := readers.get("test"):
            audit["test_rows_in_train"] = check_overlap(rows, reader.path, has_verdicts=reader.has_verdicts)
        if truth:
            require_truth_of(rows, truth_ids, truth)
        beside = {"folds": (folds, 1.0), "soft": (soft.path, soft.share) if soft else (None, 1.0), "drop": (drop, 1.0)}
        _describe(fresh, experiment, prompt, frame, audit, truth, unchanged or {}, beside)
        check_overwrite(folder)  # again, for files that came meanwhile, or with a folder that was put back
    _publish(experiment, audit)
    return audit


def _require_dropped(written: Written, ids: int, where: Path | None) -> None:
    if missing := ids - sum(counts["dropped"] for counts in written.counts.values()):
        what, remedy = f"{missing:,} of its {ids:,} ids are no training rows", "give ids of training rows"
        raise ArenaError(what, where=str(where), remedy=f"{remedy}; with folds all are")


def _chunks(
    readers: Mapping[str, VoteReader], teacher: Teacher | None, progress: Progress
) -> Iterator[tuple[list[Battle], str]]:
    """Yield the battles in chunks, each with its source's name, and report how many there were."""
    for name, reader in readers.items():
        seen = 0
        ahead = "" if name in ("train", "test") else f"{name}:"  # else the ids of two sources could be the same
        rows = ((row, replace(battle, id=ahead + battle.id) if ahead else battle) for row, battle in reader)
        battles = teacher.soften(reader, rows) if teacher and name != "test" else (battle for _, battle in rows)
        for chunk in in_chunks(battles, CHUNK):
            share = reader.share
            yield chunk, name
            seen += len(chunk)
            progress(f"{seen:,} {name} battles", share)
    if teacher:
        teacher.require_used()
    progress("dividing into folds (parts that share no prompt)", None)


def ensure_views(
    experiment: Experiment, views: Collection[View], progress: Progress = lambda text, share: None
) -> bool:
    """Add preference sets that an export left out, from the same tables; return whether any was missing.

    The other files come out byte for byte as they were, so that what was trained on them stays valid. Raises
    ArenaError, and changes nothing, where tables, experiment.yaml, judge prompt or tokenizer are not those of before.
    """
    folder = experiment.data_folder
    manifest = read_manifest(folder)
    missing = [view for view in VIEWS if view in views and view not in manifest["views"]]
    if not missing:
        return False
    sources = manifest["sources"]
    tables = {name: Path(source["file"]) for name, source in sources.items()}
    for name, path in tables.items():
        if not path.exists() or sha256_of_table(path) != sources[name]["sha256"]:
            raise ArenaError(
                f"is not the table that {folder} was exported from, so its {' and '.join(missing)} view cannot follow",
                where=str(path),
                remedy=f"python run.py prepare -e {experiment.name} --train FILE --pairs",
            )
    truth = folder / "truth.csv"
    export(
        experiment,
        [Source(path, sources[name]["weight"]) for name, path in tables.items() if name.startswith("train")],
        tables.get("test"),
        truth if truth.exists() else None,
        progress,
        views=[view for view in VIEWS if view in missing or view in manifest["views"]],
        unchanged={name: digest for name, digest in manifest["files"].items() if name not in _LISTS},
        columns={ours: theirs for source in sources.values() for ours, theirs in source.get("columns", {}).items()},
        folds=tables.get("folds"),
        soft=Soft(tables["soft"], sources["soft"]["weight"]) if "soft" in tables else None,
        drop=tables.get("drop"),
    )
    return True


def _audit(
    experiment: Experiment,
    readers: Mapping[str, VoteReader],
    weights: Mapping[str, float],
    written: Written,
    counts: Mapping[str, int],
    views: Collection[View],
) -> dict[str, Any]:
    pairs: dict[str, Any] = {
        view: {part: counts[f"dpo_{view}_{part}"] for part in experiment.labelled_parts}
        for view in VIEWS
        if view in views
    }
    if "judge" in pairs:
        pairs["judge"]["rejected"] = experiment.dpo_rejected
    if "reward" in pairs:
        pairs["reward"] |= preferences_audit(sum((written.counts[name, "pairs"] for name in weights), Counter()))
        pairs["reward"]["truncation"] = {name: truncation_audit(written.counts[name, "pairs"]) for name in readers}
    return {
        "experiment": experiment.name,
        "cutoff_len": experiment.cutoff_len,
        "sources": {
            name: {
                "file": str(reader.path),
                **reader.facts,
                "rows_read": reader.rows_read,
                "rows_kept": written.counts[name, "battles"]["rows"],
                "rows_rejected": len(reader.rejected),
                "ids_like_formulas": reader.formulas,
                **(
                    _fates(weights[name], written.counts[name, "splits"])
                    if name in weights
                    else {"lines_by_prior": sum(row.id is not None for row in reader.rejected)}
                ),
            }
            for name, reader in readers.items()
        },
        "rejected": [asdict(row) for reader in readers.values() for row in reader.rejected],
        "exported": {**counts, "test": written.counts["test", "battles"]["rows"]},
        "swap_copies": experiment.swap_copies,
        "prompts_in_several_folds": written.prompts_in_several_folds,
        "truncation": {name: truncation_audit(written.counts[name, "battles"]) for name in readers},
        "pairs": pairs,
    }


def _fates(weight: float, splits: Mapping[str, int]) -> dict[str, Any]:
    """Return what became of the kept rows of a source with verdicts."""
    return {
        "weight": weight,
        "rows_trained": splits["train"],
        "rows_validating": splits["valid"],
        "left_out": {"prompt_validates": splits["prompt validates"], "weight": splits["not drawn"]},
    }


def _describe(
    folder: Path,
    experiment: Experiment,
    prompt: JudgePrompt,
    frame: ChatFrame,
    audit: Mapping[str, Any],
    truth: Path | None,
    unchanged: Mapping[str, str],
    beside: Mapping[str, tuple[Path | None, float]],
) -> None:
    """Write the small files and last the manifest with the hash of each file; `beside` are tables but those of votes.

    Raises ArenaError where a file of `unchanged` has another hash.
    """
    write_json(folder / "dataset_info.json", _with_own_entries(experiment, audit, experiment.data_folder))
    write_json(folder / "audit.json", audit)
    with atomic_file(folder / "judge_prompt.j2") as file:
        file.write(prompt.source)
    if truth:
        shutil.copyfile(truth, folder / "truth.csv")
    files = {p.relative_to(folder).as_posix(): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}
    if changed := [name for name, digest in unchanged.items() if files.get(name) != digest]:
        raise ArenaError(
            f"{', '.join(changed)} would come out otherwise than before: experiment.yaml, the judge prompt or the "
            "tokenizer has changed since the export",
            where=str(experiment.data_folder),
            remedy=f"python run.py prepare -e {experiment.name} --train FILE, and train again",
        )
    votes = {name: (its["file"], its.get("weight", 1.0), its["columns"]) for name, its in audit["sources"].items()}
    tables = votes | {name: (path, weight, {}) for name, (path, weight) in beside.items() if path}
    manifest = {
        "format": FORMAT,
        "experiment": experiment.model_dump(mode="json", exclude={"recipes", "description", "distributed"}),
        "views": list(audit["pairs"]),
        "sources": {
            name: {"file": str(path), "sha256": sha256_of_table(Path(path)), "weight": weight, "columns": columns}
            for name, (path, weight, columns) in tables.items()
        },
        "frame": asdict(frame),
        "files": files,
    }
    write_json(folder / "manifest.json", manifest)


def _publish(experiment: Experiment, audit: Mapping[str, Any]) -> None:
    """List the sets in data/dataset_info.json too, where LLaMA Board looks."""
    path = DATA / "dataset_info.json"
    with only_run(path, wait=lambda _: None):  # an export of another experiment has it for a moment
        write_json(path, _with_own_entries(experiment, audit, DATA, f"{experiment.name}/"))


def _with_own_entries(
    experiment: Experiment, audit: Mapping[str, Any], listed: Path, within: str = ""
) -> dict[str, Any]:
    """Return the list of data sets in the folder `listed`, with the experiment's own entries."""
    others = entries_of_others(listed_sets(listed / "dataset_info.json"), experiment)
    return {**others, **dataset_entries(experiment, audit["pairs"], within)}
