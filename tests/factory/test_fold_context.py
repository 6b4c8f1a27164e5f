"""A stage's folds: what of the recipe and of the folders they change, and what --fold means."""

import pytest

from common.command_line import fold_named
from common.errors import UsageError
from common.stages import STEPS
from factory.recipes import write_recipe
from factory.stage_context import StageContext


def test_a_fold_changes_data_sets_and_folders_and_nothing_else(make_experiment, workplace):
    its = make_experiment(folds=3, quantization_bit=None)
    for step in STEPS:
        write_recipe(its, step)
    whole = StageContext(its, "dpo_judge")
    first, last, full = (whole.of(fold) for fold in (0, 2, "full"))
    assert first.recipe == first.written, "as it is written, plain llamafactory-cli trains the first fold"
    assert last.overrides("dpo_judge") == [
        "model_name_or_path=outputs/exam/sft/fold2/merged",
        "dataset=exam_dpo_judge_fold0,exam_dpo_judge_fold1",
        "output_dir=saves/none/lora/exam_dpo_judge_fold2",
        "eval_dataset=exam_dpo_judge_fold2",
    ]
    assert full.recipe["dataset"].count(",") == 2 and full.recipe["eval_dataset"] is None
    assert 'eval_strategy="no"' in full.overrides("dpo_judge"), "OmegaConf would read a bare no as false"
    assert last.merge_recipe["export_dir"] == last.merged.as_posix() == "outputs/exam/dpo_judge/fold2/merged"
    assert (whole.label, last.label) == ("dpo_judge", "dpo_judge fold2")
    assert last.command == "python run.py dpo --view judge -e exam --fold 2"
    assert whole.answering == whole.judging == [first, whole.of(1), last] and last.scores("test")
    assert not full.scores("valid") and not full.scores("test")
    answers = StageContext(make_experiment(folds=3, fold_answer="full"), "sft")
    assert [each.fold for each in answers.answering] == ["full"] and not answers.of(0).scores("test")


def test_the_fold_that_a_word_means(make_experiment):
    for text, folds, means in (("2", 3, 2), ("full", 3, "full"), (None, 3, "all"), (None, 1, None)):
        assert fold_named(text, make_experiment(folds=folds)) == means
    for text, folds in (("3", 3), ("-1", 3), ("some", 3), ("0", 1)):
        with pytest.raises(UsageError, match="--fold"):
            fold_named(text, make_experiment(folds=folds))
