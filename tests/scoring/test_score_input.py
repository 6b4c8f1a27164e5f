"""scoring.score_input: any table is scored as asked (engine, precision, time), or an error says why not."""

import csv
import json
import math
import shutil
import time
from pathlib import Path

import pandas
import pyarrow as pa
import pytest
from chain import call, called
from pyarrow.parquet import write_table

from common.battle import PROBABILITY_COLUMNS, VERDICTS
from common.errors import ArenaError, UsageError
from common.experiment import load_experiment
from factory.stage_context import StageContext
from scoring.runner import Pace
from scoring.score_input import score_input
from scoring.score_stage import ScoreOptions
from scoring.scorer import ScorerSpec, own_precision
from tests.bad_inputs.place import COLUMNS
from tests.scoring.fakes import quiet_show

OUTPUT, RESULT = Path("out.csv"), Path("outputs/exam/sft")


@pytest.fixture
def judged(place):
    """An experiment with a judge, and 40 battles in battles.csv."""
    rows = [row | {"id": f"b{number}"} for number, row in enumerate(place.rows(40))]
    place.table(rows, "battles.csv", ("id", *COLUMNS[3:6]))
    return load_experiment("exam")


def scored(experiment, columns=None, **options) -> str:
    """Score battles.csv; return what was said."""
    show, context = quiet_show(), StageContext(experiment, "sft")
    given = ScoreOptions(**options)
    made = score_input(context, Path("battles.csv"), OUTPUT, columns, show=show, options=given)
    assert made == {"rows": 40, "output": "out.csv", "by_prior": 0}
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
        assert values == pytest.approx(fp32[battle], abs=0.1)
    assert probabilities() != fp32, "16 bit really are 16 bit"


def test_a_table_with_other_names_is_scored_by_them(judged):
    assert "battles.csv: JSON lists of turns; verdicts: none; ids: id" in scored(judged)
    usual, path = probabilities(), Path("battles.csv")
    path.write_text(path.read_text().replace("id,prompt,response_a", "key,question,left", 1))
    with pytest.raises(ArenaError, match=r"lacks 2 column(.|\n)*--columns prompt=question,response_a=left"):
        scored(judged)
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


def test_a_limit_scores_both_orders_of_all_rows_or_one(judged, monkeypatch):
    scored(judged)
    one_order = probabilities()
    assert "no room" not in scored(judged, time_limit=3600.0)
    assert probabilities() != one_order
    monkeypatch.setattr(Pace, "allows", lambda self, tokens: False)
    assert "no room for the other order" in scored(judged, time_limit=3600.0)
    assert probabilities() == one_order


def test_a_row_that_cannot_be_read_gets_the_class_prior_in_its_place(judged):
    report = judged.output_folder("sft") / "report.json"
    report.write_text(json.dumps(json.loads(report.read_text()) | {"train_class_counts": {"a": 9, "b": 5, "tie": 3}}))
    rows = Path("battles.csv").read_text(encoding="utf-8").splitlines()
    bad = 'bad{},"[""x"",""y""]","[""x""]","[""y""]"'
    rows[1:1], rows[3:3] = [bad.format(0), bad.format(1)], [bad.format(2), "b7,too,short"]  # b7 is a row's own id
    Path("battles.csv").write_text("\n".join([*rows, bad.format(3)]) + "\n", encoding="utf-8")
    show = quiet_show()
    made = score_input(StageContext(judged, "sft"), Path("battles.csv"), OUTPUT, show=show)
    assert made == {"rows": 44, "output": "out.csv", "by_prior": 4}
    found = probabilities()
    assert list(found) == ["bad0", "bad1", "bad2", *(f"b{n}" for n in range(40)), "bad3"]
    assert all(found[f"bad{n}"] == pytest.approx([0.5, 0.3, 0.2]) for n in range(4))
    said = show.stream.getvalue()
    assert "5 row(s) cannot be read: 4 get the class prior; 1 without an id of their own have no line" in said
    assert "battles.csv row 1 (id bad0): the numbers of turns differ" in said


@pytest.mark.parametrize("wanted", [["id", "winner"], ["id", *PROBABILITY_COLUMNS]])
def test_a_test_set_gets_the_submission_that_its_competition_wants(place, wanted):
    wsdm = wanted[1] == "winner"
    texts = [f"text {n}" if wsdm else f'["text {n}"]' for n in range(6)]
    rows = {"id": [f"{n:03}" for n in range(6)], **dict.fromkeys(("prompt", "response_a", "response_b"), texts)}
    write_table(pa.table(rows | ({"scored": [True] * 6} if wsdm else {})), "t.parquet")
    assert f"id, {wanted[1]}" in call("score", "-e", "exam", "--input", "t.parquet", "--output", "out.csv").output
    votes = place.rows()
    for row in votes if wsdm else ():  # as its train.parquet has them
        row |= {name: json.loads(row[name])[0] for name in ("prompt", "response_a", "response_b")}
    place.table(votes)
    called("prepare", "-e", "exam", "--train", "votes.csv", "--test", "t.parquet")
    called("score", "-e", "exam", "--fresh")
    made = ((OUTPUT, "out_probabilities.csv"), (RESULT / "submission.csv", "probabilities_test.csv"))
    for submission, beside in made:
        table = pandas.read_csv(submission, dtype={"id": str})
        assert list(table) == wanted and table["id"].tolist() == rows["id"]
        if wsdm:
            chances = pandas.read_csv(submission.with_name(beside), dtype={"id": str})
            pairs = chances[list(PROBABILITY_COLUMNS[:2])].to_numpy()
            assert table["winner"].tolist() == ["model_a" if a >= b else "model_b" for a, b in pairs]
            assert chances["id"].tolist() == rows["id"]


def test_a_test_row_that_prepare_cannot_read_is_in_the_submission(place):
    rows = place.rows(6, start=9000)
    rows[2]["prompt"] = "no list"
    place.table(rows, "test.csv", COLUMNS[:6])
    said = call("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv").output
    assert "5 to submit (1 more cannot be read and will get the class prior" in said
    said = " ".join(call("score", "-e", "exam", "--fresh").output.split())
    assert "1 of 6 test rows could not be read and get the class prior" in said
    table = pandas.read_csv(RESULT / "submission.csv")
    assert table["id"].tolist() == list(range(9000, 9006))
    shares = [json.loads((RESULT / "report.json").read_text())["train_class_counts"][v] + 1 for v in VERDICTS]
    assert table.iloc[2, 1:].tolist() == pytest.approx([share / sum(shares) for share in shares])
    called("verify", str(RESULT))


def test_a_labelled_table_gets_its_log_loss_beside_the_baselines(place):
    rows = [*place.rows(30), *place.rows(10, start=5000)]
    place.table(rows, "mine.csv")
    made = json.loads(called("score", "-e", "exam", "--input", "mine.csv", "--output", "out.csv", "--json"))
    judged, shares = made["judged"], pandas.read_csv(OUTPUT)[list(PROBABILITY_COLUMNS)].to_numpy()
    losses = [-math.log(row[number % 3]) for row, number in zip(shares, [*range(30), *range(10)], strict=True)]
    assert judged["rows"] == 40 and judged["log_loss"] == pytest.approx(sum(losses) / 40, abs=1e-6)
    low, high = judged["log_loss_ci95"]
    assert low < judged["log_loss"] < high and list(judged["baselines"]) == ["uniform", "prior", "length", "tfidf"]
    assert judged["baselines"]["uniform"] == pytest.approx(math.log(3)) and 15 < judged["training_rows"] < 30
    shutil.rmtree("data/exam")  # as where a judge was brought to without its data
    said = call("score", "-e", "exam", "--input", "mine.csv", "--output", "out.csv").output
    assert "40 labelled rows" in said and "Class prior" in said and "TF-IDF" not in said


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
    for known in (RESULT / "state.json", path.with_name("canaries.json")):  # the weights' hash, the golden prompts
        known.unlink()
    with pytest.raises(ArenaError, match="id weird"):
        score_input(StageContext(judged, "sft"), Path("battles.csv"), OUTPUT, show=quiet_show())
    assert not OUTPUT.exists()


def test_engines_and_precisions_that_a_stage_lacks_are_wrong_use(judged):
    with pytest.raises(UsageError, match=r"reads each response alone, which llama\.cpp in auto cannot do"):
        ScorerSpec(StageContext(judged, "rm"), "llama.cpp").scorer()
    with pytest.raises(UsageError, match=r"which torch in adapter cannot do(.|\n)*auto, fp32, bf16, fp16"):
        ScorerSpec(StageContext(judged, "dpo_reward"), "torch", "adapter").scorer()
    experiment = judged.model_copy(update={"precision": "8bit"})  # goes where it can
    assert [own_precision(experiment, stage) for stage in ("sft", "rm", "dpo_reward")] == ["8bit", "8bit", "auto"]


def test_a_cascade_passes_on_what_the_first_judge_is_not_sure_of(place):
    rows = place.rows(30, start=5000)
    place.table(rows, "mine.csv")
    found = {}
    for stage in ("sft", "base"):
        called("score", "-e", "exam", "--stage", stage)
        made = called("score", "-e", "exam", "--stage", stage, "--input", "mine.csv", "--json")
        found[stage] = pandas.read_csv(json.loads(made)["output"])[list(PROBABILITY_COLUMNS)].to_numpy()
    threshold = float(sorted(found["sft"].max(axis=1))[18]) - 1e-6  # 12 are surer
    point = {"threshold": threshold, "coverage": 0.4, "rows": 12, "agreement": 0.95, "bound": 0.9}
    place.edit_json(str(RESULT / "report.json"), agreement={"confidence": 0.95, "rows": 30, "curve": [point]})
    asked = ("score", "-e", "exam", "--input", "mine.csv", "--output", "out.csv", "--agree", "0.8", "--cascade")
    made = json.loads(called(*asked, "exam:base", "--json"))
    sure = found["sft"].max(axis=1) >= threshold
    table = pandas.read_csv(OUTPUT)[list(PROBABILITY_COLUMNS)].to_numpy()
    assert table[sure] == pytest.approx(found["sft"][sure]) and table[~sure] == pytest.approx(found["base"][~sure])
    assert made["cascade"]["answered"] == {"exam:sft": 12, "exam:base": 18}
    assert 0 < made["cascade"]["tokens"]["exam:base"] < made["cascade"]["tokens"]["exam:sft"]
    assert (pandas.read_csv("out_choices.csv")["choice"] == "abstain").tolist() == (~sure).tolist()
    first, second = ([-math.log(row[n % 3]) for n, row in enumerate(found[stage])] for stage in ("sft", "base"))
    parts = made["judged"]["parts"]
    assert parts["first_alone"] == pytest.approx(sum(first) / 30, abs=1e-6) and parts["passed_on"] == 18
    both = sum(b if passed else a for a, b, passed in zip(first, second, ~sure, strict=True)) / 30
    assert made["judged"]["log_loss"] == pytest.approx(both, abs=1e-6)
    assert "answered by:   exam:sft 12" in call(*asked, "exam:base").output
    for wrong in ([*asked, "exam"], [*asked, "exam:sft"], [*asked[:-3], "--cascade", "exam:base"]):
        assert call(*wrong).exit_code == 2
