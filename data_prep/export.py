"""The export: votes from a table to data/<experiment>/, the folder that LLaMA-Factory and scoring read.

sft_{train,valid}.jsonl          sharegpt rows: the judge prompt and the true verdict's label
dpo_judge_{train,valid}.jsonl    preference rows on the same prompts: the true verdict's label and a wrong one
dpo_reward_{train,valid}.jsonl   preference rows on the users' prompts: the winning response and the losing one
battles.parquet                  the texts fitted to the judge prompt, one row a battle
pairs.parquet                    prompt and two responses fitted as a pair, one row a battle, ties included
rows.parquet                     what is known of each battle: split, verdict, group, tokens, cuts
dataset_info.json                LLaMA-Factory's list of data sets
audit.json                       rows read, kept, rejected; tokens lost; pairs left out
manifest.json                    what all this was made from

The preference rows are written for the views that are asked for; pairs.parquet belongs to the reward view.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep.battle import VERDICTS, Battle, swap_verdict
from data_prep.budget import Fitted, Fitter, in_chunks
from data_prep.chat_frame import load_frame
from data_prep.errors import ArenaError
from data_prep.files import atomic_file, atomic_folder, sha256_of, write_json
from data_prep.folds import prompt_group, validation_rows
from data_prep.pair_budget import FittedPair, PairFitter
from data_prep.pairs import (
    VIEWS,
    PairTally,
    View,
    judge_rows,
    pair_record,
    pair_schema,
    reward_rows,
    turn_json,
    wrong_verdicts,
)
from data_prep.prompt import JudgePrompt
from data_prep.readers import VoteReader
from data_prep.spool import Spool

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
    views: Collection[View] = VIEWS,
) -> dict[str, Any]:
    """Read, fold, fit and write one experiment's data folder, whole or not at all; return the audit.

    `truth` is a table of known probabilities (synthetic arena only), copied beside the data for the report.
    `views` are the preference sets to write beside those of SFT; "reward" tokenizes every text once more.
    Raises ArenaError; an earlier export then stays as it was.
    """
    reader = VoteReader(train, labelled=True)
    test_reader = VoteReader(test, labelled=False) if test else None
    frame, tokenizer = load_frame(experiment)
    prompt = JudgePrompt.load(Path(experiment.prompt_template), experiment.labels)
    budget = {"cutoff_len": experiment.cutoff_len, "shares": experiment.budget_shares}
    fitters = _Fitters(
        Fitter(frame, tokenizer, prompt, **budget),
        PairFitter(frame, tokenizer, **budget) if "reward" in views else None,
    )
    with atomic_folder(experiment.data_folder) as folder:
        with _Writer(folder, experiment, views) as writer:
            tallies = {"train": _Tally(), "test": _Tally()}
            for fitted, pair in _fit_all(reader, fitters, experiment.swap_copies, "train", progress):
                writer.add_labelled(fitted, pair)
                tallies["train"].add(fitted)
            for fitted, pair in _fit_all(test_reader or (), fitters, False, "test", progress):
                writer.add_test(fitted, pair)
                tallies["test"].add(fitted)
        counts = writer.split()
        audit = _audit(experiment, reader, test_reader, tallies, counts)
        audit["pairs"] = writer.pairs_audit(counts)
        _describe(folder, experiment, prompt, frame, audit, truth)
    _publish(experiment, audit)
    return audit


@dataclass(frozen=True)
class _Fitters:
    """The judge's fitter and, where the reward view is asked for, that of pairs."""

    judge: Fitter
    pair: PairFitter | None

    def fit(self, battles: list[Battle], both_orders: bool) -> list[tuple[Fitted, FittedPair | None]]:
        pairs = self.pair.fit(battles) if self.pair else [None] * len(battles)
        return list(zip(self.judge.fit(battles, both_orders=both_orders), pairs, strict=True))


def _fit_all(
    reader: Iterable[tuple[int, Battle]], fitters: _Fitters, both_orders: bool, phase: str, progress
) -> Iterator[tuple[Fitted, FittedPair | None]]:
    """Fit in chunks, one chunk ahead in a thread: the tokenizer releases the interpreter while it works."""
    seen = 0
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting = None
        for chunk in in_chunks((battle for _, battle in reader), _CHUNK):
            following = pool.submit(fitters.fit, chunk, both_orders)
            if waiting is not None:
                yield from waiting.result()
            waiting = following
            seen += len(chunk)
            progress(Progress(phase, seen))
        if waiting is not None:
            yield from waiting.result()


class _Writer:
    """Streams fitted battles to disk; the folds, which need all verdicts, divide the rows at the end."""

    def __init__(self, folder: Path, experiment: Experiment, views: Collection[View]):
        self._folder, self._experiment, self._views = folder, experiment, views
        self._labels = dict(zip(VERDICTS, experiment.labels.in_order(), strict=True))
        self._rows: dict[str, list] = {name: [] for name in _row_schema().names}
        self._tallies = {"train": PairTally(), "test": PairTally()}
        self._spools = {name: Spool(folder, name) for name in set_names(views)}
        self._battles = _ParquetFile(folder / "battles.parquet", _text_schema())
        self._pairs = _ParquetFile(folder / "pairs.parquet", pair_schema()) if "reward" in views else None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *_) -> None:
        for file in (*self._spools.values(), self._battles, self._pairs):
            if file is not None:
                file.close()

    def add_labelled(self, fitted: Fitted, pair: FittedPair | None) -> None:
        battle, experiment = fitted.battle, self._experiment
        wrong = wrong_verdicts(battle.id, battle.verdict, rejected=experiment.dpo_rejected, seed=experiment.seed)
        orders = [self._judge_lines(battle.id, fitted.message, battle.verdict, wrong)]
        if experiment.swap_copies:
            # A swapped copy is for training: the validation fold is judged on the battles as they were.
            swapped = (swap_verdict(battle.verdict), tuple(map(swap_verdict, wrong)))
            orders.append(self._judge_lines(battle.id, fitted.message_swapped, *swapped))
        for name in orders[0]:
            self._spools[name].add(orders[0][name], orders[1][name] if orders[1:] else ())
        if pair is not None:
            self._spools["dpo_reward"].add(reward_rows(pair.pair, battle.verdict))
        self._add(fitted, pair, split="train")

    def add_test(self, fitted: Fitted, pair: FittedPair | None) -> None:
        self._add(fitted, pair, split="test")

    def split(self) -> dict[str, int]:
        """Divide the labelled rows into the folds; write the data sets and rows.parquet; return row counts."""
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
        splits = [self._rows["split"][i] for i in labelled]
        counts = {f"{n}_{s}": rows for n, spool in self._spools.items() for s, rows in spool.divide(splits).items()}
        write_table(pa.table(self._rows, schema=_row_schema()), self._folder / "rows.parquet", compression="zstd")
        _refuse_empty(counts, experiment, ties=verdicts.count("tie"), battles=len(verdicts))
        return {**counts, "test": self._rows["split"].count("test")}

    def pairs_audit(self, counts: dict[str, int]) -> dict[str, Any]:
        """Return what the audit says of the preference sets that were asked for."""
        audit: dict[str, Any] = {}
        for view in (view for view in VIEWS if view in self._views):
            audit[view] = {split: counts[f"dpo_{view}_{split}"] for split in ("train", "valid")}
        if "judge" in audit:
            audit["judge"]["rejected"] = self._experiment.dpo_rejected
        if "reward" in audit:
            audit["reward"] |= self._tallies["train"].preferences()
            audit["reward"]["truncation"] = {n: t.truncation() for n, t in self._tallies.items() if t.battles}
        return audit

    def _judge_lines(self, battle_id: str, message: str, verdict: str, wrong: tuple[str, ...]) -> dict[str, list[str]]:
        human, label = turn_json("human", message), self._labels[verdict]
        answered = f'{{"id": {json.dumps(battle_id)}, "conversations": [{human}, {turn_json("gpt", label)}]}}\n'
        lines = {"sft": [answered]}
        if "judge" in self._views:
            lines["dpo_judge"] = judge_rows(battle_id, human, label, [self._labels[w] for w in wrong])
        return lines

    def _add(self, fitted: Fitted, pair: FittedPair | None, split: str) -> None:
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
        self._battles.add({name: getattr(battle, name) for name in _text_schema().names})
        if pair is not None:
            self._pairs.add(pair_record(pair))
            self._tallies[split].add(pair, turns=battle.turns + fitted.dropped, verdict=battle.verdict)


class _ParquetFile:
    """A parquet file that is written row by row, in groups of rows."""

    def __init__(self, path: Path, schema):
        from pyarrow.parquet import ParquetWriter

        self._schema, self._waiting = schema, []
        self._writer = ParquetWriter(path, schema, compression="zstd")

    def add(self, row: dict[str, Any]) -> None:
        self._waiting.append(row)
        if len(self._waiting) >= 2 * _CHUNK:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._writer.close()

    def _flush(self) -> None:
        import pyarrow as pa

        if self._waiting:
            self._writer.write_table(pa.Table.from_pylist(self._waiting, schema=self._schema))
            self._waiting.clear()


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
        "exported": counts,
        "swap_copies": experiment.swap_copies,
        "truncation": {name: tally.summary() for name, tally in tallies.items() if tally.rows},
    }


def _refuse_empty(counts: dict[str, int], experiment: Experiment, *, ties: int, battles: int) -> None:
    """Raise ArenaError for a set without a row, on which LLaMA-Factory would stop or validate nothing."""
    empty = [name for name, count in counts.items() if not count]
    if not empty:
        return
    remedy = "give more battles with different prompts, or change valid_share in experiment.yaml"
    if all(name.startswith("dpo_reward") for name in empty):
        remedy = "give battles with a winner and two different responses, or prepare without the reward view"
    raise ArenaError(
        f"no row is left for {', '.join(empty)} ({battles} battles, {ties} of them ties)",
        where=str(experiment.data_folder),
        remedy=remedy,
    )


def _describe(folder: Path, experiment: Experiment, prompt: JudgePrompt, frame, audit, truth: Path | None) -> None:
    """Write the small files; the manifest with everybody's hash is the last."""
    write_json(folder / "dataset_info.json", dataset_entries(experiment, audit["pairs"]))
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


def set_names(views: Collection[View]) -> list[str]:
    """Return the data sets of these views, without the experiment's name and the split."""
    return ["sft", *(f"dpo_{view}" for view in VIEWS if view in views)]


def dataset_entries(experiment: Experiment, views: Collection[View] = VIEWS, within: str = "") -> dict[str, Any]:
    """Return this experiment's entries of LLaMA-Factory's dataset_info.json; `within` is a folder prefix."""
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt"}
    entries = {}
    for name in set_names(views):
        pairs = name != "sft"
        columns = {"chosen": "chosen", "rejected": "rejected"} if pairs else {}
        for split in ("train", "valid"):
            entries[f"{experiment.name}_{name}_{split}"] = {
                "file_name": f"{within}{name}_{split}.jsonl",
                "formatting": "sharegpt",
                **({"ranking": True} if pairs else {}),
                "columns": {"messages": "conversations", **columns},
                "tags": tags,
            }
    return entries


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
    write_json(path, {**entries, **dataset_entries(experiment, audit["pairs"], within=f"{experiment.name}/")})
    write_json(DATA / "audit.json", audit)
