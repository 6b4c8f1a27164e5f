"""The audit of an export: what was read, what fitting cost, what no set holds; and what is known of each battle."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from pyarrow import compute
from pyarrow.parquet import ParquetFile

from common.battle import Battle
from common.errors import ArenaError
from data_prep.export_reader import PREFIX
from data_prep.folds import prompt_group
from data_prep.preference_pairs import flatten
from data_prep.prompt import FIELDS
from data_prep.truncation import Fitted

# From this share of shortened battles on, `prepare` says so.
_MUCH_CUT = 0.5
_OF_FITTING = (
    *("rows", "rows_cut", "rows_with_dropped_turns", "turns_dropped", "tokens_before", "tokens_fed", "longest_row"),
)
_REMEDY = (
    "give the battles without verdicts (the competition's test.csv), or leave --test out: a part of the votes is held "
    "out and scored anyway, and `run.py score --input FILE` answers for any other table"
)


def row_statistics(battle: Battle) -> dict[str, Any]:
    """Return id, group, verdict, language, turns and the characters of prompts, A and B of a battle that is whole."""
    return {
        "id": battle.id,
        "group": prompt_group(battle),
        "verdict": battle.verdict,
        "language": battle.language,
        "turns": battle.turns,
        "chars_prompt": sum(map(len, battle.prompts)),
        "chars_a": sum(map(len, battle.responses_a)),
        "chars_b": sum(map(len, battle.responses_b)),
    }


def first_prompts(battles: Iterable[Battle]) -> np.ndarray:
    """Return uint64 [battles], equal for the same first prompt but for white space and the case of ASCII letters.

    The run checks use it to test the folds, which are made of `prompt_group`, by another rule: they ask whether a
    prompt is on both sides. What is equal here is of one group, not the other way round.
    """
    return np.fromiter(map(_digest, battles), dtype=np.uint64)


def _digest(battle: Battle) -> int:
    words = battle.prompts[0].encode(errors="surrogatepass").lower().split()
    return int.from_bytes(blake2b(b" ".join(words), digest_size=8).digest(), "big")


def count_fitted(fitted: Sequence[Fitted]) -> Counter[str]:
    """Return what fitting some battles cost, added up; the counts of several calls are joined by `add_counts`."""
    counts: Counter[str] = Counter(rows=len(fitted), longest_row=max(max(each.lengths) for each in fitted))
    for each in fitted:
        counts["rows_cut"] += each.cut
        counts["rows_with_dropped_turns"] += each.dropped > 0
        counts["turns_dropped"] += each.dropped
        counts["tokens_before"] += each.tokens_full
        counts["tokens_fed"] += each.tokens
        for name, lost in zip(FIELDS, each.lost, strict=True):
            counts[f"lost_{name}"] += lost
            counts[f"cut_{name}"] += lost > 0
    return counts


def count_pairs(battles: Sequence[Battle], fitted: Sequence[Fitted]) -> Counter[str]:
    """Return the counts of `count_fitted`, and which battles make no row of the reward view."""
    counts = count_fitted(fitted)
    for battle, each in zip(battles, fitted, strict=True):
        pair = flatten(each.battle)
        decided, identical = battle.verdict in ("a", "b"), pair.response_a == pair.response_b
        counts["ties_left_out"] += battle.verdict == "tie"
        counts["identical_left_out"] += decided and identical
        counts["pairs"] += decided and not identical
    return counts


def add_counts(total: Counter[str], part: Counter[str]) -> None:
    """Add the counts of one part to a total; `longest_row` is the longer of the two."""
    longest = max(total["longest_row"], part["longest_row"])
    total.update(part)
    total["longest_row"] = longest


def truncation_audit(counts: Counter[str]) -> dict[str, Any]:
    """Return what fitting cost; tokens of a pair are those of its longer sequence."""
    return {
        **{name: counts[name] for name in _OF_FITTING},
        "rows_cut_share": round(counts["rows_cut"] / counts["rows"], 6) if counts["rows"] else 0.0,
        "fields_cut": {name: counts[f"cut_{name}"] for name in FIELDS},
        "tokens_lost_in_kept_turns": {name: counts[f"lost_{name}"] for name in FIELDS},
    }


def preferences_audit(counts: Counter[str]) -> dict[str, Any]:
    """Return which battles with a verdict the reward view holds and which it leaves out."""
    kinds = ("pairs", "ties_left_out", "identical_left_out")
    return {"battles": counts["rows"], **{name: counts[name] for name in kinds}}


def refuse_same_table(train: Sequence[Path], test: Path | None) -> None:
    """Raise ArenaError where one table is given twice."""
    there = [path for path in train if path.exists()]
    if test and test.exists() and any(path.samefile(test) for path in there):
        raise ArenaError("is the train table, given as the test set", where=str(test), remedy=_REMEDY)
    if twice := [path for first, path in combinations(there, 2) if first.samefile(path)]:
        remedy = f"give it once; for a larger weight: --train {twice[0]}:2"
        raise ArenaError("is given twice as --train", where=str(twice[0]), remedy=remedy)


def check_overlap(rows: Path, test: Path, *, has_verdicts: bool) -> int:
    """Return how many test rows of a rows.parquet are training rows: same id, same prompt.

    Raises ArenaError where all of them are and the test table has verdicts: it is a copy of the votes.
    """
    columns = ["id", "group", "source"]
    # Without threads: where memory is short Arrow cannot start them, and waits for them all the same.
    with ParquetFile(rows, pre_buffer=False) as file:
        held_out = (
            b.filter(compute.equal(b["source"], "test")) for b in file.iter_batches(columns=columns, use_threads=False)
        )
        tests = pa.chunked_array(map(_keys, held_out), pa.string())
        batches = map(_keys, file.iter_batches(columns=columns, use_threads=False))
        found = sum(compute.sum(compute.is_in(keys, value_set=tests)).as_py() or 0 for keys in batches)
    found -= len(tests)  # which are rows of this file, too
    if found and found == len(tests) and has_verdicts:
        raise ArenaError(f"all of its {found:,} rows are training rows", where=str(test), remedy=_REMEDY)
    return found


def _keys(rows: pa.Table | pa.RecordBatch) -> Any:
    ids = compute.replace_substring_regex(rows.column("id"), PREFIX, "")  # as their table has them
    return compute.binary_join_element_wise(rows.column("group"), ids, " ")


def warnings_of(audit: Mapping[str, Any]) -> list[str]:
    """Return what a person should know of an export that went well, one line each."""
    lines = [
        f"warning: {source['ids_like_formulas']} id(s) of {source['file']} begin as a spreadsheet's formula does; they "
        "are written as they are: do not open the CSV files of results in a spreadsheet"
        for source in audit["sources"].values()
        if source.get("ids_like_formulas")
    ]
    for name, source in audit["sources"].items():
        lines += _doubts_of(source) if name != "test" else []
    lines += [_source_line(name, source) for name, source in audit["sources"].items() if name.startswith("train_")]
    if taught := audit.get("soft_labels"):
        kept = sum(source["rows_kept"] for name, source in audit["sources"].items() if name != "test")
        lines.append(f"note: {taught:,} of {kept:,} battles have a soft label")
    if dropped := audit.get("dropped"):
        lines.append(f"note: {dropped:,} battles are judged and not trained on (--drop-ids)")
    if several := audit.get("prompts_in_several_folds"):
        lines.append(
            f"warning: {several:,} prompts are in several of the given folds: they are judged by models that trained "
            "on the same prompt"
        )
    if seen := audit.get("test_rows_in_train"):
        lines.append(
            f"warning: {seen:,} of {audit['exported']['test']:,} rows of {audit['sources']['test']['file']} are "
            "training rows (same id, same prompt): the judge learns their verdicts, so their probabilities test nothing"
        )
    cut = audit["truncation"]["train"]["rows_cut_share"]
    if cut > _MUCH_CUT:
        lines.append(
            f"note: {cut:.1%} of the battles do not fit into cutoff_len {audit['cutoff_len']}, so that the judge sees "
            f"parts of them only; a larger cutoff_len in factory_configs/{audit['experiment']}/experiment.yaml keeps "
            "more, at more memory and time (then prepare again)"
        )
    return lines


def _doubts_of(source: Mapping[str, Any]) -> list[str]:
    """Return what is strange about the verdicts of a table of votes."""
    lines, file = [], source["file"]
    given = [verdict for verdict, count in source["verdict_counts"].items() if count]
    if len(given) == 1:
        lines.append(
            f"WARNING: all {source['rows_kept']:,} verdicts of {file} are {given[0]!r}: no figure on them means "
            "anything. Was the winner always put on one side? Exchange A and B, with the verdict, in half of the rows"
        )
    if drawn := source["verdicts_of_shares"]:
        lines.append(f"note: {drawn:,} battles of {file} have shares of votes, which draw their verdict, by the id")
    if seen := source["not_anonymous"]:
        lines.append(
            f"warning: in {seen:,} battles of {file} the voter knew the models (anony is false): votes on names, not "
            "on answers; leave them out for a judge of texts"
        )
    return lines


def _source_line(name: str, source: Mapping[str, Any]) -> str:
    """Return what became of the rows of a source that is not the target; a warning where none is left."""
    left = source["left_out"]
    gone = [f"{left['prompt_validates']:,} left out because their prompt validates"] if left["prompt_validates"] else []
    gone += [f"{left['weight']:,} not drawn by its weight {source['weight']:g}"] if left["weight"] else []
    words = "; ".join([f"{source['rows_trained']:,} of {source['rows_kept']:,} battles are trained on", *gone])
    return f"{'' if source['rows_trained'] else 'warning: '}{source['file']}: {words}; its ids begin with {name}:"
