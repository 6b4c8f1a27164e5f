"""Hours: how long a training or a scoring takes, from its floating-point operations and a device's rate.

A token of a forward pass costs 2 operations a weight and 2 * layers * attention width * (tokens before it, on
average half the sequence) * 2 for the attention. Backward through frozen weights costs one forward pass more,
gradient checkpointing another, DPO's reference another; the adapter's own share is counted with the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from factory.gpu import TOKEN_BUDGET, Device
from factory.model_size import ModelSize
from factory.train_config import TokenLengths, TrainConfig, padded_tokens


@dataclass(frozen=True)
class Work:
    """Floating-point operations, weights dequantised, layer calls and optimizer steps of one run."""

    operations: float
    dequantised: float
    layer_calls: float
    steps: int

    def seconds(self, device: Device, rate: float) -> float:
        """Return the seconds from the command to the end, at a rate of operations a second."""
        computing = self.operations / rate + self.dequantised / device.dequantise
        return device.start + computing + self.layer_calls * device.layer_call


def training_work(size: ModelSize, config: TrainConfig, lengths: TokenLengths) -> Work:
    """Return the work of a whole training run, evaluations included."""
    rows, batch, valid_batch = (
        len(lengths.train),
        config["per_device_train_batch_size"],
        config["per_device_eval_batch_size"],
    )
    steps_an_epoch = max(1, -(-rows // (batch * config["gradient_accumulation_steps"])))
    steps = int(config["max_steps"])
    if steps <= 0:
        steps = round(steps_an_epoch * float(config["num_train_epochs"]))
    epochs = steps / steps_an_epoch
    grouped = config["train_sampling_strategy"] == "group_by_length"
    tokens = padded_tokens(lengths.train, batch, grouped=grouped) * epochs
    valid = padded_tokens(lengths.valid, valid_batch, grouped=False) * config.evaluations
    passes = 2 + config.checkpoints + config.has_reference
    batches = epochs * -(-rows // batch)
    evaluated = config.evaluations * -(-len(lengths.valid) // valid_batch)
    # Training sends every position through the head.
    token = _token(size, lengths.train) + 2.0 * size.embedding
    operations = tokens * (passes * token + 6.0 * size.lora(config["lora_rank"]))
    operations += valid * (1 + config.has_reference) * token
    # Each pass calls each layer once a batch, whatever the number of sequences in it.
    calls = batches * passes + evaluated * (1 + config.has_reference)
    return Work(operations, calls * size.linear if config["quantization_bit"] else 0.0, calls * size.layers, steps)


def scoring_work(size: ModelSize, lengths: TokenLengths, *, reference: bool) -> Work:
    """Return the work of scoring; batches are in length order, so that next to nothing is padding."""
    tokens = float(lengths.scored.sum()) * (1 + reference)
    batches = max(1.0, tokens / TOKEN_BUDGET["cpu"])  # a GPU's calls cost nothing beside their products
    return Work(tokens * _token(size, lengths.scored), 0.0, batches * size.layers, 0)


def _token(size: ModelSize, lengths: np.ndarray) -> float:
    """Return the operations of one token in the layers, in a sequence of the length that tokens have on average."""
    flat = lengths.ravel().astype(np.float64)
    context = float((flat**2).sum() / flat.sum())
    return 2.0 * size.linear + 4.0 * size.layers * size.attention_width * context / 2
