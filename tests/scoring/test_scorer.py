"""The same battle is described, fed and scored alike, whatever table it comes from."""

import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from chain import called, rows_of
from pyarrow import parquet

from common.experiment import load_experiment
from factory.stage_context import StageContext
from scoring.calibration import Calibration
from scoring.predictions import write_probabilities
from scoring.score_stage import audit_for
from scoring.scorer import ScorerSpec
from tests.scoring.places import identity

STAGES = ("sft", "dpo_reward")
DATA = Path("data/exam")


def scorer(stage: str):
    return ScorerSpec(StageContext(load_experiment("exam"), stage)).scorer()


@pytest.mark.parametrize("stage", STAGES)
def test_input_gives_the_last_digit_of_the_test_set_s_own_table(scored, stage):
    folder = Path("outputs/exam", stage)
    report = json.loads((folder / "report.json").read_text())
    if stage == "sft":  # the link of a random judge says the same of every battle
        report |= {"calibration": identity(), "calibrations": {"one_order": identity()}}
        (folder / "report.json").write_text(json.dumps(report))
        scores = pd.read_parquet(folder / "scores_test.parquet")
        made = Calibration.from_json(report).apply(scores)
        write_probabilities(folder / "probabilities_test.csv", scores["id"], made)
    else:
        assert report["calibration"]["kept"] and abs(report["calibration"]["link"]["length"]) > 0.1
    called("score", "-e", "exam", "--stage", stage, "--input", "test.csv", "--output", f"{stage}.csv")
    own = rows_of(folder / "probabilities_test.csv")
    assert len({row["winner_model_a"] for row in own}) > 30, "the rows differ"
    assert rows_of(Path(f"{stage}.csv")) == own


@pytest.mark.parametrize("stage", STAGES)
def test_every_exported_battle_is_described_and_fed_as_its_vote_is(scored, stage):
    asked = scorer(stage)
    exported = {facts["id"]: (facts, inputs) for split in ("train", "valid") for facts, inputs in asked.exported(split)}
    cut = 0
    for facts, inputs in asked.read(Path("votes.csv")):
        known, texts = exported.pop(facts["id"])
        assert {**facts, "verdict": known["verdict"]} == known
        assert {name: texts[name] for name in inputs} == json.loads(json.dumps(inputs)), "tuples are lists on disk"
        cut += known["cut"]
    assert not exported and cut > 50


def test_lengths_and_cuts_of_pairs_are_the_pairs_own(place):
    table = parquet.read_table(DATA / "pairs.parquet")
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        row.update(tokens_a=200, tokens_b=201 + number % 2, cut=number % 2 == 1)
    parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), DATA / "pairs.parquet")
    known = {row["id"]: row for row in rows}
    facts = [each for each, _ in scorer("dpo_reward").exported("valid")]
    assert facts and {each["cut"] for each in facts} == {True, False}
    for each in facts:
        assert (each["tokens"], each["cut"]) == (known[each["id"]]["tokens_b"], known[each["id"]]["cut"])


def test_a_report_tells_what_was_cut_from_what_its_stage_was_fed(place):
    audit = json.loads((DATA / "audit.json").read_text())
    audit["truncation"]["train"]["rows_cut"] = 11
    audit["pairs"]["reward"]["truncation"]["train"]["rows_cut"] = 22
    (DATA / "audit.json").write_text(json.dumps(audit))
    cut = {stage: audit_for(DATA, stage)["truncation"]["train"]["rows_cut"] for stage in ("sft", "dpo_judge", "rm")}
    assert cut == {"sft": 11, "dpo_judge": 11, "rm": 22} and audit_for(DATA, "dpo_reward") == audit_for(DATA, "rm")
