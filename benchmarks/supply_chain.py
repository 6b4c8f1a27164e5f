"""What this project depends on: licences, and why each direct dependency is there.

python benchmarks/supply_chain.py tables     # writes docs/dependencies.md (make tables)
python benchmarks/supply_chain.py licences   # prints the licence of every locked package
python benchmarks/supply_chain.py wheels     # writes templates/kaggle_wheels.txt: downloads 300 MB
"""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path
from textwrap import shorten

from figures import ROOT, options
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

from common.files import sha256_of
from scoring.kaggle_pack import DOWNLOAD, WHEEL_LIST

DEPENDENCIES = ROOT / "docs" / "dependencies.md"
_PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\;]+)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_REASON = re.compile(r'^\s*"?([A-Za-z0-9._-]+)[^"#\n]*"?,?[ \t]*#[ \t]*(.+)$', re.MULTILINE)
_FAMILIES = {"MPL": "MPL 2.0", "Apache": "Apache 2.0", "BSD": "BSD", "MIT": "MIT", "PSF|Python Soft": "PSF"}
_PAGE = """\
# Dependencies and licences

For whoever reviews packages. `pyproject.toml` and `extras/*.in` give the reason for each direct dependency,
`requirements.lock` and `extras/*.lock` pin everything with hashes. `make audit` reports known vulnerabilities;
`python benchmarks/supply_chain.py licences` lists the licence of each package.

`make tables` writes this table of all {count} locked packages. "Not installed": of other systems or extras.

| licence | packages | direct dependencies among them |
|---|---|---|
{rows}
"""

_WHEELS = """\
# What scoring in a Kaggle notebook needs of requirements.lock, beside the notebook's own torch; `run.py kaggle-pack`
# prints how to download it. By `benchmarks/supply_chain.py wheels`: {count} wheels, {size:.0f} MB for Python {python}.
{lines}
"""
# Direct dependencies that train, merge, draw or serve.
_NOT_FOR_SCORING = {"llamafactory", "peft", "trl", "matplotlib", "tensorboard", "torchvision", "torchaudio"}
# A wheel is of one Python: Kaggle's first, and the next, for when Kaggle moves on before this list does.
_PYTHONS = ("3.12", "3.13")
_KAGGLE = {"python_version": "3.12", "python_full_version": "3.12.0", "sys_platform": "linux", "extra": ""}


def locks() -> list[Path]:
    """Return every lock, the project's own first."""
    return [ROOT / "requirements.lock", *sorted((ROOT / "extras").glob("*.lock"))]


def locked(lock: Path) -> dict[str, str]:
    """Return the version of every package that a lock pins."""
    return dict(_PIN.findall(lock.read_text(encoding="utf-8")))


def direct() -> dict[str, str]:
    """Return the reason of each direct dependency, as pyproject.toml and extras/*.in say it beside the requirement."""
    files = [ROOT / "pyproject.toml", *sorted((ROOT / "extras").glob("*.in"))]
    project, *extras = (path.read_text(encoding="utf-8") for path in files)
    lines = [*_PROJECT["project"]["dependencies"], *_PROJECT["dependency-groups"]["dev"]]
    lines += [line for text in extras for line in text.splitlines() if _NAME.match(line)]
    reasons = dict(_REASON.findall("\n".join([project, *extras])))
    return {(name := _NAME.match(line)[0]).lower(): reasons.get(name, "") for line in lines}


def dependencies_page() -> str:
    """Return docs/dependencies.md, from the locks and the metadata of what is installed here."""
    own, by_licence = direct(), {}
    for name in dict.fromkeys(name for lock in locks() for name in locked(lock)):
        licence = "NVIDIA's own" if name.startswith("nvidia-") else licence_of(name)
        family = next((family for pattern, family in _FAMILIES.items() if re.search(pattern, licence)), licence)
        by_licence.setdefault(family, []).append(name)
    ranked = sorted(by_licence.items(), key=lambda each: -len(each[1]))
    rows = [f"| {of} | {len(names)} | {', '.join(name for name in names if name in own)} |" for of, names in ranked]
    return _PAGE.format(count=sum(map(len, by_licence.values())), rows="\n".join(rows))


def licences() -> list[str]:
    """Return a line for every locked package: name, version, licence, lock."""
    pins = [(name, version, lock.relative_to(ROOT)) for lock in locks() for name, version in locked(lock).items()]
    return [f"{name} {version}: {licence_of(name)} ({lock.as_posix()})" for name, version, lock in pins]


def licence_of(name: str) -> str:
    """Return a package's licence: its SPDX expression, else its classifiers, else the first line of its text."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return "not installed"
    classifiers = [line for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    names = ", ".join(line.rsplit(" :: ", 1)[-1] for line in classifiers)
    text = found.get("License-Expression") or names or found.get("License") or "not said"
    return shorten(text.strip().splitlines()[0].replace("|", "/"), 60, placeholder="…")


def needed(names: set[str], without: set[str]) -> set[str]:
    """Return the packages, and all that they require on Kaggle, by the metadata of what is installed here."""
    found, waiting = set(), names - without
    while waiting:
        found.add(name := waiting.pop())
        wanted = [each for each in map(Requirement, metadata.requires(name) or ()) if _on_kaggle(each)]
        waiting |= {canonicalize_name(each.name) for each in wanted} - without - found
    return found


def for_scoring() -> set[str]:
    """Return the names of the locked packages that scoring needs, torch and what comes with it left out."""
    own = {_NAME.match(line)[0] for line in _PROJECT["project"]["dependencies"]}
    return needed(own | {"accelerate"}, {*_NOT_FOR_SCORING, "torch"})


def _on_kaggle(its: Requirement) -> bool:
    return its.marker is None or its.marker.evaluate(_KAGGLE)


def wheel_list() -> str:
    """Return templates/kaggle_wheels.txt; each hash is one of the lock's, for pip looks at them as it downloads."""
    lock, pins = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", ""), {}
    for line in filter(_PIN.match, lock.splitlines()):
        its, hashes = Requirement(line.split(" --hash")[0]), re.findall(r"--hash=\S+", line)
        if its.name in for_scoring() and _on_kaggle(its):
            pins[its.name] = f"{its.name}{its.specifier}", " ".join(hashes)
    hashes, size = {}, {}
    for python in _PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            (asked := Path(folder) / "wheels.txt").write_text("\n".join(map(" ".join, pins.values())), encoding="utf-8")
            call = shlex.split(DOWNLOAD.format(python=python, wheels=shlex.quote(folder), list=shlex.quote(str(asked))))
            subprocess.run([sys.executable, *call[1:], "--quiet"], check=True)
            for wheel in Path(folder).glob("*.whl"):
                name = parse_wheel_filename(wheel.name)[0]
                hashes.setdefault(name, {})[f"--hash=sha256:{sha256_of(wheel)}"] = None
                size.setdefault(name, wheel.stat().st_size)
    lines = [f"{pin} {' '.join(hashes[name])}  # {size[name] / 1e6:.1f} MB" for name, (pin, _) in pins.items()]
    count, megabytes = len(lines), sum(size.values()) / 1e6
    return _WHEELS.format(lines="\n".join(lines), count=count, size=megabytes, python=_PYTHONS[0])


def main() -> None:
    parser = options(__doc__, write=False)
    parser.add_argument("what", choices=["tables", "licences", "wheels"])
    if (what := parser.parse_args().what) == "licences":
        print("\n".join(licences()))
        return
    path, make = {"tables": (DEPENDENCIES, dependencies_page), "wheels": (ROOT / WHEEL_LIST, wheel_list)}[what]
    path.write_text(make(), encoding="utf-8")
    print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
