"""The forecast: memory and hours of every stage on named cards, from the exported rows, before anything is spent."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from common.errors import UsageError
from common.stages import STEPS, TRAININGS
from factory.gpu import CARDS, GIB, TOKEN_BUDGET, Card
from factory.memory import Memory, scoring_memory, training_memory
from factory.model_size import ModelShape, shape_of
from factory.recipe_checks import check_recipes
from factory.runtime import (
    CARD_START,
    CPU_LAYER_CALL,
    CPU_SHARE,
    CPU_START,
    SCORING_SHARE,
    TRAINING_SHARE,
    Speed,
    Work,
    scoring_work,
    training_work,
)
from factory.train_config import Setup, Workload, setup_of, workload_of

if TYPE_CHECKING:
    from common.experiment import Experiment

# This machine's CPU, beside the cards' names.
CPU = "cpu"
# Weights up to which training on a CPU is a matter of hours; its row costs a second of measuring.
_SMALL = 5e8
_TERA = 1e12


@dataclass(frozen=True)
class _Job:
    """One stage of one experiment, as a forecast sees it."""

    experiment: Experiment
    stage: str
    shape: ModelShape
    setup: Setup
    workload: Workload

    @property
    def implicit(self) -> bool:
        """Whether scoring reads each response with and without the adapter."""
        return self.stage == "dpo_reward" and self.setup.reference


def forecast(experiment: Experiment, stages: Iterable[str], devices: Iterable[str]) -> dict[str, Any]:
    """Return memory (GiB) and hours of each stage on each device: names of `CARDS`, or "cpu" for this machine.

    No stages: all whose rows are exported; `left_out` says why the others are not. No devices: all cards, and this
    machine's CPU for a small model.
    Raises UsageError for an unknown device, ArenaError where rows, recipe or the model's sizes are missing.
    """
    stages, devices = list(stages), list(devices)
    if unknown := [name for name in devices if name not in (*CARDS, CPU)]:
        raise UsageError(f"there is no card {', '.join(unknown)}", remedy=f"choose from: {', '.join((*CARDS, CPU))}")
    shape = shape_of(experiment.model, experiment.revision)
    devices = devices or [*CARDS, *([CPU] if shape.parameters <= _SMALL else [])]
    found, left_out = {}, {} if stages else _left_out(experiment)
    stages = stages or [name for name in TRAININGS if name not in left_out]
    check_recipes(experiment, stages, installed=False)  # of another machine, maybe
    for stage in stages:
        setup = setup_of(experiment, stage)
        workload = workload_of(experiment, stage).first(setup.max_samples)
        job = _Job(experiment, stage, shape, setup, workload)
        found[stage] = _stage(job, devices)
    told = {"experiment": experiment.name, "model": experiment.model, "parameters": shape.parameters}
    return {**told, "stages": found, "left_out": left_out}


@dataclass(frozen=True)
class _Device:
    """What a forecast knows of a device: GiB to fill, and speeds."""

    kind: str  # cuda or cpu
    memory: float
    training: Speed
    scoring: Speed


def _stage(job: _Job, devices: list[str]) -> dict[str, Any]:
    train = training_work(job.shape, job.setup, job.workload)
    score = scoring_work(job.shape, job.workload, reference=job.implicit)
    return {
        "rows": len(job.workload.train),
        "longest": job.workload.longest,
        "mean_tokens": float(job.workload.train.mean()),
        "steps": train.steps,
        "scored_sequences": len(job.workload.scored),
        "devices": {name: _on(job, name, train, score) for name in devices},
    }


def _on(job: _Job, name: str, train: Work, score: Work) -> dict[str, Any]:
    card = CARDS.get(name)
    device = _this_cpu(job) if card is None else _of_card(card)
    memory = training_memory(job.shape, job.setup, job.workload.longest, device.kind)
    scoring = _scoring(job, None, device)
    fits = memory.total <= device.memory
    advice = [] if card is None else [*_format_advice(job, card), *([] if fits else _advice(job, card))]
    return {
        "memory": memory.total,
        "memory_parts": dict(memory.parts),
        "fits": fits,
        "training_hours": device.training.seconds(train) / 3600,
        "scoring_memory": scoring.total,
        "scoring_fits": scoring.total <= device.memory,
        "scoring_hours": device.scoring.seconds(score) / 3600,
        "advice": [*advice, *([] if card is None else _scoring_advice(job, device))],
    }


def _of_card(card: Card) -> _Device:
    rate = card.rate * _TERA
    return _Device("cuda", card.memory, Speed(rate * TRAINING_SHARE), Speed(rate * SCORING_SHARE))


def _this_cpu(job: _Job) -> _Device:
    import psutil

    from factory.gpu import probe_cpu

    probe = probe_cpu(job.shape, nf4=job.setup.bits == 4)
    speed = Speed(probe.rate * CPU_SHARE, probe.dequantise or float("inf"), CPU_LAYER_CALL, CPU_START)
    return _Device("cpu", psutil.virtual_memory().total / GIB, speed, speed)


def _scoring(job: _Job, bits: int | None, device: _Device) -> Memory:
    if job.implicit and device.kind == "cuda":
        bits = job.setup.bits  # the adapter is scored on the base that it was trained on
    longest = int(job.workload.scored.max())
    return scoring_memory(job.shape, bits=bits, budget=TOKEN_BUDGET[device.kind], longest=longest, device=device.kind)


def _advice(job: _Job, card: Card) -> list[str]:
    """Return the changes that make training fit, each on top of those before it, as far as any do."""
    lines: list[str] = []
    for said, setup, longest in _smaller(job):
        total = training_memory(job.shape, setup, longest).total
        lines.append(f"{said}: {total:.1f} GiB")
        if total <= card.memory:
            return lines
    return [*lines, "it still does not fit: choose a smaller model or a larger card"]


def _smaller(job: _Job) -> Iterator[tuple[str, Setup, int]]:
    """Yield what to change, and set-up and longest row after it, the cheapest change first."""
    setup, longest = job.setup, job.workload.longest
    if not setup.checkpointing:
        setup = setup.changed(checkpointing=True)
        yield "disable_gradient_checkpointing: false (a third more hours)", setup, longest
    if setup.batch > 1:
        accumulation = setup.accumulation * setup.batch
        setup = setup.changed(batch=1, accumulation=accumulation)
        yield f"per_device_train_batch_size: 1, gradient_accumulation_steps: {accumulation}", setup, longest
    if setup.stage == "sft" and not setup.liger:
        setup = setup.changed(liger=True)
        yield "enable_liger_kernel: true (pip install liger-kernel)", setup, longest
    if setup.bits != 4:
        setup = setup.changed(bits=4)
        yield "quantization_bit: 4 in experiment.yaml", setup, longest
    if setup.optimizer_bytes > 2:
        setup = setup.changed(optimizer_bytes=2)
        yield "optim: paged_adamw_8bit", setup, longest
    while longest > 512:
        longest //= 2
        yield f"cutoff_len: {longest} in experiment.yaml, then prepare again", setup, longest


def _format_advice(job: _Job, card: Card) -> list[str]:
    if card.bf16 or job.setup.compute_bytes == 4:
        return []
    return ["it has no bf16: write bf16: false and fp16: true in the recipe"]


def _scoring_advice(job: _Job, device: _Device) -> list[str]:
    if _scoring(job, None, device).total <= device.memory:
        return []
    for bits in (8, 4):
        total = _scoring(job, bits, device).total
        if total <= device.memory:
            return [f"scoring in 16 bits does not fit: precision: {bits}bit takes {total:.1f} GiB"]
    return ["scoring does not fit in any precision: choose a smaller model or a larger card"]


def print_forecast(console, found: dict[str, Any]) -> None:
    """Print one table a stage: memory, hours and what to change where it does not fit."""
    from rich.table import Table

    console.print(f"{found['model']}: {found['parameters'] / 1e6:,.1f} million parameters", highlight=False)
    for stage, one in found["stages"].items():
        console.print(  # not the table's title, which would be broken to the width of the table
            f"{found['experiment']} / {stage}: {one['rows']:,} rows, {one['mean_tokens']:.0f} tokens on average, "
            f"the longest {one['longest']:,}; {one['steps']:,} steps",
            highlight=False,
            soft_wrap=True,
        )
        table = Table()
        for heading in ("device", "train GiB", "train time", "score GiB", "score time"):
            table.add_column(heading, justify="left" if heading == "device" else "right")
        for name, cells in _rows(one["devices"]):
            table.add_row(name, *cells)
        console.print(table)
        for name, device in one["devices"].items():
            for line in device["advice"]:
                console.print(f"  {name}: {line}", highlight=False)
    for stage, why in found["left_out"].items():
        console.print(f"left out: {stage}: {why}", highlight=False, markup=False, soft_wrap=True)
    for line in _footnotes(found):
        console.print(line, highlight=False, soft_wrap=True)


def _footnotes(found: dict[str, Any]) -> list[str]:
    """Return how the figures were come by, and what of the times is the start."""
    devices = {name for one in found["stages"].values() for name in one["devices"]}
    cpu = "this machine's cpu: its speed was measured now" if CPU in devices else "this machine's CPU: --card cpu"
    lines = [f"By formula (docs/forecast.md). Cards: assumed shares of their data sheet's rate, not run; {cpu}."]
    starts = [f"{CARD_START:.0f} s assumed on a card"] if devices - {CPU} else []
    starts += [f"{CPU_START:.0f} s on the cpu"] if CPU in devices else []
    return [*lines, f"Each time holds its start, up to the first step: {', '.join(starts)}."]


def _rows(devices: dict[str, Any]) -> list[tuple[str, list[str]]]:
    """Return one row for each device; cards of one figure, as a tiny model has them, share a row."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, device in devices.items():
        alike.setdefault(tuple(_cells(device)), []).append(name)
    return [(", ".join(names), list(cells)) for cells, names in alike.items()]


def _cells(device: dict[str, Any]) -> list[str]:
    train, score = ("" if device[key] else " (too much)" for key in ("fits", "scoring_fits"))
    return [
        f"{device['memory']:.1f}{train}",
        _time(device["training_hours"]),
        f"{device['scoring_memory']:.1f}{score}",
        _time(device["scoring_hours"]),
    ]


def _time(hours: float) -> str:
    """Return hours in the unit that a person would say them in: 36 s, 12 min, 3.4 h."""
    seconds = hours * 3600
    if seconds < 99.5:
        return f"{max(1, round(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 59.5 * 60 else f"{hours:.1f} h"


def _left_out(experiment: Experiment) -> dict[str, str]:
    """Return the trainings whose recipe or rows are not there, each with the command that makes them."""
    prepare = f"python run.py prepare -e {shlex.quote(experiment.name)} --train FILE"
    pairs = (experiment.data_folder / "pairs.parquet").is_file()
    found = {}
    for stage in TRAININGS:
        if not experiment.recipe(stage).is_file():
            found[stage] = f"{experiment.recipe(stage)} is not rendered yet: {prepare}"
        elif STEPS[stage].data == "dpo_reward" and not pairs:
            found[stage] = f"the pairs that it trains on are not exported yet: {prepare} --pairs"
    return found
