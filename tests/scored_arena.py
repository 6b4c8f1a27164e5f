"""Scores of a made-up judge on a made-up arena, and the report and the comparison that come of them."""

import numpy as np
import pandas as pd

from common.battle import PROBABILITY_COLUMNS, VERDICTS
from scoring.compare import compare
from scoring.links import softmax
from scoring.report.build import build_report
from tests.votes import drawn

CHECKS = [
    {"name": "labels distinct", "passed": True, "detail": "1, 2, 3", "stops": True, "remedy": ""},
    {"name": "loss not rising", "passed": None, "detail": "a loss or two", "stops": True, "remedy": ""},
]
MERGE = {"max_abs_diff": 0.0041, "mean_abs_diff": 0.002, "log_loss_adapter": 1.0103, "log_loss_merged": 1.0101}
MERGE |= {"rows": 200, "threshold": 0.05, "passed": True, "measure": "label probabilities", "merged_into": "saves/x"}
CURVE = [{"step": 10 * n, "loss": 3 / n, "eval_loss": None if n % 10 else 2 / n} for n in range(1, 41)]


def arena(rows: int, seed: int, *, skill: float = 1.0, tie: float = 0.0, both_orders: bool = False):
    """Return (scores, texts, truth): true logits ± noise as label logits; `tie` shifts the tie class."""
    random = np.random.default_rng(seed)
    strength = random.normal(0, 1.5, rows)
    logits = np.column_stack([strength / 2, -strength / 2, np.full(rows, -0.2 + tie)])
    chances = softmax(logits)
    codes = drawn(chances, random)
    ids = [f"{seed}-{i}" for i in range(rows)]
    lengths = random.integers(1, 3_000, (rows, 3))
    columns = {"id": ids, "verdict": np.array(VERDICTS)[codes], "turns": random.integers(1, 5, rows)}
    columns |= {f"chars_{name}": lengths[:, i] for i, name in enumerate(("prompt", "a", "b"))}
    spoken = random.choice(["English", "Finnish", None], rows)
    scores = pd.DataFrame(columns).assign(group=[f"g{i // 2}" for i in range(rows)], language=spoken)
    scores["cut"] = lengths.sum(axis=1) > 8_000
    for i, name in enumerate(VERDICTS):
        scores[f"ab_{name}"] = skill * logits[:, i] + random.normal(0, 0.2, rows)
        if both_orders:
            scores[f"ba_{name}"] = skill * logits[:, i] + random.normal(0, 0.2, rows) - (0.8, -0.8, 0)[i]
    words = {name: [f"{name} " * n for n in random.integers(1, 9, rows)] for name in ("text_a", "text_b")}
    truth = pd.DataFrame(chances, columns=list(PROBABILITY_COLUMNS)).assign(id=ids)
    return scores, pd.DataFrame({**columns, **words}), truth


def as_rewards(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the same scores as a reward model gives them."""
    rewards = scores.assign(reward_a=scores["ab_a"] * 3, reward_b=scores["ab_b"] * 3)
    return rewards.drop(columns=[f"ab_{name}" for name in VERDICTS])


def built(scores, texts, truth=None, *, train=None, **more):
    """Return what `build_report` returns of an arena's parts."""
    about = {"experiment": "demo", "stage": "sft", "loss_curve": CURVE, "merge_gate": MERGE, "checks": CHECKS}
    about |= {"provenance": {"versions": {"torch": "2"}, "sha256": {"data": "4e5a0b8f"}}, "scoring": {}}
    about |= {name: more.pop(name) for name in about if name in more}
    truncation = {"train": {"rows": 3, "rows_cut": 1, "rows_cut_share": 1 / 3, "fields_cut": {"a": 1}}}
    settings = {"about": about, "truncation": truncation, "swap_tta": False, "seed": 7}
    train = arena(600, 1_000)[1] if train is None else train
    return build_report(scores=scores, train_rows=train, valid_texts=texts, truth=truth, **(settings | more))


def comparison() -> dict:
    """Return what `compare_stages` returns of two stages, the second of which knows nothing."""
    scores, _, truth = arena(300, 5)
    chances = truth[list(PROBABILITY_COLUMNS)].to_numpy()
    uniform = np.full((300, 3), 1 / 3)
    models = {"sft": chances, "rm": uniform}
    found = compare(scores, models, seed=1, baselines={"prior": uniform, "tfidf": uniform}, bayes=chances)
    return {"experiment": "demo", **found, "flags": {"sft": [], "rm": []}}
