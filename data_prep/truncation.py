"""Fitting battles to a token budget: the oldest turns go first, then prompt, A and B share what is left.

LLaMA-Factory would cut the END of a prompt that is too long, and with it the question. So nothing that leaves here
is longer than `cutoff_len`, counted with the model's own tokenizer inside the whole chat frame. The judge prompt is
fitted here, in both orders; data_prep.preference_pairs fits pairs of responses by the same steps.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate, islice
from threading import Timer

from tokenizers import Encoding, Tokenizer

from common.battle import TEXTS, Battle, swap
from common.console import name_of
from common.errors import ArenaError, is_panic
from data_prep.chat_template import ChatFrame
from data_prep.prompt import FIELDS, JudgePrompt, Neutralizer, texts_of

# Stands where the middle of a text was cut out.
MARKER = "\n[… cut …]\n"
# Joining texts can merge or split tokens at the seams, so an estimate may be a few tokens off: try again, tighter.
_ROUNDS = 24
# Hardly any tokenizer puts so many letters into one token on average: a text with more of them is most likely too long.
_LETTERS_A_TOKEN = 5
# The two orders of a battle may differ by so many tokens a turn, and by an eighth of the budget: far more than they do.
_ENDS = 8
# Seconds that fitting some battles may take, and letters a second: a hundredth of what a slow core does.
_PATIENCE, _SLOWEST = 60.0, 2_000
Spans = list[tuple[int, int]]  # first and last character of each token of a text


@dataclass(frozen=True, slots=True)
class Fitted:
    """A battle whose sequences are within the budget: its texts as fed, and what was lost on the way.

    `lengths` count each measured sequence with its answer: the two orders of a judge prompt (the second one only where
    it was measured), or the two responses of a pair. `tokens` is the first order's, or the longer response's;
    `tokens_full` what it would have been uncut. `lost` are the tokens cut from (prompt, a, b) of the kept turns.
    """

    battle: Battle
    dropped: int
    lengths: tuple[int, ...]
    tokens: int
    tokens_full: int
    lost: tuple[int, int, int]

    @property
    def cut(self) -> bool:
        """True if any turn or any part of a text was left out."""
        return self.dropped > 0 or any(self.lost)


@dataclass(slots=True)
class Job:
    """A battle that is being fitted: the whole texts, and the shorter ones that are tried."""

    battle: Battle
    kept: Battle
    both_orders: bool = True
    dropped: int = 0
    lost: tuple[int, int, int] = (0, 0, 0)
    lengths: tuple[int, ...] = ()
    tokens: int = 0
    tokens_full: int = 0
    spans: dict[tuple[int, str], Spans] = field(default_factory=dict)  # by (turn, field); of battles that are too long
    room: int = 0  # what the last estimate was allowed to be, for pairs
    estimate: int = 0  # of the kept texts' tokens


class BudgetFitter:
    """Fits battles to one experiment's budget. A subclass says which sequences a battle becomes, by five methods:

    _measure(jobs)                           set `lengths` and `tokens` of the texts that are kept
    _locate(jobs)                            set `spans` of battles that are too long
    _estimate(turns, dropped, prompt, a, b)  tokens of the longest sequence, from those of prompts, responses A and B
    _room(job, attempt)                      what may be estimated, after so many estimates that were too low
    _share(wanted, room)                     divide tokens among prompt, A and B of the last turn
    """

    def __init__(
        self, frame: ChatFrame, tokenizer: Tokenizer, neutral: Neutralizer, *, cutoff_len: int, prompt_share: float
    ):
        self.frame, self.tokenizer, self.cutoff_len, self._neutral = frame, tokenizer, cutoff_len, neutral
        # The answers have equal shares: anything else would be a position bias by construction.
        self._shares = {"prompt": prompt_share, "a": (1 - prompt_share) / 2, "b": (1 - prompt_share) / 2}
        self._marker_len = self._count(MARKER) + 1
        self.model = "the model"  # as an error names it

    def clean(self, battle: Battle) -> Battle:
        """Return the battle with empty texts named, and special strings and the prompt's own lines broken up."""
        return self._neutral.battle(battle)

    def _fit(self, jobs: list[Job]) -> list[Fitted]:
        """Fit all jobs; raises ArenaError that names the first battle that cannot be fitted.

        A model's tokenizer may hold a regular expression that some text makes run for ever: then the process ends.
        """
        letters = sum(job.battle.characters for job in jobs)
        names = " to ".join(dict.fromkeys(name_of(job.battle.id) for job in (jobs[:1] + jobs[-1:])))
        slow = self._unreadable("takes too long", names)
        clock = Timer(_PATIENCE + letters / _SLOWEST, _end, [slow])
        clock.daemon = True
        clock.start()
        try:
            with without_panics():
                return self._fit_in_time(jobs)
        except BaseException as error:
            if not is_panic(error):
                raise
            if len(jobs) > 1:
                return [fitted for job in jobs for fitted in self._fit([job])]
            raise self._unreadable(f"fails ({error})", names) from None
        finally:
            clock.cancel()

    def _unreadable(self, how: str, names: str) -> ArenaError:
        return ArenaError(
            f"the tokenizer of {self.model} {how} on this text",
            where=f"battle {names}",
            remedy="choose another model (its tokenizer.json holds a bad regular expression), or leave the battle out",
        )

    def _fit_in_time(self, jobs: list[Job]) -> list[Fitted]:
        over = self._first_look(jobs)
        for attempt in range(_ROUNDS):
            if not over:
                break
            for job in over:
                self._shrink(job, self._room(job, attempt))
            over = self._too_long(over)
        if over:
            raise ArenaError(
                f"cannot be fitted to {self.cutoff_len} tokens",
                where=f"battle {name_of(over[0].battle.id)}",
                remedy="raise cutoff_len in experiment.yaml",
            )
        return [Fitted(j.kept, j.dropped, j.lengths, j.tokens, j.tokens_full, j.lost) for j in jobs]

    def _first_look(self, jobs: list[Job]) -> list[Job]:
        """Count the whole battles and return those that are too long, with their tokens' places."""
        over = self._too_long(jobs)
        for job in jobs:
            job.tokens_full = job.tokens
        self._locate(over)
        return over

    def _too_long(self, jobs: list[Job]) -> list[Job]:
        """Measure the kept texts and return the jobs that exceed the budget."""
        self._measure(jobs)
        return [job for job in jobs if max(job.lengths) > self.cutoff_len]

    def _shrink(self, job: Job, room: int) -> None:
        """Keep less of a battle: drop the oldest turns, then cut the last turn's texts, to an estimate of `room`."""
        turns = job.battle.turns
        # tokens of prompts, A and B from each turn to the last
        rest = [list(accumulate(len(job.spans[t, name]) for t in reversed(range(turns))))[::-1] for name in FIELDS]

        def estimate(dropped: int) -> int:
            return self._estimate(turns - dropped, dropped, *(each[dropped] for each in rest))

        # The fewest turns to drop. Fewer turns are never longer, so a dozen looks find it among thousands. The judge
        # prompt says where turns were dropped, so that none dropped is a case of its own.
        job.dropped = 0
        if estimate(0) > room:
            fits = bisect_left(range(turns), True, lo=1, key=lambda dropped: estimate(dropped) <= room)
            job.dropped = min(fits, turns - 1)
        job.kept, job.lost, job.estimate = last_turns(job.battle, job.dropped), (0, 0, 0), estimate(job.dropped)
        if job.estimate > room:
            self._cut(job, room - self._estimate(1, job.dropped, 0, 0, 0))
            job.estimate = room

    def _cut(self, job: Job, room: int) -> None:
        """Cut the texts of the one turn that is kept to `room` tokens in all."""
        spans = [job.spans[job.battle.turns - 1, name] for name in FIELDS]
        granted = self._share(list(map(len, spans)), room)
        texts = zip(job.kept.texts, spans, granted, strict=True)
        cuts = [cut_middle(column[0], *each, self._marker_len) for column, *each in texts]
        prompt, a, b = ((self._neutral(text),) for text, _ in cuts)  # the text after the marker begins a line now
        job.kept = replace(job.kept, prompts=prompt, responses_a=a, responses_b=b)
        job.lost = tuple(lost for _, lost in cuts)

    def _count(self, text: str) -> int:
        return len(self.tokenizer.encode(text, add_special_tokens=False))


class Fitter(BudgetFitter):
    """Fits battles to the budget as judge prompts, so that both orders are within it."""

    def __init__(
        self, frame: ChatFrame, tokenizer: Tokenizer, prompt: JudgePrompt, *, cutoff_len: int, prompt_share: float
    ):
        """Measure the prompt's fixed parts; raises ArenaError if `cutoff_len` cannot hold even them."""
        neutral = Neutralizer(frame.special_strings, prompt.lines)
        super().__init__(frame, tokenizer, neutral, cutoff_len=cutoff_len, prompt_share=prompt_share)
        self.prompt = prompt
        self._fixed = cache(self._measure_fixed)
        smallest = self._count(self._bare(1, dropped=1, text=MARKER)) + frame.overhead
        if smallest > cutoff_len:
            raise ArenaError(
                f"the judge prompt alone takes {smallest} of the {cutoff_len} tokens of cutoff_len",
                where=prompt.where,
                remedy=f"raise cutoff_len to {2 * smallest} or more in experiment.yaml, or shorten the judge prompt",
            )

    def fit(self, battles: Sequence[Battle], *, both_orders: bool) -> list[Fitted]:
        """Fit battles; the result is in the same order, and both orders of each are within `cutoff_len`.

        `both_orders` asks for the length of the A/B-swapped order of each. Without it only those near the budget are
        measured, which is quicker: what a battle is cut to is the same. Raises ArenaError that names a battle that
        cannot be fitted.
        """
        cleaned = map(self.clean, battles)
        return self._fit([Job(battle, battle, both_orders) for battle in cleaned])

    def _first_look(self, jobs: list[Job]) -> list[Job]:
        # What is far too long by its letters is tokenized once, with places, instead of twice and in both orders.
        likely = [job for job in jobs if job.battle.characters > _LETTERS_A_TOKEN * self.cutoff_len]
        self._locate(likely)
        long = [job for job in likely if job.tokens_full > self.cutoff_len]
        known = set(map(id, long))
        return [*long, *super()._first_look([job for job in jobs if id(job) not in known])]

    def _measure(self, jobs: list[Job]) -> None:
        for job, length in zip(jobs, self._lengths(jobs, [job.kept for job in jobs]), strict=True):
            job.lengths, job.tokens = (length,), length
        both = [job for job in jobs if job.both_orders or self._is_near(job)]
        for job, length in zip(both, self._lengths(both, [swap(job.kept) for job in both]), strict=True):
            job.lengths += (length,)

    def _lengths(self, jobs: list[Job], battles: list[Battle]) -> list[int]:
        messages = [self.prompt.message(battle, job.dropped) for job, battle in zip(jobs, battles, strict=True)]
        encodings = self.tokenizer.encode_batch_fast(list(map(self.frame.wrap, messages)), add_special_tokens=False)
        return [len(encoding) + self.frame.overhead for encoding in encodings]

    def _is_near(self, job: Job) -> bool:
        """Tell whether the other order could exceed the budget though this one does not.

        The same texts stand in it, so that only tokens across their ends differ, a few for each text.
        """
        far = self.cutoff_len - self.cutoff_len // 8 - _ENDS * job.kept.turns
        return far < job.lengths[0] <= self.cutoff_len

    def _locate(self, jobs: list[Job]) -> None:
        wrapped = [self.frame.wrap(self.prompt.message(job.battle)) for job in jobs]
        for job, encoding in zip(jobs, self.tokenizer.encode_batch(wrapped, add_special_tokens=False), strict=True):
            job.tokens_full = len(encoding) + self.frame.overhead
            job.spans = self._spans(job.battle, encoding)

    def _spans(self, battle: Battle, encoding: Encoding) -> dict[tuple[int, str], Spans]:
        """Return, for each text of the battle, the characters of its tokens within that text."""
        skeleton, texts = self.prompt.skeleton(battle.turns, 0), texts_of(battle)
        offsets = encoding.offsets
        starts = [start for start, _ in offsets]
        found, at = {}, len(self.frame.before)
        for piece, slot in zip(skeleton.pieces, skeleton.slots, strict=False):
            begin = at + len(piece)
            at = begin + len(texts[slot])
            low, high = bisect_left(starts, begin), bisect_left(starts, at)
            found[slot] = [(s - begin, min(e, at) - begin) for s, e in offsets[low:high]]
        return found

    def _room(self, job: Job, attempt: int) -> int:
        return self.cutoff_len - self.frame.overhead - attempt * attempt

    def _estimate(self, turns: int, dropped: int, prompt: int, a: int, b: int) -> int:
        return self._fixed(turns, dropped > 0) + prompt + a + b

    def _measure_fixed(self, turns: int, dropped: bool) -> int:
        """Return the wrapped prompt's tokens without the texts' own."""
        return self._count(self._bare(turns, dropped, text="x")) - 3 * turns

    def _share(self, wanted: list[int], room: int) -> list[int]:
        return list(share_out(dict(zip(FIELDS, wanted, strict=True)), self._shares, room, self._marker_len).values())

    def _bare(self, turns: int, dropped: int, text: str) -> str:
        column = (text,) * turns
        return self.frame.wrap(self.prompt.message(Battle("", column, column, column), dropped))


_stderr: list[int] = []  # of this process, while file descriptor 2 is another file


@contextmanager
def without_panics() -> Iterator[None]:
    """Keep Rust from writing the trace of a tokenizer's panic, which we report, to the terminal.

    What else is written within the block comes behind it. One thread of a process fits at a time.
    """
    try:
        _stderr.append(os.dup(2))
    except OSError:  # it is closed
        yield
        return
    with open(os.memfd_create("stderr"), "w+b") as aside:  # noqa: PTH123
        os.dup2(aside.fileno(), 2)
        try:
            yield
        except BaseException as error:
            if is_panic(error):
                aside.truncate(0)
            raise
        finally:
            os.dup2(_stderr[-1], 2)
            os.close(_stderr.pop())
            aside.seek(0)
            with suppress(OSError), open(2, "wb", closefd=False) as real:
                real.write(aside.read())


def _end(error: ArenaError) -> None:
    """Print an error and end this process from any thread: the main one is in a library that never returns."""
    os.write(_stderr[-1] if _stderr else 2, f"Error: {error}\n".encode(errors="backslashreplace"))
    os._exit(1)


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


def cut_middle(text: str, spans: Spans, granted: int, marker_len: int) -> tuple[str, int]:
    """Keep `granted` tokens of a text, marker included: head and tail stay, the middle becomes MARKER.

    Returns the text and the number of its tokens that were lost.
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
    return replace(battle, **{name: getattr(battle, name)[dropped:] for name in TEXTS})


def in_chunks(items: Iterable, size: int) -> Iterator[list]:
    """Yield lists of up to `size` items."""
    iterator = iter(items)
    while chunk := list(islice(iterator, size)):
        yield chunk
