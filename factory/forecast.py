"""The forecast: memory and hours of every stage on named cards, from the exported rows, before anything is spent."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from common.error_hints import LESS_MEMORY
from common.experiment import Experiment
from common.stages import STEPS, TRAININGS
from factory.devices import (
    CARD_START,
    CARDS,
    CPU_START,
    TOKEN_BUDGET,
    DeviceRates,
    card_named,
    card_of,
    own_card,
    this_cpu,
)
from factory.memory import scoring_memory, training_memory
from factory.recipe_checks import check_recipes
from factory.stage_context import StageContext
from factory.workload import (
    SMALL,
    Counts,
    ModelSize,
    TokenLengths,
    TrainConfig,
    padded_tokens,
    sequence_lengths,
    size_of,
    time_on_cpu,
)

# This machine's CPU, beside the cards' names.
CPU = "cpu"
# The competition's votes, and its hidden test set as Kaggle states it.
_VOTES, _TEST = 57_477, 25_000
# GiB that a driver shows of a card's GB.
_SHOWN = 0.98


def forecast(
    experiment: Experiment,
    stages: Iterable[str],
    cards: Iterable[str] = (),
    gpu_memory: float | None = None,
    rows: int | None = None,
    test_rows: int | None = None,
) -> dict[str, Any]:
    """Return memory (GiB) and hours of each stage on each device: names of cards, or "cpu" for this machine.

    No stages: all whose rows are exported; `left_out` says why the others are not. No devices: this machine's own card
    and all others, and its CPU for a small model. `gpu_memory`: a card of so many GB. `rows` of votes, or nothing
    exported yet: the competition's lengths and, where `rows` and `test_rows` are silent, its numbers.
    Raises UsageError for an unknown device, ArenaError where rows, recipe or the model's sizes are missing.
    """
    stages, named = list(stages), [CPU if each.lower() == CPU else card_named(each) for each in cards]
    size = size_of(experiment.model, experiment.revision)
    devices = {name: CARDS.get(name) for name in named}
    if gpu_memory:
        devices[f"{gpu_memory:g} GB"] = card_of(gpu_memory * _SHOWN)
    if not devices:
        devices = {**own_card(), **CARDS, **({CPU: None} if size.parameters <= SMALL else {})}
    assumed = Counts(rows, test_rows)
    if rows or not (experiment.data_folder / "rows.parquet").is_file():
        assumed = Counts(rows or _VOTES, _TEST if test_rows is None else test_rows)
    left_out = {} if stages else _left_out(experiment, assumed)
    stages = stages or [name for name in TRAININGS if name not in left_out]
    check_recipes(experiment, stages)
    return {
        "experiment": experiment.name,
        "model": experiment.model,
        "parameters": size.parameters,
        "stages": {
            name: _forecast_stage(StageContext(experiment, name, fold=experiment.written_fold), size, devices, assumed)
            for name in stages
        },
        "folds": experiment.folds,
        "left_out": left_out,
        "assumed": asdict(assumed),
    }


def _left_out(experiment: Experiment, assumed: Counts) -> dict[str, str]:
    """Return the trainings that lack a recipe or rows, each with the command that makes them."""
    prepare = f"python run.py prepare -e {shlex.quote(experiment.name)} --train FILE"
    pairs = assumed.votes is not None or (experiment.data_folder / "pairs.parquet").is_file()
    found = {}
    for stage in TRAININGS:
        if not experiment.recipe(stage).is_file():
            found[stage] = f"{experiment.recipe(stage)} is missing: python run.py render -e {experiment.name}"
        elif STEPS[stage].data == "dpo_reward" and not pairs:
            found[stage] = f"the pairs that it trains on are not exported yet: {prepare} --pairs"
    return found


def _forecast_stage(
    context: StageContext, size: ModelSize, devices: Mapping[str, DeviceRates | None], assumed: Counts
) -> dict[str, Any]:
    config = TrainConfig.of(context.recipe)
    lengths = sequence_lengths(context, config["max_samples"], assumed)
    training = training_work(size, config, lengths)
    # The implicit reward reads each response with and without the adapter.
    implicit = context.name == "dpo_reward" and config.has_reference
    scoring = scoring_work(size, lengths, reference=implicit)

    def scoring_gib(device: DeviceRates) -> float:
        # The implicit reward's adapter is scored on the base that it was trained on.
        bits = {"8bit": 8, "4bit": 4}.get(context.experiment.precision)
        bits = config["quantization_bit"] if implicit and device.kind == "cuda" else bits
        budget, longest = TOKEN_BUDGET[device.kind], int(lengths.scored.max())
        return sum(scoring_memory(size, bits=bits, budget=budget, longest=longest, device=device.kind).values())

    def on(name: str) -> dict[str, Any]:
        nf4 = config["quantization_bit"] == 4
        device = devices[name] or this_cpu(size.hidden, size.feed_forward, nf4=nf4)
        parts = training_memory(size, config, lengths.longest, device.kind)
        memory, scored = sum(parts.values()), scoring_gib(device)
        advice = []
        if device.kind == "cuda" and not device.bf16 and config.compute_bytes == 2:
            advice.append("it has no bf16: write bf16: false and fp16: true in the recipe")
        if memory > device.memory:
            advice.append(f"the training does not fit: {LESS_MEMORY}")
        if scored > device.memory:
            advice.append("scoring does not fit: write precision: 8bit (or 4bit) in experiment.yaml")
        own = context.experiment
        if (device.kind, context.label) == ("cpu", "sft") and time_on_cpu(own.model) == "hours":
            advice.append(f"python run.py probe -e {own.name} first: it reads each battle once and trains nothing")
        return {
            "memory": memory,
            "memory_parts": parts,
            "fits": memory <= device.memory,
            "training_hours": training.seconds(device, device.training_rate) / 3600,
            "scoring_memory": scored,
            "scoring_fits": scored <= device.memory,
            "scoring_hours": scoring.seconds(device, device.scoring_rate) / 3600,
            "advice": advice,
        }

    return {
        "rows": len(lengths.train),
        "longest": lengths.longest,
        "mean_tokens": float(lengths.train.mean()),
        "steps": training.steps,
        "scored_sequences": len(lengths.scored),
        "devices": {name: on(name) for name in devices},
    }


# --- hours: operations, and a device's rate of them
#
# A token of a forward pass costs 2 operations a weight and 2 * layers * attention width * (tokens before it, on average
# half the sequence) * 2 for the attention. Backward through frozen weights costs one forward pass more, gradient
# checkpointing another, DPO's reference another; the adapter's own share is counted with the weights.


@dataclass(frozen=True)
class Work:
    """Floating-point operations, weights dequantised, layer calls and optimizer steps of one run."""

    operations: float
    dequantised: float
    layer_calls: float
    steps: int

    def seconds(self, device: DeviceRates, rate: float) -> float:
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


def print_forecast(console: Console, found: dict[str, Any]) -> None:
    """Print one table a stage: memory, hours and what to change where it does not fit."""
    console.print(f"{found['model']}: {found['parameters'] / 1e6:,.1f} million parameters")
    assumed = found["assumed"]
    if assumed["votes"] is not None:
        what = f"Assumed: {assumed['votes']:,} votes as long as the competition's, {assumed['test'] or 0:,} test rows"
        console.print(f"{what} (--rows, --test-rows); votes that were prepared are measured")
    for stage, one in found["stages"].items():
        console.print(  # not the table's title, which would be broken to the width of the table
            f"{found['experiment']} / {stage}: {one['rows']:,} rows, {one['mean_tokens']:.0f} tokens on average, "
            f"the longest {one['longest']:,}; {one['steps']:,} steps",
            soft_wrap=True,
        )
        table = Table()
        for heading in ("device", "train GiB", "train time", "score GiB", "score time"):
            table.add_column(heading, justify="left" if heading == "device" else "right")
        alike: dict[tuple[str, ...], list[str]] = {}  # all cards have one figure for a tiny model: they share a row
        for name, device in one["devices"].items():
            alike.setdefault(_cells(device), []).append(name)
        for cells, names in alike.items():
            table.add_row(", ".join(names), *cells)
        console.print(table)
        for name, device in one["devices"].items():
            for line in device["advice"]:
                console.print(f"  {name}: {line}")
    for stage, why in found["left_out"].items():
        console.print(f"left out: {stage}: {why}", soft_wrap=True)
    measured = any(CPU in one["devices"] for one in found["stages"].values())
    cpu = "this machine's cpu: its speed was measured now" if measured else "this machine's CPU: --card cpu"
    console.print(
        f"By formula (docs/forecast.md). Cards: assumed shares of their data sheet's rate, not run; {cpu}.\n"
        f"Each time includes the start, up to the first step: {CARD_START:.0f} s assumed on a card"
        f"{f', {CPU_START:.0f} s on the cpu' if measured else ''}.",
        soft_wrap=True,
    )


def _cells(device: dict[str, Any]) -> tuple[str, ...]:
    train, score = ("" if device[key] else " (too much)" for key in ("fits", "scoring_fits"))
    return (
        f"{device['memory']:.1f}{train}",
        _time(device["training_hours"]),
        f"{device['scoring_memory']:.1f}{score}",
        _time(device["scoring_hours"]),
    )


def _time(hours: float) -> str:
    """Return hours in the unit that a person would use: 36 s, 12 min, 3.4 h."""
    seconds = hours * 3600
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 59.5 * 60 else f"{hours:.1f} h"
