"""Single battles: one as a stage's judge read it, with its answers in both orders; and the least likely verdicts."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from common.battle import PROBABILITY_COLUMNS, TEXTS, VERDICTS, Battle, swap
from common.console import name_of, visible
from common.errors import ArenaError, UsageError
from common.experiment import Experiment, Labels
from common.files import atomic_file, csv_line
from common.stages import STAGES
from data_prep.chat_template import ChatFrame, load_frame
from data_prep.export_reader import read_columns, read_rows, readable, require_pairs
from data_prep.prompt import JudgePrompt
from data_prep.truncation import MARKER
from factory.stage_context import StageContext
from scoring.compare import stage_probabilities
from scoring.links import softmax
from scoring.metrics import EPS, verdict_codes

_SETS = {"train": "training rows", "valid": "validation fold", "test": "test set"}
_ROW = ("id", "source", "split", "verdict", "language", "turns", "dropped", "cut", "tokens", "tokens_full")
_PAIR = ("prompt", "response_a", "response_b", "dropped", "cut", "tokens_a", "tokens_b")
_AGAIN = "score the stage again"
_VERDICT_NAMES = {"a": "A wins", "b": "B wins", "tie": "tie"}
Shares = dict[str, float]
# The verdicts that the judge finds least likely.
LABEL_AUDIT = "label_audit.csv"
_HEADER = ("id", "verdict", "p_verdict", "first_choice", "p_first_choice")
_SHOWN = 10


@dataclass(frozen=True)
class ShownBattle:
    """What is known of one battle.

    `prompts` are the strings that are tokenized, by name (judge: "prompt", "prompt, A and B exchanged"; pairs:
    "prompt and answer A", "prompt and answer B"); `dropped`, `cut` and tokens are of the texts that this stage reads.
    `tokens` count the longest sequence with its answer, `tokens_full` before cutting (None for pairs, whose export does
    not keep it), `tokens_with` those with answer "A" and "B" of a pair. `probabilities` by order ("A first", "B first",
    before calibration) and "final", as in the stage's probabilities file; `rewards` of A and B where there are any.
    `stale` says why the scores on disk are of an earlier judge or export, and so not shown.
    """

    id: str
    experiment: str
    stage: str
    split: str
    verdict: str | None
    language: str | None
    turns: int
    dropped: int
    cut: bool
    tokens: int
    tokens_full: int | None
    cutoff_len: int
    prompts: dict[str, str]
    probabilities: dict[str, Shares]
    rewards: dict[str, float]
    source: str
    tokens_with: dict[str, int] = field(default_factory=dict)
    stale: str | None = None


def show_battle(context: StageContext, battle_id: str, split: str | None = None) -> ShownBattle:
    """Return one exported battle.

    Raises UsageError for an id that was not exported or that two splits hold, ArenaError for a missing export.
    """
    manifest = context.manifest
    place, row = _row(context.experiment, battle_id, split)
    row["source"] = manifest["sources"][row["source"]]["file"]
    read = _pair_read if context.step.data == "dpo_reward" else _judge_read
    stale = context.earlier_scores()
    if changed := context.outdated_files():
        stale = f"this stage was trained or scored on another export ({changed[0]} changed since)"
    judged = "valid" if row["split"] in context.parts("valid") else row["split"]
    probabilities, rewards = ({}, {}) if stale else _scores(context.folder, judged, battle_id)
    return ShownBattle(
        **{**row, **read(context, place, row)},
        experiment=context.experiment.name,
        stage=context.name,
        cutoff_len=manifest["experiment"]["cutoff_len"],
        probabilities=probabilities,
        rewards=rewards,
        stale=stale,
    )


def _row(experiment: Experiment, battle_id: str, split: str | None) -> tuple[int, dict[str, Any]]:
    """Return the battle's place in rows.parquet (and so in battles.parquet and pairs.parquet) and its row."""
    path = experiment.data_folder / "rows.parquet"
    with readable(path):
        table = read_columns(path, list(_ROW))
        places = [place for place, name in enumerate(table["id"].to_pylist()) if name == battle_id]
        rows = {place: table.slice(place, 1).to_pylist()[0] for place in places}
    found = [(place, row) for place, row in rows.items() if split in (None, row["split"])]
    if len(found) == 1:
        return found[0]
    if splits := [row["split"] for row in rows.values()]:
        remedy = f"python run.py show {battle_id} -e {experiment.name} --split {splits[0]}"
        raise UsageError(f"{battle_id!r} is an id of {' and '.join(splits)}", remedy=remedy)
    raise UsageError(
        f"{battle_id!r} is not an id of train, valid or test",
        where=str(experiment.data_folder),
        remedy="take an id of the exported table; rejected rows are in audit.json",
    )


def _row_at(path: Path, place: int, columns: Sequence[str]) -> dict[str, Any]:
    """Return one row of a table whose rows are those of rows.parquet."""
    with readable(path):
        rows = read_columns(path, list(columns)).slice(place, 1).to_pylist()
    if not rows:
        raise ArenaError("has fewer rows than rows.parquet", where=str(path), remedy="run prepare again")
    return rows[0]


def _judge_read(context: StageContext, place: int, row: dict[str, Any]) -> dict[str, Any]:
    """Return the judge prompt in both orders."""
    data, dropped = context.experiment.data_folder, row["dropped"]
    cells = _row_at(data / "battles.parquet", place, ["id", *TEXTS])
    battle = Battle(cells.pop("id"), *map(tuple, cells.values()))
    with readable(data / "judge_prompt.j2"):
        source = (data / "judge_prompt.j2").read_text(encoding="utf-8")
    prompt = JudgePrompt(source, Labels(**context.manifest["experiment"]["labels"]), where="judge_prompt.j2")
    frame = ChatFrame.from_dict(context.manifest["frame"])
    orders = {"prompt": battle, "prompt, A and B exchanged": swap(battle)}
    wrapped = {name: frame.wrap(prompt.message(each, dropped)) for name, each in orders.items()}
    ids = frame.prefix_ids, frame.suffix_ids
    return {"prompts": {name: _whole(context.experiment, text, *ids) for name, text in wrapped.items()}}


def _pair_read(context: StageContext, place: int, row: dict[str, Any]) -> dict[str, Any]:
    """Return the prompt with each answer; a pair was fitted by itself, and not as the judge prompt was."""
    pair = _row_at(require_pairs(context.experiment.data_folder), place, _PAIR)
    frame = ChatFrame.from_dict(context.manifest["frame"])
    answers = {"A": pair["response_a"], "B": pair["response_b"]}
    start = _whole(context.experiment, frame.wrap(pair["prompt"]), frame.prefix_ids, frame.suffix_ids)
    ids = frame.answer_prefix_ids, frame.answer_suffix_ids
    ends = {x: _whole(context.experiment, frame.wrap_answer(answer), *ids) for x, answer in answers.items()}
    return {
        "dropped": pair["dropped"],
        "cut": pair["cut"],
        "tokens": max(pair["tokens_a"], pair["tokens_b"]),
        "tokens_full": None,
        "tokens_with": {"A": pair["tokens_a"], "B": pair["tokens_b"]},
        "prompts": {f"prompt and answer {x}": start + end for x, end in ends.items()},
    }


def _whole(experiment: Experiment, text: str, before: Sequence[int], after: Sequence[int]) -> str:
    """Return a wrapped text with the ids that are not part of its string (a BOS, say) written as their tokens."""
    if not before and not after:
        return text
    _, tokenizer = load_frame(experiment)
    first, last = (tokenizer.decode(list(ids), skip_special_tokens=False) for ids in (before, after))
    return first + text + last


def _scores(folder: Path, split: str, battle_id: str) -> tuple[dict[str, Shares], dict[str, float]]:
    """Return the probabilities by order and the rewards that scoring left; both empty for a row that was not scored."""
    path, table = folder / f"scores_{split}.parquet", folder / f"probabilities_{split}.csv"
    if not path.is_file():
        return {}, {}
    with readable(path, _AGAIN):
        row = next(iter(read_columns(path, where=("id", battle_id)).to_pylist()), None)
    if row is None:
        return {}, {}
    shares = {}
    for name, order in (("A first", "ab"), ("B first", "ba")):
        logits = np.array([row.get(f"{order}_{verdict}") for verdict in VERDICTS], dtype=np.float64)
        if not np.isnan(logits).any():
            shares[name] = dict(zip(VERDICTS, softmax(logits).tolist(), strict=True))
    if table.is_file():
        with readable(table, _AGAIN), table.open(newline="", encoding="utf-8") as file:
            final = next((line for line in csv.DictReader(file) if line["id"] == battle_id), None)
            if final is None:
                raise ValueError(f"lacks the row {battle_id}, which was scored")
            shares["final"] = {
                v: float(final[name] or "") for v, name in zip(VERDICTS, PROBABILITY_COLUMNS, strict=True)
            }
    return shares, {x: row[f"reward_{x}"] for x in ("a", "b") if f"reward_{x}" in row}


def print_battle(console: Console, shown: ShownBattle, *, swapped: bool = False) -> None:
    """Print a battle; control characters are made visible, and the cut places stand out."""
    rows = _SETS.get(shown.split, shown.split)
    head = f"battle {shown.id}: {shown.experiment} / {shown.stage}, {rows} of {shown.source}"
    console.print(Text(visible(head), style="bold"), soft_wrap=True)
    for line in _facts(shown):
        console.print(Text(visible(line)), soft_wrap=True)
    if shown.probabilities:
        console.print(_table(shown))
    names = list(shown.prompts)
    for name in names if shown.tokens_with else names[1:] if swapped else names[:1]:
        console.print(Text(f"--- {name}, exactly as the model reads it ---", style="bold"))
        text = Text(visible(shown.prompts[name]))
        text.highlight_words([MARKER.strip()], style="black on yellow")
        text.highlight_regex(r"(?m)^### .*$", style="cyan")
        console.print(text, soft_wrap=True)
    console.print(Text("--- end ---", style="bold"))


def _facts(shown: ShownBattle) -> list[str]:
    verdict = _VERDICT_NAMES.get(shown.verdict or "", "not known")
    lines = [f"verdict: {verdict}" + (f"; language: {shown.language}" if shown.language else "")]
    if shown.tokens_with:
        both = " and ".join(f"{tokens:,} with answer {x}" for x, tokens in shown.tokens_with.items())
        lengths = f"pair: of {shown.cutoff_len:,} tokens {both}"
    else:
        full = f" ({shown.tokens_full:,} before cutting)" if shown.tokens_full != shown.tokens else ""
        lengths = f"judge prompt: {shown.tokens:,} of {shown.cutoff_len:,} tokens with the label{full}"
    lines.append(f"turns: {shown.turns}; {lengths}")
    if shown.dropped:
        lines.append(f"left out: the {shown.dropped} oldest turn(s)")
    if shown.cut:
        lines.append(f"cut: the places are marked with {MARKER.strip()!r}")
    if shown.rewards:
        lines.append("rewards: " + ", ".join(f"{x.upper()} {value:+.4f}" for x, value in shown.rewards.items()))
    if not shown.probabilities:
        why = "training rows are not scored"
        if shown.split != "train":
            command = f"python run.py {STAGES[shown.stage].command} -e {shown.experiment}"
            why = f"{shown.stale or 'this stage was not scored yet'} ({command})"
        lines.append(f"probabilities: none; {why}")
    return lines


def _table(shown: ShownBattle) -> Table:
    """Return the probabilities of each order and the final ones, with their log loss."""
    table = Table()
    for heading in ("", *_VERDICT_NAMES.values(), "log loss"):
        table.add_column(heading, justify="right" if heading else "left")
    final = "final, as submitted" if shown.split == "test" else "final"
    for name, shares in shown.probabilities.items():
        loss = f"{-math.log(max(shares[shown.verdict], EPS)):.4f}" if shown.verdict in shares else ""
        label = final if name == "final" else f"{name}, softmax"
        table.add_row(label, *(f"{shares[verdict]:.4f}" for verdict in VERDICTS), loss)
    return table


def audit_labels(context: StageContext, most: int) -> dict[str, Any]:
    """Write the battles whose verdict is least likely, that one first; return the file's name and its rows.

    Only battles that the judge did not train on are listed: with folds all, else those of the validation fold.
    """
    rows = read_rows(context.experiment.data_folder, context.parts("valid"))
    probabilities = stage_probabilities(context, rows["id"].tolist())
    given = probabilities[np.arange(len(rows)), verdict_codes(rows["verdict"])]
    chosen = np.argsort(given, kind="stable")[:most]
    first = probabilities.argmax(axis=1)
    ids, verdicts = rows["id"].tolist(), rows["verdict"].tolist()
    cells = [(ids[i], verdicts[i], given[i], VERDICTS[first[i]], probabilities[i, first[i]]) for i in chosen]
    listed = [
        {
            name: round(float(cell), 6) if name.startswith("p_") else cell
            for name, cell in zip(_HEADER, each, strict=True)
        }
        for each in cells
    ]
    path = context.folder / LABEL_AUDIT
    with atomic_file(path) as file:
        file.writelines(map(csv_line, [_HEADER, *(each.values() for each in listed)]))
    return {"file": str(path), "judged": len(rows), "rows": listed}


def audit_in_words(found: dict[str, Any]) -> list[str]:
    """Return the audit as lines for people."""
    lines = [
        f"{name_of(row['id'])}: voted {row['verdict']}, which has {row['p_verdict']:.1%}; "
        f"its choice is {row['first_choice']} ({row['p_first_choice']:.1%})"
        for row in found["rows"][:_SHOWN]
    ]
    return [
        *lines,
        f"{found['file']}: the {len(found['rows']):,} least likely of {found['judged']:,} verdicts; "
        "`run.py show ID` prints a battle, `run.py prepare --drop-ids FILE` trains without them",
    ]
