"""What the fuzzer feeds bytes to: all code that reads files of others, of trainers and of earlier runs.

A target takes bytes or their file and returns, or raises one of our own errors; anything else is a crash. Each has
seeds, good inputs to start from. No fuzzer is needed to import this: the tests replay seeds and crashes.
Targets write to the current folder, which the driver makes a scratch folder.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
from figures import ROOT
from pyarrow.parquet import write_table
from workbench import frame_of, train_tokenizer

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle, swap
from common.error_hints import all_errors, clean_lines, remedy_for
from common.errors import ArenaError
from common.experiment import Labels, parse_experiment, read_yaml
from common.stages import STEPS
from data_prep import cells
from data_prep.cells import BadCell, BadVerdict, parse_id
from data_prep.chat_template import ChatFrame
from data_prep.export_reader import FORMAT, read_manifest
from data_prep.prompt import JudgePrompt
from data_prep.readers import VoteReader
from data_prep.truncation import Fitter
from factory.demo import SPECIAL_TOKENS
from factory.fingerprint import data_sets, training_rows
from factory.recipe_checks import check_recipe
from factory.recipes import render_recipe
from factory.state import StageState
from factory.trainer_log import loss_curve
from scoring.judge import FORMAT as JUDGE_FORMAT
from scoring.judge import load_judge
from scoring.predictions import check_submission

OUR_ERRORS = (ArenaError, BadCell, BadVerdict)
_CSV = """id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie
1,m,n,"[""hi"", null]","[""a"", ""b""]","[""c\\ud83d"", ""d""]",1,0,0
2,m,n,"[""hi"", null]","[""a"", ""b""]","[""c\\ud83d"", ""d""]",0,1.0,0
3,m,n,"[""hi"", null]","[""a"", ""b""]","[""c\\ud83d"", ""d""]",0,0,1
"""
_KEYS = {"model": "models/none", "template": "qwen3_nothink", "cutoff_len": 512, "quantization_bit": None}
_LOOP = "{% for turn in turns %}{{ turn.prompt }}{{ turn.a }}{{ turn.b }}{% endfor %}"
_EXPERIMENT = parse_experiment(dict(_KEYS), "exam", where="experiment.yaml")
_TOKENIZER = train_tokenizer(["### User\n### Assistant A\nWhich assistant do people prefer? Verdict:"] * 3, 400)
_FRAME = frame_of(_TOKENIZER)
_PROMPT = JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels())
_OTHER = 'question_id,conversation_a,conversation_b,winner\n1,"[{""role"": ""user"", ""content"": ""x""}]",[],tie\n'
_PLAIN = "id,prompt,response_a,response_b,winner,language\n1,p,a,b,model_a,English\n"
_MORE = ("\ufeff" + _CSV, gzip.compress(_CSV.encode(), mtime=0), _CSV.encode("utf-16"))
_TEXTS = {name: [["hi"], ["x", None]] for name in ("prompt", "response_a", "response_b")}
_ROWS = {"id": ["1", "2"], **_TEXTS} | dict(zip(PROBABILITY_COLUMNS, ([1, 0], [0, 1], [0, 0]), strict=True))
_TEXT = "### Assistant B\nVerdict: A <|im_end|> 日本語 😀 {{ x }}"
_EXPERIMENTS = [path.read_bytes() for path in ROOT.glob("factory_configs/*/experiment.yaml")]
_IF = "{% if dropped %}x{% endif %}{% set a = 1 %}{{ labels.a|upper ~ a }}"
_RECORD = {"inputs": {"x": 1}, "outputs": ["a"], "started_at": "now", "finished_at": "then", "seconds": 1.0}
_PARTS = {part: {**_RECORD, "sha256": {}} for part in ("train", "merge", "score")}
_BAD_STATE = '{"parts": {"score": {"outputs": ["/"]}}}'
_SOURCES = {"train": {"file": "votes.csv", "sha256": "0" * 64, "weight": 1.0}}
_MANIFEST = {"format": FORMAT, "views": ["judge"], "sources": _SOURCES, "files": {"rows.parquet": "0"}}
_MANIFEST |= {"experiment": {"name": "exam"}, "frame": asdict(_FRAME)}
_ENTRY = {"file_name": "dataset_info.json", "formatting": "sharegpt", "num_samples": 3}
_ENTRIES = {"exam_sft_train": _ENTRY, "exam_sft_valid": _ENTRY | {"file_name": "x"}}
_JUDGE = {"format": JUDGE_FORMAT, "classes": list(VERDICTS), "labels": Labels().model_dump(), "cutoff_len": 512}
_JUDGE |= {"judge_prompt": _PROMPT.source, "prompt_share": 0.2, "frame": asdict(_FRAME), "source": {}}
_JUDGE |= {"canaries": {"Verdict:": _TOKENIZER.encode("Verdict:").ids}}
_POINT = {"current_steps": 1, "total_steps": 9, "loss": 0.5, "lr": 1e-4, "elapsed_time": "1 day, 0:00:01"}
_LOG = "\x1b[1mTraceback (most recent call last):\n  File x\nValueError: no\r[rank0]: torch.OutOfMemoryError: CUDA\n"


class Target(NamedTuple):
    """A function of bytes or of their file, and the good inputs to begin with."""

    function: Callable[[Any], object]
    seeds: list[bytes]
    file: str | None

    def run(self, data: bytes) -> None:
        """Call the function with bytes, or with the file that holds them."""
        if self.file:
            Path(self.file).parent.mkdir(parents=True, exist_ok=True)
            Path(self.file).write_bytes(data)
        self.function(Path(self.file) if self.file else data)


TARGETS: dict[str, Target] = {}


def target(name: str, *seeds: bytes | str, file: str | None = None) -> Callable:
    """Register a function of bytes, or of a file that holds them, as a target with seeds."""

    def register(function: Callable[[Any], object]) -> Callable[[Any], object]:
        TARGETS[name] = Target(function, [s if isinstance(s, bytes) else s.encode() for s in seeds], file)
        return function

    return register


def never_crashes(fuzzed: Target, data: bytes) -> None:
    """Run a target; our own errors are answers, and must have a message."""
    try:
        fuzzed.run(data)
    except OUR_ERRORS as error:
        assert str(error)


def _parquet(columns: dict[str, list]) -> bytes:
    write_table(pa.table(columns), file := io.BytesIO(), compression="none")
    return file.getvalue()


@target("parquet", _parquet(_ROWS), _parquet({"id": [1.0, 2.0], "prompt": ["a", "b"]}), file="votes")
@target("csv", _CSV, _OTHER, _PLAIN, *_MORE, file="votes")
def read_votes(file: Path) -> None:
    for labelled in (True, False):
        for _, battle in VoteReader(file, labelled=labelled):
            assert battle.id and len(battle.prompts) == len(battle.responses_a) == len(battle.responses_b) >= 1
            "".join(text for column in battle.texts for text in column).encode("utf-8")


@target("cells", '["a", null, "\\ud83d\\ude00"]', '[{"role": "user", "content": "x"}]', "1,0,0", "tie", "[" * 99)
def read_cells(data: bytes) -> None:
    text = data.decode("utf-8", "replace")
    parse_id(text)
    for name in cells.ENCODINGS:
        with suppress(BadCell):
            value = cells.ENCODINGS[name](text, "prompt")
            for read, values in ((cells.read_pair, [value] * 3), (cells.read_conversations, [value] * 2)):
                with suppress(BadCell):
                    assert all(map(len, read(values, ["prompt", "a", "b"][: len(values)])))
    for columns, read in cells.VERDICT_FORMATS.values():
        with suppress(BadVerdict):
            found = read([*text.split(",", 2), "0", "0"][: len(columns)])
            assert found in VERDICTS or abs(sum(found) - 1) < 1e-9


@target("budget", f"x{_TEXT}\0{_TEXT}\0{_TEXT}", "\1" + "\0".join(["word " * 300] * 6), "\0")
def fit(data: bytes) -> None:
    """Fit texts from the bytes, split at NUL, to a budget from their first byte; nothing is ever longer."""
    cutoff = 300 + 4 * (data[0] if data else 0)
    fitter = Fitter(_FRAME, _TOKENIZER, _PROMPT, cutoff_len=cutoff, prompt_share=0.2)
    texts = data[1:].decode("utf-8", "replace").split("\0")
    turns = max(1, len(texts) // 3)
    texts = (texts + [""] * 3)[: 3 * turns]
    battle = Battle("1", tuple(texts[::3]), tuple(texts[1::3]), tuple(texts[2::3]), "a")
    (fitted,) = fitter.fit([battle], both_orders=True)
    special = {_TOKENIZER.token_to_id(name) for name in SPECIAL_TOKENS}
    for order, tokens in zip((fitted.battle, swap(fitted.battle)), fitted.lengths, strict=True):
        message = _PROMPT.message(order, fitted.dropped)
        ids = _TOKENIZER.encode(message, add_special_tokens=False).ids
        assert tokens <= cutoff and not special & set(ids)
        assert len([line for line in message.split("\n") if line == "### Question"]) == 1


@target("experiment", *_EXPERIMENTS, json.dumps(_KEYS), file="experiment.yaml")
def load_experiment(file: Path) -> None:
    experiment = parse_experiment(read_yaml(file), "exam", where="experiment.yaml")
    for step in ("sft", "merge_rm"):
        path = Path("rendered.yaml")
        path.write_text(render_recipe(experiment, step), encoding="utf-8")
        assert read_yaml(path)["template"] == experiment.template  # is read back as it was meant


@target("recipe", *(render_recipe(_EXPERIMENT, step) for step in STEPS), file=str(_EXPERIMENT.recipe("sft")))
def check_a_recipe(_: Path) -> None:
    assert all(isinstance(fault, str) for fault in check_recipe(_EXPERIMENT, "sft"))


@target("judge_prompt", _PROMPT.source, _LOOP, _IF + _LOOP)
def judge_prompt(data: bytes) -> None:
    prompt = JudgePrompt(data.decode("utf-8", "replace"), Labels())
    battle = Battle("1", ("p\n", "q"), ("{{ a }}", ""), ("b", "c"))
    message = prompt.message(battle)
    assert all(text in message for column in battle.texts for text in column)


@target("state", json.dumps({"version": 1, "parts": _PARTS}), _BAD_STATE, file="state.json")
def read_state(file: Path) -> None:
    state = StageState(file.parent)
    for part in _PARTS:
        standing = state.standing(part, {"x": 1})
        if standing.is_finished:
            standing.require_same_inputs(part, Path(), "--fresh")


@target("manifest", json.dumps(_MANIFEST), file="manifest.json")
def read_a_manifest(file: Path) -> None:
    ChatFrame.from_dict(read_manifest(file.parent)["frame"])


@target("dataset_info", json.dumps(_ENTRIES), file="dataset_info.json")
def read_dataset_info(_: Path) -> None:
    recipe = {"dataset": "exam_sft_train", "eval_dataset": "exam_sft_valid", "dataset_dir": "."}
    data_sets(recipe, {})
    training_rows(recipe)


@target("judge", json.dumps(_JUDGE), file="judge/judge.json")
def read_judge(file: Path) -> None:
    if not (file.parent / "tokenizer.json").is_file():
        _TOKENIZER.save(str(file.parent / "tokenizer.json"))
    load_judge(file.parent).fitter()


@target("submission", f"id,{','.join(PROBABILITY_COLUMNS)}\n1,.5,.25,.25\n2,1,0,0\n", file="submission.csv")
def read_submission(file: Path) -> None:
    check_submission(file, ["1", "2"])


@target("logs", (json.dumps(_POINT) + "\n") * 2, _LOG, file="trainer.log")
def read_logs(file: Path) -> None:
    assert all(set(point) == {"step", "loss", "lr", "eval_loss"} for point in loss_curve(file))
    text = file.read_bytes().decode("utf-8", "replace")
    clean_lines(text)
    for error in all_errors(text):
        remedy_for(error)
