"""The export: votes from a table to data/<experiment>/, the folder that LLaMA-Factory and scoring read.

sft_train.jsonl, sft_valid.jsonl   sharegpt rows: the judge prompt and the true verdict's label
battles.parquet                    the fitted texts, one row a battle
rows.parquet                       what is known of each battle: split, verdict, group, tokens, cuts
dataset_info.json                  LLaMA-Factory's list of data sets
audit.json                         rows read, kept, rejected; tokens lost
manifest.json                      what all this was made from
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from data_prep.battle import VERDICTS, Battle, swap_verdict
from data_prep.budget import Fitted, Fitter, in_chunks
from data_prep.chat_frame import load_frame
from data_prep.errors import ArenaError
from data_prep.files import atomic_file, atomic_folder, sha256_of, write_json
from data_prep.folds import prompt_group, validation_rows
from data_prep.prompt import JudgePrompt
from data_prep.readers import VoteReader

if TYPE_CHECKING:
    from factory.experiment import Experiment

DATA = Path("data")
# Battles per tokenizer call: enough to keep every core busy, little enough to keep memory flat.
_CHUNK = 512
FORMAT = 1


@dataclass
class Progress:
    """What `prepare` tells while it works: a phase and how many rows it has seen."""

    phase: str
    rows: int


@dataclass
class _Tally:
    """Counts for the audit, added up row by row."""

    rows: int = 0
    cut_rows: int = 0
    rows_with_dropped_turns: int = 0
    turns_dropped: int = 0
    tokens_full: int = 0
    tokens_kept: int = 0
    lost: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "a": 0, "b": 0})
    cut: dict[str, int] = field(default_factory=lambda: {"prompt": 0, "a": 0, "b": 0})
    longest: int = 0

    def add(self, fitted: Fitted) -> None:
        self.rows += 1
        self.cut_rows += fitted.cut
        self.rows_with_dropped_turns += fitted.dropped > 0
        self.turns_dropped += fitted.dropped
        self.tokens_full += fitted.tokens_full
        self.tokens_kept += fitted.tokens
        self.longest = max(self.longest, fitted.tokens, fitted.tokens_swapped)
        for name, lost in zip(self.lost, fitted.lost, strict=True):
            self.lost[name] += lost
            self.cut[name] += lost > 0

    def summary(self) -> dict[str, Any]:
        return {
            "rows": self.rows,
            "rows_cut": self.cut_rows,
            "rows_cut_share": round(self.cut_rows / self.rows, 6) if self.rows else 0.0,
            "rows_with_dropped_turns": self.rows_with_dropped_turns,
            "turns_dropped": self.turns_dropped,
            "tokens_before": self.tokens_full,
            "tokens_fed": self.tokens_kept,
            "fields_cut": self.cut,
            "tokens_lost_in_kept_turns": self.lost,
            "longest_row": self.longest,
        }


def export(
    experiment: Experiment,
    train: Path,
    test: Path | None = None,
    truth: Path | None = None,
    progress: Callable[[Progress], None] = lambda _: None,
) -> dict[str, Any]:
    """Read, fold, fit and write one experiment's data folder, whole or not at all; return the audit.

    `truth` is a table of known probabilities (synthetic arena only), copied beside the data for the report.
    Raises ArenaError; an earlier export then stays as it was.
    """
    reader = VoteReader(train, labelled=True)
    test_reader = VoteReader(test, labelled=False) if test else None
    frame, tokenizer = load_frame(experiment)
    prompt = JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)
    fitter = Fitter(frame, tokenizer, prompt, cutoff_len=experiment.cutoff_len, shares=experiment.budget_shares)
    with atomic_folder(experiment.data_folder) as folder:
        writer = _Writer(folder, experiment)
        with writer:
            tallies = {"train": _Tally(), "test": _Tally()}
            for fitted in _fit_all(reader, fitter, experiment.swap_copies, "train", progress):
                writer.add_labelled(fitted)
                tallies["train"].add(fitted)
            for fitted in _fit_all(test_reader or (), fitter, False, "test", progress):
                writer.add_test(fitted)
                tallies["test"].add(fitted)
        counts = writer.split()
        audit = _audit(experiment, reader, test_reader, tallies, counts)
        _describe(folder, experiment, prompt, frame, audit, truth)
    _publish(experiment, audit)
    return audit


def _fit_all(
    reader: Iterable[tuple[int, Battle]], fitter: Fitter, both_orders: bool, phase: str, progress
) -> Iterator[Fitted]:
    """Fit in chunks, one chunk ahead in a thread: the tokenizer releases the interpreter while it works."""
    seen = 0
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for chunk in in_chunks((battle for _, battle in reader), _CHUNK):
            following = pool.submit(fitter.fit, chunk, both_orders=both_orders)
            if waiting is not None:
                yield from waiting.result()
            waiting = following
            seen += len(chunk)
            progress(Progress(phase, seen))
        if waiting is not None:
            yield from waiting.result()


class _Writer:
    """Streams fitted battles to disk; the folds, which need all verdicts, divide the rows at the end."""

    def __init__(self, folder: Path, experiment: Experiment):
        self._folder, self._experiment = folder, experiment
        self._labels = dict(zip(VERDICTS, experiment.labels.in_order(), strict=True))
        self._rows: dict[str, list] = {name: [] for name in _row_schema().names}
        self._texts: list[dict] = []
        self._spool: IO[str] | None = None
        self._parquet = None

    def __enter__(self) -> _Writer:
        from pyarrow.parquet import ParquetWriter

        self._spool = (self._folder / "spool.jsonl").open("w", encoding="utf-8")
        self._parquet = ParquetWriter(self._folder / "battles.parquet", _text_schema(), compression="zstd")
        return self

    def __exit__(self, *_) -> None:
        self._flush()
        self._spool.close()
        self._parquet.close()

    def add_labelled(self, fitted: Fitted) -> None:
        verdict = fitted.battle.verdict
        self._write_line(fitted.battle.id, fitted.message, verdict)
        if self._experiment.swap_copies:
            self._write_line(fitted.battle.id, fitted.message_swapped, swap_verdict(verdict))
        self._add(fitted, split="train")

    def add_test(self, fitted: Fitted) -> None:
        self._add(fitted, split="test")

    def split(self) -> dict[str, int]:
        """Divide the labelled rows into the folds; write the two data sets and rows.parquet; return row counts."""
        import pyarrow as pa
        from pyarrow.parquet import write_table

        labelled = [i for i, split in enumerate(self._rows["split"]) if split == "train"]
        groups = [self._rows["group"][i] for i in labelled]
        verdicts = [self._rows["verdict"][i] for i in labelled]
        experiment = self._experiment
        for i, valid in zip(
            labelled,
            validation_rows(groups, verdicts, share=experiment.valid_share, seed=experiment.seed),
            strict=True,
        ):
            if valid:
                self._rows["split"][i] = "valid"
        counts = self._divide_spool([self._rows["split"][i] for i in labelled])
        write_table(pa.table(self._rows, schema=_row_schema()), self._folder / "rows.parquet", compression="zstd")
        for name, count in counts.items():
            if not count:
                raise ArenaError(
                    f"the {name} set has no row",
                    where=str(experiment.data_folder),
                    remedy="give more battles with different prompts, or change valid_share in experiment.yaml",
                )
        return {**counts, "test": self._rows["split"].count("test")}

    def _divide_spool(self, splits: list[str]) -> dict[str, int]:
        spool = self._folder / "spool.jsonl"
        copies = 2 if self._experiment.swap_copies else 1
        counts = {"train": 0, "valid": 0}
        names = {name: self._folder / f"sft_{name}.jsonl" for name in counts}
        with (
            spool.open(encoding="utf-8") as lines,
            names["train"].open("w", encoding="utf-8") as train,
            names["valid"].open("w", encoding="utf-8") as valid,
        ):
            for split in splits:
                own = [next(lines) for _ in range(copies)]
                # A swapped copy is for training: the validation fold is judged on the battles as they were.
                own = own[:1] if split == "valid" else own
                (valid if split == "valid" else train).writelines(own)
                counts[split] += len(own)
        spool.unlink()
        return counts

    def _write_line(self, battle_id: str, message: str, verdict: str) -> None:
        turns = [{"from": "human", "value": message}, {"from": "gpt", "value": self._labels[verdict]}]
        # ASCII escapes: NULs and every other character reach LLaMA-Factory unchanged.
        self._spool.write(json.dumps({"id": battle_id, "conversations": turns}) + "\n")

    def _add(self, fitted: Fitted, split: str) -> None:
        battle = fitted.battle
        for name, value in {
            "id": battle.id,
            "split": split,
            "verdict": battle.verdict,
            "group": prompt_group(battle),
            "language": battle.language,
            "turns": battle.turns + fitted.dropped,
            "dropped": fitted.dropped,
            "cut": fitted.cut,
            "tokens": fitted.tokens,
            "tokens_full": fitted.tokens_full,
            "chars_prompt": sum(map(len, battle.prompts)),
            "chars_a": sum(map(len, battle.responses_a)),
            "chars_b": sum(map(len, battle.responses_b)),
        }.items():
            self._rows[name].append(value)
        self._texts.append(
            {
                "id": battle.id,
                "prompts": battle.prompts,
                "responses_a": battle.responses_a,
                "responses_b": battle.responses_b,
            }
        )
        if len(self._texts) >= 2 * _CHUNK:
            self._flush()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._texts:
            self._parquet.write_table(pa.Table.from_pylist(self._texts, schema=_text_schema()))
            self._texts.clear()


def _text_schema():
    import pyarrow as pa

    texts = pa.list_(pa.string())
    return pa.schema([("id", pa.string()), ("prompts", texts), ("responses_a", texts), ("responses_b", texts)])


def _row_schema():
    import pyarrow as pa

    strings = ("id", "split", "verdict", "group", "language")
    counts = ("turns", "dropped", "tokens", "tokens_full", "chars_prompt", "chars_a", "chars_b")
    fields = {**dict.fromkeys(strings, pa.string()), **dict.fromkeys(counts, pa.int32()), "cut": pa.bool_()}
    return pa.schema(list(fields.items()))


def _audit(experiment: Experiment, reader, test_reader, tallies, counts) -> dict[str, Any]:
    sources = {"train": reader} | ({"test": test_reader} if test_reader else {})
    return {
        "experiment": experiment.name,
        "cutoff_len": experiment.cutoff_len,
        "sources": {
            name: {
                "file": str(r.path),
                "schema": r.schema,
                "rows_read": r.rows_read,
                "rows_kept": tallies[name].rows,
                "rows_rejected": len(r.rejected),
            }
            for name, r in sources.items()
        },
        "rejected": [asdict(row) for r in sources.values() for row in r.rejected],
        "exported": {"sft_train": counts["train"], "sft_valid": counts["valid"], "test": counts["test"]},
        "swap_copies": experiment.swap_copies,
        "truncation": {name: tally.summary() for name, tally in tallies.items() if tally.rows},
    }


def _describe(folder: Path, experiment: Experiment, prompt: JudgePrompt, frame, audit, truth: Path | None) -> None:
    """Write the small files; the manifest with everybody's hash is the last."""
    write_json(folder / "dataset_info.json", dataset_entries(experiment))
    write_json(folder / "audit.json", audit)
    with atomic_file(folder / "judge_prompt.j2") as file:
        file.write(prompt.source)
    if truth:
        shutil.copyfile(truth, folder / "truth.csv")
    write_json(
        folder / "manifest.json",
        {
            "format": FORMAT,
            "experiment": experiment.model_dump(mode="json", exclude={"recipes", "description"}),
            "frame": asdict(frame),
            "files": {path.name: sha256_of(path) for path in sorted(folder.iterdir())},
        },
    )


def dataset_entries(experiment: Experiment, within: str = "") -> dict[str, Any]:
    """Return this experiment's entries of LLaMA-Factory's dataset_info.json; `within` is a folder prefix."""
    return {
        f"{experiment.name}_sft_{split}": {
            "file_name": f"{within}sft_{split}.jsonl",
            "formatting": "sharegpt",
            "columns": {"messages": "conversations"},
            "tags": {
                "role_tag": "from",
                "content_tag": "value",
                "user_tag": "human",
                "assistant_tag": "gpt",
            },
        }
        for split in ("train", "valid")
    }


def _publish(experiment: Experiment, audit: dict[str, Any]) -> None:
    """List the sets in data/dataset_info.json too, where LLaMA Board looks, and leave the newest audit there."""
    path = DATA / "dataset_info.json"
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        entries = {}
    entries = {
        name: entry
        for name, entry in entries.items()
        if (DATA / entry.get("file_name", "")).exists() and not entry["file_name"].startswith(f"{experiment.name}/")
    }
    write_json(path, {**entries, **dataset_entries(experiment, within=f"{experiment.name}/")})
    write_json(DATA / "audit.json", audit)
