"""scoring.scorer: what is known of the rows that a stage is fed."""

import json
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from common.errors import ArenaError
from common.experiment import load_experiment
from scoring.pipeline import audit_for
from scoring.scorer import scorer_of

DATA = Path("data/exam")


def test_lengths_and_cuts_of_pairs_are_the_pairs_own(place):
    table = parquet.read_table(DATA / "pairs.parquet")
    rows = table.to_pylist()
    for number, row in enumerate(rows):
        row.update(tokens_a=200, tokens_b=201 + number % 2, cut=number % 2 == 1)
    parquet.write_table(pa.Table.from_pylist(rows, schema=table.schema), DATA / "pairs.parquet")
    known = {row["id"]: row for row in rows}
    facts = [each for each, _ in scorer_of(load_experiment("exam"), "dpo_reward").exported("valid")]
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
    del audit["pairs"]["reward"]
    (DATA / "audit.json").write_text(json.dumps(audit))
    with pytest.raises(ArenaError, match=r"audit\.json: is damaged"):
        audit_for(DATA, "rm")
