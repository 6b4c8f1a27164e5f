"""Preference rows: what DPO and a reward model learn from, as LLaMA-Factory reads it and as scoring feeds it.

judge view    the judge prompt; chosen = the true verdict's label, rejected = a wrong one (`dpo_rejected`)
reward view   the user's prompt; chosen = the winning response, rejected = the losing one

A battle of several turns becomes one prompt and two responses: each holds all its answers, with the user's later turns
between them under headings. A line of a text that looks like such a heading gets a backslash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal

from tokenizers import Tokenizer

from common.battle import VERDICTS, Battle
from common.errors import ArenaError
from data_prep.chat_template import ChatFrame
from data_prep.prompt import FIELDS, Neutralizer
from data_prep.truncation import BudgetFitter, Fitted, Job, share_out

View = Literal["judge", "reward"]
VIEWS: tuple[View, ...] = ("judge", "reward")

USER = "\n\n### User\n"
ASSISTANT = "\n\n### Assistant\n"
_LOOKS_LIKE_HEADER = re.compile(r"^(?=\\*### (?:User|Assistant)[ \t\r]*$)", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two responses to it, each one string."""

    id: str
    prompt: str
    response_a: str
    response_b: str


def flatten(battle: Battle) -> Pair:
    """Return the battle as one prompt and two responses, without verdict and language."""
    first, *later = battle.prompts
    return Pair(battle.id, first, _join_turns(battle.responses_a, later), _join_turns(battle.responses_b, later))


def _join_turns(answers: Sequence[str], later_prompts: Sequence[str]) -> str:
    """Return one response text: n answers with the n - 1 user turns between them."""
    parts = [_escape(answers[0])]
    for prompt, answer in zip(later_prompts, answers[1:], strict=True):
        parts += (USER, _escape(prompt), ASSISTANT, _escape(answer))
    return "".join(parts)


def _escape(text: str) -> str:
    # Nearly no text has one, and `in` is far faster than a regular expression.
    return _LOOKS_LIKE_HEADER.sub(r"\\", text) if "### " in text else text


def wrong_verdicts(battle_id: str, verdict: str, *, rejected: str, seed: int) -> tuple[str, ...]:
    """Return the verdicts that a judge is taught to reject: each wrong one, or one that seed and id draw.

    The draw is made for the straight order; the swapped copy rejects the same verdict, exchanged, so that what is
    rejected tells nothing of the position.
    """
    wrong = tuple(v for v in VERDICTS if v != verdict)
    if rejected == "each":
        return wrong
    drawn = blake2b(f"{seed}:{battle_id}".encode(errors="surrogatepass"), digest_size=1).digest()[0] % len(wrong)
    return (wrong[drawn],)


def judge_rows(battle_id: str, human: str, label: str, wrong_labels: Sequence[str]) -> list[str]:
    """Return the judge view's lines of one message, which comes as `turn_json("human", message)`."""
    return [_preference(battle_id, human, label, wrong) for wrong in wrong_labels]


def reward_rows(pair: Pair, verdict: str | None) -> list[str]:
    """Return the reward view's line of one battle, or none for a tie and for responses that do not differ."""
    if verdict not in ("a", "b") or pair.response_a == pair.response_b:
        return []
    won, lost = (pair.response_a, pair.response_b) if verdict == "a" else (pair.response_b, pair.response_a)
    return [_preference(pair.id, turn_json("human", pair.prompt), won, lost)]


def turn_json(role: str, text: str) -> str:
    """Return one sharegpt turn as JSON in ASCII: NULs and every other character reach LLaMA-Factory unchanged."""
    return f'{{"from": "{role}", "value": {json.dumps(text)}}}'


def _preference(battle_id: str, human: str, chosen: str, rejected: str) -> str:
    return (
        f'{{"id": {json.dumps(battle_id)}, "conversations": [{human}], '
        f'"chosen": {turn_json("gpt", chosen)}, "rejected": {turn_json("gpt", rejected)}}}\n'
    )


def pair_sequences(
    frame: ChatFrame, tokenizer: Tokenizer, pairs: Sequence[Pair]
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt ids, ids of answer A, ids of answer B) of each pair, exactly those that training feeds."""
    ids = (encoding.ids for encoding in tokenizer.encode_batch_fast(_wrapped(frame, pairs), add_special_tokens=False))
    return [(frame.surround(next(ids)), frame.answer(next(ids)), frame.answer(next(ids))) for _ in pairs]


def _wrapped(frame: ChatFrame, pairs: Sequence[Pair]) -> list[str]:
    """Return the strings that are tokenized, three a pair: prompt, answer A, answer B."""
    answer = frame.wrap_answer
    return [text for p in pairs for text in (frame.wrap(p.prompt), answer(p.response_a), answer(p.response_b))]


class PairFitter(BudgetFitter):
    """Fits battles to the budget as pairs, so that the prompt with either response is within it."""

    def __init__(self, frame: ChatFrame, tokenizer: Tokenizer, *, cutoff_len: int, prompt_share: float):
        """Measure the fixed parts; raises ArenaError if `cutoff_len` cannot hold even a marker for each text."""
        neutral = Neutralizer(frame.special_strings)
        super().__init__(frame, tokenizer, neutral, cutoff_len=cutoff_len, prompt_share=prompt_share)
        self._overhead = len(frame.surround([])) + len(frame.answer([]))
        self._around = self._overhead + self._count(frame.wrap("x") + frame.wrap_answer("x")) - 2
        self._between = self._count(USER + ASSISTANT)
        smallest = self._around + 2 * self._marker_len
        if smallest > cutoff_len:
            raise ArenaError(
                f"an almost empty prompt and response take {smallest} of the {cutoff_len} tokens of cutoff_len",
                where="reward view",
                remedy=f"raise cutoff_len to {4 * smallest} or more in experiment.yaml",
            )

    def fit(self, battles: Sequence[Battle]) -> list[Fitted]:
        """Fit battles; the result is in the same order, and both sequences of each are within `cutoff_len`.

        `flatten` makes the pair of a fitted battle. Raises ArenaError that names a battle that cannot be fitted.
        """
        return self._fit([Job(battle, battle) for battle in map(self.clean, battles)])

    def _measure(self, jobs: list[Job]) -> None:
        texts = _wrapped(self.frame, [flatten(job.kept) for job in jobs])
        counts = iter(map(len, self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)))
        for job in jobs:
            prompt, a, b = next(counts), next(counts), next(counts)
            job.lengths = (self._overhead + prompt + a, self._overhead + prompt + b)
            job.tokens = max(job.lengths)

    def _locate(self, jobs: list[Job]) -> None:
        texts = [text for job in jobs for column in job.battle.texts for text in column]
        encodings = iter(self.tokenizer.encode_batch(texts, add_special_tokens=False))
        for job in jobs:
            turns = range(job.battle.turns)
            job.spans = {(turn, name): next(encodings).offsets for name in FIELDS for turn in turns}
            totals = (sum(len(job.spans[turn, name]) for turn in turns) for name in FIELDS)
            job.estimate = self._estimate(job.battle.turns, 0, *totals)
            job.room = self.cutoff_len - self._around

    def _room(self, job: Job, attempt: int) -> int:
        """Take off what the last round was too long by, where seams or escaped lines took more than was estimated."""
        if job.estimate <= job.room:
            job.room = job.estimate - (job.tokens - self.cutoff_len)
        return job.room

    def _estimate(self, turns: int, dropped: int, prompt: int, a: int, b: int) -> int:
        return self._between * (turns - 1) + prompt + max(a, b)

    def _share(self, wanted: list[int], room: int) -> list[int]:
        # of the answers each is read without the other
        granted = share_out({"prompt": wanted[0], "a": max(wanted[1:])}, self._shares, room, floor=self._marker_len)
        return [granted["prompt"], granted["a"], granted["a"]]
