"""scoring.judge: sealed once, and another model, another precision or a damaged file is told."""

import json

import numpy as np
import pytest

from common.errors import ArenaError
from common.experiment import BudgetShares
from scoring.judge import (
    BATTLES,
    CANARIES,
    Judge,
    canary_limit,
    label_canaries,
    require_canaries,
    reward_canaries,
    seal_canaries,
)

ANSWERS = np.tile([0.5, 0.3, 0.2], (len(BATTLES), 1))


@pytest.fixture
def judge(tmp_path, small_frame, small_tokenizer, judge_prompt):
    fields = {"labels": None, "swap_tta": False, "source": {}, "shares": BudgetShares(), "cutoff_len": 256}
    return Judge(folder=tmp_path, frame=small_frame, tokenizer=small_tokenizer, prompt=judge_prompt, **fields)


def test_the_canaries_are_asked_as_any_battle(judge):
    sequences = label_canaries(judge)
    assert len(sequences) == len(BATTLES) == len({tuple(ids) for ids in sequences})
    assert max(map(len, sequences)) <= judge.cutoff_len
    assert sequences == judge.sequences([(battle, 0) for battle in BATTLES]), "none is cut at 256 tokens"
    assert len(reward_canaries(judge)) == len(BATTLES)


@pytest.mark.parametrize(
    ("sealed", "asked", "moved", "passes"),
    [
        ("fp32", "fp32", 5e-4, True),
        ("fp32", "fp32", 2e-3, False),
        ("fp32", "bf16", 2e-2, True),
        ("bf16", "fp32", 2e-2, True),
        ("fp32", "bf16", 8e-2, False),
        ("fp32", "q4_k_m", 0.2, True),
        ("fp32", "q4_k_m", 0.3, False),
    ],
)
def test_the_coarser_precision_decides(judge, sealed, asked, moved, passes):
    seal_canaries(judge, ANSWERS, sealed)
    answers = ANSWERS + np.eye(*ANSWERS.shape) * moved
    assert (moved <= canary_limit(judge.folder, asked)) is passes
    if passes:
        require_canaries(judge.folder, asked, lambda: answers)
        return
    with pytest.raises(ArenaError, match="does not answer as it did when it was merged") as caught:
        require_canaries(judge.folder, asked, lambda: answers)
    assert f"({sealed} then, {asked} now)" in caught.value.what and "merge again" in caught.value.remedy


def test_nothing_sealed_nan_and_a_damaged_file(judge):
    assert canary_limit(judge.folder, "fp32") is None
    require_canaries(judge.folder, "fp32", lambda: pytest.fail("asked"))
    with pytest.raises(ArenaError, match="no finite answer"):
        seal_canaries(judge, ANSWERS * np.nan, "fp32")
    assert not (judge.folder / CANARIES).exists()
    seal_canaries(judge, ANSWERS, "fp32")
    with pytest.raises(ArenaError, match="moved by up to nan"):
        require_canaries(judge.folder, "fp32", lambda: ANSWERS * np.nan)
    content = json.loads((judge.folder / CANARIES).read_text())
    del content["answers"]["sum"]
    for text in (json.dumps(content), "{", "[]", json.dumps(content | {"format": 9})):
        (judge.folder / CANARIES).write_text(text)
        with pytest.raises(ArenaError, match="is damaged") as caught:
            canary_limit(judge.folder, "fp32")
        assert "merge again" in caught.value.remedy
