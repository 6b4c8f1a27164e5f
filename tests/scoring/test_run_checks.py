"""scoring.checks.run_checks: each check passes on a sound run and fails on one that is broken in just that way."""

import json
import math

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from data_prep.truncation import MARKER
from factory.train import trained_rows
from scoring.checks import run_checks as checks
from scoring.checks.run_checks import require_sound, stopping

SOUND = [{"step": step, "loss": 2 - step / 10, "eval_loss": None} for step in range(1, 13)]
GATE = {"max_abs_diff": 1e-6, "rows": 200, "threshold": 0.05, "passed": True}


def effect(moved, left):
    return {"merge_gate": GATE, "adapter_effect": {"rows": 32, "mean_abs_diff": moved, "merged_mean_abs_diff": left}}


def labels(spread):
    logits = np.tile([1.0, 0.5, 0.0], (4, 1)) + np.arange(4)[:, None] * [0, 0, spread]
    return pd.DataFrame(logits, columns=["ab_a", "ab_b", "ab_tie"])


def rewards(values):
    return pd.DataFrame(values, columns=["reward_a", "reward_b"])


def rose(step):
    return SOUND[:step] + [row | {"loss": 9.0} for row in SOUND[step:]]


DPO = {"stage": "dpo", "pref_loss": "sigmoid"}
FIRST = {"step": 1, "rewards/chosen": 0.0, "rewards/rejected": 1e-4}
CASES = {
    "rows": (checks.rows_trained(10, 10), checks.rows_trained(10, 9), checks.rows_trained(None, 9)),
    "labels": (checks.labels_distinct([1, 2, 3]), checks.labels_distinct([1, 2, 1]), None),
    "folds": (checks.folds_apart({"votes": 0, "texts": 0}), checks.folds_apart({"votes": 1, "texts": 0}), None),
    "nan": (
        checks.loss_finite(SOUND),
        checks.loss_finite([*SOUND, {"step": 13, "loss": math.nan}]),
        checks.loss_finite([]),
    ),
    "rising": (checks.loss_not_rising(SOUND), checks.loss_not_rising(rose(9)), checks.loss_not_rising(SOUND[:3])),
    "dpo": (
        checks.dpo_start(DPO, FIRST),
        checks.dpo_start(DPO, FIRST | {"rewards/rejected": -0.4}),
        checks.dpo_start(DPO, FIRST | {"step": 10}),
    ),
    "adapter": (
        checks.adapter_applied(effect(0.1, 1e-6), None),
        checks.adapter_applied(effect(0.0, 0.0), None),
        checks.adapter_applied(None, None),
    ),
    "merge lost it": (
        checks.adapter_applied(effect(0.002, 0.001), None),
        checks.adapter_applied(effect(0.002, 0.002), None),
        None,
    ),
    "implicit rewards": (
        checks.adapter_applied(None, np.array([[0.0, 0.2]])),
        checks.adapter_applied(None, np.zeros((3, 2))),
        None,
    ),
    "gate": (
        checks.merge_gate({"merge_gate": GATE}, "sft"),
        checks.merge_gate({"merge_gate": GATE | {"passed": False, "max_abs_diff": None}}, "sft"),
        checks.merge_gate(None, "dpo_reward"),
    ),
    "constant": (
        checks.not_constant(labels(0.1)),
        checks.not_constant(labels(0.0)),
        checks.not_constant(labels(0.1)[:1]),
    ),
    "shifted logits say the same": (
        checks.not_constant(rewards([[1, 2], [1, 3]])),
        checks.not_constant(rewards([[1, 2], [2, 3]])),
        None,
    ),
    "ids": (
        checks.submission_ids(["1", "2"], ["1", "2"], 0),
        checks.submission_ids(["1", "2"], ["2", "1"], 0),
        checks.submission_ids([], [], 0),
    ),
    "rejected": (
        checks.submission_ids(["1"], ["1"], 0),
        checks.submission_ids(["1"], ["1"], 3),
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_check_passes_fails_and_says_when_there_is_nothing_to_look_at(name):
    sound, broken, nothing = CASES[name]
    assert sound.passed is True, sound
    assert broken.passed is False and broken.detail and broken.remedy, broken
    assert nothing is None or (nothing.passed is None and nothing.detail)
    assert {check.name for check in CASES[name] if check} == {sound.name}
    json.dumps([each.to_json() for each in CASES[name] if each], allow_nan=False)


def test_only_what_makes_the_figures_wrong_stops():
    listed_only = {"rising", "rejected"}
    assert {name for name, (_, broken, _) in CASES.items() if not broken.stops} == listed_only


def test_a_stop_lists_every_failure_with_its_remedy(tmp_path):
    found = [check.to_json() for _, broken, _ in CASES.values() for check in (broken,)]
    assert len(stopping(found)) == len(CASES) - 2
    with pytest.raises(ArenaError, match="12 check") as caught:
        require_sound(found, tmp_path / "report.json")
    assert "labels distinct: token ids 1, 2, 1; choose labels of experiment.yaml" in caught.value.what
    assert "report.json" in caught.value.where
    require_sound([check.to_json() for check, _, _ in CASES.values()], tmp_path)
    require_sound([], tmp_path)  # a report of an earlier version


@pytest.mark.parametrize(("recipe", "why"), [({"stage": "sft"}, "not DPO"), (DPO | {"pref_loss": "orpo"}, "reference")])
def test_dpo_s_start_is_only_for_dpo_with_a_reference(recipe, why):
    found = checks.dpo_start(recipe, FIRST)
    assert found.passed is None and why in found.detail
    assert checks.dpo_start(DPO, None).passed is None


def test_the_log_tells_the_trained_rows(tmp_path):
    log = tmp_path / "train.log"
    assert trained_rows(log) is None
    log.write_text(
        "***** Running training *****\n  Num examples = 9\n***** Running Evaluation *****\n  Num examples = 2\n"
        "***** Running training *****\n  Num examples = 10,800\n***** Running Evaluation *****\n  Num examples = 600\n"
    )
    assert trained_rows(log) == 10_800, "the last training, no evaluation"
    log.write_text("nothing")
    assert trained_rows(log) is None


def export(folder, prompts, *, groups=None, noted=None, dropped=0, pairs=None):
    """Write what the checks read of an export: one row a prompt, the splits in turn."""
    splits = ["train", "valid", "test"]
    known = {"group": groups or list(map(str, range(len(prompts)))), "first_prompt": noted or range(len(prompts))}
    rows = {"id": [str(i) for i in range(len(prompts))], "split": [splits[i % 3] for i in range(len(prompts))]}
    pd.DataFrame({**rows, **known, "dropped": dropped}).to_parquet(folder / "rows.parquet", index=False)
    pd.DataFrame({"prompts": [[prompt] for prompt in prompts]}).to_parquet(folder / "battles.parquet", index=False)
    if pairs:
        pd.DataFrame({"prompt": pairs, "dropped": dropped}).to_parquet(folder / "pairs.parquet", index=False)


def test_prompts_on_both_sides_are_found_by_each_witness_alone(tmp_path):
    def told(*prompts, **known) -> dict[str, int]:
        export(tmp_path, list(prompts), **known)
        found = checks.shared_prompts(tmp_path)
        assert checks.folds_apart(found).passed == (not any(found.values()))
        return {witness: count for witness, count in found.items() if count}

    assert told("why", "how", "why") == {}, "the test set is no side"
    assert told("why", "Why?", "x") == {"the judge's texts": 1}
    assert told("why", "Why?", "x", dropped=1) == {}, "a later turn's prompt is not the first"
    assert told(f"w{MARKER}y", f"w{MARKER}y", "x") == {}, "what is left of a cut text proves nothing"
    assert told("a", "b", "x", groups=["1", "1", "3"]) == {"the folds' groups": 1}
    assert told("a", "b", "x", "a", noted=[1, 2, 3, 2]) == {"the votes": 1}
    assert checks._test_ids(tmp_path) == ["2"]
    assert told("a", "b", "x", pairs=["why", "why", "x"]) == {"the pairs' texts": 1}
    found = checks.folds_apart(checks.shared_prompts(tmp_path))
    assert found.detail == (
        "prompts in both: 0 by the folds' groups, 0 by the votes, 0 by the judge's texts, 1 by the pairs' texts"
    )


def test_the_first_rewards_are_read_from_the_trainer_s_state(tmp_path):
    assert checks._first_rewards(tmp_path) is None
    history = [{"step": 1, "loss": 0.7}, FIRST, FIRST | {"step": 10, "rewards/chosen": 3.0}]
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
    assert checks._first_rewards(tmp_path) == FIRST
    (tmp_path / "trainer_state.json").write_text("{")
    assert checks._first_rewards(tmp_path) is None
