"""Hours: how long a training or a scoring takes, from its floating-point operations and a device's measured rate.

A token of a forward pass costs 2 operations a weight and 2 * layers * attention width * (tokens before it, on
average half the sequence) * 2 for the attention. Backward through frozen weights costs one forward pass more,
gradient checkpointing another, DPO's reference another; the adapter's own share is counted with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from factory.gpu import TOKEN_BUDGET
from factory.model_size import ModelShape
from factory.train_config import Setup, Workload

# Shares of the matrix rate that training and scoring reach on a GPU, derived from two public runs of this
# competition; docs/forecast.md has the derivation. Not measured by this project.
TRAINING_SHARE, SCORING_SHARE = 0.30, 0.21

# Seconds from the command to the first step with a large model on a GPU: assumed, not measured. It is most of what a
# forecast says of a tiny model, which a CPU that starts in less then seems to be faster with.
CARD_START = 60.0

# What a CPU adds to its products, measured on two cores with benchmarks/forecast_check.py.
CPU_SHARE = 0.55  # of the probe's rate, in a whole training step
CPU_LAYER_CALL = 0.9e-3  # seconds that calling one layer costs, however small it is
CPU_START = 12.0  # seconds from the command to the first step


@dataclass(frozen=True)
class Speed:
    """A device's speed: operations a second, nf4 weights made whole a second, seconds a layer's call and the start."""

    rate: float
    dequantise: float = float("inf")
    layer_call: float = 0.0
    start: float = CARD_START

    def seconds(self, work: Work) -> float:
        """Return the seconds that `work` takes, from the command to the end."""
        once = work.operations / self.rate + work.dequantised / self.dequantise
        return self.start + once + work.layer_calls * self.layer_call


@dataclass(frozen=True)
class Work:
    """Floating-point operations, quantised weights made whole, layer calls and optimizer steps of one run."""

    operations: float
    dequantised: float
    layer_calls: float
    steps: int


def training_work(shape: ModelShape, setup: Setup, workload: Workload) -> Work:
    """Return the work of a whole training run, evaluations included."""
    rows = len(workload.train)
    steps_an_epoch = max(1, -(-rows // (setup.batch * setup.accumulation)))
    steps = setup.max_steps if setup.max_steps > 0 else round(steps_an_epoch * setup.epochs)
    epochs = steps / steps_an_epoch
    tokens = workload.padded_tokens(workload.train, setup.batch, grouped=setup.grouped) * epochs
    valid = workload.padded_tokens(workload.valid, setup.eval_batch, grouped=False) * setup.evaluations
    passes = 2 + setup.checkpointing + setup.reference
    mean = _mean_of_squares(workload.train)
    batches = epochs * -(-rows // setup.batch)
    evaluated = setup.evaluations * -(-len(workload.valid) // setup.eval_batch)
    head = _head(shape)
    operations = tokens * (passes * (_token(shape, mean) + head) + _lora(shape, setup))
    operations += valid * (1 + setup.reference) * (_token(shape, mean) + head)
    # Each pass calls each layer once a batch, whatever the number of sequences in it.
    calls = batches * passes + evaluated * (1 + setup.reference)
    whole = calls * shape.linear if setup.bits else 0.0
    return Work(operations, whole, calls * shape.layers, steps)


def scoring_work(shape: ModelShape, workload: Workload, *, reference: bool) -> Work:
    """Return the work of scoring; batches are in length order, so that next to nothing is padding."""
    tokens = float(workload.scored.sum()) * (1 + reference)
    operations = tokens * _token(shape, _mean_of_squares(workload.scored))
    batches = max(1.0, tokens / TOKEN_BUDGET["cpu"])  # a GPU's calls cost nothing beside their products
    return Work(operations, 0.0, batches * shape.layers, 0)


def _token(shape: ModelShape, mean_context: float) -> float:
    return 2.0 * shape.linear + 4.0 * shape.layers * shape.attention_width * mean_context / 2


def _lora(shape: ModelShape, setup: Setup) -> float:
    return 6.0 * shape.lora(setup.rank)


def _head(shape: ModelShape) -> float:
    """Operations of the head for one token of one pass: training sends every position through it."""
    return 2.0 * shape.embedding


def _mean_of_squares(lengths: np.ndarray) -> float:
    """Return the length of the sequence that a token stands in, on average over tokens."""
    flat = lengths.ravel().astype(np.float64)
    return float((flat**2).sum() / flat.sum())
