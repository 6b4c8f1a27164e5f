"""A card: memory, matrix rate and number formats of a GPU that people train on, from its maker's data sheet."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
# Tokens of one forward pass in scoring. A GPU wants many to be busy. A CPU is busy with one row, and what does not fit
# into its caches costs time: see "Ways of batching" in docs/scoring.md.
TOKEN_BUDGET = {"cpu": 1024, "cuda": 32768}


@dataclass(frozen=True)
class Card:
    """`memory` in GiB as the driver shows it; `rate` in dense 16-bit TFLOP/s with fp32 accumulation."""

    name: str
    memory: float
    rate: float
    bf16: bool = True


CARDS: dict[str, Card] = {
    card.name: card
    for card in (
        Card("T4", 14.6, 65, bf16=False),
        Card("RTX-3060-6GB", 5.8, 40),
        Card("RTX-3090", 23.7, 71),
        Card("RTX-4090", 23.6, 165),
        Card("A100-40GB", 39.4, 312),
        Card("A100-80GB", 79.2, 312),
        Card("H100", 79.1, 989),
        Card("H200", 139.8, 989),
    )
}
