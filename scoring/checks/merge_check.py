"""The merge check: the trained adapter on its base, as in training, and the merged model answer the same battles.

    record = check_merge(context, show=show)["merge_gate"]
    {"max_abs_diff": 6.4e-07, "mean_abs_diff": 8.8e-08, "log_loss_adapter": 0.8842, "log_loss_merged": 0.8842, …}

sft, dpo_judge   the three label probabilities after the judge prompt, answers in their own order
rm               P(A beats B) = sigmoid(reward A - reward B) from the value head; its log loss leaves ties out
dpo_reward       nothing: its score needs the adapter on and off, and no merged model is scored
base             nothing: no adapter
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common.battle import VERDICTS
from common.console import duration
from common.errors import ArenaError, same_command
from common.files import only_run, read_json, write_json
from common.progress import Line, Show
from data_prep.export_reader import iter_pairs, read_battles
from data_prep.preference_pairs import pair_sequences
from factory.fingerprint import model_files
from factory.stage_context import StageContext
from scoring.engines.torch_engine import score_labels
from scoring.judge import GOLDEN_ANSWERS, Judge, load_judge, write_golden_answers
from scoring.links import softmax
from scoring.metrics import log_loss
from scoring.model_loading import device_name, float_precision, load_model, trained_adapter
from scoring.report.findings import points
from scoring.rewards import a_beats_b, load_value_head, value_rewards

RECORD = "merge_gate.json"
# On these of the battles the adapter is also switched off: it must make a difference, and the merge must keep it.
EFFECT_ROWS = 32
Ask = Callable[..., np.ndarray]  # asks a model about rows; takes `progress`


def check_merge(context: StageContext, *, show: Show) -> dict[str, Any] | None:
    """Compare a stage's adapter with its merged model and return the record, None where nothing is compared.

    The record is kept beside the merged folder, and made again only if adapter, merged model, rows or settings changed;
    the merged folder gets its answers to the golden prompts. Raises ArenaError, after the record is written, if a
    probability differs by more than the experiment's `merge_gate.max_abs_diff`, or while another run works there.
    """
    if context.name == "dpo_reward" or not context.is_trained:
        return None
    with only_run(context.folder):
        path, inputs = context.folder / RECORD, _inputs(context)
        record = _kept(path, inputs)
        if record is None and (reason := _not_comparable(context, inputs)):
            show.note(f"{context.label}: the merged model is not compared with the trained adapter: {reason}")
            return None
        if record is None or not (context.merged / GOLDEN_ANSWERS).is_file():
            started = time.monotonic()
            with show.line(f"{context.label}: merge check (does the merged model answer as the adapter did?)") as line:
                record = {"inputs": inputs, **_measure(context, line)}
            write_json(path, record)
            took = duration(time.monotonic() - started)
            show.note(f"{context.label}: {_in_words(record['merge_gate'])}, in {took}")
        _require_passed(context, record["merge_gate"], path)
        return record


def compared(adapter: np.ndarray, merged: np.ndarray, verdicts: Sequence[str | None], limit: float) -> dict[str, Any]:
    """Return how far two models' answers to the same battles differ, [n, 3] or P(A beats B) [n, 1].

    A probability that is NaN or infinite never passes.
    """
    differences = np.abs(adapter - merged)
    largest = float(differences.max())
    return {
        "max_abs_diff": _finite(largest),
        "mean_abs_diff": _finite(float(differences.mean())),
        "log_loss_adapter": _loss(adapter, verdicts),
        "log_loss_merged": _loss(merged, verdicts),
        "rows": len(adapter),
        "threshold": limit,
        "passed": bool(largest <= limit),
    }


def _measure(context: StageContext, line: Line) -> dict[str, Any]:
    """Ask both models; the first is freed before the second is loaded."""

    def progress(share: float) -> None:
        line.update("of the answers", share)

    device, judge = device_name(), load_judge(context.merged)
    rows, verdicts, golden, ask = _questions(context, judge)
    bits = context.recipe.get("quantization_bit")
    line.update(f"the adapter on its base{f' in {bits} bits' if bits else ''}")
    policy = trained_adapter(context).load(device)
    adapter = ask(policy, rows, progress=progress)
    with policy.disable_adapter():
        base = ask(policy, rows[:EFFECT_ROWS])
    del policy
    line.update("the merged model")
    model = load_model(judge.folder, device)
    merged = ask(model, rows, progress=progress)
    write_golden_answers(judge, ask(model, golden), float_precision(device))
    few = len(base)
    return {
        "merge_gate": {
            **compared(adapter, merged, verdicts, context.experiment.merge_gate.max_abs_diff),
            "measure": "P(A beats B) from the rewards" if context.name == "rm" else "label probabilities",
            "merged_into": context.experiment.merge_model(context.name, context.fold),
        },
        "adapter_effect": {
            "rows": few,
            "mean_abs_diff": _finite(float(np.abs(adapter[:few] - base).mean())),
            "merged_mean_abs_diff": _finite(float(np.abs(adapter[:few] - merged[:few]).mean())),
        },
    }


def _questions(context: StageContext, judge: Judge) -> tuple[list, list[str | None], list, Ask]:
    """Return the drawn battles as model inputs, their verdicts, the golden prompts, and how to ask a model."""
    data, settings = context.experiment.data_folder, context.experiment.merge_gate
    battles = read_battles(data, context.parts("valid"))
    random = np.random.default_rng(context.experiment.seed)
    drawn = sorted(random.choice(len(battles), min(settings.rows, len(battles)), replace=False))
    verdicts = [battles[i][0].verdict for i in drawn]
    if context.name == "rm":
        pairs = [pair for pair, _ in iter_pairs(data, context.parts("valid"))]
        head = load_value_head(judge.folder)
        triples = pair_sequences(judge.frame, judge.tokenizer, [pairs[i] for i in drawn])
        ask = lambda model, rows, **how: a_beats_b(value_rewards(model, head, rows, **how))  # noqa: E731
        return triples, verdicts, judge.golden_triples(), ask
    ask = lambda model, rows, **how: softmax(score_labels(model, rows, judge.frame.label_ids, **how))  # noqa: E731
    return judge.sequences([battles[i] for i in drawn]), verdicts, judge.golden_sequences(), ask


def _loss(answers: np.ndarray, verdicts: Sequence[str | None]) -> float | None:
    """Return the log loss of the rows with a verdict, of P(A beats B) without the ties; None if there is none."""
    if answers.shape[1] == 1:
        answers = np.column_stack([answers, 1 - answers])
    classes = VERDICTS[: answers.shape[1]]
    known = [row for row, verdict in enumerate(verdicts) if verdict in classes]
    if not known:
        return None
    return _finite(log_loss(answers[known], np.array([classes.index(verdicts[row]) for row in known])))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _inputs(context: StageContext) -> dict[str, Any]:
    """Return what a record is made from; `adapter` is None where its weights are gone."""
    merged = model_files(context.merged)
    return {
        "adapter": model_files(context.weights) if (context.weights / "adapter_model.safetensors").is_file() else None,
        "merged": {name: value for name, value in merged.items() if name.endswith((".safetensors", "config.json"))},
        "data": context.manifest["files"].get("battles.parquet"),
        "recipe": context.recipe,
        "settings": context.experiment.merge_gate.model_dump() | {"seed": context.experiment.seed},
    }


def _not_comparable(context: StageContext, inputs: dict[str, Any]) -> str | None:
    if inputs["adapter"] is None:
        return "the adapter is not here any more"
    if context.recipe.get("adapter_name_or_path"):
        return "the training went on from another adapter, so its base is not a model by itself"
    return None


def _kept(path: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record on disk if it was made from these inputs; an adapter that is gone contradicts nothing."""
    try:
        record = read_json(path)
        gone = {"adapter": record["inputs"]["adapter"]} if inputs["adapter"] is None else {}
        same = record["inputs"] == json.loads(json.dumps(inputs | gone))
        return record if same and record["merge_gate"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # measured again


def _in_words(found: dict[str, Any]) -> str:
    largest = "not a number" if found["max_abs_diff"] is None else f"{points(found['max_abs_diff'])} percentage points"
    said = f"merged model against trained adapter: largest difference {largest} on {found['rows']} battles"
    if not found["passed"] or found["max_abs_diff"] <= found["threshold"] / 2:
        return said
    return f"{said}, more than half of what is allowed (docs/merge.md); --precision adapter scores without a merge"


def _require_passed(context: StageContext, found: dict[str, Any], path: Path) -> None:
    if found["passed"]:
        return
    again = f"then move {context.merged} away and run {same_command()} again"
    if context.experiment.quantization_bit and not context.experiment.merges_dequantised:
        remedy = (
            f"merge_onto: dequantised in experiment.yaml merges into the weights that were trained on; prepare, {again}"
        )
    else:
        remedy = (
            "infer_dtype: float32 in the merge recipe rounds less where the base is stored in 32 bits, "
            f"{again}; or raise merge_gate.max_abs_diff"
        )
    raise ArenaError(
        f"the merged model is not the trained adapter: {_in_words(found)}, allowed {found['threshold']} "
        f"(log loss: adapter {found['log_loss_adapter']}, merged {found['log_loss_merged']})",
        where=str(path),
        remedy=remedy,
    )
