"""How time and memory of `prepare` and `score --input` grow with the rows.

    python benchmarks/scale.py prepare --votes FILE [FILE ...] --work FOLDER [--rows 57477 1000000]
    python benchmarks/scale.py score --work FOLDER [--rows 10000 100000 1000000]

prepare: real rows are repeated with fresh ids and written as a folder of parquet parts of 50,000 rows; each size is
exported once, in a fresh process, without swapped copies. Every second prompt is made unique, so that the number of
different prompts grows with the rows, as that of real votes does. The tokenizer is a byte-level BPE of 32,000 entries
trained on the same votes, the size class of real models' tokenizers.
score: short synthetic battles and the demo's judge, so small that what grows with the rows shows; FOLDER is a place
where `run.py demo` was run to its end.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

import pandas as pd
from figures import ROOT, options, publish, row, table
from tokenizers import Tokenizer
from workbench import alone, battles_of, child_peak, frame_of, texts_of, train_tokenizer, vote_table

from common.battle import Battle
from common.experiment import Experiment
from data_prep import export as export_module
from data_prep.synthetic import TEST_COLUMNS, cell
from data_prep.truncation import in_chunks

PART, VOCABULARY = 50_000, 32_000
WORDS = ["red", "fox", "ran", "over", "old", "hills", "near", "warm", "lake", "until", "rain", "came", "again"]


def repeated(battles: list[Battle], rows: int) -> Iterator[Battle]:
    """Yield `rows` battles with fresh ids, every second prompt made unique."""
    for number, battle in enumerate(islice(cycle(battles), rows)):
        first = f"{battle.prompts[0]} ({number})" if number % 2 else battle.prompts[0]
        yield replace(battle, id=str(number), prompts=(first, *battle.prompts[1:]))


def export(folder: Path, votes: Path) -> float:
    """Export votes in a folder with a tokenizer.json; return the seconds."""
    os.chdir(folder)
    tokenizer = Tokenizer.from_file("tokenizer.json")
    export_module.load_frame = lambda _: (frame_of(tokenizer), tokenizer)  # no model is needed
    keys = {"model": "none", "template": "qwen3_nothink", "cutoff_len": 2048, "swap_copies": False}
    template = shutil.copy(ROOT / "templates" / "judge_prompt.j2", "judge_prompt.j2")
    started = time.perf_counter()
    export_module.export(Experiment(name="scale", prompt_template=template, **keys), votes, workers=0)
    return time.perf_counter() - started


def measure_prepare(asked: Namespace) -> None:
    """Export every size and publish the table."""
    asked.work.mkdir(parents=True, exist_ok=True)
    battles, lines, first = battles_of(*asked.votes), [], None
    train_tokenizer(texts_of(battles[:4000]), VOCABULARY).save(str(asked.work / "tokenizer.json"))
    for rows in asked.rows or (57_477, 1_000_000):
        (parts := asked.work / f"votes-{rows}").mkdir()
        for number, part in enumerate(in_chunks(repeated(battles, rows), PART)):
            vote_table(part).to_parquet(parts / f"part-{number:05}.parquet", row_group_size=5_000)
        seconds, peak = alone(export, asked.work, parts)
        first = first or (seconds / rows, peak)
        ratios = f"**{seconds / rows / first[0]:.2f}**", f"{peak:.2f} GiB", f"**{peak / first[1]:.2f}**"
        lines.append(row(f"{rows:,}", f"{seconds:,.1f} s", f"{rows / seconds:,.0f}", *ratios))
        shutil.rmtree(parts)
        shutil.rmtree(asked.work / "data")
    headings = ["battles", "prepare", "battles/s", "time a battle, ratio", "peak memory", "ratio"]
    publish("prepare scale", table(headings, lines), asked.write)


def measure_score(asked: Namespace) -> None:
    """Score a table of every size with the demo's judge and publish the table."""
    lines, source, output = [], asked.work / "rows.csv", asked.work / "scored.csv"
    for rows in asked.rows or (10_000, 100_000, 1_000_000):
        draw = random.Random(rows)
        texts = ([cell([" ".join(draw.choices(WORDS, k=3))]) for _ in range(3)] for _ in range(rows))
        pd.DataFrame(([number, *each] for number, each in enumerate(texts)), columns=TEST_COLUMNS).to_csv(
            source, index=False
        )
        call = [sys.executable, str(ROOT / "run.py"), "score", "-e", "demo", "--input", source, "--output", output]
        seconds, peak = child_peak(call, asked.work, asked.work / "scored.log")
        assert len(pd.read_csv(output)) == rows
        size = f"{source.stat().st_size / 2**20:,.1f} MiB"
        lines.append(
            row(f"{rows:,}", size, f"{seconds:.0f} s", f"{rows / seconds:,.0f}", f"**{1024 * peak:,.0f} MiB**")
        )
        source.unlink()
        output.unlink()
    publish("", table(["rows", "table", "seconds", "rows/s", "peak memory"], lines))


def main() -> None:
    parser = options(__doc__, "work")
    parser.add_argument("what", choices=["prepare", "score"])
    parser.add_argument("--votes", nargs="+", type=Path)
    parser.add_argument("--rows", nargs="+", type=int)
    asked = parser.parse_args()
    if asked.what == "prepare" and not asked.votes:
        parser.error("prepare needs --votes")
    measure_prepare(asked) if asked.what == "prepare" else measure_score(asked)


if __name__ == "__main__":
    main()
