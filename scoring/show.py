"""An exhibit: one battle as a stage's judge got it, with its verdict and what the judge said in both orders."""

from __future__ import annotations

import csv
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle, swap
from common.console import visible
from common.errors import ArenaError, UsageError
from common.experiment import Experiment, Labels
from common.stages import STEPS
from data_prep.chat_template import ChatFrame, load_frame
from data_prep.export_reader import read_manifest, readable, require_pairs
from data_prep.prompt import JudgePrompt
from data_prep.truncation import MARKER
from factory.state import earlier_scores, outdated_files

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

_SETS = {"train": "training rows", "valid": "validation fold", "test": "test set"}
_ROW = ("id", "split", "verdict", "language", "turns", "dropped", "cut", "tokens", "tokens_full")
_PAIR = ("id", "prompt", "response_a", "response_b", "dropped", "cut", "tokens_a", "tokens_b")
_AGAIN = "score the stage again"
_VERDICT_NAMES = {"a": "A wins", "b": "B wins", "tie": "tie"}
Shares = dict[str, float]


@dataclass(frozen=True)
class Exhibit:
    """What is known of one battle.

    `prompts` are the strings that are tokenized, by name (judge: "prompt", "prompt, A and B exchanged"; pairs:
    "prompt and answer A", "prompt and answer B"), and `dropped`, `cut` and tokens are those of what this stage is fed.
    `tokens` count the longest sequence with its answer, `tokens_full` before cutting (None for pairs, whose export does
    not keep it), `tokens_with` those with answer "A" and "B" of a pair. `probabilities` by order ("A first", "B first",
    before calibration) and "final", as in the stage's probabilities file; `rewards` of A and B where there are any.
    `stale` says why scores that lie there are of an earlier judge or export, and so not shown.
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
    cuts: list[str]
    probabilities: dict[str, Shares]
    rewards: dict[str, float]
    source: str
    tokens_with: dict[str, int] = field(default_factory=dict)
    stale: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def exhibit(experiment: Experiment, stage: str, battle_id: str, split: str | None = None) -> Exhibit:
    """Return the exhibit of one exported battle.

    Raises UsageError for an id that was not exported or that two splits hold, ArenaError for a missing export.
    """
    data = experiment.data_folder
    manifest = read_manifest(data)
    place, row = _row(experiment, battle_id, split)
    split = row["split"]
    frame = ChatFrame.from_dict(manifest["frame"])
    if STEPS[stage].data == "dpo_reward":
        fed = _fed_pair(experiment, frame, place)
    else:
        fed = _fed_judge(experiment, frame, manifest, place, row)
    folder = experiment.output_folder(stage)
    stale = _not_of_today(experiment, stage)
    probabilities, rewards = ({}, {}) if stale else _scores(folder, split, battle_id)
    return Exhibit(
        id=battle_id,
        experiment=experiment.name,
        stage=stage,
        split=split,
        verdict=row["verdict"],
        language=row["language"],
        turns=row["turns"],
        cutoff_len=manifest["experiment"]["cutoff_len"],
        **fed,
        probabilities=probabilities,
        rewards=rewards,
        source=manifest["sources"]["test" if split == "test" else "train"]["file"],
        stale=stale,
    )


def _fed_pair(experiment: Experiment, frame: ChatFrame, place: int) -> dict[str, Any]:
    """Return what an exhibit tells of a pair as it was fed; it was fitted on its own, not as the judge prompt was."""
    row = _row_at(require_pairs(experiment.data_folder), place, list(_PAIR))
    texts = {"prompt": row["prompt"], "response A": row["response_a"], "response B": row["response_b"]}
    answers = {x: texts[f"response {x}"] for x in "AB"}
    return {
        "dropped": row["dropped"],
        "cut": row["cut"],
        "tokens": max(row["tokens_a"], row["tokens_b"]),
        "tokens_full": None,
        "tokens_with": {"A": row["tokens_a"], "B": row["tokens_b"]},
        "prompts": {
            f"prompt and answer {x}": _pair_text(experiment, frame, row["prompt"], answer)
            for x, answer in answers.items()
        },
        "cuts": _cuts(texts) if row["cut"] else [],
    }


def _fed_judge(
    experiment: Experiment, frame: ChatFrame, manifest: dict[str, Any], place: int, row: dict[str, Any]
) -> dict[str, Any]:
    """Return what an exhibit tells of a judge prompt as it was fed."""
    battle, dropped = _battle(experiment.data_folder, place), row["dropped"]
    return {
        "dropped": dropped,
        "cut": row["cut"],
        "tokens": row["tokens"],
        "tokens_full": row["tokens_full"],
        "prompts": _judge_texts(experiment, frame, manifest, battle, dropped),
        "cuts": _cuts(_named_texts(battle, dropped)) if row["cut"] else [],
    }


def _row(experiment: Experiment, battle_id: str, split: str | None) -> tuple[int, dict[str, Any]]:
    """Return the battle's place in rows.parquet (and so in battles.parquet and pairs.parquet) and its row."""
    from pyarrow.parquet import read_table

    path = experiment.data_folder / "rows.parquet"
    with readable(path):
        table = read_table(path, columns=list(_ROW))
        hits = [
            (i, table.slice(i, 1).to_pylist()[0]) for i, each in enumerate(table["id"].to_pylist()) if each == battle_id
        ]
    found = [(i, row) for i, row in hits if split in (None, row["split"])]
    if len(found) == 1:
        return found[0]
    command = f"python run.py show {battle_id} -e {experiment.name}"
    if found:
        names = " and ".join(row["split"] for _, row in found)
        raise UsageError(f"{battle_id!r} is an id of {names}", remedy=f"{command} --split {found[0][1]['split']}")
    other = f"; it is one of {hits[0][1]['split']}" if hits else ""
    raise UsageError(
        f"{battle_id!r} is not an id of {split or 'train, valid or test'}{other}",
        where=str(experiment.data_folder),
        remedy="take an id of the exported table; report.html lists the worst ones, unless it is of an earlier export "
        "(run.py status tells). Rejected rows are in audit.json",
    )


def _battle(data: Path, place: int) -> Battle:
    """Return one fitted battle without making Python objects of all the others."""
    text = _row_at(data / "battles.parquet", place, ["id", "prompts", "responses_a", "responses_b"])
    return Battle(text["id"], tuple(text["prompts"]), tuple(text["responses_a"]), tuple(text["responses_b"]))


def _row_at(path: Path, place: int, columns: list[str]) -> dict[str, Any]:
    """Return one row of a table that lies beside rows.parquet, row by row."""
    from pyarrow.parquet import read_table

    with readable(path):
        rows = read_table(path, columns=columns).slice(place, 1).to_pylist()
    if not rows:
        raise ArenaError("has fewer rows than rows.parquet", where=str(path), remedy="run prepare again")
    return rows[0]


def _judge_texts(
    experiment: Experiment, frame: ChatFrame, manifest: dict[str, Any], battle: Battle, dropped: int
) -> dict[str, str]:
    path = experiment.data_folder / "judge_prompt.j2"
    with readable(path):
        source = path.read_text(encoding="utf-8")
    prompt = JudgePrompt(source, Labels(**manifest["experiment"]["labels"]), where="judge_prompt.j2")
    orders = {"prompt": battle, "prompt, A and B exchanged": swap(battle)}
    return {name: _whole(experiment, frame, frame.wrap(prompt.message(each, dropped))) for name, each in orders.items()}


def _pair_text(experiment: Experiment, frame: ChatFrame, prompt: str, answer: str) -> str:
    answered = _whole(experiment, frame, frame.wrap_answer(answer), frame.answer_prefix_ids, frame.answer_suffix_ids)
    return _whole(experiment, frame, frame.wrap(prompt)) + answered


def _whole(
    experiment: Experiment,
    frame: ChatFrame,
    text: str,
    before: tuple[int, ...] | None = None,
    behind: tuple[int, ...] | None = None,
) -> str:
    """Return a wrapped text with the ids that stand outside its string (a BOS, say) written as their tokens."""
    before = frame.prefix_ids if before is None else before
    behind = frame.suffix_ids if behind is None else behind
    if not before and not behind:
        return text
    _, tokenizer = load_frame(experiment)

    def decode(ids: tuple[int, ...]) -> str:
        return tokenizer.decode(list(ids), skip_special_tokens=False)

    return decode(before) + text + decode(behind)


def _named_texts(battle: Battle, dropped: int) -> dict[str, str]:
    columns = {"user": battle.prompts, "response A": battle.responses_a, "response B": battle.responses_b}
    return {
        f"turn {turn + dropped + 1}, {name}": texts[turn]
        for turn in range(battle.turns)
        for name, texts in columns.items()
    }


def _cuts(texts: dict[str, str]) -> list[str]:
    """Return one line for each place where the middle of a text was cut out."""
    lines = []
    for name, text in texts.items():
        at = text.find(MARKER)
        if at >= 0:
            behind = len(text) - at - len(MARKER)
            lines.append(f"{name}: {at:,} characters kept before the cut, {behind:,} behind it")
    return lines


def _not_of_today(experiment: Experiment, stage: str) -> str | None:
    """Return why the scores that a stage left are not those of its judge on today's export, None where they are."""
    if changed := outdated_files(experiment, stage):
        return f"this stage was trained or scored on another export ({changed[0]} changed since)"
    return earlier_scores(experiment, stage)


def _scores(folder: Path, split: str, battle_id: str) -> tuple[dict[str, Shares], dict[str, float]]:
    """Return the probabilities by order and the rewards that scoring left; both empty for a row that was not scored."""
    from pyarrow.parquet import read_table

    path = folder / f"scores_{split}.parquet"
    if not path.is_file():
        return {}, {}
    with readable(path, _AGAIN):
        row = next(iter(read_table(path, filters=[("id", "==", battle_id)]).to_pylist()), None)
    if row is None:
        return {}, {}
    shares = {}
    for name, order in (("A first", "ab"), ("B first", "ba")):
        logits = [row.get(f"{order}_{verdict}") for verdict in VERDICTS]
        if all(value is not None and value == value for value in logits):
            shares[name] = _softmax(logits)
    rewards = {x: row[f"reward_{x}"] for x in ("a", "b") if f"reward_{x}" in row}
    final = _final(folder / f"probabilities_{split}.csv", battle_id)
    return {**shares, **({"final": final} if final else {})}, rewards


def _softmax(logits: list[float]) -> Shares:
    import numpy as np

    from scoring.links import log_softmax

    values = np.exp(log_softmax(np.array([logits], dtype=np.float64)))[0]
    return dict(zip(VERDICTS, map(float, values), strict=True))


def _final(path: Path, battle_id: str) -> Shares | None:
    if not path.is_file():
        return None
    with readable(path, _AGAIN), path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            if row["id"] == battle_id:
                return {v: float(row[column] or "") for v, column in zip(VERDICTS, PROBABILITY_COLUMNS, strict=True)}
    raise ArenaError("lacks a row that was scored", where=f"{path} id {battle_id}", remedy=_AGAIN)


def print_exhibit(console: Console, shown: Exhibit, *, swapped: bool = False) -> None:
    """Print an exhibit; texts are made harmless for a terminal, and the cut places stand out."""
    from rich.text import Text

    head = f"battle {shown.id}: {shown.experiment} / {shown.stage}, {_SETS[shown.split]} of {shown.source}"
    console.print(Text(visible(head), style="bold"), soft_wrap=True)
    for line in _facts(shown):
        console.print(Text(visible(line)), soft_wrap=True)
    _print_probabilities(console, shown)
    names = list(shown.prompts)
    pairs = len(names) > 1 and "answer" in names[0]
    for name in names if pairs else names[1:] if swapped else names[:1]:
        console.print(Text(f"--- {name}, exactly as fed ---", style="bold"))
        console.print(_lit(visible(shown.prompts[name])), soft_wrap=True)
    console.print(Text("--- end ---", style="bold"))


def _lit(text: str) -> Text:
    """Return a prompt whose cut places and section headings stand out."""
    from rich.text import Text

    lit = Text(text)
    lit.highlight_words([MARKER.strip()], style="black on yellow")
    lit.highlight_regex(r"(?m)^### .*$", style="cyan")
    return lit


def _facts(shown: Exhibit) -> list[str]:
    verdict = _VERDICT_NAMES.get(shown.verdict or "", "not known")
    lines = [f"verdict: {verdict}" + (f"; language: {shown.language}" if shown.language else "")]
    lines.append(f"turns: {shown.turns}; {_lengths(shown)}")
    if shown.dropped:
        lines.append(f"left out: the {shown.dropped} oldest turn(s)")
    lines += [f"cut: {line}" for line in shown.cuts]
    if shown.dropped or shown.cuts:
        lines.append(f"the whole texts are in {shown.source}")
    return lines


def _lengths(shown: Exhibit) -> str:
    """Return the lengths of what was fed, beside the budget."""
    if shown.tokens_with:
        both = " and ".join(f"{tokens:,} with answer {x}" for x, tokens in shown.tokens_with.items())
        return f"pair: of {shown.cutoff_len:,} tokens {both}"
    full = f" ({shown.tokens_full:,} before cutting)" if shown.tokens_full != shown.tokens else ""
    return f"judge prompt: {shown.tokens:,} of {shown.cutoff_len:,} tokens with the label{full}"


def _print_probabilities(console: Console, shown: Exhibit) -> None:
    from rich.table import Table
    from rich.text import Text

    if shown.rewards:
        console.print(Text("rewards: " + ", ".join(f"{x.upper()} {v:+.4f}" for x, v in shown.rewards.items())))
    if not shown.probabilities:
        not_yet = shown.stale or "this stage was not scored yet"
        what = "training rows are not scored" if shown.split == "train" else not_yet
        call = f"python run.py {STEPS[shown.stage].asked_by} -e {shown.experiment}"
        console.print(Text(f"probabilities: none; {what}" + ("" if shown.split == "train" else f" ({call})")))
        return
    table = Table()
    for heading in ("", *_VERDICT_NAMES.values(), "log loss"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, shares in shown.probabilities.items():
        note = {"final": "final, as submitted" if shown.split == "test" else "final"}.get(name, f"{name}, softmax")
        table.add_row(note, *(f"{shares[v]:.4f}" for v in VERDICTS), _loss(shares, shown.verdict))
    console.print(table)


def _loss(shares: Shares, verdict: str | None) -> str:
    import math

    return f"{-math.log(max(shares[verdict], 1e-15)):.4f}" if verdict in shares else ""
