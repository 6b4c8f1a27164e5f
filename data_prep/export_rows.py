"""A batch: some hundred battles fitted to the budget and turned into the bytes and columns that are written.

Everything that takes time for each battle happens here, in a thread or in a process of its own (data_prep.export_rows);
what comes back is quickly appended to files.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from struct import Struct
from typing import TYPE_CHECKING, Any

from common.battle import VERDICTS, Battle, swap_verdict
from data_prep.audit import Tally, battle_facts
from data_prep.dataset_info import set_names
from data_prep.folds import group_number
from data_prep.preference_pairs import (
    FittedPair,
    PairFitter,
    PairTally,
    View,
    judge_rows,
    pair_table,
    reward_rows,
    turn_json,
    wrong_verdicts,
)
from data_prep.prompt import JudgePrompt
from data_prep.truncation import Fitted, Fitter

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

    from common.experiment import Experiment
    from data_prep.chat_template import ChatFrame
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process

from common.errors import ArenaError


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


_FEW_CORES = 4
_MOST = 16  # processes; beyond them the reader sets the pace
_maker: BatchMaker | None = None  # in a process of the crew


def usual_workers() -> int:
    """Return how many processes suit this machine; 0 stands for a thread of our own."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores - 1, _MOST) if cores >= _FEW_CORES else 0


class Crew:
    """Makes batches elsewhere; at most two a worker are under way or wait, so that memory stays flat."""

    def __init__(self, executor: Executor, make: Callable[[list[Battle], bool], Batch], ahead: int):
        self._executor, self._make, self._ahead = executor, make, ahead

    def batches(self, chunks: Iterable[list[Battle]], labelled: bool) -> Iterator[Batch]:
        """Yield the batch of each chunk, in their order; raises ArenaError as `BatchMaker.make` does."""
        waiting: deque[Future[Batch]] = deque()
        try:
            for chunk in chunks:
                waiting.append(self._executor.submit(self._make, chunk, labelled))
                if len(waiting) > self._ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenExecutor:
            raise ArenaError(
                "a worker process of prepare ended without a word, most likely for lack of memory",
                remedy="use fewer: --workers 2, or --workers 0 for none",
            ) from None
        finally:
            for future in waiting:
                future.cancel()


@contextmanager
def open_crew(maker: BatchMaker, workers: int) -> Iterator[Crew]:
    """Yield a crew of `workers` processes, or of one thread for 0."""
    if not workers:
        with ThreadPoolExecutor(max_workers=1) as executor:
            yield Crew(executor, maker.make, ahead=1)
        return
    # Spawned, not forked: a tokenizer's threads do not survive a fork.
    executor = ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_join_crew, initargs=(maker,))
    try:
        yield Crew(executor, _make, ahead=2 * workers)
    finally:
        executor.shutdown(cancel_futures=True)


def _join_crew(maker: BatchMaker) -> None:
    """Begin as a process of the crew: one core for it, Ctrl-C is its parent's business, and it ends with its parent."""
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _maker = maker


def _end_with_parent() -> None:
    if (parent := parent_process()) is not None:
        parent.join()
        os._exit(1)


def _make(battles: list[Battle], labelled: bool) -> Batch:
    assert _maker is not None
    return _maker.make(battles, labelled)


RECORD_HEAD = Struct("<IHIH")  # bytes and lines for both folds, then for training only


def record(lines: Sequence[str], training_lines: Sequence[str] = ()) -> bytes:
    """Return a battle's lines as a spool keeps them; `training_lines` are left out where the battle validates."""
    always, extra = "".join(lines).encode("ascii"), "".join(training_lines).encode("ascii")
    return RECORD_HEAD.pack(len(always), len(lines), len(extra), len(training_lines)) + always + extra
