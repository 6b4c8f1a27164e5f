"""scoring.score_input: any table is scored as asked (engine, precision, time), or an error says why not."""

from __future__ import annotations

import csv
import json
import time
from pathlib import Path

import pytest

from common.errors import ArenaError, UsageError
from factory.stage_context import StageContext
from scoring.score_input import score_input
from scoring.score_stage import ScoreOptions
from scoring.scorer import ScorerSpec, own_precision
from tests.scoring.fakes import quiet_show
from tests.scoring.places import judged_place, write_battles

OUTPUT = Path("out.csv")


@pytest.fixture
def judged(workplace, make_experiment, tiny_model, small_tokenizer, small_frame, judge_prompt):
    """An experiment with a judge, and 40 battles in battles.csv; the current folder is its place."""
    experiment = make_experiment(cutoff_len=400)
    judged_place(experiment, tiny_model(), small_tokenizer, small_frame, judge_prompt)
    write_battles(Path("battles.csv"), 40)
    return experiment


def scored(experiment, columns=None, **options) -> str:
    """Score battles.csv; return what was said."""
    show, context = quiet_show(), StageContext(experiment, "sft")
    given = ScoreOptions(**options)
    assert score_input(context, Path("battles.csv"), OUTPUT, columns, show=show, options=given) == 40
    assert not (experiment.output_folder("sft") / "scoring").exists(), "nothing is left behind, its lock neither"
    return show.stream.getvalue()


def probabilities() -> dict[str, list[float]]:
    with OUTPUT.open(newline="") as file:
        return {row[0]: [float(x) for x in row[1:]] for row in list(csv.reader(file))[1:]}


def test_a_calibration_of_another_precision_is_told(judged):
    assert "the calibration was fitted" not in scored(judged)
    fp32 = probabilities()
    told = scored(judged, precision="bf16")
    assert "the calibration was fitted on scores of torch in fp32, these are of torch in bf16" in told
    for battle, values in probabilities().items():
        assert values == pytest.approx(fp32[battle], abs=5e-2)
    assert probabilities() != fp32, "16 bit really are 16 bit"


def test_a_table_with_other_names_is_scored_by_them(judged):
    assert "battles.csv: JSON lists of turns; verdicts: none; ids: id" in scored(judged)
    usual, path = probabilities(), Path("battles.csv")
    path.write_text(path.read_text().replace("id,prompt,response_a", "key,question,left", 1))
    with pytest.raises(ArenaError, match="lacks 2 column") as caught:
        scored(judged)
    assert "--columns prompt=question,response_a=left" in caught.value.remedy
    assert probabilities() == usual
    scored(judged, {"id": "key", "prompt": "question", "response_a": "left"})
    assert probabilities() == usual


def test_it_says_how_many_rows_were_shortened(judged):
    assert "shortened" not in scored(judged)
    rows = Path("battles.csv").read_text(encoding="utf-8").splitlines()
    long = json.dumps(["word " * 500]).replace('"', '""')
    rows[1:3] = [f'{row.split(",")[0]},"{long}","{long}","{long}"' for row in rows[1:3]]
    Path("battles.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    assert "sft: 2 of 40 rows (5.0%) were shortened to the judge's token budget" in scored(judged)


def test_a_limit_that_does_not_hold_writes_nothing_and_loses_nothing(judged):
    with pytest.raises(ArenaError, match="before every row was scored once") as caught:
        scored(judged, time_limit=3600.0, started=time.monotonic() - 7200)
    assert "1:00:00" in caught.value.where and "--precision 8bit" in caught.value.remedy
    assert not OUTPUT.exists()
    scored(judged)
    assert len(probabilities()) == 40


def test_a_generous_limit_swaps_every_row(judged):
    scored(judged)
    one_order = probabilities()
    assert "within the time limit" not in scored(judged, time_limit=3600.0)
    assert probabilities() != one_order


def test_a_row_that_cannot_be_read_is_named_and_nothing_is_written(judged):
    with Path("battles.csv").open("a") as file:
        file.write('bad,"[""x"",""y""]","[""x""]","[""y""]"\n')
    with pytest.raises(ArenaError, match=r"1 row\(s\) cannot be scored; the first \(id bad\): the numbers of turns"):
        scored(judged)
    assert not OUTPUT.exists()


def test_a_row_without_a_finite_score_is_named_by_its_id(judged, small_tokenizer):
    from safetensors.torch import load_file, save_file

    with Path("battles.csv").open("a") as file:
        file.write('"weird","[""日""]","[""x""]","[""y""]"\n')
    path = judged.merged_folder("sft") / "model.safetensors"
    weights = load_file(path)
    shown = Path("battles.csv").read_text().split("weird")[0]
    used = set(small_tokenizer.encode(shown).ids)
    (broken, *_) = (i for i in small_tokenizer.encode("日").ids if i not in used)
    weights["model.embed_tokens.weight"][broken] = float("nan")
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(ArenaError, match="id weird"):
        score_input(StageContext(judged, "sft"), Path("battles.csv"), OUTPUT, show=quiet_show())
    assert not OUTPUT.exists()


def test_nobody_else_s_file_is_replaced_and_no_model_loaded(judged):
    content = Path("battles.csv").read_bytes()
    Path("train.csv").write_bytes(content)
    for name in ("train.csv", "battles.csv"):
        show = quiet_show()
        with pytest.raises(UsageError, match="not an earlier output of this command"):
            score_input(StageContext(judged, "sft"), Path("battles.csv"), Path(name), show=show)
        assert Path(name).read_bytes() == content and show.stream.getvalue() == ""
    scored(judged)
    scored(judged)
    assert len(probabilities()) == 40, "an earlier output is replaced"


def test_engines_and_precisions_that_a_stage_lacks_are_wrong_use(judged):
    with pytest.raises(UsageError, match="gives rewards and cannot be scored in auto"):
        ScorerSpec(StageContext(judged, "rm"), "llama.cpp").scorer()
    with pytest.raises(UsageError, match="cannot be scored in adapter by torch") as caught:
        ScorerSpec(StageContext(judged, "dpo_reward"), "torch", "adapter").scorer()
    assert "auto, fp32, bf16, fp16" in caught.value.remedy


def test_an_experiments_precision_goes_where_it_can(make_experiment):
    experiment = make_experiment(precision="8bit")
    assert [own_precision(experiment, stage) for stage in ("sft", "rm", "dpo_reward")] == ["8bit", "8bit", "auto"]
