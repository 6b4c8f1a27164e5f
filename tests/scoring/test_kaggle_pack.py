"""`run.py kaggle-pack`: its notebook scores from that very folder, with the listed wheels alone and no network."""

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from chain import call
from supply_chain import needed

from common.battle import PROBABILITY_COLUMNS
from common.experiment import load_experiment
from factory.stage_context import StageContext
from scoring.links import DavidsonLink
from tests.bad_inputs.place import lay_stage

FOLDER = Path("outputs/exam/sft/kaggle")
_PIN = re.compile(r"^([\w-]+)==\S+", re.MULTILINE)
NO_NETWORK = """
import socket
connect = socket.socket.connect
def refuse(self, address):
    if self.family != socket.AF_UNIX:
        raise OSError("no network")
    return connect(self, address)
socket.socket.connect = refuse
"""


def pack(*options: str):
    return call("kaggle-pack", "-e", "exam", *options)


def packages_of(names: set[str], folder: Path) -> Path:
    """Make a folder of links to these packages, as Kaggle's with the wheels installed."""
    folder.mkdir()
    for name in names:
        distribution = metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(distribution.locate_file(top))
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sft", "rm"])
def test_the_notebook_writes_the_submission_from_its_folder(place, tmp_path, stage):
    slug = "another-arena"
    if stage == "rm":
        lay_stage(StageContext(load_experiment("exam"), stage))
        assert call("score", "-e", "exam", "--stage", stage).exit_code == 0
        # on so few votes nothing is fitted, and every row would get the class prior
        calibration = json.loads(Path("outputs/exam/rm/report.json").read_text())["calibration"]
        link = DavidsonLink(0.5, 0.1, 0.1, 1.0, 1.0, 100.0).to_json()
        place.edit_json("outputs/exam/rm/report.json", calibration={**calibration, "link": link})
    done = pack("--stage", stage, "--competition", slug, "--user", "me", "--precision", "fp32", "--json")
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["dataset"] == f"me/arena-factory-exam-{stage}" and made["wheels"]["count"] > 30
    folder = Path(made["folder"])
    assert json.loads((folder / "dataset-metadata.json").read_text())["id"] == made["dataset"]
    content = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sum(map(len, content.values())) == made["bytes"]
    assert not any(b"question 1" in each or str(Path.cwd()).encode() in each for each in content.values()), "no vote"
    given, working, scratch = (tmp_path / name for name in ("input", "working", "scratch"))
    working.mkdir()
    (given / "competitions" / slug).mkdir(parents=True)
    Path("test.csv").rename(given / "competitions" / slug / "test.csv")
    mounted = given / "datasets" / made["dataset"]
    mounted.parent.mkdir(parents=True)
    folder.rename(mounted)
    listed = mounted / "project" / "templates" / "kaggle_wheels.txt"
    names = set(_PIN.findall(listed.read_text()))
    # the list is of Kaggle's Python; an older one has an older NumPy
    listed.write_text(_PIN.sub(lambda pin: f"{pin[1]}=={metadata.version(pin[1])}", listed.read_text()))
    lies = {path: path.stat().st_mtime_ns for path in given.rglob("*")}
    for path in given.rglob("*"):
        path.chmod(0o555 if path.is_dir() else 0o444)
    cells = json.loads((mounted / made["notebook"].split("/")[-1]).read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    two_cards = code.replace('SCORE = ["', 'SCORE = ["--workers", "2", "')
    (tmp_path / "cells.py").write_text(two_cards)
    own = {"PYTHONPATH": str(packages_of(names | needed({"torch"}, set()), tmp_path / "site"))}
    own |= {"KAGGLE_INPUT": str(given), "KAGGLE_WORKING": str(working), "KAGGLE_SCRATCH": str(scratch)}
    own |= {"PYTHONDONTWRITEBYTECODE": "1"}
    python = getattr(sys, "_base_executable", sys.executable)
    call_cells = [python, str(tmp_path / "cells.py")]
    ended = subprocess.run(call_cells, env={**os.environ, **own}, capture_output=True, text=True, check=False)
    assert ended.returncode == 0 and "nothing to install" in ended.stdout, ended.stdout + ended.stderr[-3000:]
    assert {path: path.stat().st_mtime_ns for path in given.rglob("*")} == lies, "nothing is written into the inputs"
    assert [path.name for path in working.rglob("*")] == ["submission.csv"], "Kaggle keeps nothing else"
    options = ["--stage", stage, "--precision", "fp32", "--time-limit", "8h", "--output", "own.csv"]
    done = call("score", "-e", "exam", "--input", str(given / "competitions" / slug / "test.csv"), *options)
    assert done.exit_code == 0, done.output
    here, there = pd.read_csv("own.csv"), pd.read_csv(working / "submission.csv")
    assert list(there) == ["id", *PROBABILITY_COLUMNS] and there["id"].tolist() == here["id"].tolist()
    assert np.abs(there - here).to_numpy().max() < 1e-6 and np.abs(there.iloc[:, 1:].sum(axis=1) - 1).max() < 1e-6
    assert there["winner_model_a"].nunique() == len(there), "no row has another's scores"


def test_a_pack_is_replaced_with_its_wheels_kept_and_says_what_is_left_to_do(place):
    first = pack("--json")
    assert first.exit_code == 0, first.output
    wheels = [FOLDER / "wheels" / f"{number}.whl" for number in range(json.loads(first.stdout)["wheels"]["count"])]
    wheels[0].parent.mkdir()
    for wheel in wheels[1:]:
        wheel.write_text("a wheel")
    unfinished = pack()
    assert "INSERT_USER_HERE" in unfinished.stdout and "pip download" in unfinished.stdout
    wheels[0].write_text("a wheel")
    again = pack("--user", "me")
    assert again.exit_code == 0 and "INSERT_USER_HERE" not in again.stdout and "pip download" not in again.stdout
    assert all(wheel.is_file() for wheel in wheels)


@pytest.mark.parametrize(
    ("before", "options", "words", "code"),
    [
        (lambda: FOLDER.mkdir(), [], "no earlier kaggle-pack", 2),
        (lambda: None, ["--stage", "dpo_reward"], "its base model", 2),
        (lambda: None, ["--stage", "rm"], "run.py rm -e exam", 1),
        (lambda: None, ["--competition", "https://kaggle.com"], "no name on Kaggle", 2),
        (lambda: None, ["--time-limit", "soon"], "not a length of time", 2),
        (lambda: Path("outputs/exam/sft/report.json").unlink(), [], "run.py sft -e exam", 1),
        (lambda: Path("outputs/exam/sft/merged").rename("outputs/gguf"), [], "run.py sft -e exam", 1),
    ],
)
def test_what_cannot_be_packed_is_refused_with_what_to_do(place, before, options, words, code):
    before()
    done = pack(*options)
    assert done.exit_code == code and words in " ".join(done.output.split()), done.output
    assert not list(FOLDER.glob("*")) and not list(FOLDER.parent.glob(".kaggle.*"))
