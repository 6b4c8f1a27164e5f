"""A folder for a code competition on Kaggle: this project, a judge, a notebook that scores with it, and a wheel list.

    dataset-metadata.json   what `kaggle datasets create` reads
    arena_factory.ipynb     the notebook, from templates/kaggle_notebook.py.j2
    project/                run.py with its packages, factory_configs/EXP, outputs/EXP/STAGE
    wheels/                 empty until the user downloads them

Nothing is downloaded or sent: the commands that do are returned.
"""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import UsageError
from common.files import atomic_folder, write_json
from common.progress import Show
from factory.devices import CARDS
from factory.memory import scoring_memory
from factory.recipes import TEMPLATES, render_template
from factory.stage_context import StageContext
from factory.workload import size_of
from scoring.model_card import at_another_place, public_base
from scoring.predictions import REPORT
from scoring.publish import published_files
from scoring.runner import parse_duration

# Kaggle's image of August 2026, from Kaggle/docker-python: this Python, PyTorch 2.10 for CUDA 12.8.
PYTHON = "3.12"
NOTEBOOK, WHEEL_LIST = "arena_factory.ipynb", Path("templates") / "kaggle_wheels.txt"
DOWNLOAD = (
    "python -m pip download --only-binary=:all: --no-deps --require-hashes --python-version {python} "
    "--platform manylinux_2_28_x86_64 --platform manylinux_2_27_x86_64 --platform manylinux_2_24_x86_64 "
    "--platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 -d {wheels} -r {list}"
)
_CARD = "T4"
_ROOT = TEMPLATES.parent
_CODE = ("run.py", "common", "data_prep", "factory", "scoring", "templates")
_PACKED = ("sft", "dpo_judge", "rm")
_SLUG = re.compile(r"[a-z0-9][a-z0-9-]{1,98}")
_NO_USER = "INSERT_USER_HERE"
_LONGEST_SLUG = 50
_CELLS = re.compile(r"^# %%( \[markdown\])?\n", re.MULTILINE)


def kaggle_pack(
    context: StageContext,
    *,
    competition: str,
    user: str | None,
    precision: str,
    time_limit: str,
    output: Path | None,
    show: Show,
) -> dict[str, Any]:
    """Write the folder for a stage's judge; return where it lies, its size, and the commands that download and upload.

    A folder that an earlier call wrote is replaced; its wheels stay as long as the wheel list does. Raises UsageError
    for a stage, a precision or a folder that cannot do, ArenaError where the judge is not the one that was scored.
    """
    folder = output or context.folder / "kaggle"
    _require_possible(context, competition, user or "user", folder)
    parse_duration(time_limit)
    files = published_files(context, adapter=False)
    _require_fit(context, precision)
    there, experiment, base = at_another_place(context), context.experiment, context.experiment.model
    slug = re.sub(r"[^a-z0-9]+", "-", f"arena-factory-{experiment.name}-{context.name}".lower())
    slug = slug[:_LONGEST_SLUG].strip("-")
    own = {REPORT: there.folder / REPORT, "experiment.yaml": experiment.folder / "experiment.yaml"}
    values = {"experiment": experiment.name, "stage": context.name, "competition": competition, "dataset": slug}
    with atomic_folder(folder) as fresh:
        project = fresh / "project"
        for path in _code():
            _copy(path, project / path.relative_to(_ROOT))
        show.note(f"{context.label}: copying the judge")
        for name, content in files.items():
            _copy(content, project / own.get(name, there.merged / name))
        source = render_template("kaggle_notebook.py.j2", {**values, "precision": precision, "time_limit": time_limit})
        write_json(fresh / NOTEBOOK, _notebook(source))
        about = f"Code and a judge, {experiment.name} {context.name}, made with arena-factory for {competition}."
        licence = f"{about} The judge holds the weights of {public_base(base) or Path(base).name}: its licence applies."
        metadata = {"title": slug, "id": f"{user or _NO_USER}/{slug}", "licenses": [{"name": "other"}]}
        write_json(fresh / "dataset-metadata.json", {**metadata, "description": licence})
        size = sum(path.stat().st_size for path in fresh.rglob("*") if path.is_file())
        wheels, listed = folder / "wheels", folder / "project" / WHEEL_LIST
        same = listed.is_file() and listed.read_bytes() == (project / WHEEL_LIST).read_bytes()
        if same and wheels.is_dir():
            wheels.rename(fresh / "wheels")
    sizes = re.findall(r"# ([\d.]+) MB$", (_ROOT / WHEEL_LIST).read_text(encoding="utf-8"), re.MULTILINE)
    downloaded = len(list(wheels.glob("*.whl"))) >= len(sizes)
    place = {"wheels": shlex.quote(str(wheels)), "list": shlex.quote(str(listed))}
    return {
        "folder": str(folder),
        "bytes": size,
        "dataset": metadata["id"],
        "competition": competition,
        "notebook": str(folder / NOTEBOOK),
        "licence": licence,
        "wheels": {"count": len(sizes), "bytes": int(sum(map(float, sizes)) * 1e6), "downloaded": downloaded},
        "download": DOWNLOAD.format(python=PYTHON, **place),
        "upload": f"kaggle datasets create -p {shlex.quote(str(folder))} --dir-mode zip",
    }


def _require_possible(context: StageContext, competition: str, user: str, folder: Path) -> None:
    """Raise UsageError for what is no name on Kaggle, a stage that needs its base, or a folder of something else."""
    for option, text in (("--competition", competition), ("--user", user)):
        if not _SLUG.fullmatch(text.lower()):
            raise UsageError(f"{text!r} is no name on Kaggle", where=option, remedy="take it from the page's address")
    if context.name not in _PACKED:
        what = f"{context.name} is scored with its base model, which is not in its folder"
        raise UsageError(what, where="--stage", remedy=f"choose one of: {', '.join(_PACKED)}")
    if folder.exists() and not (folder / NOTEBOOK).is_file():
        raise UsageError("exists, and no earlier kaggle-pack", where=str(folder), remedy="name another --output")


def pack_lines(made: Mapping[str, Any]) -> list[str]:
    """Return what was made and what is to be done with it, step by step."""
    wheels, owner = made["wheels"], made["dataset"].split("/")[0]
    need = f"download the {wheels['count']} wheels, {wheels['bytes'] / 1e6:.0f} MB, for Kaggle's Python {PYTHON}"
    lines = [f"{made['folder']}: {made['bytes'] / 1e6:,.0f} MB, for {made['competition']}", made["licence"]]
    steps = [] if wheels["downloaded"] else [f"{need}:\n   {made['download']}"]
    if owner == _NO_USER:
        steps.append(f"write your user name for {_NO_USER} in {made['folder']}/dataset-metadata.json (or give --user)")
    steps.append(f"upload it as a private data set:\n   {made['upload']}")
    where = f"https://www.kaggle.com/competitions/{made['competition']}"
    steps.append(f"{where}: Code > New Notebook > File > Import Notebook: {made['notebook']}")
    steps.append(f"Accelerator GPU T4 x2; Internet off; Add Input: {made['dataset'].split('/')[1]} and the competition")
    steps.append("Save Version > Save & Run All; when it has run: Submit. docs/kaggle.md has each click")
    return [*lines, *(f"{number}. {step}" for number, step in enumerate(steps, 1))]


def _code() -> list[Path]:
    """Return the project's own files that scoring reads."""
    places = [_ROOT / name for name in _CODE]
    found = [path for place in places for path in (place.rglob("*") if place.is_dir() else [place])]
    return sorted(path for path in found if path.is_file() and "__pycache__" not in path.parts)


def _copy(content: Path | bytes, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content) if isinstance(content, bytes) else shutil.copyfile(content, target)


def _require_fit(context: StageContext, precision: str) -> None:
    """Raise UsageError where one card of Kaggle's cannot hold the judge; each of the two holds all of it."""
    size, longest = size_of(str(context.merged)), context.experiment.cutoff_len
    bits = {"8bit": 8, "4bit": 4}.get(precision)
    parts = scoring_memory(size, bits=bits, budget=1, longest=longest)
    needs, has = sum(parts.values()) + (parts["weights"] if precision == "fp32" else 0), CARDS[_CARD].memory
    if needs > has:
        smaller = {"fp32": "--precision fp16", "fp16": "--precision 8bit", "8bit": "--precision 4bit"}
        what = f"{precision} takes about {needs:.1f} GiB, and a {_CARD} has {has} GiB"
        raise UsageError(what, where="--precision", remedy=smaller.get(precision, "train a smaller model"))


def _notebook(source: str) -> dict[str, Any]:
    """Return a Jupyter notebook of a Python file with `# %%` before each cell."""
    _, *parts = _CELLS.split(source)
    cells = []
    for kind, text in zip(parts[::2], parts[1::2], strict=True):
        lines = text.strip("\n").splitlines(keepends=True)
        if kind:
            text = [line.removeprefix("# ") for line in lines]
            cells.append({"cell_type": "markdown", "metadata": {}, "source": text})
        else:
            cell = {"cell_type": "code", "execution_count": None, "metadata": {}, "outputs": []}
            cells.append({**cell, "source": lines})
    python = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    return {"cells": cells, "metadata": python, "nbformat": 4, "nbformat_minor": 4}
