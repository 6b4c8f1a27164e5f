"""The writer of an export: fitted battles become the data sets' rows and the two or three tables beside them."""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.battle import VERDICTS, swap_verdict
from data_prep.data_sets import set_names
from data_prep.errors import ArenaError
from data_prep.folds import prompt_group, validation_rows
from data_prep.pairs import (
    VIEWS,
    PairTally,
    View,
    judge_rows,
    pair_record,
    pair_schema,
    reward_rows,
    turn_json,
    wrong_verdicts,
)
from data_prep.spool import Spool

if TYPE_CHECKING:
    from data_prep.budget import Fitted
    from data_prep.pair_budget import FittedPair
    from factory.experiment import Experiment

# Rows that are put into one group of a parquet file: they wait in memory.
_ROW_GROUP = 1024


class Writer:
    """Streams fitted battles to disk; the folds, which need all verdicts, divide the rows at the end."""

    def __init__(self, folder: Path, experiment: Experiment, views: Collection[View]):
        self._folder, self._experiment, self._views = folder, experiment, views
        self._labels = dict(zip(VERDICTS, experiment.labels.in_order(), strict=True))
        self._rows: dict[str, list] = {name: [] for name in _row_schema().names}
        self._tallies = {"train": PairTally(), "test": PairTally()}
        self._spools = {name: Spool(folder, name) for name in set_names(views)}
        self._battles = _ParquetFile(folder / "battles.parquet", _text_schema())
        self._pairs = _ParquetFile(folder / "pairs.parquet", pair_schema()) if "reward" in views else None

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, *_) -> None:
        for file in (*self._spools.values(), self._battles, self._pairs):
            if file is not None:
                file.close()

    def add_labelled(self, fitted: Fitted, pair: FittedPair | None) -> None:
        battle, experiment = fitted.battle, self._experiment
        wrong = wrong_verdicts(battle.id, battle.verdict, rejected=experiment.dpo_rejected, seed=experiment.seed)
        orders = [self._judge_lines(battle.id, fitted.message, battle.verdict, wrong)]
        if experiment.swap_copies:
            # A swapped copy is for training: the validation fold is judged on the battles as they were.
            swapped = (swap_verdict(battle.verdict), tuple(map(swap_verdict, wrong)))
            orders.append(self._judge_lines(battle.id, fitted.message_swapped, *swapped))
        for name in orders[0]:
            self._spools[name].add(orders[0][name], orders[1][name] if orders[1:] else ())
        if pair is not None:
            self._spools["dpo_reward"].add(reward_rows(pair.pair, battle.verdict))
        self._add(fitted, pair, split="train")

    def add_test(self, fitted: Fitted, pair: FittedPair | None) -> None:
        self._add(fitted, pair, split="test")

    def split(self) -> dict[str, int]:
        """Divide the labelled rows into the folds; write the data sets and rows.parquet; return row counts."""
        import pyarrow as pa
        from pyarrow.parquet import write_table

        labelled = [i for i, split in enumerate(self._rows["split"]) if split == "train"]
        groups = [self._rows["group"][i] for i in labelled]
        verdicts = [self._rows["verdict"][i] for i in labelled]
        experiment = self._experiment
        for i, valid in zip(
            labelled,
            validation_rows(groups, verdicts, share=experiment.valid_share, seed=experiment.seed),
            strict=True,
        ):
            if valid:
                self._rows["split"][i] = "valid"
        splits = [self._rows["split"][i] for i in labelled]
        counts = {f"{n}_{s}": rows for n, spool in self._spools.items() for s, rows in spool.divide(splits).items()}
        write_table(pa.table(self._rows, schema=_row_schema()), self._folder / "rows.parquet", compression="zstd")
        _refuse_empty(counts, experiment, ties=verdicts.count("tie"), battles=len(verdicts))
        return {**counts, "test": self._rows["split"].count("test")}

    def pairs_audit(self, counts: dict[str, int]) -> dict[str, Any]:
        """Return what the audit says of the preference sets that were asked for."""
        audit: dict[str, Any] = {}
        for view in (view for view in VIEWS if view in self._views):
            audit[view] = {split: counts[f"dpo_{view}_{split}"] for split in ("train", "valid")}
        if "judge" in audit:
            audit["judge"]["rejected"] = self._experiment.dpo_rejected
        if "reward" in audit:
            audit["reward"] |= self._tallies["train"].preferences()
            audit["reward"]["truncation"] = {n: t.truncation() for n, t in self._tallies.items() if t.battles}
        return audit

    def _judge_lines(self, battle_id: str, message: str, verdict: str, wrong: tuple[str, ...]) -> dict[str, list[str]]:
        human, label = turn_json("human", message), self._labels[verdict]
        answered = f'{{"id": {json.dumps(battle_id)}, "conversations": [{human}, {turn_json("gpt", label)}]}}\n'
        lines = {"sft": [answered]}
        if "judge" in self._views:
            lines["dpo_judge"] = judge_rows(battle_id, human, label, [self._labels[w] for w in wrong])
        return lines

    def _add(self, fitted: Fitted, pair: FittedPair | None, split: str) -> None:
        battle = fitted.battle
        for name, value in {
            "id": battle.id,
            "split": split,
            "verdict": battle.verdict,
            "group": prompt_group(battle),
            "language": battle.language,
            "turns": battle.turns + fitted.dropped,
            "dropped": fitted.dropped,
            "cut": fitted.cut,
            "tokens": fitted.tokens,
            "tokens_full": fitted.tokens_full,
            "chars_prompt": sum(map(len, battle.prompts)),
            "chars_a": sum(map(len, battle.responses_a)),
            "chars_b": sum(map(len, battle.responses_b)),
        }.items():
            self._rows[name].append(value)
        self._battles.add({name: getattr(battle, name) for name in _text_schema().names})
        if pair is not None:
            self._pairs.add(pair_record(pair))
            self._tallies[split].add(pair, turns=battle.turns + fitted.dropped, verdict=battle.verdict)


class _ParquetFile:
    """A parquet file that is written row by row, in groups of rows."""

    def __init__(self, path: Path, schema):
        from pyarrow.parquet import ParquetWriter

        self._schema, self._waiting = schema, []
        self._writer = ParquetWriter(path, schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= _ROW_GROUP:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self._schema))
            self._waiting.clear()


def _refuse_empty(counts: dict[str, int], experiment: Experiment, *, ties: int, battles: int) -> None:
    """Raise ArenaError for a set without a row, on which LLaMA-Factory would stop or validate nothing."""
    empty = [name for name, count in counts.items() if not count]
    if not empty:
        return
    remedy = "give more battles with different prompts, or change valid_share in experiment.yaml"
    if all(name.startswith("dpo_reward") for name in empty):
        remedy = "give battles with a winner and two different responses, or prepare without the reward view"
    raise ArenaError(
        f"no row is left for {', '.join(empty)} ({battles} battles, {ties} of them ties)",
        where=str(experiment.data_folder),
        remedy=remedy,
    )


def _text_schema():
    import pyarrow as pa

    texts = pa.list_(pa.string())
    return pa.schema([("id", pa.string()), ("prompts", texts), ("responses_a", texts), ("responses_b", texts)])


def _row_schema():
    import pyarrow as pa

    strings = ("id", "split", "verdict", "group", "language")
    counts = ("turns", "dropped", "tokens", "tokens_full", "chars_prompt", "chars_a", "chars_b")
    fields = {**dict.fromkeys(strings, pa.string()), **dict.fromkeys(counts, pa.int32()), "cut": pa.bool_()}
    return pa.schema(list(fields.items()))
