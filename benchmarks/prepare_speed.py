"""How fast `prepare` is against the bare tokenizer, and how much memory it takes.

    python benchmarks/prepare_speed.py --votes FILE [FILE ...] [--rows 57477] [--runs 3]

Real rows are repeated with fresh ids up to --rows. In one process, in turn: the bare `tokenizers` batch call over
the texts that prepare has to measure (each battle's whole judge prompt, uncut, in each order that is exported), then
the export itself. The tokenizer is a byte-level BPE of 32,000 entries trained on the same votes, the size class of
real models' tokenizers. Medians over the runs.
"""

from __future__ import annotations

import argparse
import csv
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path

from figures import ROOT, measured_on, table

from common.battle import Battle, swap
from common.experiment import Experiment
from data_prep import export as export_module
from data_prep.chat_template import ChatFrame
from data_prep.prompt import JudgePrompt
from data_prep.readers import VoteReader
from data_prep.sanitize import Neutralizer
from data_prep.synthetic import cell
from data_prep.truncation import in_chunks

SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VOCABULARY = 32_000


def battles_of(files: list[Path]) -> list[Battle]:
    return [battle for file in files for _, battle in VoteReader(file, labelled=True)]


def write_votes(battles: list[Battle], rows: int, path: Path) -> None:
    """Write `rows` rows in the competition's schema, the battles repeated with fresh ids."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(
            [
                "id",
                "model_a",
                "model_b",
                "prompt",
                "response_a",
                "response_b",
                "winner_model_a",
                "winner_model_b",
                "winner_tie",
            ]
        )
        for number, battle in enumerate(islice(cycle(battles), rows)):
            cells = [cell(texts) for texts in (battle.prompts, battle.responses_a, battle.responses_b)]
            writer.writerow([number, "x", "y", *cells, *(int(battle.verdict == v) for v in ("a", "b", "tie"))])


def train_tokenizer(battles: list[Battle]):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = (t for b in battles for t in (*b.prompts, *b.responses_a, *b.responses_b))
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def frame_of(tokenizer) -> ChatFrame:
    labels = tuple(tokenizer.encode(x).ids[0] for x in "ABC")
    before, after = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"
    return ChatFrame(
        template="qwen3_nothink",
        prefix_ids=(),
        before=before,
        after=after,
        suffix_ids=(),
        answer_prefix_ids=(),
        answer_before="",
        answer_after="<|im_end|>\n",
        answer_suffix_ids=(),
        label_ids=labels,
        answer_len=3,
        special_strings=tuple(SPECIALS),
    )


def prompts(votes: Path, experiment: Experiment, frame: ChatFrame) -> Iterator[str]:
    """Yield every text that prepare must measure."""
    prompt = JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)
    neutral = Neutralizer(frame.special_strings)
    for _, battle in VoteReader(votes, labelled=True):
        clean = replace(
            battle,
            prompts=tuple(map(neutral, battle.prompts)),
            responses_a=tuple(map(neutral, battle.responses_a)),
            responses_b=tuple(map(neutral, battle.responses_b)),
        )
        yield frame.wrap(prompt.message(clean))
        if experiment.swap_copies:
            yield frame.wrap(prompt.message(swap(clean)))


def bare_seconds(votes: Path, experiment: Experiment, frame: ChatFrame, tokenizer) -> tuple[float, int]:
    """Return the seconds of the batch calls alone (making the texts is not counted) and the number of tokens."""
    seconds, tokens = 0.0, 0
    for chunk in in_chunks(prompts(votes, experiment, frame), 1024):
        started = time.perf_counter()
        encodings = tokenizer.encode_batch(chunk, add_special_tokens=False)
        seconds += time.perf_counter() - started
        tokens += sum(map(len, encodings))
    return seconds, tokens


def one_setting(votes: Path, swap_copies: bool, cutoff: int) -> None:
    """Measure both once and print `bare prepare tokens peak`; its own process, so that the peak is its own."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file("tokenizer.json")
    frame = frame_of(tokenizer)
    export_module.load_frame = lambda _: (frame, tokenizer)
    experiment = Experiment(
        name="speed",
        model="none",
        template="qwen3_nothink",
        cutoff_len=cutoff,
        swap_copies=swap_copies,
        prompt_template=str(ROOT / "templates" / "judge_prompt.j2"),
    )
    started = time.perf_counter()
    export_module.export(experiment, votes)
    prepare = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    bare, tokens = bare_seconds(votes, experiment, frame, tokenizer)
    print(bare, prepare, tokens, peak)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", nargs="+", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=57_477)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cutoff", type=int, default=2048)
    parser.add_argument("--copies", nargs="+", choices=["no", "yes"], default=["no", "yes"], help="swapped copies")
    arguments = parser.parse_args()
    battles = battles_of(arguments.votes)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        votes = Path(folder) / "votes.csv"
        write_votes(battles, arguments.rows, votes)
        train_tokenizer(battles[:4000]).save(str(Path(folder) / "tokenizer.json"))
        del battles
        for copies in arguments.copies:
            rows.append(one_row(folder, votes, copies == "yes", arguments))
            print(" | ".join(rows[-1]), flush=True)
    headings = ["battles", "swapped copies", "bare tokenizer", "prepare", "battles/s", "ratio of speeds", "peak memory"]
    names = " ".join(path.name for path in arguments.votes)
    how = measured_on(
        f"python benchmarks/prepare_speed.py --votes {names} --rows {arguments.rows} --runs {arguments.runs}"
    )
    print(f"{table(headings, rows)}\n\n{how}")


def one_row(folder: str, votes: Path, swap_copies: bool, arguments: argparse.Namespace) -> list[str]:
    """Measure one setting in as many fresh processes as there are runs; return the table's row of medians."""
    results = []
    for _ in range(arguments.runs):
        call = [sys.executable, __file__, "--one", str(votes), str(int(swap_copies)), str(arguments.cutoff)]
        found = subprocess.run(call, cwd=folder, capture_output=True, text=True, check=True).stdout.split()
        results.append([float(x) for x in found])
    bare, prepare, _, peak = (statistics.median(column) for column in zip(*results, strict=True))
    ratio = statistics.median(r[0] / r[1] for r in results)
    speed = f"{arguments.rows / prepare:,.0f}"
    copies = "yes" if swap_copies else "no"
    seconds = [f"{bare:.1f} s", f"{prepare:.1f} s"]
    return [f"{arguments.rows:,}", copies, *seconds, speed, f"**{ratio:.2f}**", f"{peak:.2f} GiB"]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one_setting(Path(sys.argv[2]), sys.argv[3] == "1", int(sys.argv[4]))
    else:
        main()
