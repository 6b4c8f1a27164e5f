"""The merge gate: the trained adapter, un-merged on its quantised base, and the merged model answer the same battles.

    record = gate(experiment, "sft", show=show)["merge_gate"]
    {"max_abs_diff": 6.4e-07, "mean_abs_diff": 8.8e-08, "log_loss_adapter": 0.8842, "log_loss_merged": 0.8842, …}

sft, dpo_judge   the three label probabilities behind the judge prompt, answers in their own order
rm               P(A beats B) = sigmoid(reward A - reward B) from the value head; ties have no place in its log loss
dpo_reward       nothing: its score is the adapter switched on and off, no merged model answers
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from common.battle import VERDICTS
from common.console import duration
from common.errors import ArenaError, same_command
from common.experiment import Experiment, read_yaml
from common.files import only_run, write_json
from data_prep.export_reader import read_battles, read_pairs, readable
from data_prep.preference_pairs import pair_sequences
from factory.state import model_files
from scoring.batches import ScoreProgress
from scoring.engines.torch_engine import device_name, load_model, score_labels
from scoring.judge import CANARIES, Judge, label_canaries, load_judge, reward_canaries, seal_canaries
from scoring.links import softmax
from scoring.metrics import log_loss
from scoring.report.formatting import points
from scoring.rewards import beats, load_value_head, value_rewards
from scoring.scorer import trained_adapter

if TYPE_CHECKING:
    from common.progress import Line, Show

RECORD = "merge_gate.json"
# On these of the battles the adapter is also switched off: it must make a difference, and the merge must keep it.
EFFECT_ROWS = 32
Tell = Callable[[ScoreProgress], None]


def gate(experiment: Experiment, stage: str, *, show: Show) -> dict[str, Any] | None:
    """Compare a stage's adapter with its merged model and return the record, None where nothing merged is scored.

    The record is kept beside the merged folder and made again only if adapter, merged model, rows or settings changed;
    the answers to the canaries are put into the merged folder. Raises ArenaError, after the record is written, if a
    probability differs by more than the experiment's `merge_gate.max_abs_diff`, or if another run is at work there.
    """
    if stage == "dpo_reward":
        return None
    with only_run(experiment.output_folder(stage)):
        return _gate(experiment, stage, show)


def _gate(experiment: Experiment, stage: str, show: Show) -> dict[str, Any] | None:
    path, inputs = experiment.output_folder(stage) / RECORD, _inputs(experiment, stage)
    record = _kept(path, inputs)
    reason = _not_comparable(inputs)
    if record is None and reason:
        show.note(f"{stage}: the merged model is not compared with the trained adapter: {reason}")
        return None
    if record is None or not (experiment.merged_folder(stage) / CANARIES).is_file():
        started = time.monotonic()
        with show.line(f"{stage}: merge gate") as line:
            record = {"inputs": inputs, **_measure(experiment, stage, line)}
        write_json(path, record)
        show.note(f"{stage}: {_in_words(record['merge_gate'])}, in {duration(time.monotonic() - started)}")
    _require_passed(experiment, stage, record["merge_gate"], path)
    return record


def compared(adapter: np.ndarray, merged: np.ndarray, verdicts: Sequence[str | None], limit: float) -> dict[str, Any]:
    """Return the contract's figures of two sets of answers to the same battles, [n, 3] or P(A beats B) [n, 1].

    A probability that is not a number passes no gate.
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


def _measure(experiment: Experiment, stage: str, line: Line) -> dict[str, Any]:
    """Ask both models; one is given back before the other is loaded."""
    device = device_name()
    judge = load_judge(experiment.merged_folder(stage))
    questions = (_reward_questions if stage == "rm" else _label_questions)(experiment, judge)
    progress = _told(line, "the adapter on its quantised base")
    policy = trained_adapter(experiment, stage).load(device)
    adapter = questions.ask(policy, questions.rows, progress)
    with policy.disable_adapter():
        base = questions.ask(policy, questions.rows[:EFFECT_ROWS])
    del policy
    progress = _told(line, "the merged model")
    model = load_model(judge.folder, device)
    merged = questions.ask(model, questions.rows, progress)
    seal_canaries(judge, questions.ask(model, questions.canaries), "bf16" if device == "cuda" else "fp32")
    found = compared(adapter, merged, questions.verdicts, experiment.merge_gate.max_abs_diff)
    measure = "P(A beats B) from the rewards" if stage == "rm" else "label probabilities"
    few = len(base)
    effect = {
        "rows": few,
        "mean_abs_diff": _finite(float(np.abs(adapter[:few] - base).mean())),
        "merged_mean_abs_diff": _finite(float(np.abs(adapter[:few] - merged[:few]).mean())),
    }
    merged_into = experiment.merge_model(stage)
    return {"merge_gate": {**found, "measure": measure, "merged_into": merged_into}, "adapter_effect": effect}


@dataclass(frozen=True)
class _Questions:
    """What both models are asked: the drawn battles with their verdicts, the canaries, and how to ask."""

    rows: list
    verdicts: list[str | None]
    canaries: list
    ask: Callable[..., np.ndarray]  # of a model and sequences; a third argument is told how far it is


def _told(line: Line, who: str) -> Tell:
    """Say who is asked now; return what shows how many answers are there, with the time left."""
    line.update(who)

    def tell(progress: ScoreProgress) -> None:
        line.update("of the answers", progress.tokens / max(progress.total_tokens, 1))

    return tell


def _label_questions(experiment: Experiment, judge: Judge) -> _Questions:
    battles = _drawn(read_battles(experiment.data_folder, "valid"), experiment)

    def ask(model: Any, sequences: Sequence, progress: Tell = lambda _: None) -> np.ndarray:
        return softmax(score_labels(model, sequences, judge.frame.label_ids, progress=progress))

    verdicts = [battle.verdict for battle, _ in battles]
    return _Questions(judge.sequences(battles), verdicts, label_canaries(judge), ask)


def _reward_questions(experiment: Experiment, judge: Judge) -> _Questions:
    data, head = experiment.data_folder, load_value_head(judge.folder)
    drawn = _drawn(list(zip(read_battles(data, "valid"), read_pairs(data, "valid"), strict=True)), experiment)

    def ask(model: Any, triples: Sequence, progress: Tell = lambda _: None) -> np.ndarray:
        return beats(value_rewards(model, head, triples, progress=progress))

    triples = pair_sequences(judge.frame, judge.tokenizer, [pair for _, pair in drawn])
    verdicts = [battle.verdict for (battle, _), _ in drawn]
    return _Questions(triples, verdicts, reward_canaries(judge), ask)


def _drawn(rows: list, experiment: Experiment) -> list:
    """Return as many rows as the gate compares, drawn by the experiment's seed, in the order of the input."""
    size = min(experiment.merge_gate.rows, len(rows))
    chosen = np.random.default_rng(experiment.seed).choice(len(rows), size, replace=False)
    return [rows[i] for i in sorted(chosen)]


def _loss(answers: np.ndarray, verdicts: Sequence[str | None]) -> float | None:
    """Return the log loss of the rows with a verdict, of P(A beats B) without the ties; None if there is none."""
    if answers.shape[1] == 1:
        answers = np.column_stack([answers, 1 - answers])
    known = [(row, VERDICTS.index(v)) for row, v in enumerate(verdicts) if v in VERDICTS[: answers.shape[1]]]
    if not known:
        return None
    rows, codes = (np.array(part) for part in zip(*known, strict=True))
    return _finite(log_loss(answers[rows], codes))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _inputs(experiment: Experiment, stage: str) -> dict[str, Any]:
    merged, adapter = model_files(experiment.merged_folder(stage)), experiment.adapter_folder(stage)
    texts = experiment.data_folder / "battles.parquet"
    with readable(texts):
        exported = model_files(texts)
    return {
        "adapter": model_files(adapter) if (adapter / "adapter_model.safetensors").is_file() else None,
        "merged": {name: value for name, value in merged.items() if name.endswith((".safetensors", "config.json"))},
        "data": exported,
        "recipe": read_yaml(experiment.recipe(stage)),
        "settings": experiment.merge_gate.model_dump() | {"seed": experiment.seed},
    }


def _not_comparable(inputs: dict[str, Any]) -> str | None:
    if inputs["adapter"] is None:
        return "the adapter is not here any more"
    if inputs["recipe"].get("adapter_name_or_path"):
        return "the training went on from another adapter, so its base is not a model by itself"
    return None


def _kept(path: Path, inputs: dict[str, Any]) -> dict[str, Any] | None:
    """Return the record on disk if it was made from these inputs; an adapter that is gone contradicts nothing."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        gone = {"adapter": record["inputs"]["adapter"]} if inputs["adapter"] is None else {}
        same = record["inputs"] == json.loads(json.dumps(inputs | gone))
        return record if same and record["merge_gate"] else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # made anew


def _in_words(found: dict[str, Any]) -> str:
    none = found["max_abs_diff"] is None
    largest = "not a number" if none else f"{points(found['max_abs_diff'])} percentage points"
    return f"merged model against trained adapter: largest difference {largest} on {found['rows']} battles"


def _require_passed(experiment: Experiment, stage: str, found: dict[str, Any], path: Path) -> None:
    if found["passed"]:
        return
    merged = experiment.merged_folder(stage)
    again = f"then move {merged} away and run {same_command()} again"
    if experiment.quantization_bit and not experiment.merges_dequantised:
        remedy = (
            f"merge_onto: dequantised in experiment.yaml merges into the weights that were trained on; prepare, {again}"
        )
    else:
        remedy = f"infer_dtype: float32 in the merge recipe rounds less, {again}; or accept it by merge_gate in "
        remedy += "experiment.yaml"
    losses = (f"{name} {found[key]}" for name, key in (("adapter", "log_loss_adapter"), ("merged", "log_loss_merged")))
    raise ArenaError(
        f"the merged model is not the trained adapter: {_in_words(found)}, allowed {found['threshold']} "
        f"(log loss: {', '.join(losses)})",
        where=str(path),
        remedy=remedy,
    )
