"""What a user does, for the tests of run.py and of the documents: a place of one's own, and calls of run.py in it."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

from click.testing import CliRunner

import run
from common.experiment import Labels, parse_experiment
from data_prep.prompt import JudgePrompt
from data_prep.synthetic import synthetic_battles
from factory.demo import EMBEDDED_BASE, build_base_model
from factory.stage_context import StageContext
from factory.status import stage_status

ROOT = Path(__file__).resolve().parents[1]
# What a shell may hold; none of it may be found in anything that a run writes or prints.
SECRETS = {"HF_TOKEN": "hf_NeverToBeSeenAnywhere", "WANDB_API_KEY": "0123456789abcdefNeverToBeSeen"}


def run_py(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    """Call run.py as a user does, from `folder`."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache"), "NO_COLOR": "1", **SECRETS}
    call = [sys.executable, str(ROOT / "run.py"), *arguments]
    return subprocess.run(call, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def call(*arguments: str, **options):
    """Call run.py in this process; return its exit code and what it printed."""
    return CliRunner().invoke(run.cli, list(arguments), **options)


def called(*arguments: str) -> str:
    """Call run.py in this process, which must succeed; return what it printed."""
    done = call(*arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def experiment_of(name: str = "exam", **changed):
    """Return an experiment with the given keys changed; it is in no file."""
    keys = {"model": "models/none", "template": "qwen3_nothink", "cutoff_len": 512} | changed
    return parse_experiment(keys, name, where="experiment.yaml")


def status(experiment, stage: str):
    """Return what `run.py status` knows of a stage."""
    return stage_status(StageContext(experiment, stage))


def rows_of(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def hub_cache(cache: Path, model: str) -> Path:
    """Make the folder of a model in a cache of the hub's, still without files."""
    kept = cache / f"models--{model.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text("abc")
    (kept / "snapshots" / "abc").mkdir(parents=True)
    return kept / "snapshots" / "abc"


def whole_checkpoint(folder: Path) -> Path:
    """Make a checkpoint that a training can go on from, its files empty."""
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text("{}")
    for name in ("optimizer.pt", "scheduler.pt"):
        ZipFile(folder / name, "w").close()
    return folder


def place(folder: Path, **recipes: dict) -> Path:
    """Lay out templates and a demo experiment of its own, with the given recipes' keys changed."""
    from omegaconf import OmegaConf

    folder.mkdir()
    shutil.copytree(ROOT / "templates", folder / "templates")
    target = folder / "factory_configs" / "demo"
    target.mkdir(parents=True)
    content = OmegaConf.to_container(OmegaConf.load(ROOT / "factory_configs" / "demo" / "experiment.yaml"))
    for step, keys in recipes.items():
        content.setdefault("recipes", {}).setdefault(step, {}).update(keys)
    OmegaConf.save(OmegaConf.create(content), target / "experiment.yaml")
    judging_base(folder / EMBEDDED_BASE)
    return folder


def judging_base(folder: Path) -> None:
    """Build a base that knows something of the voters: a few steps on another one may end in a constant judge."""
    prompt, rows = JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels()), synthetic_battles(1500, seed=2)
    lessons = [(prompt.message(row.battle), dict(zip("ABC", row.probabilities, strict=True))) for row in rows]
    build_base_model(folder, [text for text, _ in lessons], lessons, seed=1)


def train_chain(folder: Path) -> None:
    """Prepare made-up votes in a new folder, and train, merge and score the demo's judge on them."""
    from data_prep.synthetic import write_arena

    place(folder, **{step: {"max_steps": 12} for step in ("sft", "dpo_judge", "dpo_reward", "rm")})
    write_arena(folder / "arena", seed=11, train_rows=700, test_rows=30)
    votes = ["--train", "arena/train.csv", "--test", "arena/test.csv", "--truth", "arena/truth.csv"]
    done = run_py(folder, "prepare", "-e", "demo", *votes)
    assert done.returncode == 0, done.stderr
    assert "700 battles kept" in done.stderr and "next: python run.py sft -e demo" in done.stdout
    done = run_py(folder, "sft", "-e", "demo", "--json")
    assert done.returncode == 0, done.stderr
    (folder / "sft.said").write_text(done.stderr, encoding="utf-8")
    report = folder / "outputs" / "demo" / "sft" / "report.json"
    assert json.loads(done.stdout) == json.loads(report.read_text(encoding="utf-8"))
