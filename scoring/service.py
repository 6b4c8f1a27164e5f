"""A judge that answers while it runs: battles of several requests are scored together, by one model.

    service = open_service(context, ScoreOptions(), show)
    table = await service.scores(battles)       # raw scores and facts of each battle
    answers = service.answers(battles, table)   # calibrated probabilities, as /v1/judge gives them

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

    async def scores(self, battles: Sequence[Battle]) -> pd.DataFrame:
        """Return facts and raw scores of battles, label logits in both orders.

        Raises ArenaError for a battle that cannot be scored, Busy where too much is waiting.
        """
        size = sum(len(text) for b in battles for text in (*b.prompts, *b.responses_a, *b.responses_b))
        return await self._ask(tuple(battles), size)

    async def text_rewards(self, texts: Sequence[str]) -> list[float]:
        """Return a reward model's score behind each whole conversation, chat template included; raises as `scores`."""
        return await self._ask(list(texts), sum(map(len, texts)))

    def answers(self, battles: Sequence[Battle], table: pd.DataFrame) -> list[dict[str, Any]]:
        """Return what /v1/judge says of battles and their scores."""
        used = self.calibration.used.apply(table)
        chosen = used.argmax(axis=1)
        found = []
        for row, (battle, each) in enumerate(zip(battles, table.to_dict("records"), strict=True)):
            answer: dict[str, Any] = {"id": battle.id, **dict(zip(VERDICTS, map(float, used[row]), strict=True))}
            answer["choice"] = VERDICTS[chosen[row]]
            if self.agreement:
                answer["abstain"] = not self.agreement.answers(used[row : row + 1])[0]
            answer["tokens"], answer["cut"] = each["tokens"], each["cut"]
            answer["turns_dropped"], answer["tokens_uncut"] = each["turns_dropped"], each["tokens_uncut"]
            found.append(answer)
        if self.scorer.label_ids:
            straight = self.calibration.links[1].apply(table)
            turned = table.assign(**{a: table[b] for a, b in zip(AB_COLUMNS, BA_COLUMNS, strict=True)})
            other = self.calibration.links[1].apply(turned)
            for answer, one, two in zip(found, straight.tolist(), other.tolist(), strict=True):
                answer["orders"] = {"ab": one, "ba": two}
                # Total variation distance: the share of probability that moves when the answers change places.
                answer["disagreement"] = float(np.abs(np.subtract(one, two)).sum() / 2)
        else:
            for answer, pair in zip(found, table[["reward_a", "reward_b"]].to_numpy().tolist(), strict=True):
                answer["rewards"] = dict(zip(("a", "b"), pair, strict=True))
        return found

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
                if answer.done():  # the caller has gone
                    continue
                answer.set_exception(result) if isinstance(result, Exception) else answer.set_result(result)

    def _together(self, jobs: list[Any]) -> list[Any]:
        """Return each job's result or its own error; what all of them ask goes to the model in one call."""
        prepared = [self._prepared(job) for job in jobs]
        rows = [row for each in prepared if not isinstance(each, ArenaError) for row in each[1]]
        try:
            scores = self.scorer.ask(rows, progress=lambda _: None, name="request {}".format) if rows else np.empty(0)
        except ArenaError as error:  # of one row: the others must not suffer for it
            return [error] if len(jobs) == 1 else [result for job in jobs for result in self._together([job])]
        results, first = [], 0
        for each in prepared:
            if isinstance(each, ArenaError):
                results.append(each)
                continue
            table, own = each[0], scores[first : first + len(each[1])]
            first += len(own)
            if table is None:
                results.append(own[:, 0].tolist())
                continue
            table[list(self.scorer.columns)] = own[: len(table)]
            if self.scorer.label_ids:
                table[list(BA_COLUMNS)] = own[len(table) :][:, SWAPPED_ORDER]
            results.append(table)
        return results

    def _prepared(self, job: Any) -> tuple[pd.DataFrame | None, list] | ArenaError:
        """Return facts and token ids of a request's battles (label stages: in both orders), or why there are none."""
        try:
            if isinstance(job, list):
                return None, [self._text_ids(text) for text in job]
            fitted, inputs = zip(*self.scorer.fit(list(job)), strict=True)
            facts = [
                {
                    **row_statistics(battle),
                    "tokens": each.tokens,
                    "tokens_uncut": each.tokens_full,
                    "cut": each.cut,
                    "turns_dropped": each.dropped,
                }
                for battle, each in zip(job, fitted, strict=True)
            ]
            orders = (False, True) if self.scorer.label_ids else (False,)
            rows = [row for swapped in orders for row in self.scorer.prepare(inputs, swapped=swapped)]
            return pd.DataFrame(facts), rows
        except ArenaError as error:
            return error

    def _text_ids(self, text: str) -> tuple[list[int], list[int], list[int]]:
        """Return a conversation as a reward model's row: its last token stands for both answers."""
        ids = self.scorer.tokenizer.encode(text, add_special_tokens=False).ids
        limit = self.context.experiment.cutoff_len
        if not 2 <= len(ids) <= limit:
            what = f"{name_of(text[:40])} has {len(ids)} tokens"
            raise ArenaError(what, where="messages", remedy=f"send 2 to {limit} tokens (cutoff_len)")
        return ids[:-1], ids[-1:], ids[-1:]
