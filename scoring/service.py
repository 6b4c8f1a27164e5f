"""A judge that answers while it runs: battles of several requests are scored together, by one model.

    service = open_service(context, ScoreOptions(), show)
    answers = await service.judge(battles)      # calibrated probabilities, as /v1/judge gives them

While the model works on a batch, requests wait in a bounded queue; whatever waits then goes into the next batch.
Prompt, budget, label tokens and calibration are those of scoring a table, so the answers are the same.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd

from common.battle import SWAPPED_ORDER, VERDICTS, Battle
from common.console import name_of
from common.errors import ArenaError
from common.progress import Show
from data_prep.audit import row_statistics
from factory.stage_context import StageContext
from scoring.agreement import Agreement
from scoring.calibration import AB_COLUMNS, BA_COLUMNS, Calibration
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
    """Return the service of a scored stage, its model loaded.

    Raises ArenaError where the stage was not scored, or its judge has changed since.
    """
    report, scorer = read_report(context), options.spec(context).scorer()
    context.require_scored(scorer.inputs())
    show.note(f"{context.name}: loading the trained model")
    scorer.note = show.note
    scorer.open()
    return Service(context, scorer, report)


class Service:
    """The judge of one scored stage, its model loaded; one event loop uses it."""

    agreement: Agreement | None = None  # the promise, where one was asked for

    def __init__(self, context: StageContext, scorer: Scorer, report: Mapping[str, Any]):
        """Keep an opened scorer, and the report of its stage; raises ArenaError for a broken calibration."""
        self.context, self.scorer, self.report = context, scorer, report
        self.calibration = Calibration.from_json(report)
        # One thread: a model works on one batch at a time, and the event loop stays free.
        self._model = ThreadPoolExecutor(1)
        self._waiting: deque[tuple[Any, int, asyncio.Future]] = deque()
        self._characters, self._work = 0, None

    async def judge(self, battles: Sequence[Battle]) -> list[dict[str, Any]]:
        """Return what /v1/judge says of each battle.

        Raises ArenaError for a battle that cannot be scored, Busy where too much is waiting.
        """
        size = sum(len(text) for b in battles for text in (*b.prompts, *b.responses_a, *b.responses_b))
        return await self._ask(tuple(battles), size)

    async def text_rewards(self, texts: Sequence[str]) -> list[float]:
        """Return a reward model's score behind each whole conversation, chat template included; raises as `judge`."""
        return await self._ask(list(texts), sum(map(len, texts)))

    async def close(self) -> None:
        """Answer what was taken, then free the model."""
        while self._waiting or (self._work and not self._work.done()):
            await asyncio.sleep(0.01)
        self._model.shutdown()
        self.scorer.close()

    async def _ask(self, job: Any, size: int) -> Any:
        if len(self._waiting) >= _MOST_WAITING or (self._waiting and self._characters + size > _QUEUE):
            raise Busy
        answer = asyncio.get_running_loop().create_future()
        self._waiting.append((job, size, answer))
        self._characters += size
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._run())
        return await answer

    async def _run(self) -> None:
        """Work on batches until nothing waits."""
        loop = asyncio.get_running_loop()
        while self._waiting:
            await asyncio.sleep(_GATHER)
            batch, taken = [], 0
            while self._waiting and (not batch or taken + self._waiting[0][1] <= _BATCH):
                batch.append(self._waiting.popleft())
                taken += batch[-1][1]
            self._characters -= taken
            try:
                results = await loop.run_in_executor(self._model, self._together, [job for job, _, _ in batch])
            except Exception as error:  # whatever it is, the callers must hear of it
                results = [error] * len(batch)
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
            scores = self.scorer.ask([*rows, *texts], progress=lambda _: None, name="request {}".format)
            if judged:
                answers = iter(self._answers(judged, fitted, scores[: len(rows)]))
            rewards = iter(scores[len(rows) :, 0].tolist())
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
            else:
                answer["rewards"] = dict(zip(("a", "b"), scores[row].tolist(), strict=True))
            facts = {"tokens": each.tokens, "tokens_uncut": each.tokens_full, "cut": each.cut}
            answers.append({**answer, **facts, "turns_dropped": each.dropped})
        return answers

    def _text_ids(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return a conversation as a reward model's row: its last token stands for both answers."""
        ids = self.scorer.tokenizer.encode(text, add_special_tokens=False).ids
        limit = self.context.experiment.cutoff_len
        if not 2 <= len(ids) <= limit:
            what = f"{name_of(text[:40])} has {len(ids)} tokens"
            raise ArenaError(what, where="messages", remedy=f"send 2 to {limit} tokens (cutoff_len)")
        return ids[:-1], ids[-1:], ids[-1:]
