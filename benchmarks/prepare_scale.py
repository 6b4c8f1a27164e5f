"""How time and memory of `prepare` grow with the votes.

    python benchmarks/prepare_scale.py --votes FILE [FILE ...] --work FOLDER [--rows 57477 1000000]
                                       [--characters 40] [--docs]

Real rows are repeated with fresh ids and written as a folder of parquet parts of 50,000 rows; each size is exported
once, in a process of its own, whose peak of resident memory is measured (with --workers, that of the workers is added).
Tokenizer, cutoff and judge prompt are those of benchmarks/prepare_speed.py, without swapped copies. Every second prompt
is made new, so that the number of different prompts grows with the rows, as that of real votes does. With --characters
only the beginning of each text is kept: what stays in memory of a battle is the same, and many more rows are done.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from figures import ROOT, measured_on, put, table
from prepare_speed import battles_of, frame_of, train_tokenizer

from common.battle import Battle
from common.experiment import Experiment
from data_prep import export as export_module
from data_prep.synthetic import cell

PART = 50_000


def write_parts(battles: list[Battle], rows: int, folder: Path) -> None:
    """Write `rows` rows in the competition's schema as parquet parts, the battles repeated with fresh ids."""
    import pyarrow as pa
    from pyarrow import parquet

    folder.mkdir(parents=True)
    source = enumerate(islice(cycle(battles), rows))
    for number in range(-(-rows // PART)):
        columns: dict[str, list] = {name: [] for name in ("id", "prompt", "response_a", "response_b")}
        columns |= {f"winner_{name}": [] for name in ("model_a", "model_b", "tie")}
        for row, battle in islice(source, PART):
            first = f"{battle.prompts[0]} ({row})" if row % 2 else battle.prompts[0]
            texts = ((first, *battle.prompts[1:]), battle.responses_a, battle.responses_b)
            winners = (battle.verdict == verdict for verdict in ("a", "b", "tie"))
            for name, value in zip(columns, [str(row), *map(cell, texts), *map(int, winners)], strict=True):
                columns[name].append(value)
        parquet.write_table(pa.table(columns), folder / f"part-{number:05}.parquet", row_group_size=5_000)


def shortened(battle: Battle, characters: int) -> Battle:
    """Return a battle with the first characters of each text."""
    texts = {name: getattr(battle, name) for name in ("prompts", "responses_a", "responses_b")}
    return replace(battle, **{name: tuple(text[:characters] for text in turns) for name, turns in texts.items()})


def one_size(folder: Path, workers: int, cutoff: int) -> None:
    """Export a folder of parts once and print `seconds peak`, in GiB."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file("tokenizer.json")
    frame = frame_of(tokenizer)
    export_module.load_frame = lambda _: (frame, tokenizer)
    experiment = Experiment(
        name="scale",
        model="none",
        template="qwen3_nothink",
        cutoff_len=cutoff,
        swap_copies=False,
        prompt_template=str(ROOT / "templates" / "judge_prompt.j2"),
    )
    started = time.perf_counter()
    export_module.export(experiment, folder, workers=workers)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak += workers * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    print(seconds, peak / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", nargs="+", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="an empty folder with room for 15 KB a row")
    parser.add_argument("--rows", nargs="+", type=int, default=[57_477, 1_000_000])
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cutoff", type=int, default=2048)
    parser.add_argument("--characters", type=int, help="keep so many of each text (default: all)")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    work = arguments.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    battles = battles_of(arguments.votes)
    train_tokenizer(battles[:4000]).save(str(work / "tokenizer.json"))
    if arguments.characters:
        battles = [shortened(battle, arguments.characters) for battle in battles]
    lines, first = [], None
    for rows in arguments.rows:
        parts = work / f"votes-{rows}"
        write_parts(battles, rows, parts)
        call = [sys.executable, __file__, "--one", str(parts), str(arguments.workers), str(arguments.cutoff)]
        told = subprocess.run(call, cwd=work, capture_output=True, text=True, check=True).stdout.split()
        seconds, peak = float(told[0]), float(told[1])
        first = first or (seconds / rows, peak)
        ratios = [f"**{seconds / rows / first[0]:.2f}**", f"{peak:.2f} GiB", f"**{peak / first[1]:.2f}**"]
        lines.append([f"{rows:,}", f"{seconds:,.1f} s", f"{rows / seconds:,.0f}", *ratios])
        print(" | ".join(lines[-1]), flush=True)
        shutil.rmtree(parts)
        shutil.rmtree(work / "data")
    headings = ["battles", "prepare", "battles/s", "time a battle, ratio", "peak memory", "ratio"]
    votes = " ".join(path.name for path in arguments.votes)
    sizes = " ".join(map(str, arguments.rows))
    options = f" --characters {arguments.characters}" if arguments.characters else ""
    how = measured_on(f"python benchmarks/prepare_scale.py --votes {votes} --work FOLDER --rows {sizes}{options}")
    text = f"{table(headings, lines)}\n\n{how}"
    if arguments.docs and not arguments.characters:
        put(ROOT / "docs" / "votes.md", "prepare scale", text)
    print(text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one_size(Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    else:
        main()
