"""The work on each battle, in a thread or in a pool of processes: fitting it, and later writing its rows as JSON.

Between the two lie the folds, which need the verdicts of all battles. What comes back to the main process is ready to
be appended to files.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor, Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from multiprocessing import get_context, parent_process
from typing import Any

import pyarrow as pa
from tokenizers import Tokenizer

from common.battle import TEXTS, VERDICTS, Battle, swap, swap_verdict
from common.errors import ArenaError
from common.experiment import Experiment
from data_prep.audit import count_fitted, count_pairs, first_prompts, row_statistics
from data_prep.chat_template import ChatFrame
from data_prep.export_folder import set_names
from data_prep.preference_pairs import (
    Pair,
    PairFitter,
    View,
    flatten,
    judge_rows,
    reward_rows,
    turn_json,
    wrong_verdicts,
)
from data_prep.prompt import JudgePrompt
from data_prep.truncation import Fitted, Fitter
from data_prep.verdict_shares import drawn


def _schema(**columns: pa.DataType) -> pa.Schema:
    return pa.schema(list(columns.items()))


_STATISTICS = ("turns", "dropped", "tokens", "tokens_full", "chars_prompt", "chars_a", "chars_b")
SCHEMAS = {
    # what is known of each battle; `source` is a key of the manifest's sources, `times` how often it is trained on,
    # `shares` its soft label where it has one, `first_prompt` is for the run checks, see data_prep.audit
    "rows": _schema(
        **dict.fromkeys(("id", "source", "split", "verdict", "group", "language"), pa.string()),
        times=pa.int16(),
        shares=pa.list_(pa.float64()),
        **dict.fromkeys(_STATISTICS, pa.int32()),
        cut=pa.bool_(),
        first_prompt=pa.uint64(),
    ),
    # the texts that were fitted to the judge prompt
    "battles": _schema(id=pa.string(), **dict.fromkeys(TEXTS, pa.list_(pa.string()))),
    # the texts that were fitted as a pair; tokens count prompt and response together
    "pairs": _schema(
        **dict.fromkeys(("id", "prompt", "response_a", "response_b"), pa.string()),
        **dict.fromkeys(("tokens_a", "tokens_b", "dropped"), pa.int32()),
        cut=pa.bool_(),
    ),
}
_FEW_CORES = 4
_MOST = 16  # processes; beyond them the reader sets the pace


@dataclass(frozen=True)
class FittedChunk:
    """Some battles as rows of the tables, by the tables' names, and what fitting them cost."""

    source: str  # "train", "train_2", …: battles with verdicts; "test"
    tables: dict[str, pa.RecordBatch]
    counts: dict[str, Counter[str]]


class RowMaker:
    """Fits battles, and makes the lines of the data sets, by one experiment; may be pickled to another process."""

    def __init__(
        self, experiment: Experiment, frame: ChatFrame, tokenizer: Tokenizer, views: Collection[View], source: str
    ):
        """`source` is the judge prompt's template. Raises ArenaError if `cutoff_len` holds no prompt."""
        self._made_of = (experiment, frame, tokenizer, tuple(views), source)
        self._experiment, self._views = experiment, tuple(views)
        self._labels = dict(zip(VERDICTS, experiment.labels.in_order(), strict=True))
        self._prompt = JudgePrompt(source, experiment.labels, where=experiment.prompt_template)
        budget = {"cutoff_len": experiment.cutoff_len, "prompt_share": experiment.prompt_share}
        self._fitter = Fitter(frame, tokenizer, self._prompt, **budget)
        self._pair_fitter = PairFitter(frame, tokenizer, **budget) if "reward" in views else None
        for each in filter(None, (self._fitter, self._pair_fitter)):
            each.model = experiment.model

    def __reduce__(self):
        return RowMaker, self._made_of

    def fit(self, battles: Sequence[Battle], source: str) -> FittedChunk:
        """Fit battles of one source; raises ArenaError if one cannot be fitted."""
        both_orders = source != "test" and self._experiment.swap_copies
        fitted = self._fitter.fit(battles, both_orders=both_orders)
        rows = [
            {
                **row_statistics(battle),
                "source": source,
                "shares": battle.shares,
                "dropped": each.dropped,
                "tokens": each.tokens,
                "tokens_full": each.tokens_full,
                "cut": each.cut,
                "first_prompt": first,
            }
            for battle, each, first in zip(battles, fitted, first_prompts(battles).tolist(), strict=True)
        ]
        texts = [{name: getattr(each.battle, name) for name in ("id", *TEXTS)} for each in fitted]
        tables, counts = {"rows": rows, "battles": texts}, {"battles": count_fitted(fitted)}
        if self._pair_fitter:
            pairs = self._pair_fitter.fit(battles)
            tables["pairs"] = [_pair_row(each) for each in pairs]
            counts["pairs"] = count_pairs(battles, pairs)
        batches = {name: pa.RecordBatch.from_pylist(each, schema=SCHEMAS[name]) for name, each in tables.items()}
        return FittedChunk(source, batches, counts)

    def lines(
        self, rows: Sequence[tuple[Battle, int, Pair | None]], swapped: bool, epoch: int | None = None
    ) -> dict[str, list[str]]:
        """Return the data sets' lines of fitted battles, each with its turns dropped and its pair.

        `swapped` asks for a copy of each battle with A and B exchanged, behind it. Soft labels are drawn for an
        `epoch`; without one the verdict stands.
        """
        lines: dict[str, list[str]] = {name: [] for name in set_names(self._views)}
        experiment = self._experiment
        how = {"rejected": experiment.dpo_rejected, "seed": experiment.seed}

        def label(battle: Battle, use: str) -> Battle:
            return battle if epoch is None else drawn(battle, experiment.seed, epoch, use)

        for battle, dropped, pair in rows:
            straight = label(battle, "ab")
            self._add_judge_lines(lines, straight, dropped, wrong_verdicts(battle.id, straight.verdict, **how))
            if swapped:
                other = label(battle, "ba")
                wrong = map(swap_verdict, wrong_verdicts(battle.id, other.verdict, **how))
                self._add_judge_lines(lines, swap(other), dropped, tuple(wrong))
            if pair is not None:
                lines["dpo_reward"] += reward_rows(pair, label(battle, "pair").verdict)
        return lines

    def _add_judge_lines(self, lines: dict[str, list[str]], battle: Battle, dropped: int, wrong: Sequence[str]) -> None:
        """Add the lines of the sets that show the judge prompt."""
        human = turn_json("human", self._prompt.message(battle, dropped))
        label = self._labels[battle.verdict]
        turns = f"[{human}, {turn_json('gpt', label)}]"
        lines["sft"].append(f'{{"id": {json.dumps(battle.id)}, "conversations": {turns}}}\n')
        if "judge" in self._views:
            lines["dpo_judge"] += judge_rows(battle.id, human, label, [self._labels[each] for each in wrong])


def _pair_row(fitted: Fitted) -> dict[str, Any]:
    tokens_a, tokens_b = fitted.lengths
    tokens = {"tokens_a": tokens_a, "tokens_b": tokens_b}
    return {**asdict(flatten(fitted.battle)), **tokens, "dropped": fitted.dropped, "cut": fitted.cut}


def usual_workers() -> int:
    """Return how many processes suit this machine; 0 stands for a thread of our own."""
    cores = len(os.sched_getaffinity(0))
    return min(cores - 1, _MOST) if cores >= _FEW_CORES else 0


@contextmanager
def open_pool(maker: RowMaker, workers: int | None) -> Iterator[Callable[[str, Iterable[tuple]], Iterator[Any]]]:
    """Yield a function that calls a method of `maker` by name with each of many arguments, elsewhere, in their order.

    `workers` is the number of processes, 0 stands for one thread, None for what suits this machine. Two calls a worker
    are under way or wait, so that memory stays flat.
    """
    workers = usual_workers() if workers is None else workers
    if workers:  # spawned, not forked: a tokenizer's threads do not survive a fork
        pools = [ProcessPoolExecutor(1, get_context("spawn"), _start_process, (maker,)) for _ in range(workers)]
    else:
        pools = [ThreadPoolExecutor(1, initializer=_start, initargs=(maker,))]
    try:
        yield partial(_in_order, pools, 2 * workers or 1)
    finally:
        for pool in pools:
            pool.shutdown(cancel_futures=True)


def _in_order(pools: Sequence[Executor], ahead: int, method: str, calls: Iterable[tuple]) -> Iterator[Any]:
    waiting: deque[Future] = deque()
    try:
        for pool, arguments in zip(cycle(pools), calls, strict=False):
            waiting.append(submit(pool, _call, method, *arguments))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (BrokenExecutor, BrokenPipeError):  # the latter where a worker died before it had read the call
        raise _died() from None


def submit(pool: Executor, call: Callable[..., Any], *arguments: Any) -> Future:
    """Submit a call to a pool of one worker.

    While this process, too, could write there, the rest of a result whose worker was killed would be waited for.
    """
    future = pool.submit(call, *arguments)
    if isinstance(pool, ProcessPoolExecutor):
        pool._result_queue._writer.close()
    return future


def _died() -> ArenaError:
    return ArenaError(
        "a worker process of prepare ended, most likely for lack of memory where it says nothing above",
        remedy="use fewer: --workers 2, or --workers 0 for none",
    )


_maker: RowMaker | None = None  # of this worker


def _start(maker: RowMaker) -> None:
    global _maker
    _maker = maker


def _start_process(maker: RowMaker) -> None:
    """Use one core, leave Ctrl-C to the parent process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    end_with_parent()
    _start(maker)


def end_with_parent() -> None:
    """Let this process of a pool end as soon as the process that started it is gone."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_maker, method)(*arguments)
