"""A judge that answers while it runs: battles of several requests are scored together.

    service = open_service(context, ScoreOptions(), show)
    answers = await service.judge(battles)      # calibrated probabilities, as /v1/judge gives them

While the model works on a batch, requests wait in a bounded queue; whatever waits then goes into the next batch. With
several models, one a GPU, those that are free share what waits.
Prompt, budget, label tokens and calibration are those of scoring a table, so the answers are the same.
"""

from __future__ import annotations

import asyncio
import signal
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd

from common.battle import SWAPPED_ORDER, VERDICTS, Battle
from common.console import name_of
from common.errors import ArenaError, is_panic, user_error
from common.progress import Show
from data_prep.audit import row_statistics
from factory.stage_context import StageContext
from scoring.agreement import Agreement
from scoring.calibration import AB_COLUMNS, BA_COLUMNS, REWARD_COLUMNS, Calibration
from scoring.executor import Executor, ProcessDied
from scoring.score_stage import ScoreOptions, read_report
from scoring.scorer import Scorer

# Characters of one batch and of all that wait: some hundred long battles, and some thousand.
_BATCH, _QUEUE = 1 << 20, 1 << 24
_MOST_WAITING = 4096  # requests
# How long the first request of a batch waits for others to come: far less than a pass of any model takes.
_GATHER = 0.002  # seconds


class Busy(Exception):
    """The queue is full: the caller should come again later."""


def open_service(context: StageContext, options: ScoreOptions, show: Show) -> Service:
    """Return the service of a scored stage, its models loaded.

    Raises ArenaError where the stage was not scored, or its judge has changed since.
    """
    report, spec = read_report(context), options.spec(context)
    scorer = spec.scorer()
    context.require_scored(manifest := scorer.inputs())
    service = Service(context, scorer, report, options.open(spec, scorer, show))
    service.executor.load()  # no request waits for that
    service.manifest = manifest
    return service


class Service:
    """The judge of one scored stage, its models loaded; one event loop uses it."""

    agreement: Agreement | None = None  # the promise, where one was asked for
    manifest: Mapping[str, Any] = {}  # what its scores depend on, weights as sums
    ending = False  # whether answers are the last ones of their connections
    fault: Exception | None = None  # why it can answer no more

    def __init__(self, context: StageContext, scorer: Scorer, report: Mapping[str, Any], executor: Executor):
        """Keep what reads battles and what computes, and the stage's report; raises ArenaError for a broken one."""
        self.context, self.scorer, self.report, self.executor = context, scorer, report, executor
        self.calibration = Calibration.from_json(report)
        # A thread a model: each works on one batch at a time, and the event loop stays free.
        self._threads = ThreadPoolExecutor(executor.models)
        self._waiting: deque[tuple[Any, int, asyncio.Future]] = deque()
        self._characters, self._work, self._busy = 0, set(), 0

    async def judge(self, battles: Sequence[Battle]) -> list[dict[str, Any]]:
        """Return what /v1/judge says of each battle.

        Raises ArenaError for a battle that cannot be scored, Busy where too much is waiting.
        """
        return await self._ask(tuple(battles), sum(battle.characters for battle in battles))

    async def text_rewards(self, texts: Sequence[str]) -> list[float]:
        """Return the reward of the last answer of whole conversations, chat template included; raises as `judge`."""
        return await self._ask(list(texts), sum(map(len, texts)))

    async def close(self) -> None:
        """Answer what was taken, then free the models."""
        await asyncio.gather(*self._work)
        self._threads.shutdown()
        self.executor.close()

    async def _ask(self, job: Any, size: int) -> Any:
        if len(self._waiting) >= _MOST_WAITING or (self._waiting and self._characters + size > _QUEUE):
            raise Busy
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((job, size, answer))
        self._characters += size
        self._work = {each for each in self._work if not each.done()}
        if len(self._work) < self.executor.models:
            self._work.add(asyncio.create_task(self._run()))
        return await answer

    async def _run(self) -> None:
        """Work on batches with one model until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(_GATHER)
            batch, taken, free = [], 0, self.executor.models - self._busy
            share = -(-len(self._waiting) // free)
            while self._waiting and (not batch or (len(batch) < share and taken + self._waiting[0][1] <= _BATCH)):
                batch.append(self._waiting.popleft())
                taken += batch[-1][1]
            self._characters -= taken
            self._busy += 1
            try:
                results = await loop.run_in_executor(self._threads, self._together, [job for job, _, _ in batch])
            except ProcessDied as error:  # the server ends, for it would go on failing
                self.fault, results = error, [Busy()] * len(batch)
                signal.raise_signal(signal.SIGTERM)
            except Exception as error:  # whatever it is, the callers must hear of it
                results = [error] * len(batch)
            except BaseException as error:
                if not is_panic(error):
                    raise
                results = [user_error(error)] * len(batch)
            self._busy -= 1
            for (_, _, answer), result in zip(batch, results, strict=True):
                if not answer.done():  # else the caller has gone
                    answer.set_exception(result) if isinstance(result, Exception) else answer.set_result(result)

    def _together(self, jobs: list[Any]) -> list[Any]:
        """Return each job's result or its own error; what all of them ask goes to the model in one call."""
        try:
            judged = [battle for job in jobs if isinstance(job, tuple) for battle in job]
            texts = [self._text_ids(text) for job in jobs if isinstance(job, list) for text in job]
            answers, rows = iter(()), []
            if judged:
                fitted, inputs = zip(*self.scorer.fit(judged), strict=True)
                orders = (False, True) if self.scorer.label_ids else (False,)
                rows = [row for swapped in orders for row in self.scorer.prepare(inputs, swapped=swapped)]
            scores = self.executor.ask([*rows, *texts])
            if judged:
                answers = iter(self._answers(judged, fitted, scores[: len(rows)]))
            rewards = iter(scores[len(rows) :, 0].tolist())
        except ProcessDied:
            raise
        except ArenaError as error:  # of one request: the others must not suffer for it
            return [error] if len(jobs) == 1 else [result for job in jobs for result in self._together([job])]
        return [[next(answers if isinstance(job, tuple) else rewards) for _ in job] for job in jobs]

    def _answers(self, battles: list[Battle], fitted: Sequence[Any], scores: np.ndarray) -> list[dict[str, Any]]:
        """Return what /v1/judge says, from scores [battles, columns], of label stages behind them the other order's."""
        table = pd.DataFrame(map(row_statistics, battles))
        table[list(self.scorer.columns)] = scores[: len(battles)]
        both: list[np.ndarray] = []
        if self.scorer.label_ids:
            table[list(BA_COLUMNS)] = scores[len(battles) :][:, SWAPPED_ORDER]
            turned = table.assign(**{a: table[b] for a, b in zip(AB_COLUMNS, BA_COLUMNS, strict=True)})
            both = [self.calibration.links[1].apply(each) for each in (table, turned)]
        found = self.calibration.used.apply(table)
        answered = self.agreement.answers(found) if self.agreement else None
        answers = []
        for row, (battle, each) in enumerate(zip(battles, fitted, strict=True)):
            answer: dict[str, Any] = {"id": battle.id, **dict(zip(VERDICTS, found[row].tolist(), strict=True))}
            answer["choice"] = VERDICTS[found[row].argmax()]
            if answered is not None:
                answer["abstain"] = not answered[row]
            if both:
                answer["orders"] = {name: one[row].tolist() for name, one in zip(("ab", "ba"), both, strict=True)}
                # Total variation distance: the share of probability that moves when the answers change places.
                answer["disagreement"] = float(np.abs(both[0][row] - both[1][row]).sum() / 2)
            elif self.scorer.columns == REWARD_COLUMNS:
                answer["rewards"] = dict(zip(("a", "b"), scores[row].tolist(), strict=True))
            facts = {"tokens": each.tokens, "tokens_uncut": each.tokens_full, "cut": each.cut}
            answers.append({**answer, **facts, "turns_dropped": each.dropped})
        return answers

    def _text_ids(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return a conversation as a stage of rewards reads it: what precedes the last answer, and it for both."""
        tokenizer, frame = self.scorer.tokenizer, self.scorer.frame
        begin = frame.after + tokenizer.decode(list(frame.suffix_ids), skip_special_tokens=False)
        before, mark, reply = text.rpartition(begin)
        prompt, answer = (tokenizer.encode(part, add_special_tokens=False).ids for part in (before + mark, reply))
        size, limit = len(prompt) + len(answer), self.context.experiment.cutoff_len
        if not (prompt and answer) or size > limit:
            what = f"{name_of(text[:40])} has {len(prompt)} tokens up to {name_of(begin)} and {len(answer)} behind it"
            raise ArenaError(what, where="messages", remedy=f"send both, {limit} tokens at most (cutoff_len)")
        return prompt, answer, answer
