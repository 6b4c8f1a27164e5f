"""Preference rows: what DPO and a reward model learn from, as LLaMA-Factory reads it and as scoring feeds it.

judge view    the judge prompt; chosen = the true verdict's label, rejected = a wrong one (`dpo_rejected`)
reward view   the user's prompt; chosen = the winning response, rejected = the losing one

{"id": "65089", "conversations": [{"from": "human", "value": …}],
 "chosen": {"from": "gpt", "value": …}, "rejected": {"from": "gpt", "value": …}}
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from common.battle import VERDICTS, Battle
from common.errors import ArenaError

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

    from data_prep.chat_template import ChatFrame
from bisect import bisect_left
from dataclasses import replace
from typing import TYPE_CHECKING

from common.console import name_of
from data_prep.sanitize import Neutralizer
from data_prep.truncation import MARKER, cut_middle, last_turns, share_out

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from data_prep.chat_template import ChatFrame

USER = "\n\n### User\n"
ASSISTANT = "\n\n### Assistant\n"
_HEADER = r"### (?:User|Assistant)[ \t\r]*$"
_LOOKS_LIKE_HEADER = re.compile(rf"^(?=\\*{_HEADER})", re.MULTILINE)
_ESCAPED_HEADER = re.compile(rf"^\\(?=\\*{_HEADER})", re.MULTILINE)
_SEPARATOR = re.compile(r"\n\n### (?:User|Assistant)\n")


@dataclass(frozen=True, slots=True)
class Pair:
    """One prompt and two responses to it, each one string."""

    id: str
    prompt: str
    response_a: str
    response_b: str


def flatten(battle: Battle) -> Pair:
    """Return the battle as one prompt and two responses; verdict and language are left behind."""
    later = battle.prompts[1:]
    return Pair(
        battle.id,
        battle.prompts[0],
        join_turns(battle.responses_a, later),
        join_turns(battle.responses_b, later),
    )


def unflatten(pair: Pair) -> Battle:
    """Return the battle that `flatten` made the pair from; raises ArenaError if the two responses do not agree."""
    answers_a, later = split_turns(pair.response_a)
    answers_b, later_b = split_turns(pair.response_b)
    if later != later_b:
        raise ArenaError(
            "the two responses do not hold the same user turns",
            where=f"pair {pair.id}",
            remedy="make pairs with `python run.py prepare`",
        )
    return Battle(pair.id, (pair.prompt, *later), answers_a, answers_b)


def join_turns(answers: Sequence[str], later_prompts: Sequence[str]) -> str:
    """Return one response text: n answers with the n - 1 user turns between them."""
    parts = [_escape(answers[0])]
    for prompt, answer in zip(later_prompts, answers[1:], strict=True):
        parts += (USER, _escape(prompt), ASSISTANT, _escape(answer))
    return "".join(parts)


def split_turns(response: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return (n answers, n - 1 user turns) of a text that `join_turns` made."""
    texts = [_ESCAPED_HEADER.sub("", text) for text in _SEPARATOR.split(response)]
    return tuple(texts[::2]), tuple(texts[1::2])


def _escape(text: str) -> str:
    # Nearly no text has one, and `in` is far faster than a regular expression.
    return _LOOKS_LIKE_HEADER.sub(r"\\", text) if "### " in text else text


View = Literal["judge", "reward"]
VIEWS: tuple[View, ...] = ("judge", "reward")


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
    head = f'{{"id": {json.dumps(battle_id)}, "conversations": [{human}], "chosen": {turn_json("gpt", label)}, '
    return [f'{head}"rejected": {turn_json("gpt", wrong)}}}\n' for wrong in wrong_labels]


def turn_json(role: str, text: str) -> str:
    """Return one sharegpt turn as JSON in ASCII: NULs and every other character reach LLaMA-Factory unchanged."""
    return f'{{"from": "{role}", "value": {json.dumps(text)}}}'


def reward_rows(pair: Pair, verdict: str) -> list[str]:
    """Return the reward view's line of one battle, or none for a tie and for responses that do not differ."""
    if verdict not in ("a", "b") or pair.response_a == pair.response_b:
        return []
    won, lost = (pair.response_a, pair.response_b) if verdict == "a" else (pair.response_b, pair.response_a)
    return [
        f'{{"id": {json.dumps(pair.id)}, "conversations": [{turn_json("human", pair.prompt)}], '
        f'"chosen": {turn_json("gpt", won)}, "rejected": {turn_json("gpt", lost)}}}\n'
    ]


def pair_sequences(
    frame: ChatFrame, tokenizer: Tokenizer, pairs: Sequence[Pair]
) -> list[tuple[list[int], list[int], list[int]]]:
    """Return (prompt ids, ids of answer A, ids of answer B) of each pair, exactly those that training feeds."""
    texts = []
    for pair in pairs:
        texts += (
            frame.wrap(pair.prompt),
            frame.wrap_answer(pair.response_a),
            frame.wrap_answer(pair.response_b),
        )
    ids = (encoding.ids for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False))
    return [(frame.surround(next(ids)), frame.answer(next(ids)), frame.answer(next(ids))) for _ in pairs]


def pair_schema() -> pa.Schema:
    """Return the columns of pairs.parquet, one row a battle; tokens count prompt and response together."""
    import pyarrow as pa

    return pa.schema(
        [
            *((name, pa.string()) for name in ("id", "prompt", "response_a", "response_b")),
            *((name, pa.int32()) for name in ("tokens_a", "tokens_b", "dropped")),
            ("cut", pa.bool_()),
        ]
    )


def pair_table(fitted: Sequence[FittedPair]) -> pa.RecordBatch:
    """Return battles' rows of pairs.parquet."""
    import pyarrow as pa

    columns: dict[str, list[Any]] = {
        **{
            name: [getattr(each.pair, name) for each in fitted] for name in ("id", "prompt", "response_a", "response_b")
        },
        **{name: [getattr(each, name) for each in fitted] for name in ("tokens_a", "tokens_b", "dropped", "cut")},
    }
    return pa.RecordBatch.from_pydict(columns, schema=pair_schema())


@dataclass
class PairTally:
    """What the audit says of the reward view, added up battle by battle."""

    battles: int = 0
    multi_turn: int = 0
    ties: int = 0
    identical: int = 0
    pairs: int = 0
    multi_turn_pairs: int = 0
    rows_cut: int = 0
    rows_with_dropped_turns: int = 0
    longest: int = 0
    tokens_before: int = 0
    tokens_fed: int = 0
    cut: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prompt", "a", "b"), 0))
    lost: dict[str, int] = field(default_factory=lambda: dict.fromkeys(("prompt", "a", "b"), 0))

    def add(self, fitted: FittedPair, turns: int, verdict: str | None) -> None:
        """Count one battle of `turns` turns, dropped ones included."""
        self.battles += 1
        self.multi_turn += turns > 1
        identical = fitted.pair.response_a == fitted.pair.response_b
        self.ties += verdict == "tie"
        self.identical += identical and verdict in ("a", "b")
        pair = verdict in ("a", "b") and not identical
        self.pairs += pair
        self.multi_turn_pairs += pair and turns > 1
        self.rows_cut += fitted.cut
        self.rows_with_dropped_turns += fitted.dropped > 0
        self.longest = max(self.longest, fitted.tokens)
        self.tokens_before += fitted.tokens_full
        self.tokens_fed += fitted.tokens
        for name, lost in zip(self.lost, fitted.lost, strict=True):
            self.lost[name] += lost
            self.cut[name] += lost > 0

    def preferences(self) -> dict[str, Any]:
        """Return the counts of the battles that have a verdict."""
        return {
            "battles": self.battles,
            "pairs": self.pairs,
            "ties_left_out": self.ties,
            "identical_left_out": self.identical,
            "multi_turn": {"battles": self.multi_turn, "share": _share(self.multi_turn, self.battles)},
            "single_turn_only_would_lose": {
                "pairs": self.multi_turn_pairs,
                "share": _share(self.multi_turn_pairs, self.pairs),
            },
        }

    def truncation(self) -> dict[str, Any]:
        """Return what fitting cost; tokens are those of the longer sequence of each battle."""
        return {
            "rows": self.battles,
            "rows_cut": self.rows_cut,
            "rows_cut_share": _share(self.rows_cut, self.battles),
            "rows_with_dropped_turns": self.rows_with_dropped_turns,
            "tokens_before": self.tokens_before,
            "tokens_fed": self.tokens_fed,
            "fields_cut": self.cut,
            "tokens_lost_in_kept_turns": self.lost,
            "longest_row": self.longest,
        }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 6) if whole else 0.0


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
