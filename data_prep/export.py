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

The preference rows are written for the views that are asked for; pairs.parquet belongs to the reward view. A set of
more than 500,000 rows is a folder of parts (sft_train/part-00000.jsonl, …) instead of one file. Nothing here holds the
rows: memory grows by some ten bytes a battle, so that millions of votes are a matter of time and disk.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.battle import Battle
from common.errors import ArenaError
from common.files import atomic_file, atomic_folder, only_run, sha256_of, sha256_of_table, write_json
from data_prep.audit import check_overlap, noting, refuse_same_table
from data_prep.chat_template import load_frame
from data_prep.dataset_info import dataset_entries, entries_of_others, listed_sets
from data_prep.export_reader import FORMAT, read_manifest
from data_prep.export_rows import BatchMaker, open_crew, usual_workers
from data_prep.export_writer import Writer
from data_prep.ground_truth import check_truth, require_truth_of
from data_prep.overwrite_check import refuse_loss, refuse_strangers
from data_prep.preference_pairs import VIEWS, View
from data_prep.prompt import JudgePrompt
from data_prep.readers import VoteReader
from data_prep.truncation import in_chunks

if TYPE_CHECKING:
    import numpy as np

    from common.experiment import Experiment

DATA = Path("data")
# Battles per tokenizer call: enough to keep every core busy, little enough to keep memory flat.
_CHUNK = 512
# The share of shortened battles from which on a person is told.
_MUCH_CUT = 0.5
# The files that name all sets: a set more changes them.
_LISTS = ("dataset_info.json", "audit.json")


# What `prepare` is doing and, where it is known, the share that is done (common.progress.Line.update).
Progress = Callable[[str, float | None], None]


def export(
    experiment: Experiment,
    train: Path,
    test: Path | None = None,
    truth: Path | None = None,
    progress: Progress = lambda text, share: None,
    views: Collection[View] = ("judge",),
    unchanged: Mapping[str, str] | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Read, fold, fit and write one experiment's data folder, whole or not at all; return the audit.

    `truth` is a table of known probabilities of all votes (synthetic arena only), copied beside the data.
    `views` are the preference sets to write beside those of SFT; "reward" tokenizes every text once more, and
    may follow later with `ensure_views`. `unchanged` are SHA-256 sums of files that must come out as they were.
    `workers` is the number of processes that fit (0: a thread; None: what suits the machine); the files do not
    depend on it. Raises ArenaError; an earlier export then stays as it was.
    """
    refuse_loss(experiment.data_folder, [train, test, None if unchanged else truth])  # a view takes the copy in there
    for folder in (DATA, experiment.data_folder):
        listed_sets(folder / "dataset_info.json")  # a slip in it is told now, not after the work
    if truth:
        check_truth(truth)
    if test and test.exists() and train.exists():
        refuse_same_table(train, test)
    reader = VoteReader(train, labelled=True)
    test_reader = VoteReader(test, labelled=False) if test else None
    frame, tokenizer = load_frame(experiment)
    prompt = JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)
    maker = BatchMaker(experiment, frame, tokenizer, views, prompt.source)
    with only_run(experiment.data_folder), atomic_folder(experiment.data_folder) as folder:
        with (
            Writer(folder, experiment, views) as writer,
            open_crew(maker, usual_workers() if workers is None else workers) as crew,
        ):
            for phase, votes in (("train", reader), ("test", test_reader)):
                chunks = _counted(votes, f"{phase} battles", progress) if votes else ()
                noted: list[np.ndarray] = []  # of the chunks under way
                for batch in crew.batches(noting(chunks, noted), labelled=phase == "train"):
                    writer.add(batch, noted.pop(0))
        progress("dividing into folds", None)
        counts = writer.split()
        audit = _audit(experiment, reader, test_reader, writer.tallies, counts)
        audit["pairs"] = writer.pairs_audit(counts)
        if test_reader:
            rows = folder / "rows.parquet"
            audit["test_rows_in_train"] = check_overlap(rows, test_reader.path, has_verdicts=test_reader.has_verdicts)
        if truth:
            require_truth_of(folder / "rows.parquet", truth)
        files = _describe(folder, experiment, prompt, frame, audit, truth)
        _refuse_changed(experiment, files, unchanged or {})
        refuse_strangers(experiment.data_folder)  # what came while we worked, or with a folder that was put back
    _publish(experiment, audit)
    return audit


def _counted(reader: VoteReader, phase: str, progress: Progress) -> Iterator[list[Battle]]:
    """Yield the battles in chunks and tell how many there were."""
    seen = 0
    for chunk in in_chunks((battle for _, battle in reader), _CHUNK):
        share = reader.share
        yield chunk
        seen += len(chunk)
        progress(f"{seen:,} {phase}", share)


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
    remedy = f"python run.py prepare -e {experiment.name} --train FILE --pairs"
    tables = {}
    for name, source in manifest["sources"].items():
        tables[name] = Path(source["file"])
        if not tables[name].exists() or sha256_of_table(tables[name]) != source["sha256"]:
            raise ArenaError(
                f"is not the table that {folder} was exported from, so its {' and '.join(missing)} view cannot follow",
                where=source["file"],
                remedy=remedy,
            )
    truth = folder / "truth.csv"
    export(
        experiment,
        tables["train"],
        tables.get("test"),
        truth if truth.exists() else None,
        progress,
        views=[view for view in VIEWS if view in missing or view in manifest["views"]],
        unchanged={name: digest for name, digest in manifest["files"].items() if name not in _LISTS},
    )
    return True


def _audit(experiment: Experiment, reader, test_reader, tallies, counts) -> dict[str, Any]:
    sources = {"train": reader} | ({"test": test_reader} if test_reader else {})
    return {
        "experiment": experiment.name,
        "cutoff_len": experiment.cutoff_len,
        "sources": {
            name: {
                "file": str(r.path),
                "schema": r.schema,
                "rows_read": r.rows_read,
                "rows_kept": tallies[name].rows,
                "rows_rejected": len(r.rejected),
                "ids_like_formulas": r.formulas,
            }
            for name, r in sources.items()
        },
        "rejected": [asdict(row) for r in sources.values() for row in r.rejected],
        "exported": counts,
        "swap_copies": experiment.swap_copies,
        "truncation": {name: tally.summary() for name, tally in tallies.items() if tally.rows},
    }


def _describe(
    folder: Path, experiment: Experiment, prompt: JudgePrompt, frame, audit, truth: Path | None
) -> dict[str, str]:
    """Write the small files, the manifest with everybody's hash last; return the hashes."""
    earlier = listed_sets(experiment.data_folder / "dataset_info.json")
    theirs = entries_of_others(earlier, experiment, experiment.data_folder)  # recipes read their sets from this list
    own = dataset_entries(experiment, audit["pairs"], folders=_folders(folder))
    write_json(folder / "dataset_info.json", {**theirs, **own})
    write_json(folder / "audit.json", audit)
    with atomic_file(folder / "judge_prompt.j2") as file:
        file.write(prompt.source)
    if truth:
        shutil.copyfile(truth, folder / "truth.csv")
    whole = (path for path in folder.rglob("*") if path.is_file())
    files = {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(whole)}
    write_json(
        folder / "manifest.json",
        {
            "format": FORMAT,
            "experiment": experiment.model_dump(mode="json", exclude={"recipes", "description", "distributed"}),
            "views": list(audit["pairs"]),
            "sources": {
                name: {"file": source["file"], "sha256": sha256_of_table(Path(source["file"]))}
                for name, source in audit["sources"].items()
            },
            "frame": asdict(frame),
            "files": files,
        },
    )
    return files


def _folders(folder: Path) -> set[str]:
    """Return the data sets that are folders of parts."""
    return {path.name for path in folder.iterdir() if path.is_dir()}


def _refuse_changed(experiment: Experiment, files: Mapping[str, str], unchanged: Mapping[str, str]) -> None:
    changed = [name for name, digest in unchanged.items() if files.get(name) != digest]
    if changed:
        raise ArenaError(
            f"{', '.join(changed)} would come out otherwise than before: experiment.yaml, the judge prompt or the "
            "tokenizer has changed since the export",
            where=str(experiment.data_folder),
            remedy=f"python run.py prepare -e {experiment.name} --train FILE, and train again",
        )


def _publish(experiment: Experiment, audit: dict[str, Any]) -> None:
    """List the sets in data/dataset_info.json too, where LLaMA Board looks, and leave the newest audit there."""
    path = DATA / "dataset_info.json"
    with only_run(path, wait=lambda _: None):  # an export of another experiment has it for a moment
        others = entries_of_others(listed_sets(path), experiment, DATA)
        own = dataset_entries(
            experiment, audit["pairs"], within=f"{experiment.name}/", folders=_folders(experiment.data_folder)
        )
        write_json(path, {**others, **own})
        write_json(DATA / "audit.json", audit)


def warnings_of(audit: Mapping[str, Any]) -> list[str]:
    """Return what a person should know of an export that went well, one line each."""
    told = [
        f"warning: {source['ids_like_formulas']} id(s) of {source['file']} begin as a spreadsheet's formula does; they "
        "are written as they are: do not open the CSV files of results in a spreadsheet"
        for source in audit["sources"].values()
        if source.get("ids_like_formulas")
    ]
    if seen := audit.get("test_rows_in_train"):
        told.append(
            f"warning: {seen:,} of {audit['exported']['test']:,} rows of {audit['sources']['test']['file']} are "
            "training rows (same id, same prompt): the judge learns their verdicts, so their probabilities test nothing"
        )
    cut = audit["truncation"]["train"]["rows_cut_share"]
    if cut > _MUCH_CUT:
        told.append(
            f"note: {cut:.1%} of the battles do not fit into cutoff_len {audit['cutoff_len']}, so that the judge sees "
            f"parts of them only; a larger cutoff_len in factory_configs/{audit['experiment']}/experiment.yaml keeps "
            "more, at more memory and time (then prepare again)"
        )
    return told
