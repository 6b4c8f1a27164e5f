"""Fitting battles to a token budget: the oldest turns go first, then prompt, A and B share what is left.

LLaMA-Factory would cut the END of a prompt that is too long, and with it the question. So nothing that leaves here
is longer than `cutoff_len`, counted with the model's own tokenizer inside the whole chat frame, in both orders.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from common.battle import Battle, swap
from common.console import name_of
from common.errors import ArenaError
from data_prep.prompt import FIELDS, JudgePrompt, texts_of
from data_prep.sanitize import Neutralizer

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

    from data_prep.chat_template import ChatFrame

# Stands where the middle of a text was cut out.
MARKER = "\n[… cut …]\n"
# Joining texts can merge or split tokens at the seams, so an estimate may be a few tokens off: try again, tighter.
_ROUNDS = 24
# Letters that hardly any tokenizer puts into one token on average: more are too long, most likely.
_LETTERS_A_TOKEN = 5
# By so many tokens a turn the two orders of a battle may differ, and by an eighth of the budget: far more than they do.
_ENDS = 8


@dataclass(frozen=True, slots=True)
class Fitted:
    """A battle that fits: its texts as fed, its message in both orders, and what was lost on the way.

    `tokens` and `tokens_swapped` count the whole sequence with the answer (`message_swapped` is empty and its count
    0 where the other order was neither asked for nor near the budget); `tokens_full` is what the uncut battle would
    have taken; `lost` are the tokens cut from (prompt, a, b) of the kept turns.
    """

    battle: Battle
    dropped: int
    message: str
    message_swapped: str
    tokens: int
    tokens_swapped: int
    tokens_full: int
    lost: tuple[int, int, int]

    @property
    def cut(self) -> bool:
        """True if any turn or any part of a text was left out."""
        return self.dropped > 0 or any(self.lost)


@dataclass(slots=True)
class _Job:
    """A battle on its way: the candidate texts, and what its first tokenization told."""

    battle: Battle
    tokens_full: int = 0
    dropped: int = 0
    candidate: Battle | None = None
    lost: tuple[int, int, int] = (0, 0, 0)
    messages: tuple[str, ...] = ()  # AB, and BA where both orders are asked for
    tokens: tuple[int, ...] = ()
    # (start, end) characters of every token, by (turn, field); only for battles that are too long
    tokens_of: dict[tuple[int, str], list[tuple[int, int]]] | None = None


class Fitter:
    """Fits battles to one experiment's budget."""

    def __init__(self, frame: ChatFrame, tokenizer: Tokenizer, prompt: JudgePrompt, *, cutoff_len: int, shares):
        """Measure the prompt's fixed parts; raises ArenaError if `cutoff_len` cannot hold even them."""
        self.frame, self.tokenizer, self.prompt = frame, tokenizer, prompt
        self.cutoff_len = cutoff_len
        self._shares = {"prompt": shares.prompt, "a": shares.a, "b": shares.b}
        self._neutral = Neutralizer(frame.special_strings, prompt.lines)
        self._room = cutoff_len - frame.overhead
        self._marker_len = len(self._encode(MARKER)) + 1
        self._fixed: dict[tuple[int, bool], int] = {}
        smallest = self._count(self._bare(1, dropped=1, text=MARKER)) + frame.overhead
        if smallest > cutoff_len:
            raise ArenaError(
                f"the judge prompt alone takes {smallest} of the {cutoff_len} tokens of cutoff_len",
                where=prompt.where,
                remedy=f"raise cutoff_len to {2 * smallest} or more in experiment.yaml, or shorten the judge prompt",
            )

    def clean(self, battle: Battle) -> Battle:
        """Return the battle with empty texts named, special strings and the prompt's own lines broken up."""
        return self._neutral.battle(battle)

    def fit(self, battles: Sequence[Battle], *, both_orders: bool) -> list[Fitted]:
        """Fit a batch of battles; the result is in the same order and every row is within `cutoff_len`.

        With `both_orders` the A/B-swapped message of each is made and counted; without it only of those near the
        budget, which costs little: what a battle is cut to does not depend on who asks, and both of its orders are
        within the budget either way. Raises ArenaError that names the battle if it cannot be fitted.
        """
        jobs = [_Job(self.clean(battle)) for battle in battles]
        for job in jobs:
            job.candidate = job.battle
        over = self._first_look(jobs, both_orders)
        for attempt in range(_ROUNDS):
            if not over:
                break
            for job in over:
                self._shrink(job, slack=attempt * attempt)
            over = self._measure(over, both_orders)
        if over:
            raise ArenaError(
                f"cannot be fitted to {self.cutoff_len} tokens",
                where=f"battle {name_of(over[0].battle.id)}",
                remedy="raise cutoff_len in experiment.yaml",
            )
        return [self._finish(job) for job in jobs]

    def _first_look(self, jobs: list[_Job], both_orders: bool) -> list[_Job]:
        """Count the whole battles and return those that are too long, with their tokens' places."""
        # What is far too long by its letters is tokenized once, with places, instead of twice and in both orders.
        likely = [job for job in jobs if _letters(job.battle) > _LETTERS_A_TOKEN * self.cutoff_len]
        self._analyse(likely)
        long = [job for job in likely if job.tokens_full > self.cutoff_len]
        known = set(map(id, long))
        others = [job for job in jobs if id(job) not in known]
        over = self._measure(others, both_orders)
        for job in others:
            job.tokens_full = job.tokens[0]
        self._analyse(over)
        return [*long, *over]

    def _finish(self, job: _Job) -> Fitted:
        return Fitted(
            battle=job.candidate,
            dropped=job.dropped,
            message=job.messages[0],
            message_swapped=job.messages[1] if len(job.messages) > 1 else "",
            tokens=job.tokens[0],
            tokens_swapped=job.tokens[1] if len(job.tokens) > 1 else 0,
            tokens_full=job.tokens_full,
            lost=job.lost,
        )

    def _measure(self, jobs: list[_Job], both_orders: bool) -> list[_Job]:
        """Count every candidate with one or two batch calls; return those that exceed the budget."""
        for job in jobs:
            job.messages, job.tokens = (), ()
        self._add_order(jobs, lambda battle: battle)
        self._add_order(jobs if both_orders else [job for job in jobs if self._is_near(job)], swap)
        return [job for job in jobs if max(job.tokens) > self.cutoff_len]

    def _add_order(self, jobs: list[_Job], order: Callable[[Battle], Battle]) -> None:
        """Make and count one order's message of every candidate."""
        messages = [self.prompt.message(order(job.candidate), job.dropped) for job in jobs]
        texts = [self.frame.wrap(message) for message in messages]
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        for job, message, encoding in zip(jobs, messages, encoded, strict=True):
            job.messages += (message,)
            job.tokens += (len(encoding) + self.frame.overhead,)

    def _is_near(self, job: _Job) -> bool:
        """Tell whether the other order could exceed the budget though this one does not.

        The same texts stand in it, so that only tokens across their ends differ, a few for each text.
        """
        far = self.cutoff_len - self.cutoff_len // 8 - _ENDS * job.candidate.turns
        return far < job.tokens[0] <= self.cutoff_len

    def _analyse(self, jobs: list[_Job]) -> None:
        """Count a battle's tokens and find their places in its texts."""
        texts = [self.frame.wrap(self.prompt.message(job.battle)) for job in jobs]
        encodings = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        for job, encoding in zip(jobs, encodings, strict=True):
            job.tokens_full = len(encoding) + self.frame.overhead
            job.tokens_of = self._locate(job.battle, encoding)

    def _locate(self, battle: Battle, encoding: Encoding) -> dict[tuple[int, str], list[tuple[int, int]]]:
        """Return, for each text of the battle, the (start, end) characters of its tokens within that text."""
        skeleton = self.prompt.skeleton(battle.turns, 0)
        texts = texts_of(battle)
        offsets = encoding.offsets
        starts = [start for start, _ in offsets]
        found, at = {}, len(self.frame.before)
        for piece, slot in zip(skeleton.pieces, skeleton.slots, strict=False):
            begin = at + len(piece)
            at = begin + len(texts[slot])
            low, high = bisect_left(starts, begin), bisect_left(starts, at)
            found[slot] = [(s - begin, min(e, at) - begin) for s, e in offsets[low:high]]
        return found

    def _shrink(self, job: _Job, slack: int) -> None:
        """Choose a smaller candidate: drop the oldest turns, then cut the last turn's texts; `slack` tokens below."""
        room = self._room - slack
        turns = job.battle.turns
        texts = [0] * (turns + 1)  # tokens of the texts from this turn to the last
        for (turn, _), spans in job.tokens_of.items():
            texts[turn] += len(spans)
        texts = list(accumulate(reversed(texts)))[::-1]

        def too_long(dropped: int) -> bool:
            return self._overhead(turns - dropped, dropped) + texts[dropped] > room

        # The fewest to drop: fewer turns are never longer, so that thousands of them need a dozen looks. The template
        # says where turns were dropped, so that none dropped is a case of its own.
        job.dropped = 0
        if too_long(0):
            job.dropped = min(bisect_left(range(turns), True, lo=1, key=lambda d: not too_long(d)), turns - 1)
        job.candidate = last_turns(job.battle, job.dropped)
        job.lost = (0, 0, 0)
        if too_long(job.dropped):
            self._cut(job, turn=turns - 1, room=room - self._overhead(1, job.dropped))

    def _cut(self, job: _Job, turn: int, room: int) -> None:
        spans = {field: job.tokens_of[turn, field] for field in FIELDS}
        granted = share_out({f: len(spans[f]) for f in FIELDS}, self._shares, room, floor=self._marker_len)
        texts, lost = {}, []
        for field, column in zip(
            FIELDS, (job.battle.prompts, job.battle.responses_a, job.battle.responses_b), strict=True
        ):
            kept, gone = cut_middle(column[turn], spans[field], granted[field], self._marker_len)
            texts[field] = self._neutral(kept)  # what stands behind the marker begins a line now
            lost.append(gone)
        job.lost = tuple(lost)
        job.candidate = replace(
            job.candidate, prompts=(texts["prompt"],), responses_a=(texts["a"],), responses_b=(texts["b"],)
        )

    def _overhead(self, turns: int, dropped: int) -> int:
        """The wrapped prompt's tokens without any of the texts' own (measured once, with a letter for each text)."""
        key = (turns, bool(dropped))
        if key not in self._fixed:
            self._fixed[key] = self._count(self._bare(turns, dropped, text="x")) - 3 * turns
        return self._fixed[key]

    def _bare(self, turns: int, dropped: int, text: str) -> str:
        column = (text,) * turns
        return self.frame.wrap(self.prompt.message(Battle("", column, column, column), dropped))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _count(self, text: str) -> int:
        return len(self._encode(text))


def _letters(battle: Battle) -> int:
    return sum(map(len, (*battle.prompts, *battle.responses_a, *battle.responses_b)))


def share_out(wanted: dict[str, int], shares: dict[str, float], room: int, floor: int) -> dict[str, int]:
    """Divide `room` tokens by weighted max-min fairness: whoever wants less than its share leaves the rest to others.

    Everyone gets what it wants or at least `floor`; beyond the floors the sum never exceeds `room`.
    """
    lowest = {f: min(n, floor) for f, n in wanted.items()}

    def grants(level: float) -> dict[str, int]:
        return {f: max(lowest[f], min(n, int(level * shares[f]))) for f, n in wanted.items()}

    low, high = 0.0, (max(wanted.values(), default=0) + 1) / min(shares.values())
    for _ in range(64):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(grants(middle).values()) <= room else (low, middle)
    return grants(low)


def cut_middle(text: str, spans: list[tuple[int, int]], granted: int, marker_len: int) -> tuple[str, int]:
    """Keep `granted` tokens of a text, marker included: head and tail stay, the middle becomes MARKER.

    `spans` are the characters of each token. Returns the text and the number of its tokens that were lost.
    """
    if len(spans) <= granted:
        return text, 0
    keep = max(granted - marker_len, 0)
    head, tail = keep - keep // 2, keep // 2
    front = text[: spans[head - 1][1]] if head else ""
    back = text[spans[len(spans) - tail][0] :] if tail else ""
    return front + MARKER + back, len(spans) - keep


def last_turns(battle: Battle, dropped: int) -> Battle:
    """Return the battle without its `dropped` oldest turns."""
    return replace(
        battle,
        prompts=battle.prompts[dropped:],
        responses_a=battle.responses_a[dropped:],
        responses_b=battle.responses_b[dropped:],
    )


def in_chunks(items: Iterable, size: int) -> Iterable[list]:
    """Yield lists of up to `size` items."""
    chunk = []
    for item in items:
        chunk.append(item)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
