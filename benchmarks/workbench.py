"""What measurements share: a folder where run.py works as a user calls it, votes, tokenizers, fresh processes."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from figures import ROOT
from omegaconf import OmegaConf
from tokenizers import ByteLevelBPETokenizer, Tokenizer

from common.battle import PROBABILITY_COLUMNS, VERDICTS, Battle
from common.experiment import load_experiment
from common.files import read_json
from common.stages import STAGES
from data_prep.chat_template import ChatFrame
from data_prep.readers import VoteReader
from data_prep.synthetic import TRAIN_COLUMNS, cell
from factory.demo import SPECIAL_TOKENS, BaseModelSize, build_base_model
from factory.forecast import forecast
from factory.process import child_environment, llamafactory
from scoring.metrics import GroupBootstrap, as_groups

os.environ["ARENA_FACTORY_HERE"] = "1"  # run.py is called in folders of the measurements


class Workbench:
    """A copy of templates and experiments in which run.py works without touching the checkout's own runs."""

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in ("templates", "factory_configs"):
            if not (folder / name).exists():
                shutil.copytree(ROOT / name, folder / name)

    def run(self, *arguments: str) -> float:
        """Call run.py; return the seconds it took."""
        started = time.monotonic()
        call = [sys.executable, str(ROOT / "run.py"), *arguments]
        subprocess.run(call, cwd=self.folder, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - started

    def stage(self, experiment: str, stage: str, *more: str) -> None:
        """Run a stage to its report, unless the report is there already."""
        if not self.has(experiment, stage):
            self.run(*STAGES[stage].command.split(), "-e", experiment, *more)

    def has(self, experiment: str, stage: str) -> bool:
        """Return whether a stage was run to its report."""
        return (self.output(experiment, stage) / "report.json").is_file()

    def variant(self, name: str, *votes: str, of: str = "demo", **changed: Any) -> None:
        """Make an experiment like another one, with keys changed (`recipes` merged); export its votes once."""
        configs = self.folder / "factory_configs"
        (configs / name).mkdir(exist_ok=True)
        content = OmegaConf.merge(OmegaConf.load(configs / of / "experiment.yaml"), OmegaConf.create(changed))
        OmegaConf.save(content, configs / name / "experiment.yaml")
        if not (self.folder / "data" / name / "manifest.json").is_file():
            self.run("prepare", "-e", name, *votes)

    def base(self, name: str, texts: Iterable[str], **size: int) -> str:
        """Build a base with random weights and a tokenizer of the texts, once; return its folder's name."""
        if not (self.folder / "models" / name).is_dir():
            build_base_model(self.folder / "models" / name, texts, seed=1, size=BaseModelSize(**size))
        return f"models/{name}"

    def trained(self, name: str, stage: str, device: str | None = None) -> tuple[dict[str, Any], float, float]:
        """Train by LLaMA-Factory alone, in this folder; return a device's forecast, seconds and peak memory in GiB."""
        experiment = load_experiment(name)
        devices = forecast(experiment, [stage], [device] if device else [])["stages"][stage]["devices"]
        shutil.rmtree(experiment.adapter_folder(stage), ignore_errors=True)
        call = llamafactory("train", f"factory_configs/{name}/{stage}.yaml")
        # This machine's own card comes first.
        return devices[device or next(iter(devices))], *child_peak(call, self.folder, self.folder / f"{name}.log")

    def report(self, experiment: str, stage: str) -> dict[str, Any]:
        """Return a stage's report.json."""
        return read_json(self.output(experiment, stage) / "report.json")

    def output(self, experiment: str, stage: str) -> Path:
        """Return a stage's folder of outputs."""
        return self.folder / "outputs" / experiment / stage

    def judged(self, experiment: str, stage: str) -> pd.DataFrame:
        """Return the validation rows of a stage: id, verdict, group, p_a, p_b, p_tie and the raw scores."""
        scores = pd.read_parquet(self.output(experiment, stage) / "scores_valid.parquet")
        chances = pd.read_csv(self.output(experiment, stage) / "probabilities_valid.csv", dtype={"id": str})
        assert scores["id"].tolist() == chances["id"].tolist()
        scores[[f"p_{verdict}" for verdict in VERDICTS]] = chances[list(PROBABILITY_COLUMNS)].to_numpy()
        return scores


def battles_of(*files: Path) -> list[Battle]:
    """Return all battles of tables of votes."""
    return [battle for file in files for _, battle in VoteReader(file, labelled=True)]


def texts_of(battles: Iterable[Battle]) -> Iterable[str]:
    """Yield every prompt and response."""
    return (text for battle in battles for column in battle.texts for text in column)


def vote_table(battles: Iterable[Battle]) -> pd.DataFrame:
    """Return battles in the competition's schema; one without a verdict is no row of a table of votes."""
    rows = [[b.id, "x", "y", *map(cell, b.texts), *(int(b.verdict == each) for each in VERDICTS)] for b in battles]
    return pd.DataFrame(rows, columns=TRAIN_COLUMNS)


def write_votes(path: Path, battles: Iterable[Battle]) -> Path:
    """Write battles as a CSV file in the competition's schema."""
    vote_table(battles).to_csv(path, index=False, lineterminator="\r\n")  # so that each kind of line end is quoted
    return path


def train_tokenizer(texts: Iterable[str], vocabulary: int, special: Sequence[str] = SPECIAL_TOKENS) -> Tokenizer:
    """Return a byte-level BPE tokenizer, with Qwen's special tokens where no others are given."""
    bpe, keys = ByteLevelBPETokenizer(), {"min_frequency": 0, "show_progress": False}
    bpe.train_from_iterator(texts, vocabulary, special_tokens=list(special), **keys)
    return Tokenizer.from_str(bpe.to_str())


def frame_of(tokenizer: Tokenizer) -> ChatFrame:
    """Return the chat frame of LLaMA-Factory's template qwen3_nothink around such a tokenizer."""
    keys = dict.fromkeys(("prefix_ids", "suffix_ids", "answer_prefix_ids", "answer_suffix_ids"), ())
    keys |= {"before": "<|im_start|>user\n", "after": "<|im_end|>\n<|im_start|>assistant\n", "answer_before": ""}
    keys |= {"template": "qwen3_nothink", "answer_after": "<|im_end|>\n", "special_strings": SPECIAL_TOKENS}
    return ChatFrame(**keys, label_ids=tuple(tokenizer.encode(label).ids[0] for label in "ABC"), answer_len=3)


def alone(function: Callable, *arguments: Any) -> tuple[Any, float]:
    """Call a function in a fresh process; return its result and that process's peak memory in GiB."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        found = pool.submit(function, *arguments).result()
        # ru_maxrss would be that of the process that started this one, where that had more.
        status = pool.submit(Path("/proc/self/status").read_text, encoding="utf-8").result()
    return found, int(re.search(r"VmHWM:\s+(\d+)", status)[1]) / 2**20


def child_peak(call: Sequence[str], folder: Path, log: Path) -> tuple[float, float]:
    """Run a program in a folder; return its seconds and peak memory in GiB; raises SystemExit where it fails."""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(call, cwd=folder, env=child_environment(), stdout=output, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(map(str, call))} failed; read {log}")
    return time.monotonic() - started, usage.ru_maxrss / 2**20


def matrix_rate(gpu: bool) -> float:
    """Return the measured operations a second of a large matrix product, 16-bit on a GPU."""
    import torch
    from torch.utils.benchmark import Timer

    size, device = (8192, "cuda") if gpu else (1024, "cpu")
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())
    return 2 * size**3 / timer.blocked_autorange(min_run_time=1).median


def interval(ends: list[float] | None, digits: int = 3) -> str:
    """Return an interval as text, empty without one."""
    return f"[{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]" if ends else ""


def mean(values: np.ndarray, groups: Iterable, form: str = "+.4f", digits: int = 3) -> str:
    """Return the mean of `values` [rows] and its 95% interval over resampled prompt groups, as text."""
    return f"{values.mean():{form}} {interval(GroupBootstrap(as_groups(groups), seed=1).interval(values), digits)}"
