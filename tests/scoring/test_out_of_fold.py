"""The mean of several judges' scores, and the processes that train a fold each."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chain import call

from common.errors import ArenaError
from common.experiment import load_experiment
from common.progress import Show
from factory.stage_context import StageContext
from scoring import pipeline
from scoring.calibration import AB_COLUMNS, BA_COLUMNS, Calibration, calibrate
from scoring.judge import write_judge_manifest
from scoring.links import SoftmaxLink
from scoring.out_of_fold import mean_scores
from tests.bad_inputs.place import train_and_merge


def scores(seed: int, rows: int = 200) -> pd.DataFrame:
    random = np.random.default_rng(seed)
    frame = pd.DataFrame(random.normal(0, 2, (rows, 6)), columns=[*AB_COLUMNS, *BA_COLUMNS])
    names = [str(n) for n in range(rows)]
    return frame.assign(id=names, group=names, verdict=np.resize(["a", "b", "tie"], rows))


def test_the_mean_before_the_link_is_the_geometric_mean_behind_it():
    tables = [scores(seed) for seed in (1, 2, 3)]
    link = SoftmaxLink(0.7, (0.2, -0.3, 0.1))
    each = [np.log(link.probabilities(table[list(AB_COLUMNS)].to_numpy())) for table in tables]
    pool = np.exp(np.mean(each, axis=0))
    mean = link.probabilities(mean_scores(tables)[list(AB_COLUMNS)].to_numpy())
    np.testing.assert_allclose(mean, pool / pool.sum(axis=1, keepdims=True), atol=1e-12)


def test_a_row_that_one_judge_saw_in_one_order_only_counts_as_such():
    tables = [scores(seed) for seed in (1, 2)]
    calibration: Calibration = calibrate(tables[0], seed=1)
    tables[1].loc[7, list(BA_COLUMNS)] = np.nan
    found = mean_scores(tables)
    assert found.loc[7, list(BA_COLUMNS)].isna().all() and found[list(BA_COLUMNS)].notna().sum().min() == 199
    assert np.isfinite(calibration.apply(found)).all()
    with pytest.raises(ArenaError, match="different rows"):
        mean_scores([tables[0], tables[1].iloc[::-1].reset_index(drop=True)])


@pytest.mark.parametrize("fails", [False, True])
def test_each_gpu_trains_one_fold_at_a_time_and_a_failure_is_named(make_experiment, workplace, monkeypatch, fails):
    child = workplace / "child.py"
    child.write_text(
        "import os, pathlib, sys, time\n"
        "gpu, fold = os.environ['CUDA_VISIBLE_DEVICES'], sys.argv[sys.argv.index('--fold') + 1]\n"
        "busy = pathlib.Path(f'busy-{gpu}')\n"
        "busy.touch(exist_ok=False); time.sleep(0.3); busy.unlink()\n"
        "pathlib.Path(f'done-{fold}').write_text(gpu)\n"
        f"sys.exit({int(fails)} and fold == '0')\n"
    )
    monkeypatch.setattr(pipeline, "_RUN_PY", child)
    whole = StageContext(make_experiment(folds=3), "sft")
    options = {"resume": True, "fresh": False, "until": "train", "allow": ["my tracker"]}
    if fails:
        with pytest.raises(ArenaError, match="1 of 3 trainings failed") as caught:
            pipeline.run_side_by_side(whole.judging, ["4", "7"], options, Show())
        assert caught.value.where == "outputs/exam/sft/fold0.log"
        assert caught.value.remedy.endswith("-e exam --fold 0 --until train --allow 'my tracker'")
        return
    pipeline.run_side_by_side(whole.judging, ["4", "7"], options, Show())
    gpus = [(workplace / f"done-{fold}").read_text() for fold in range(3)]
    assert set(gpus) == {"4", "7"} and len(gpus) == 3


@pytest.mark.slow
def test_another_fold_answer_asks_the_judges_that_did_not_answer(place):
    place.edit_experiment("folds: 2\n")
    votes = ("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv")
    assert call(*votes).exit_code == 0
    whole = StageContext(load_experiment("exam"), "sft")
    for fold in (0, 1, "full"):
        context = whole.of(fold)
        context.merged.mkdir(parents=True)
        train_and_merge(context.adapter, context.merged)
        write_judge_manifest(context.merged, context)
    done = call("score", "-e", "exam", "--fold", "full")
    assert done.exit_code == 0, done.output
    answers = Path("outputs/exam/sft/submission.csv")
    for how in ("mean", "full"):
        place.edit_experiment(f"fold_answer: {how}\n")
        answers.unlink(missing_ok=True)
        done = call("score", "-e", "exam")
        assert done.exit_code == 0 and len(answers.read_text().splitlines()) == 7, done.output
