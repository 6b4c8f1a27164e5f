"""The documents: links that lead somewhere, commands that exist, keys that are all explained, and the tutorial run."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import click
import psutil
import pytest
from chain import ROOT, place, rows_of, run_py

import run
from common.experiment import Experiment
from data_prep.synthetic import write_arena

DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
_FENCE = re.compile(r"(?:<!-- (?P<mark>[^>]*) -->\n)?```(?P<kind>\w*)\n(?P<body>.*?)```", re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def commands_of(document: Path, marked: str = "") -> list[tuple[str, bool]]:
    """Return (command line of run.py, whether it is to be run) of a document's shell blocks, all or those `marked`."""
    found = []
    for block in _FENCE.finditer(document.read_text(encoding="utf-8")):
        if marked and marked != block["mark"]:
            continue
        if block["kind"] not in ("bash", "console", "sh"):
            continue
        text = block["body"].replace("\\\n", " ")
        lines = text.splitlines()
        if block["kind"] == "console":  # what stands without a prompt is output
            lines = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
        own = [line[line.index("python run.py") :] for line in lines if "python run.py" in line]
        tested = "not tested" not in (block["mark"] or "")
        found += [(re.sub(r"\s+#.*", "", line).split("&&")[0].strip(), tested) for line in own]
    return found


def arguments_of(line: str) -> list[str]:
    """Return a documented command's arguments, its placeholders made names and choices that exist."""
    parts = shlex.split(line)[2:]
    stands_for = {"EXP": "demo", "STAGE": "sft", "S": "sft", "N": "1", "ID": "100001"}
    return [stands_for.get(part, part) for part in parts]


ALL = [(document.name, line) for document in DOCUMENTS for line, _ in commands_of(document)]


def test_the_documents_are_found_and_hold_commands():
    assert len(DOCUMENTS) >= 8 and len(ALL) >= 20
    assert {line.split()[2] for _, line in ALL} >= {"prepare", "sft", "score", "forecast", "verify"}


@pytest.mark.parametrize(("document", "line"), ALL, ids=[f"{d}: {line}" for d, line in ALL])
def test_every_command_has_the_form_that_run_py_takes(document, line):
    name, *arguments = arguments_of(line)
    command = run.cli.commands[name]
    try:
        command.make_context(name, arguments, parent=click.Context(run.cli))
    except click.exceptions.Exit as ended:  # --help
        assert ended.exit_code == 0


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda d: d.name)
def test_every_link_leads_to_a_file_and_a_heading(document):
    text = document.read_text(encoding="utf-8")
    for link in _LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if link.startswith(("http://", "https://")):
            assert re.fullmatch(r"https?://[\w.-]+\.[a-z]+(/\S*)?", link), link
            continue
        path, _, heading = link.partition("#")
        target = (document.parent / path).resolve() if path else document
        assert target.exists(), f"{document.name}: {link}"
        if heading:
            titles = re.findall(r"^#+ (.*)", target.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in {re.sub(r"[^\w\- ]", "", t.lower()).replace(" ", "-") for t in titles}, link


def test_every_document_is_reached_from_the_readme():
    seen, waiting = set(), [ROOT / "README.md"]
    while waiting:
        document = waiting.pop()
        if document in seen:
            continue
        seen.add(document)
        links = [link.partition("#")[0] for link in _LINK.findall(document.read_text(encoding="utf-8"))]
        waiting += [(document.parent / link).resolve() for link in links if link.endswith(".md") and ":" not in link]
    assert {d.name for d in DOCUMENTS} <= {d.name for d in seen}


def test_every_key_of_an_experiment_is_documented_in_the_table_and_where_it_stands():
    table = (ROOT / "docs" / "experiment.md").read_text(encoding="utf-8")
    example = (ROOT / "factory_configs" / "demo" / "experiment.yaml").read_text(encoding="utf-8")
    keys = set(Experiment.model_fields) - {"name"}
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == keys
    assert set(re.findall(r"^# .*\n(\w+):", example, re.MULTILINE)) == keys, "with a comment above each"
    for key, field in Experiment.model_fields.items():
        if key != "name" and field.is_required():
            assert f"| `{key}` | required |" in table


def test_the_tutorial_runs_as_it_is_written(chain):
    """Every command of the tutorial in its order, with the demo in place of the 4B model and a small zip of votes."""
    with zipfile.ZipFile(chain / "llm-classification-finetuning.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in ("train.csv", "test.csv"):
            archive.write(chain / "arena" / name, name)
    for line, tested in commands_of(ROOT / "docs" / "tutorial.md"):
        arguments = shlex.split(line.replace("qwen3-4b", "demo").replace("30192", "100001"))[2:]
        if not tested:
            continue
        if arguments[0] == "prepare":  # the chain was trained beside the known probabilities
            arguments += ["--truth", "arena/truth.csv"]
        done = run_py(chain, *arguments)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (chain / "outputs" / "demo" / "compare" / "compare.json").is_file()


def kill_at(file: Path, folder: Path, *arguments: str) -> None:
    """Call run.py in a folder, and kill it as soon as the file is there."""
    environment = {**os.environ, "HF_DATASETS_CACHE": str(folder / "cache")}
    call = subprocess.Popen([sys.executable, str(ROOT / "run.py"), *arguments], cwd=folder, env=environment)
    while call.poll() is None and not file.exists():
        time.sleep(0.01)
    family = psutil.Process(call.pid).children(recursive=True)
    call.kill()
    assert call.wait() < 0
    psutil.wait_procs(family, timeout=20)


@pytest.mark.slow
def test_three_models_and_folds_give_one_submission_as_it_is_written(tmp_path):
    """The worked example of docs/folds.md, with two folds and a few steps; the second fold is killed on its way."""
    # The first of the checkpoints may be chosen: without warm-up it has moved.
    steps = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 3}
    steps |= {"warmup_steps": 0, "adam_epsilon": 1e-8}
    folder = place(tmp_path / "place", sft=steps, **{step: {"max_steps": 3} for step in ("dpo_reward", "rm")})
    arena = write_arena(folder / "arena", seed=7, train_rows=160, test_rows=12)
    for path in (arena.train, arena.test):
        shutil.copy(path, folder / path.name)
    config = folder / "factory_configs" / "demo" / "experiment.yaml"
    single = config.read_text().replace("orders_together: false", "orders_together: true")
    config.write_text(single.replace("folds: 1", "folds: 2"))
    for number, (line, _) in enumerate(commands_of(ROOT / "docs" / "folds.md", "run in a test")):
        if number == 1:
            second = folder / "saves" / "arena-tiny" / "lora" / "demo_sft_fold1"
            call = ("sft", "-e", "demo", "--checkpoint", "best", "--resume")
            kill_at(second / "checkpoint-1" / "trainer_state.json", folder, *call)
            done = run_py(folder, *call)
            assert done.returncode == 0, done.stderr[-2000:]
            assert "sft fold0: scores kept" in done.stderr and "demo_sft_fold1/checkpoint-" in done.stderr
        done = run_py(folder, *shlex.split(line)[2:])
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        if " new student " in line:
            (config.parents[1] / "student" / config.name).write_text(single)  # without folds: fewer trainings
    rows = (folder / "outputs" / "all" / "ensemble" / "submission.csv").read_text().splitlines()
    ids = [row["id"] for row in rows_of(arena.test)]
    assert [row.split(",")[0] for row in rows[1:]] == ids
    report = json.loads((folder / "outputs" / "demo" / "sft" / "report.json").read_text())
    assert "fold1 " in next(flag["text"] for flag in report["flags"] if flag["code"] == "checkpoint")
    assert report["set"] == "out-of-fold" and report["rows"] == 160 and len(report["folds"]) == 2
    assert run_py(folder, "score", "-e", "demo", "--input", "test.csv").returncode == 0
    scored = (folder / "outputs" / "demo" / "sft" / "scored" / "test.csv").read_text()
    assert scored == (folder / "outputs" / "demo" / "sft" / "probabilities_test.csv").read_text(), "the folds' mean"
    adapters = sorted(path.name for path in (folder / "saves" / "arena-tiny" / "lora").iterdir())
    of_folds = [f"demo_{stage}_fold{n}" for stage in ("dpo_reward", "rm", "sft") for n in range(2)]
    assert adapters == [*of_folds, "student_sft"]
