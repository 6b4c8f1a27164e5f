"""scoring.checks.run_checks: each check passes on a sound run and fails on one that is broken in just that way."""

import json
import math
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest

from common.errors import ArenaError
from scoring.checks import run_checks as checks
from scoring.checks.run_checks import require_sound, stopping

SOUND = [{"step": step, "loss": 2 - step / 10, "eval_loss": None} for step in range(1, 13)]
RISEN = [row | {"loss": row["loss"] if row["step"] < 10 else 9.0} for row in SOUND]
GATE = {"max_abs_diff": 1e-6, "rows": 200, "threshold": 0.05, "passed": True}


def effect(moved, left):
    return {"merge_gate": GATE, "adapter_effect": {"rows": 32, "mean_abs_diff": moved, "merged_mean_abs_diff": left}}


def labels(spread):
    logits = np.tile([1.0, 0.5, 0.0], (4, 1)) + np.arange(4)[:, None] * [0, 0, spread]
    return pd.DataFrame(logits, columns=["ab_a", "ab_b", "ab_tie"])


def rewards(values):
    return pd.DataFrame(values, columns=["reward_a", "reward_b"])


DPO = {"stage": "dpo", "pref_loss": "sigmoid"}
FIRST = {"step": 1, "rewards/chosen": 0.0, "rewards/rejected": 1e-4}
# The check, and the arguments with which it passes, fails, and does not apply.
CASES = {
    "rows": (checks.rows_trained, (10, 10), (10, 9), (None, 9)),
    "labels": (checks.labels_distinct, ([1, 2, 3],), ([1, 2, 1],), None),
    "folds": (checks.folds_apart, ({"votes": 0, "texts": 0},), ({"votes": 1, "texts": 0},), None),
    "nan": (checks.loss_finite, (SOUND,), ([*SOUND, {"step": 13, "loss": math.nan}],), ([],)),
    "rising": (checks.loss_not_rising, (SOUND,), (RISEN,), (SOUND[:3],)),
    "dpo": (checks.dpo_start, (DPO, FIRST), (DPO, FIRST | {"rewards/rejected": -0.4}), (DPO, FIRST | {"step": 10})),
    "orpo": (checks.dpo_start, (DPO, FIRST), (DPO, FIRST | {"rewards/chosen": 1}), (DPO | {"pref_loss": "orpo"}, {})),
    "adapter": (checks.adapter_applied, (effect(0.1, 1e-6), None), (effect(0.0, 0.0), None), (None, None)),
    "lost": (checks.adapter_applied, (effect(0.002, 0.001), None), (effect(0.002, 0.002), None), None),
    "no number": (checks.adapter_applied, (effect(0.002, 0.001), None), (effect(0.002, None), None), None),
    "rewards": (checks.adapter_applied, (None, np.array([[0.0, 0.2]])), (None, np.zeros((3, 2))), None),
    "constant": (checks.not_constant, (labels(0.1),), (labels(0.0),), (labels(0.1)[:1],)),
    "shifted": (checks.not_constant, (rewards([[1, 2], [1, 3]]),), (rewards([[1, 2], [2, 3]]),), None),
}
FAILED = [asdict(check(*broken)) for check, _, broken, _ in CASES.values()]


@pytest.mark.parametrize("name", CASES)
def test_a_check_passes_fails_and_says_where_it_does_not_apply(name):
    check, *arguments = CASES[name]
    sound, broken, nothing = (check(*each) if each else None for each in arguments)
    assert sound.passed is True, sound
    assert broken.passed is False and broken.detail and broken.remedy, broken
    assert nothing is None or (nothing.passed is None and nothing.detail)
    json.dumps([asdict(each) for each in (sound, broken, nothing) if each], allow_nan=False)


def test_a_stop_lists_every_failure_with_its_remedy_and_a_warning_stops_nothing(tmp_path):
    assert [check["name"] for check in FAILED if not check["stops"]] == ["loss not rising"]
    assert len(stopping(FAILED)) == len(CASES) - 1
    with pytest.raises(ArenaError, match=f"{len(CASES) - 1} check") as caught:
        require_sound(FAILED, tmp_path / "report.json")
    assert "labels distinct: token ids 1, 2, 1; choose labels of experiment.yaml" in caught.value.what
    assert "report.json" in caught.value.where
    require_sound([asdict(check(*sound)) for check, sound, *_ in CASES.values()], tmp_path)


def export(folder, rows, *, groups=None, noted=None, rejected=0):
    """Write what the checks read of an export, the splits in turn."""
    splits = ["train", "valid", "test"]
    ids = list(map(str, range(rows)))
    known = {"id": ids, "group": groups or ids, "first_prompt": noted or range(rows)}
    frame = pd.DataFrame({**known, "split": [splits[i % 3] for i in range(rows)]})
    frame.to_parquet(folder / "rows.parquet", index=False)
    audit = {"truncation": {}, "sources": {"test": {"rows_rejected": rejected}}}
    (folder / "audit.json").write_text(json.dumps(audit))


@pytest.mark.parametrize(
    ("known", "found"),
    [
        ({"groups": ["1", "2", "1", "4"]}, {}),  # the test set is neither
        ({"groups": ["1", "1", "3", "4"]}, {"the folds' groups": 1}),
        ({"noted": [1, 2, 3, 2]}, {"the votes": 1}),
    ],
)
def test_prompts_in_both_folds_are_found_by_each_source_alone(tmp_path, known, found):
    export(tmp_path, 4, **known)
    shared = checks.shared_prompts(tmp_path, ["train"], ["valid"])
    assert {source: count for source, count in shared.items() if count} == found
    assert checks.folds_apart(shared).passed is (not found)


def test_the_submission_answers_the_test_rows_in_their_order(tmp_path):
    export(tmp_path, 6)
    assert checks.submission_ids(tmp_path, ["2", "5"]).passed is True
    for wrong in (["5", "2"], ["2"], []):
        found = checks.submission_ids(tmp_path, wrong)
        assert found.passed is False and found.stops
    export(tmp_path, 6, rejected=3)
    found = checks.submission_ids(tmp_path, ["2", "5"])
    assert found.passed is False and not found.stops and "3 have no readable id" in found.detail
    export(tmp_path, 2)
    assert checks.submission_ids(tmp_path, []).passed is None
