"""Run checks: named checks, made in every real run, that catch failures which raise no error.

    [{"name": "rows trained", "passed": true, "detail": "10,800 exported, 10,800 trained", "stops": true, "remedy": ""}]

`passed` is null where a check does not apply; the detail says why. A failed check that `stops` means that the
figures or the submission are wrong: the report is written, the submission is not, and the command ends with an error.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.errors import ArenaError
from common.files import read_json
from data_prep.export_reader import read_audit, read_columns, readable
from factory.fingerprint import training_rows
from factory.stage_context import StageContext
from factory.train import trained_rows
from scoring.calibration import AB_COLUMNS, REWARD_COLUMNS
from scoring.links import softmax
from scoring.report.findings import points

# Below this a difference of probabilities or rewards is no difference.
NOTHING = 1e-6
# A DPO training starts at its reference, where every reward is 0; kernels that are not repeatable leave a little.
START_REWARD = 0.05
# The last quarter of the logged losses may lie this much above the first.
RISE = 1.1
_AGAIN = "train again with --fresh"
_IDS = "submission ids = test ids"


@dataclass(frozen=True)
class Check:
    """What one check found. `passed` None: it does not apply here."""

    name: str
    passed: bool | None
    detail: str
    remedy: str = ""
    stops: bool = True


def run_checks(
    context: StageContext,
    *,
    scores: pd.DataFrame,
    test_ids: Sequence[str],
    loss_curve: Sequence[Mapping[str, Any]],
    compared: Mapping[str, Any] | None,
) -> list[Check]:
    """Return every check of one scored stage, in a fixed order.

    `scores` are the validation fold's raw scores, `test_ids` the scored test rows in their order, `compared` the
    record of the merge check.
    """
    recipe, data = context.recipe, context.experiment.data_folder
    return [
        rows_trained(training_rows(recipe), trained_rows(context.folder / "train.log")),
        labels_distinct(context.manifest["frame"]["label_ids"]),
        folds_apart(
            shared_prompts(data, context.parts("train"), context.parts("valid")),
            given="folds" in context.manifest["sources"],
        ),
        loss_finite(loss_curve),
        loss_not_rising(loss_curve),
        dpo_start(recipe, _first_rewards(context.adapter)),
        adapter_applied(compared, _implicit_rewards(scores, recipe)),
        not_constant(scores),
        submission_ids(data, test_ids) if context.scores("test") else Check(_IDS, None, "another judge answers them"),
    ]


def require_sound(checks: Sequence[Mapping[str, Any]], where: Path) -> None:
    """Raise ArenaError that lists the failed checks that stop, each with its remedy; `checks` as in report.json."""
    if failed := stopping(checks):
        what = f"{len(failed)} check(s) failed, so these figures are wrong and no submission was written:"
        lines = [f"  - {check['name']}: {check['detail']}; {check['remedy']}" for check in failed]
        raise ArenaError("\n".join([what, *lines]), where=str(where), remedy="see above, one remedy for each")


def stopping(checks: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Return the failed checks after which the figures or the submission are wrong."""
    return [check for check in checks if check["passed"] is False and check["stops"]]


def rows_trained(expected: int | None, logged: int | None) -> Check:
    """Compare the exported rows with those that LLaMA-Factory logged: it drops rows with only a warning."""
    name = "exported rows = trained rows"
    if expected is None or logged is None:
        reason = "the recipe leaves the number open" if expected is None else "there is no log of the training here"
        return Check(name, None, reason)
    remedy = "look for 'Dropped' in train.log; prepare again, then " + _AGAIN
    return Check(name, expected == logged, f"{expected:,} exported, {logged:,} trained", remedy)


def labels_distinct(label_ids: Sequence[int]) -> Check:
    """Require that each verdict has a token of its own: else two classes always get the same probability."""
    distinct = len(set(label_ids)) == len(label_ids) == 3
    remedy = "choose labels of experiment.yaml that are single, different tokens; prepare, then " + _AGAIN
    return Check("labels distinct", distinct, f"token ids {', '.join(map(str, label_ids))}", remedy)


def folds_apart(shared: Mapping[str, int], *, given: bool = False) -> Check:
    """Require that no prompt is both trained on and validated on; `shared` as `shared_prompts` counts them.

    Folds that were `given`, to repeat a published figure, may be others: this only warns.
    """
    counts = ", ".join(f"{count:,} by {source}" for source, count in shared.items())
    remedy = "prepare again, then " + _AGAIN
    return Check(
        "train/validation prompt overlap = 0",
        not any(shared.values()),
        f"prompts in both: {counts}",
        remedy,
        stops=not given,
    )


def loss_finite(curve: Sequence[Mapping[str, Any]]) -> Check:
    """Require that every logged loss is a number."""
    losses = [row[key] for row in curve for key in ("loss", "eval_loss") if row.get(key) is not None]
    if not losses:
        return Check("loss is a number", None, "no loss was logged")
    bad = sum(not math.isfinite(loss) for loss in losses)
    remedy = "lower learning_rate (3 to 10 times), prefer bf16 to fp16; then " + _AGAIN
    return Check("loss is a number", not bad, f"{bad} of {len(losses)} logged losses are NaN or infinite", remedy)


def loss_not_rising(curve: Sequence[Mapping[str, Any]]) -> Check:
    """Compare the first and the last quarter of the training loss; this only warns, as the log loss is reported."""
    losses = [row["loss"] for row in curve if row.get("loss") is not None and math.isfinite(row["loss"])]
    if len(losses) < 4:
        return Check("loss not rising", None, f"only {len(losses)} loss(es) were logged", stops=False)
    quarter = len(losses) // 4
    first, last = float(np.mean(losses[:quarter])), float(np.mean(losses[-quarter:]))
    passed = last <= RISE * first if first > 0 else last <= first + 0.1
    remedy = "lower learning_rate, or " + _AGAIN + " on other data"
    return Check("loss not rising", passed, f"first quarter {first:.4f}, last quarter {last:.4f}", remedy, stops=False)


def dpo_start(recipe: Mapping[str, Any], first: Mapping[str, Any] | None) -> Check:
    """Require that DPO's first rewards were about 0: else it did not start at the reference that scoring uses."""
    name = "step-1 DPO reward about 0"
    if recipe.get("stage") != "dpo":
        return Check(name, None, "this stage is not DPO")
    if recipe.get("pref_loss", "sigmoid") != "sigmoid":
        return Check(name, None, f"{recipe['pref_loss']} has no reference")
    if first is None or first.get("step") != 1:
        return Check(name, None, "step 1 was not logged; logging_first_step: true in the recipe logs it")
    rewards = [float(first[f"rewards/{side}"]) for side in ("chosen", "rejected")]
    remedy = "remove adapter_name_or_path and ref_model from the recipe; then " + _AGAIN
    detail = f"chosen {rewards[0]:.4f}, rejected {rewards[1]:.4f}"
    return Check(name, max(map(abs, rewards)) <= START_REWARD, detail, remedy)


def adapter_applied(compared: Mapping[str, Any] | None, rewards: np.ndarray | None) -> Check:
    """Require that the adapter changes the base's answers, and that the merged model is nearer to it than the base is.

    `rewards` are implicit ones against the reference, which are 0 where the adapter does nothing.
    """
    name, remedy = "adapter applied", "merge again (move the merged folder away); if that does not help, " + _AGAIN
    if rewards is not None:
        largest = float(np.abs(rewards).max()) if rewards.size else 0.0
        return Check(name, largest > NOTHING, f"the largest reward is {largest:.2g}", _AGAIN)
    effect = (compared or {}).get("adapter_effect")
    if effect is None:
        return Check(name, None, "the adapter was not compared with its base")
    moved, left = effect["mean_abs_diff"], effect["merged_mean_abs_diff"]
    if moved is None or left is None:
        return Check(name, False, "an answer of the adapter or of the merged model is not a number", remedy)
    detail = (
        f"on {effect['rows']} battles the adapter moves the base's probabilities by {points(moved)} percentage points "
        f"on average, and the merged model is {points(left)} away from it"
    )
    return Check(name, moved > NOTHING and left < moved, detail, remedy)


def not_constant(scores: pd.DataFrame) -> Check:
    """Require that the scores depend on the battle."""
    name = "probabilities not constant"
    if len(scores) < 2:
        return Check(name, None, f"{len(scores)} battle(s)")
    if AB_COLUMNS[0] in scores:
        spread = float(np.ptp(softmax(scores[list(AB_COLUMNS)].to_numpy(np.float64)), axis=0).max())
        wide = f"{points(spread)} percentage points"
    else:
        spread = float(np.ptp(np.diff(scores[list(REWARD_COLUMNS)].to_numpy(np.float64), axis=1)))
        wide = f"{spread:.2g} of reward"
    remedy = "the training collapsed: lower learning_rate, look at the loss curve; " + _AGAIN
    return Check(name, spread > NOTHING, f"they spread over {wide} on {len(scores):,} battles", remedy)


def submission_ids(data: Path, found: Sequence[str]) -> Check:
    """Require an answer for exactly the exported test rows, in their order; warn of rows that prepare rejected."""
    name = _IDS
    with readable(data / "rows.parquet"):
        expected = read_columns(data / "rows.parquet", ["id"], where=("split", "test"))["id"].to_pylist()
    read = read_audit(data)["sources"].get("test", {})
    rejected, by_prior = read.get("rows_rejected", 0), read.get("lines_by_prior", 0)
    if not expected and not rejected:
        return Check(name, None, "there is no test set")
    if expected != list(found):
        lost = len(set(expected) - set(found))
        detail = f"{len(expected):,} expected, {len(found):,} answered, {lost:,} of them missing, or in another order"
        return Check(name, False, detail, "score again with --fresh")
    if rejected:
        lost = [f"{rejected - by_prior:,} have no readable id and lack an answer"] if rejected > by_prior else []
        prior = [f"{by_prior:,} of {len(expected) + by_prior:,} test rows could not be read and get the class prior"]
        detail = "; ".join([*(prior if by_prior else []), *lost])
        remedy = f"fix the rows that {data / 'audit.json'} names, then prepare again"
        return Check(name, False, detail, remedy, stops=False)
    return Check(name, True, f"{len(expected):,} rows in the test's order")


def shared_prompts(data: Path, train: Collection[str], valid: Collection[str]) -> dict[str, int]:
    """Return how many first prompts of an export are both in training and in validation, by where that is seen.

    The sources do not depend on each other: the groups that the folds were made of, and the prompts, noted by another
    rule where the table was read.
    """
    with readable(data / "rows.parquet"):
        rows = read_columns(data / "rows.parquet", ["split", "group", "first_prompt"]).to_pydict()
    sources = {"the folds' groups": rows["group"], "the votes": rows["first_prompt"]}
    return {name: _in_both(rows["split"], prompts, train, valid) for name, prompts in sources.items()}


def _in_both(splits: Sequence[str], prompts: Sequence[Any], *sides: Collection[str]) -> int:
    """Return how many different prompts are in training and in validation."""
    train, valid = ({p for s, p in zip(splits, prompts, strict=True) if s in side} for side in sides)
    return len((train & valid) - {None})


def _first_rewards(adapter: Path) -> dict[str, Any] | None:
    """Return the trainer's first log entry that holds DPO's rewards."""
    try:
        history = read_json(adapter / "trainer_state.json")["log_history"]
        return next((entry for entry in history if "rewards/chosen" in entry), None)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _implicit_rewards(scores: pd.DataFrame, recipe: Mapping[str, Any]) -> np.ndarray | None:
    """Return the scores where they are rewards measured against a reference, else None."""
    if recipe.get("stage") != "dpo" or REWARD_COLUMNS[0] not in scores:
        return None
    if recipe.get("pref_loss", "sigmoid") != "sigmoid":
        return None
    return scores[list(REWARD_COLUMNS)].to_numpy(np.float64)
