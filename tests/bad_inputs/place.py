"""A whole working place in miniature: votes, an export, recipes, a merged judge, its report and submission."""

import csv
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from chain import called

from common.battle import PROBABILITY_COLUMNS
from data_prep.synthetic import TRAIN_COLUMNS as COLUMNS
from factory.stage_context import StageContext

ROOT = Path(__file__).resolve().parents[2]
PREPARE = ("prepare", "-e", "exam", "--train", "votes.csv")
PREPARE_TEST = (*PREPARE, "--test", "test.csv")
SFT = ("sft", "-e", "exam")
SCORE = ("score", "-e", "exam")
SCORE_INPUT = ("score", "-e", "exam", "--input", "test.csv", "--output", "mine.csv")
COMPARE = ("compare", "-e", "exam")
# What a run may leave beside the work itself: locks, and the cache of frames.
_OURS = (".lock", ".frames")
EXPERIMENT = """\
model: models/tiny
template: qwen3_nothink
cutoff_len: 300
quantization_bit: null
valid_share: 0.3
trust_remote_code: false
seed: 7
recipes:
  sft: {bf16: false}
"""


class Place:
    """The current folder, with what a case needs to break it."""

    def rows(self, count: int = 40, start: int = 1000) -> list[dict[str, str]]:
        """Return good rows of the competition's table."""
        return [row(str(start + i), f"question {i}", f"first {i}", f"second {i}", i) for i in range(count)]

    def table(self, rows: list[dict[str, str]], name: str = "votes.csv", columns=COLUMNS) -> Path:
        """Write rows as a CSV file and return its path."""
        with Path(name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, extrasaction="ignore", restval="")
            writer.writeheader()
            writer.writerows(rows)
        return Path(name)

    def edit_experiment(self, text: str, name: str = "exam") -> None:
        """Put lines into experiment.yaml; a top-level key that is there already is replaced."""
        path = Path("factory_configs") / name / "experiment.yaml"
        path.write_text(_merged_lines(path.read_text(), text), encoding="utf-8")

    def edit_recipe(self, step: str, text: str) -> None:
        """Put lines into a recipe; a key that is there already is replaced."""
        path = Path("factory_configs/exam") / f"{step}.yaml"
        path.write_text(_merged_lines(path.read_text(), text), encoding="utf-8")

    def edit_json(self, path: str, **changed: Any) -> None:
        """Replace keys of a JSON file; a value of `...` removes the key."""
        content = json.loads(Path(path).read_text())
        content.update(changed)
        Path(path).write_text(json.dumps({k: v for k, v in content.items() if v is not ...}))

    def snapshot(self) -> dict[str, str]:
        """Return every file below the current folder with its SHA-256, links as what they say."""
        found = {}
        for folder, _, names in os.walk("."):
            for path in (Path(folder) / name for name in names):
                if not any(mark in path.as_posix() for mark in _OURS):
                    content = str(path.readlink()).encode() if path.is_symlink() else path.read_bytes()
                    found[path.as_posix()] = hashlib.sha256(content).hexdigest()
        return found


def row(identity: str, prompt: str, a: str, b: str, verdict: int) -> dict[str, str]:
    """Return one row of the competition's table; texts become JSON lists of one turn."""
    flags = {name: str(int(verdict % 3 == i)) for i, name in enumerate(PROBABILITY_COLUMNS)}
    texts = {"prompt": prompt, "response_a": a, "response_b": b}
    return {"id": identity, "model_a": "m", "model_b": "n", **{k: json.dumps([v]) for k, v in texts.items()}, **flags}


def usual_votes(place: Place) -> None:
    """Write votes.csv and test.csv."""
    place.table(place.rows())
    place.table(place.rows(6, start=9000), "test.csv", COLUMNS[:6])


def build(folder: Path, frame, tokenizer, write_votes: Callable[[Place], object] = usual_votes) -> None:
    """Lay the place out in `folder`, the current one: everything by the project's own code, training left out."""
    from common.experiment import load_experiment
    from data_prep.chat_template import write_cache

    (folder / "templates").symlink_to(ROOT / "templates")
    for name in ("factory_configs/exam", "models"):
        (folder / name).mkdir(parents=True)
    Path("factory_configs/exam/experiment.yaml").write_text(EXPERIMENT, encoding="utf-8")
    _model(Path("models/tiny"), tokenizer)
    experiment = load_experiment("exam")
    write_cache(experiment, frame, tokenizer.to_str())
    write_votes(Place())
    called("prepare", "-e", "exam", "--train", "votes.csv", "--test", "test.csv", "--pairs")
    lay_stage(StageContext(experiment, "sft"))
    called("score", "-e", "exam", "--json")


def lay_stage(context: StageContext) -> None:
    """Lay down what a stage's training and merge leave."""
    import numpy as np
    from safetensors.numpy import save_file

    from scoring.judge import write_judge_manifest

    context.merged.mkdir(parents=True)
    train_and_merge(context.adapter, context.merged)
    if context.name == "rm":
        weight = np.linspace(-3, 3, 16, dtype=np.float32)[None]
        for folder in (context.adapter, context.merged):
            tensors = {"v_head.summary.weight": weight, "v_head.summary.bias": np.zeros(1, np.float32)}
            save_file(tensors, folder / "value_head.safetensors")
    write_judge_manifest(context.merged, context)


def _model(folder: Path, tokenizer) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 600, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = AutoConfig.for_model("llama", initializer_range=0.3, **sizes, **heads)
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}')


def train_and_merge(adapter: Path, merged: Path) -> None:
    """Lay down what a training and its merge leave, with a random adapter."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(4)
        base = AutoModelForCausalLM.from_pretrained("models/tiny")
        policy = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    policy.save_pretrained(adapter)
    (adapter / "trainer_state.json").write_text(json.dumps({"log_history": [{"step": 1, "loss": 1.0}]}))
    policy.merge_and_unload().save_pretrained(merged)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path("models/tiny") / name, merged / name)


def _merged_lines(old: str, new: str) -> str:
    keys = tuple(f"{line.split(':')[0]}:" for line in new.splitlines() if line[:1].isalpha())
    kept, skipping = [], False
    for line in old.splitlines():
        begins = line[:1].isalpha()
        skipping = line.startswith(keys) if begins and keys else skipping and not begins
        if not skipping:
            kept.append(line)
    return "\n".join([*kept, new.rstrip("\n")]) + "\n"


Breaks = Callable[[Place], object]


@dataclass(frozen=True)
class Case:
    """How a good place is broken, what is then called, and what must be said.

    `call` is a command's arguments or a function; exit code 0 means that the words stand in the audit.
    """

    name: str
    breaks: Breaks
    call: tuple[str, ...] | Callable[[], object]
    words: Sequence[str]
    code: int = 1
    writes: tuple[str, ...] = ()  # what the call may write before the fault shows


def write(path: str, content: bytes | str) -> Breaks:
    """Return what puts `content` in a file's place."""
    data = content.encode("utf-8") if isinstance(content, str) else content
    return lambda place: Path(path).write_bytes(data)


def change(path: str, how: Callable[[bytes], bytes]) -> Breaks:
    """Return what changes a file's bytes."""
    return lambda place: Path(path).write_bytes(how(Path(path).read_bytes()))


def remove(path: str) -> Breaks:
    """Return what takes a file away."""
    return lambda place: Path(path).unlink()


def cut(share: float) -> Callable[[bytes], bytes]:
    """Return what keeps the first share of some bytes."""
    return lambda data: data[: int(len(data) * share)]


def nothing(place: Place) -> None:
    """Leave the place as it is: the call itself is the fault."""


def cases(rows: Sequence[tuple], call: tuple[str, ...] | None = None, **options: Any) -> list[Case]:
    """Return the cases of rows (name, breaks, call, words …), without the call where all rows share one."""
    each = [(*row[:2], call, *row[2:]) if call else row for row in rows]
    return [Case(name, breaks, call, words, **options) for name, breaks, call, *words in each]
