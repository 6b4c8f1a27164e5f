"""What the fuzzer feeds bytes to: all code that reads files of others, of trainers and of earlier runs.

A target takes bytes and returns, or raises one of our own errors; anything else is a crash. Each has seeds, good
inputs to start from. No fuzzer is needed to import this: the tests replay seeds and crashes.
Targets write to the current folder, which the driver makes a scratch folder.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
from figures import ROOT
from pyarrow.parquet import write_table
from tokenizers import Tokenizer
from workbench import frame_of, train_tokenizer

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle, swap
from common.error_hints import all_errors, clean_lines, remedy_for
from common.errors import ArenaError
from common.experiment import Experiment, Labels, parse_experiment, read_yaml
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
_FILE = Path("fuzzed")
_CSV = """id,model_a,model_b,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie
1,m,n,"[""hi"", null]","[""a"", ""b""]","[""c\\ud83d"", ""d""]",1,0,0
2,m,n,"[""hi"", null]","[""a"", ""b""]","[""c\\ud83d"", ""d""]",0,1.0,0
3,m,n,"[""hi"", null]","[""a"", ""b""]","[""c\\ud83d"", ""d""]",0,0,1
"""
_KEYS = {"model": "models/none", "template": "qwen3_nothink", "cutoff_len": 512, "quantization_bit": None}
_LOOP = "{% for turn in turns %}{{ turn.prompt }}{{ turn.a }}{{ turn.b }}{% endfor %}"


@dataclass(frozen=True)
class Target:
    """A function of bytes, and the good inputs to begin with."""

    run: Callable[[bytes], object]
    seeds: Callable[[], list[bytes]]


TARGETS: dict[str, Target] = {}


def target(name: str, seeds: Callable[[], Iterable[bytes | str]]) -> Callable:
    """Register a function of bytes as a target with seeds, which are made when they are asked for."""

    def register(run: Callable[[bytes], object]) -> Callable[[bytes], object]:
        TARGETS[name] = Target(run, lambda: [s if isinstance(s, bytes) else s.encode() for s in seeds()])
        return run

    return register


def never_crashes(fuzzed: Target, data: bytes) -> None:
    """Run a target; our own errors are answers, and must have a message."""
    try:
        fuzzed.run(data)
    except OUR_ERRORS as error:
        assert str(error)


def _csv_seeds() -> list[bytes | str]:
    other = 'question_id,conversation_a,conversation_b,winner\n1,"[{""role"": ""user"", ""content"": ""x""}]",[],tie\n'
    plain = "id,prompt,response_a,response_b,winner,language\n1,p,a,b,model_a,English\n"
    return [_CSV, other, plain, "\ufeff" + _CSV, gzip.compress(_CSV.encode(), mtime=0), _CSV.encode("utf-16")]


def _parquet_seeds() -> Iterable[bytes]:
    texts = {name: [["hi"], ["x", None]] for name in ("prompt", "response_a", "response_b")}
    flags = dict(zip(PROBABILITY_COLUMNS, ([1, 0], [0, 1], [0, 0]), strict=True))
    for columns in ({"id": ["1", "2"], **texts, **flags}, {"id": [1.0, 2.0], "prompt": ["a", "b"]}):
        write_table(pa.table(columns), file := io.BytesIO(), compression="none")
        yield file.getvalue()


@target("parquet", _parquet_seeds)
@target("csv", _csv_seeds)
def read_votes(data: bytes) -> None:
    _FILE.write_bytes(data)
    for labelled in (True, False):
        for _, battle in VoteReader(_FILE, labelled=labelled):
            assert battle.id and len(battle.prompts) == len(battle.responses_a) == len(battle.responses_b) >= 1
            "".join((*battle.prompts, *battle.responses_a, *battle.responses_b)).encode("utf-8")


@target(
    "cells", lambda: ['["a", null, "\\ud83d\\ude00"]', '[{"role": "user", "content": "x"}]', "1,0,0", "tie", "[" * 99]
)
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


@cache
def _tokenizer() -> Tokenizer:
    return train_tokenizer(["### User\n### Assistant A\nWhich assistant do people prefer? Verdict:"] * 3, 400)


@cache
def _prompt() -> JudgePrompt:
    return JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels())


def _fit_seeds() -> list[str]:
    text = "### Assistant B\nVerdict: A <|im_end|> 日本語 😀 {{ x }}"
    return [f"x{text}\0{text}\0{text}", "\1" + "\0".join(["word " * 300] * 6), "\0"]


@target("budget", _fit_seeds)
def fit(data: bytes) -> None:
    """Fit texts from the bytes, split at NUL, to a budget from their first byte; nothing is ever longer."""
    cutoff = 300 + 4 * (data[0] if data else 0)
    fitter = Fitter(frame_of(_tokenizer()), _tokenizer(), _prompt(), cutoff_len=cutoff, prompt_share=0.2)
    texts = data[1:].decode("utf-8", "replace").split("\0")
    turns = max(1, len(texts) // 3)
    texts = (texts + [""] * 3)[: 3 * turns]
    battle = Battle("1", tuple(texts[::3]), tuple(texts[1::3]), tuple(texts[2::3]), "a")
    (fitted,) = fitter.fit([battle], both_orders=True)
    special = {_tokenizer().token_to_id(name) for name in SPECIAL_TOKENS}
    for order, tokens in zip((fitted.battle, swap(fitted.battle)), fitted.lengths, strict=True):
        message = _prompt().message(order, fitted.dropped)
        ids = _tokenizer().encode(message, add_special_tokens=False).ids
        assert tokens <= cutoff and not special & set(ids)
        assert len([line for line in message.split("\n") if line == "### Question"]) == 1


def _experiment() -> Experiment:
    return parse_experiment(dict(_KEYS), "exam", where="experiment.yaml")


@target(
    "experiment",
    lambda: [*(path.read_bytes() for path in ROOT.glob("factory_configs/*/experiment.yaml")), json.dumps(_KEYS)],
)
def load_experiment(data: bytes) -> None:
    _FILE.write_bytes(data)
    experiment = parse_experiment(read_yaml(_FILE), "exam", where="experiment.yaml")
    for step in ("sft", "merge_rm"):
        path = Path("rendered.yaml")
        path.write_text(render_recipe(experiment, step), encoding="utf-8")
        assert read_yaml(path)["template"] == experiment.template  # is read back as it was meant


@target("recipe", lambda: [render_recipe(_experiment(), step) for step in STEPS])
def check_a_recipe(data: bytes) -> None:
    path = (experiment := _experiment()).recipe("sft")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    assert all(isinstance(fault, str) for fault in check_recipe(experiment, "sft"))


@target(
    "judge_prompt",
    lambda: [_prompt().source, _LOOP, "{% if dropped %}x{% endif %}{% set a = 1 %}{{ labels.a|upper ~ a }}" + _LOOP],
)
def judge_prompt(data: bytes) -> None:
    prompt = JudgePrompt(data.decode("utf-8", "replace"), Labels())
    battle = Battle("1", ("p\n", "q"), ("{{ a }}", ""), ("b", "c"))
    message = prompt.message(battle)
    assert all(text in message for text in (*battle.prompts, *battle.responses_a, *battle.responses_b))


def _state_seeds() -> list[str]:
    record = {"inputs": {"x": 1}, "outputs": ["a"], "started_at": "now", "finished_at": "then", "seconds": 1.0}
    parts = {part: {**record, "sha256": {}} for part in ("train", "merge", "score")}
    return [json.dumps({"version": 1, "parts": parts}), '{"parts": {"score": {"outputs": ["/"]}}}']


@target("state", _state_seeds)
def read_state(data: bytes) -> None:
    Path("state.json").write_bytes(data)
    state = StageState(Path())
    for part in ("train", "merge", "score"):
        standing = state.standing(part, {"x": 1})
        if standing.is_finished:
            standing.require_same_inputs(part, Path(), "--fresh")


def _manifest_seeds() -> list[str]:
    source = {"file": "votes.csv", "sha256": "0" * 64, "weight": 1.0}
    content = {"format": FORMAT, "views": ["judge"], "sources": {"train": source}, "files": {"rows.parquet": "0"}}
    return [json.dumps({**content, "experiment": {"name": "exam"}, "frame": asdict(frame_of(_tokenizer()))})]


@target("manifest", _manifest_seeds)
def read_a_manifest(data: bytes) -> None:
    Path("manifest.json").write_bytes(data)
    ChatFrame.from_dict(read_manifest(Path())["frame"])


_ENTRY = {"file_name": "dataset_info.json", "formatting": "sharegpt", "num_samples": 3}


@target("dataset_info", lambda: [json.dumps({"exam_sft_train": _ENTRY, "exam_sft_valid": _ENTRY | {"file_name": "x"}})])
def read_dataset_info(data: bytes) -> None:
    Path("dataset_info.json").write_bytes(data)
    recipe = {"dataset": "exam_sft_train", "eval_dataset": "exam_sft_valid", "dataset_dir": "."}
    data_sets(recipe, {})
    training_rows(recipe)


def _judge_seeds() -> list[str]:
    content = {"format": JUDGE_FORMAT, "classes": list(VERDICTS), "labels": Labels().model_dump(), "cutoff_len": 512}
    content |= {"judge_prompt": _prompt().source, "prompt_share": 0.2}
    content |= {"frame": asdict(frame_of(_tokenizer()))}
    golden = {"Verdict:": _tokenizer().encode("Verdict:").ids}
    return [json.dumps({**content, "canaries": golden, "source": {}})]


@target("judge", _judge_seeds)
def read_judge(data: bytes) -> None:
    folder = Path("judge")
    folder.mkdir(exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "judge.json").write_bytes(data)
    load_judge(folder).fitter()


@target("submission", lambda: [f"id,{','.join(PROBABILITY_COLUMNS)}\n1,.5,.25,.25\n2,1,0,0\n"])
def read_submission(data: bytes) -> None:
    _FILE.write_bytes(data)
    check_submission(_FILE, ["1", "2"])


def _log_seeds() -> list[str]:
    point = {"current_steps": 1, "total_steps": 9, "loss": 0.5, "lr": 1e-4, "elapsed_time": "1 day, 0:00:01"}
    log = "\x1b[1mTraceback (most recent call last):\n  File x\nValueError: no\r[rank0]: torch.OutOfMemoryError: CUDA\n"
    return [(json.dumps(point) + "\n") * 2, log]


@target("logs", _log_seeds)
def read_logs(data: bytes) -> None:
    _FILE.write_bytes(data)
    assert all(set(row) == {"step", "loss", "lr", "eval_loss"} for row in loss_curve(_FILE))
    text = data.decode("utf-8", "replace")
    clean_lines(text)
    for error in all_errors(text):
        remedy_for(error)
