"""The stage probe: hidden states of the untrained base, a linear probe fitted on them, and its report.

outputs/EXP/probe/states/<digest>/00012.npy    states of A minus those of B, of some training battles
outputs/EXP/probe/probe.npz, probe.json        the probe; what was tried, with cross-fitted log losses
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UsageError
from common.files import atomic_file, only_run, write_json
from common.progress import Show
from data_prep.export_reader import require_intact
from data_prep.truncation import in_chunks
from factory.prepare import ensure_pairs
from factory.stage_context import StageContext
from factory.workload import size_of
from scoring.metrics import as_groups, verdict_codes
from scoring.model_loading import device_name, float_precision
from scoring.probe import LENGTHS, PROBE, fit_probe
from scoring.score_stage import score_stage
from scoring.scorer import ProbeScorer, own_precision

# Battles whose states are kept together: what a kill can cost.
_ROWS = 16
# The layers that are read where none is asked for, as shares of all: what an answer is like stands in the middle.
_DEPTHS = (1 / 2, 2 / 3)


def run_probe(
    context: StageContext, *, layers: Sequence[int] = (), precision: str | None = None, fresh: bool = False, show: Show
) -> dict[str, Any]:
    """Read the training battles, fit the probe, score the fold and the test set; return the report.

    What was read is kept: the same command goes on where it was interrupted. Raises UsageError for a layer that the
    model does not have, ArenaError where the votes are too few or the probe was fitted on others.
    """
    experiment, folder = context.experiment, context.folder
    if experiment.folds > 1:
        what, remedy = "a probe is not fitted in folds", "fit it in an experiment with folds: 1"
        raise UsageError(what, where=f"{experiment.folder / 'experiment.yaml'}: folds", remedy=remedy)
    layers = _layers(size_of(experiment.model).layers, layers)
    context.require_current_settings()
    ensure_pairs(context, show)
    wanted = precision or own_precision(experiment, context.name)
    wanted = float_precision(device_name()) if wanted == "auto" else wanted
    data = context.training_inputs
    require_intact(experiment.data_folder, [Path(path).name for path in data["data"]], context.manifest["files"])
    with only_run(folder):
        scorer = ProbeScorer(context, wanted, layers)
        read = {"model": {k: v for k, v in scorer.inputs().items() if k != PROBE}, "precision": wanted}
        inputs = {**data, **read, "layers": list(layers)}
        standing = context.state.standing("train", inputs)
        if standing.is_finished and not fresh:
            standing.require_same_inputs("train", folder, f"fit the probe again: {context.command} --fresh")
            show.note(f"probe: kept, fitted {standing.record.finished_at}")
        else:
            context.state.begin("train", inputs)
            started = time.monotonic()
            with context.state.failures_of("train"):
                _fit(context, scorer, inputs, show)
            made = [folder / PROBE, folder / "probe.json"]
            context.state.finish("train", made, time.monotonic() - started)
    return score_stage(context, show=show)


def _layers(count: int, asked: Sequence[int]) -> tuple[int, ...]:
    if unknown := [layer for layer in asked if not 1 <= layer <= count]:
        raise UsageError(f"there is no layer {unknown[0]}", where="--layer", remedy=f"choose from 1 to {count}")
    return tuple(sorted(set(asked) or {max(1, round(count * depth)) for depth in _DEPTHS}))


def _fit(context: StageContext, scorer: ProbeScorer, inputs: dict[str, Any], show: Show) -> None:
    facts, states = _read(context.folder / "states", scorer, inputs, show)
    truth, groups = verdict_codes([each["verdict"] for each in facts]), as_groups([each["group"] for each in facts])
    lengths = np.array([[each[name] for name in LENGTHS] for each in facts], dtype=np.float64)
    with show.line("probe: fitting") as line:
        line.update(f"on {len(facts):,} battles")
        how = {"layers": inputs["layers"], "precision": inputs["precision"], "seed": context.experiment.seed}
        probe, tried = fit_probe(states, lengths, truth, groups, **how)
    best = min(tried, key=lambda each: each["log_loss"])
    chosen = f"layer {', '.join(map(str, best['layers']))}, {' and '.join(best['pools'])}, C {best['strength']:g}"
    show.note(f"probe: {chosen}: cross-fitted log loss {best['log_loss']:.4f} on {len(facts):,} training battles")
    probe.save(context.folder / PROBE)
    write_json(context.folder / "probe.json", {"rows": len(facts), "chosen": best, "tried": tried})


def _read(folder: Path, scorer: ProbeScorer, inputs: dict[str, Any], show: Show) -> tuple[list[dict], np.ndarray]:
    """Return the facts of the training battles with a verdict and their states, A minus B, [rows, columns] float32."""
    folder /= hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    rows = [row for row in scorer.exported("train") if row[0]["verdict"] is not None]
    chunks, found, kept, opened = list(in_chunks(rows, _ROWS)), [], 0, 0.0
    with show.line("probe: reading the training battles") as line:
        line.update(f"0/{len(rows):,}", 0.0)  # the first part may take minutes
        for number, chunk in enumerate(chunks):
            path = folder / f"{number:05d}.npy"
            states = _kept(path, len(chunk))
            if states is None:
                if not opened:
                    scorer.open()
                    opened = time.monotonic()
                prepared = scorer.prepare([each for _, each in chunk], swapped=False)
                both = scorer.states(prepared, name=lambda at, chunk=chunk: f"battle {chunk[at][0]['id']}")
                states = both[:, 0] - both[:, 1]
                with atomic_file(path, "wb") as file:
                    np.save(file, states)
                done = number + 1 - kept
                left = (time.monotonic() - opened) / done * (len(chunks) - number - 1)
                line.update(f"{number * _ROWS + len(chunk):,}/{len(rows):,}", (number + 1) / len(chunks), left)
            else:
                kept += 1
            found.append(states)
    scorer.close()
    for earlier in folder.parent.iterdir():  # of other votes or layers
        if earlier != folder:
            shutil.rmtree(earlier)
    if kept:
        show.note(f"probe: {kept} of {len(chunks)} parts were read by an earlier call, and kept")
    return [facts for facts, _ in rows], np.concatenate(found) if found else np.empty((0, 0), np.float32)


def _kept(path: Path, rows: int) -> np.ndarray | None:
    """Return the states of an earlier call, None where they are missing or damaged."""
    try:
        states = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return None
    return states if states.ndim == 2 and len(states) == rows and states.dtype == np.float32 else None
