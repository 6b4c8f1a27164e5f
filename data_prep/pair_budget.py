"""Fitting pairs to the token budget: the oldest turns go first, then prompt and the longer response share the rest.

LLaMA-Factory budgets a pairwise row on its longer response and cuts ends: a response that is too long would lose its
end-of-turn token while the other keeps it, which a reward model learns at once. So no row that leaves here is longer
than `cutoff_len` with either response, counted with the model's own tokenizer in the whole chat frame.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from common.battle import Battle
from common.errors import ArenaError
from common.screen import name_of
from data_prep.flatten import ASSISTANT, USER, Pair, flatten
from data_prep.sanitize import Neutralizer
from data_prep.truncation import MARKER, cut_middle, last_turns, share_out

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from data_prep.chat_template import ChatFrame

# A round takes off what the last one was too long by, so two or three do; escaped header lines may ask for more.
_ROUNDS = 16


@dataclass(frozen=True, slots=True)
class FittedPair:
    """A battle as a pair that fits, and what was lost on the way.

    `tokens_a` and `tokens_b` count the whole sequence, prompt and response; `tokens_full` is what the longer one would
    have taken uncut; `lost` are the tokens cut from (prompt, a, b) of the last turn.
    """

    pair: Pair
    dropped: int
    tokens_a: int
    tokens_b: int
    tokens_full: int
    lost: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """The tokens of the longer sequence."""
        return max(self.tokens_a, self.tokens_b)

    @property
    def cut(self) -> bool:
        """True if any turn or any part of a text was left out."""
        return self.dropped > 0 or any(self.lost)


@dataclass(slots=True)
class _Job:
    """A battle on its way: the candidate pair, its length, and the tokens' places where it is too long."""

    battle: Battle
    pair: Pair
    tokens: tuple[int, int] = (0, 0)
    tokens_full: int = 0
    dropped: int = 0
    room: int = 0  # for the estimate, which is made of the texts' own counts, without the frame
    estimate: int = 0
    lost: tuple[int, int, int] = (0, 0, 0)
    counts: list[tuple[int, int, int]] = field(default_factory=list)  # tokens of (prompt, a, b), one a turn
    spans: list[list[tuple[int, int]]] = field(default_factory=list)  # characters of each token of the last turn


class PairFitter:
    """Fits battles, as pairs, to one experiment's budget."""

    def __init__(self, frame: ChatFrame, tokenizer: Tokenizer, *, cutoff_len: int, shares):
        """Measure the fixed parts; raises ArenaError if `cutoff_len` cannot hold even a marker for each text."""
        self.frame, self.tokenizer, self.cutoff_len = frame, tokenizer, cutoff_len
        self._shares = {"prompt": shares.prompt, "answer": shares.a}
        self._neutral = Neutralizer(frame.special_strings)
        self._overhead = len(frame.surround([])) + len(frame.answer([]))
        marker, around, between = map(
            len,
            tokenizer.encode_batch(
                [MARKER, frame.wrap("x") + frame.wrap_answer("x"), USER + ASSISTANT], add_special_tokens=False
            ),
        )
        self._marker_len = marker + 1
        self._room = cutoff_len - self._overhead - (around - 2)
        self._between = between
        smallest = cutoff_len - self._room + 2 * self._marker_len
        if smallest > cutoff_len:
            raise ArenaError(
                f"an almost empty prompt and response take {smallest} of the {cutoff_len} tokens of cutoff_len",
                where="reward view",
                remedy=f"raise cutoff_len to {4 * smallest} or more in experiment.yaml",
            )

    def clean(self, battle: Battle) -> Battle:
        """Return the battle with empty texts named and special strings broken up."""
        return self._neutral.battle(battle)

    def fit(self, battles: Sequence[Battle]) -> list[FittedPair]:
        """Fit a batch of battles; the result is in the same order and both sequences are within `cutoff_len`.

        Raises ArenaError that names the battle if it cannot be fitted.
        """
        cleaned = map(self.clean, battles)
        jobs = [_Job(battle, flatten(battle)) for battle in cleaned]
        over = self._measure(jobs)
        for job in jobs:
            job.tokens_full = max(job.tokens)
        self._analyse(over)
        for _ in range(_ROUNDS):
            if not over:
                break
            for job in over:
                self._shrink(job)
            over = self._measure(over)
        if over:
            raise ArenaError(
                f"cannot be fitted to {self.cutoff_len} tokens as a pair",
                where=f"battle {name_of(over[0].battle.id)}",
                remedy="raise cutoff_len in experiment.yaml",
            )
        return [FittedPair(job.pair, job.dropped, *job.tokens, job.tokens_full, job.lost) for job in jobs]

    def _measure(self, jobs: list[_Job]) -> list[_Job]:
        """Count every candidate with one batch call; return those that exceed the budget."""
        wrap, wrap_answer = self.frame.wrap, self.frame.wrap_answer
        texts = []
        for pair in (job.pair for job in jobs):
            texts += (wrap(pair.prompt), wrap_answer(pair.response_a), wrap_answer(pair.response_b))
        counts = iter(map(len, self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)))
        over = []
        for job in jobs:
            prompt, a, b = next(counts), next(counts), next(counts)
            job.tokens = (self._overhead + prompt + a, self._overhead + prompt + b)
            if max(job.tokens) > self.cutoff_len:
                over.append(job)
        return over

    def _analyse(self, jobs: list[_Job]) -> None:
        """Count the tokens of every text of the battles that are too long, and place those of their last turns."""
        texts = [text for job in jobs for turn in _turns(job.battle) for text in turn]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        for job in jobs:
            last = []
            for _ in range(job.battle.turns):
                last = [next(encodings), next(encodings), next(encodings)]
                job.counts.append(tuple(map(len, last)))
            job.spans = [encoding.offsets for encoding in last]
            job.room, job.estimate = self._room, self._estimate(job.counts)

    def _shrink(self, job: _Job) -> None:
        """Choose a smaller candidate: drop the oldest turns, then cut the last turn's texts."""
        if job.estimate <= job.room:  # seams or escaped header lines took more than was estimated
            job.room = job.estimate - (max(job.tokens) - self.cutoff_len)
        last = job.battle.turns - 1
        # The fewest to drop; fewer turns are never longer.
        job.dropped = bisect_left(range(last), True, key=lambda d: self._estimate(job.counts[d:]) <= job.room)
        job.estimate, job.lost = self._estimate(job.counts[job.dropped :]), (0, 0, 0)
        kept = last_turns(job.battle, job.dropped)
        if job.estimate > job.room:
            kept, job.lost = self._cut(job, kept)
            job.estimate = job.room
        job.pair = flatten(kept)

    def _estimate(self, counts: list[tuple[int, int, int]]) -> int:
        """The tokens of the longer sequence of these turns, without the frame."""
        prompts, a, b = map(sum, zip(*counts, strict=True))
        return prompts + max(a, b) + self._between * (len(counts) - 1)

    def _cut(self, job: _Job, kept: Battle) -> tuple[Battle, tuple[int, int, int]]:
        prompt, a, b = job.counts[-1]
        granted = share_out({"prompt": prompt, "answer": max(a, b)}, self._shares, job.room, floor=self._marker_len)
        texts, lost = [], []
        for (text,), spans, field_name in zip(
            (kept.prompts, kept.responses_a, kept.responses_b), job.spans, ("prompt", "answer", "answer"), strict=True
        ):
            shorter, gone = cut_middle(text, spans, granted[field_name], self._marker_len)
            texts.append((shorter,))
            lost.append(gone)
        return replace(kept, prompts=texts[0], responses_a=texts[1], responses_b=texts[2]), tuple(lost)


def _turns(battle: Battle) -> list[tuple[str, str, str]]:
    return list(zip(battle.prompts, battle.responses_a, battle.responses_b, strict=True))
