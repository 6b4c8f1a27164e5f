"""A batch: some hundred battles fitted to the budget and turned into the bytes and columns that are written.

Everything that takes time for each battle happens here, in a thread or in a process of its own (data_prep.pool);
what comes back is quickly appended to files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.battle import VERDICTS, Battle, swap_verdict
from data_prep.audit import Tally
from data_prep.dataset_info import set_names
from data_prep.folds import group_number
from data_prep.pair_budget import FittedPair, PairFitter
from data_prep.preference_pairs import PairTally, View, judge_rows, pair_table, reward_rows, turn_json, wrong_verdicts
from data_prep.prompt import JudgePrompt
from data_prep.row_statistics import battle_facts
from data_prep.spool import record
from data_prep.truncation import Fitted, Fitter

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

    from common.experiment import Experiment
    from data_prep.chat_template import ChatFrame


@dataclass
class Batch:
    """What some battles became. `lines` are spool records by data set; `groups` and `kinds` (the verdicts' places in
    VERDICTS) are there for labelled battles only."""

    battles: int
    labelled: bool
    rows: pa.RecordBatch
    texts: pa.RecordBatch
    pairs: pa.RecordBatch | None
    lines: dict[str, bytes]
    groups: list[int]
    kinds: list[int]
    tally: Tally
    pair_tally: PairTally


class BatchMaker:
    """Turns battles into batches by one experiment; may be pickled to another process."""

    def __init__(
        self, experiment: Experiment, frame: ChatFrame, tokenizer: Tokenizer, views: Collection[View], source: str
    ):
        """`source` is the judge prompt's template. Raises ArenaError if `cutoff_len` holds no prompt."""
        self._experiment, self._frame, self._tokenizer, self._source = experiment, frame, tokenizer, source
        self._views = tuple(views)
        self._labels = dict(zip(VERDICTS, experiment.labels.in_order(), strict=True))
        self.prompt = JudgePrompt(source, experiment.labels, where=str(Path(experiment.prompt_template)))
        budget = {"cutoff_len": experiment.cutoff_len, "shares": experiment.budget_shares}
        self._fitter = Fitter(frame, tokenizer, self.prompt, **budget)
        self._pair_fitter = PairFitter(frame, tokenizer, **budget) if "reward" in views else None
        self._row_schema, self._text_schema = row_schema(), text_schema()

    def __reduce__(self):
        return BatchMaker, (self._experiment, self._frame, self._tokenizer, self._views, self._source)

    def make(self, battles: list[Battle], labelled: bool) -> Batch:
        """Fit the battles and return what is to be written; raises ArenaError if one cannot be fitted."""
        pairs = self._pair_fitter.fit(battles) if self._pair_fitter else [None] * len(battles)
        fitted = self._fitter.fit(battles, both_orders=labelled and self._experiment.swap_copies)
        facts = [battle_facts(battle) for battle in battles]
        batch = Batch(
            battles=len(battles),
            labelled=labelled,
            rows=self._rows(fitted, facts, "train" if labelled else "test"),
            texts=self._texts(fitted),
            pairs=pair_table(pairs) if self._pair_fitter else None,
            lines=self._lines(fitted, pairs) if labelled else {},
            groups=[group_number(each["group"]) for each in facts] if labelled else [],
            kinds=[VERDICTS.index(battle.verdict) for battle in battles] if labelled else [],
            tally=Tally(),
            pair_tally=PairTally(),
        )
        for battle, each, pair in zip(battles, fitted, pairs, strict=True):
            batch.tally.add(each)
            if pair is not None:
                batch.pair_tally.add(pair, turns=battle.turns, verdict=battle.verdict)
        return batch

    def _lines(self, fitted: Sequence[Fitted], pairs: Sequence[FittedPair | None]) -> dict[str, bytes]:
        records: dict[str, list[bytes]] = {name: [] for name in set_names(self._views)}
        for each, pair in zip(fitted, pairs, strict=True):
            for name, lines in self._judge_lines(each).items():
                records[name].append(record(*lines))
            if pair is not None:
                records["dpo_reward"].append(record(reward_rows(pair.pair, each.battle.verdict)))
        return {name: b"".join(each) for name, each in records.items()}

    def _judge_lines(self, fitted: Fitted) -> dict[str, tuple[list[str], ...]]:
        """Return the lines of the sets that show the judge prompt, those of the swapped copy behind them."""
        battle, experiment = fitted.battle, self._experiment
        wrong = wrong_verdicts(battle.id, battle.verdict, rejected=experiment.dpo_rejected, seed=experiment.seed)
        orders = [self._order_lines(battle.id, fitted.message, battle.verdict, wrong)]
        if experiment.swap_copies:
            # A swapped copy is for training: the validation fold is judged on the battles as they were.
            swapped = (swap_verdict(battle.verdict), tuple(map(swap_verdict, wrong)))
            orders.append(self._order_lines(battle.id, fitted.message_swapped, *swapped))
        return {name: tuple(order[name] for order in orders) for name in orders[0]}

    def _order_lines(self, battle_id: str, message: str, verdict: str, wrong: tuple[str, ...]) -> dict[str, list[str]]:
        human, label = turn_json("human", message), self._labels[verdict]
        answered = f'{{"id": {json.dumps(battle_id)}, "conversations": [{human}, {turn_json("gpt", label)}]}}\n'
        lines = {"sft": [answered]}
        if "judge" in self._views:
            lines["dpo_judge"] = judge_rows(battle_id, human, label, [self._labels[w] for w in wrong])
        return lines

    def _rows(self, fitted: Sequence[Fitted], facts: Sequence[dict[str, Any]], split: str) -> pa.RecordBatch:
        """Return what is known of each battle: the facts of the vote itself, and what fitting it cost."""
        columns: dict[str, list[Any]] = {
            **{name: [each[name] for each in facts] for name in facts[0]},
            "split": [split] * len(facts),
            "dropped": [each.dropped for each in fitted],
            "tokens": [each.tokens for each in fitted],
            "tokens_full": [each.tokens_full for each in fitted],
            "cut": [each.cut for each in fitted],
        }
        return _record_batch(columns, self._row_schema)

    def _texts(self, fitted: Sequence[Fitted]) -> pa.RecordBatch:
        names = self._text_schema.names
        return _record_batch({name: [getattr(f.battle, name) for f in fitted] for name in names}, self._text_schema)


def _record_batch(columns: dict[str, list[Any]], schema: pa.Schema) -> pa.RecordBatch:
    import pyarrow as pa

    return pa.RecordBatch.from_pydict(columns, schema=schema)


def text_schema() -> pa.Schema:
    """Return the columns of battles.parquet: the fitted texts."""
    import pyarrow as pa

    texts = pa.list_(pa.string())
    return pa.schema([("id", pa.string()), ("prompts", texts), ("responses_a", texts), ("responses_b", texts)])


def row_schema() -> pa.Schema:
    """Return the columns of what is known of each battle."""
    import pyarrow as pa

    strings = ("id", "split", "verdict", "group", "language")
    counts = ("turns", "dropped", "tokens", "tokens_full", "chars_prompt", "chars_a", "chars_b")
    fields = {**dict.fromkeys(strings, pa.string()), **dict.fromkeys(counts, pa.int32()), "cut": pa.bool_()}
    return pa.schema(list(fields.items()))
