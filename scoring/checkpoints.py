"""Checkpoints by their true log loss: scored while a run is watched, and chosen to be merged.

choose(context, "best", show)   ->   outputs/EXP/STAGE/checkpoint.json, which StageContext.weights follows
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UsageError
from common.files import write_json
from common.progress import Show
from data_prep.chat_template import load_frame
from data_prep.export_reader import read_battles, read_rows
from data_prep.prompt import JudgePrompt
from factory.stage_context import CHOICE, StageContext
from factory.state import archive, whole_checkpoints
from scoring.calibration import grouped_parts
from scoring.engines.torch_engine import score_labels
from scoring.judge import judge_sequences
from scoring.links import log_softmax
from scoring.metrics import as_groups, row_losses, verdict_codes
from scoring.model_loading import device_name, trained_adapter

# Validation battles that each checkpoint is asked about; more would cost more than they tell apart.
ROWS = 1000


class CheckpointScorer:
    """Scores a run's checkpoints on some validation battles, on the base as it was trained.

    A second copy of the model: on a GPU it shares the training's memory.
    """

    def __init__(self, context: StageContext, rows: int):
        """Choose the rows, the same for every checkpoint."""
        self._context, experiment = context, context.experiment
        frame, tokenizer = load_frame(experiment)
        source = (experiment.data_folder / "judge_prompt.j2").read_text(encoding="utf-8")
        prompt = JudgePrompt(source, experiment.labels, where="judge_prompt.j2")
        battles = read_battles(experiment.data_folder, context.parts("valid"))
        chosen = np.sort(np.random.default_rng(experiment.seed).permutation(len(battles))[:rows])
        picked = [battles[i] for i in chosen]
        self.ids = [battle.id for battle, _ in picked]
        self._truth = verdict_codes([battle.verdict for battle, _ in picked])
        self._label_ids = tuple(context.manifest["frame"]["label_ids"])
        self._sequences = judge_sequences(frame, tokenizer, prompt, picked)

    def losses(self, adapter: Path) -> np.ndarray:
        """Return the log loss (plain softmax, A first) of an adapter's folder on each of the chosen rows."""
        model = replace(trained_adapter(self._context), folder=adapter)
        logits = score_labels(model.load(device_name()), self._sequences, self._label_ids)
        return row_losses(np.exp(log_softmax(logits)), self._truth)


def choose(context: StageContext, wanted: str, show: Show) -> None:
    """Record which adapter is merged: `best` by log loss on validation battles, `last`, or that of a step.

    What was merged from another one is put aside. Raises UsageError for a step that was not saved, and for the best
    of a stage that gives rewards: they have no log loss before their link is fitted.
    """
    folder, saved = context.folder / CHOICE, {path.name: path for path in whole_checkpoints(context.adapter)}
    before, choice = context.weights, None
    if wanted == "best":
        if context.step.data == "dpo_reward":
            what = f"{context.name} gives rewards, which have no log loss"
            raise UsageError(what, where="--checkpoint", remedy="give last, or a step")
        if context.scores("valid"):
            choice = _best(context, list(saved.values()), show)
        else:
            show.note(f"{context.label}: its last checkpoint is taken, for it trained on every battle to choose by")
    elif wanted != "last":
        if f"checkpoint-{wanted}" not in saved:
            what = f"there is no whole checkpoint {wanted!r} in {context.adapter}"
            kept = ", ".join(name.split("-")[1] for name in saved) or "none"
            remedy = f"give best, last or one of those that save_total_limit kept: {kept}"
            raise UsageError(what, where="--checkpoint", remedy=remedy)
        choice = {"chosen": f"checkpoint-{wanted}"}
    folder.unlink(missing_ok=True)
    if choice:
        write_json(folder, choice)
    if context.forget_choice() != before:
        for old in archive(context.merged):
            show.note(f"{context.label}: merged from another checkpoint, now {old}")


def _best(context: StageContext, saved: list[Path], show: Show) -> dict[str, Any]:
    """Return the choice between the saved checkpoints and the trained adapter, with the curve and its honest figure."""
    candidates = {**{path.name: path for path in saved}, "": context.adapter}
    scorer, losses = CheckpointScorer(context, ROWS), {}
    with show.line(f"{context.label}: checkpoints") as line:
        for number, (name, path) in enumerate(candidates.items(), 1):
            line.update(f"{name or 'the last'} on {len(scorer.ids):,} battles", number / len(candidates))
            losses[name] = scorer.losses(path)
    means = {name: float(each.mean()) for name, each in losses.items()}
    best = min(means, key=means.get)
    show.note(f"{context.label}: {best or 'the last'} is the best of {len(means)}: log loss {means[best]:.4f}")
    return {
        "chosen": best,
        "rows": len(scorer.ids),
        "log_loss": means[best],
        "cross_fitted": _cross_fitted(context, scorer.ids, np.column_stack(list(losses.values()))),
        "curve": [{"checkpoint": name or "last", "log_loss": loss} for name, loss in means.items()],
    }


def _cross_fitted(context: StageContext, ids: list[str], losses: np.ndarray) -> float:
    """Return the mean loss [rows, checkpoints] where each part of the prompts is judged by the best on the others."""
    groups = read_rows(context.experiment.data_folder, context.parts("valid")).set_index("id").loc[ids, "group"]
    found = np.empty(len(losses))
    for fit, judge in grouped_parts(as_groups(groups), context.experiment.seed):
        found[judge] = losses[judge, losses[fit].mean(axis=0).argmin()]
    return float(found.mean())
