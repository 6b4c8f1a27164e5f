"""Preference rows: what DPO and a reward model learn from, as LLaMA-Factory reads it and as scoring feeds it.

judge view    the judge prompt; chosen = the true verdict's label, rejected = a wrong one (`dpo_rejected`)
reward view   the user's prompt; chosen = the winning response, rejected = the losing one (see data_prep.flatten)

{"id": "65089", "conversations": [{"from": "human", "value": …}],
 "chosen": {"from": "gpt", "value": …}, "rejected": {"from": "gpt", "value": …}}
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Literal

from common.battle import VERDICTS
from data_prep.flatten import Pair

if TYPE_CHECKING:
    import pyarrow as pa
    from tokenizers import Tokenizer

    from data_prep.chat_template import ChatFrame
    from data_prep.pair_budget import FittedPair

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
