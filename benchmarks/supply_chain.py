"""What this project depends on: licences, and why each direct dependency is there.

python benchmarks/supply_chain.py tables     # writes docs/dependencies.md (make tables)
python benchmarks/supply_chain.py licences   # prints the licence of every locked package
python benchmarks/supply_chain.py wheels     # writes templates/kaggle_wheels.txt: downloads 300 MB
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
DEPENDENCIES = ROOT / "docs" / "dependencies.md"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\;]+)", re.MULTILINE)
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_REASON = re.compile(r'^\s*"?([A-Za-z0-9._-]+)[^"#\n]*"?,?[ \t]*#[ \t]*(.+)$', re.MULTILINE)
_LONGEST_LICENCE = 60
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
    source = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    content = tomllib.loads(source)
    lists = [(source, [*content["project"]["dependencies"], *content["dependency-groups"]["dev"]])]
    for path in sorted((ROOT / "extras").glob("*.in")):
        source = path.read_text(encoding="utf-8")
        lists.append((source, [line.split("#")[0].strip() for line in source.splitlines()]))
    reasons = {name: reason for source, _ in lists for name, reason in _REASON.findall(source)}
    names = [_NAME.match(line)[0] for _, requirements in lists for line in requirements if line]
    return {name.lower(): reasons.get(name, "") for name in names}


def dependencies_page() -> str:
    """Return docs/dependencies.md, from the locks and the metadata of what is installed here."""
    own, by_licence = direct(), {}
    for name in dict.fromkeys(name for lock in locks() for name in locked(lock)):
        licence = "NVIDIA's own" if name.startswith("nvidia-") else licence_of(name)
        family = next((family for pattern, family in _FAMILIES.items() if re.search(pattern, licence)), licence)
        by_licence.setdefault(family, []).append(name)
    rows = [
        f"| {licence} | {len(names)} | {', '.join(name for name in names if name in own)} |"
        for licence, names in sorted(by_licence.items(), key=lambda each: -len(each[1]))
    ]
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
    first = text.strip().splitlines()[0].replace("|", "/")
    return first if len(first) <= _LONGEST_LICENCE else f"{first[:_LONGEST_LICENCE]}…"


def needed(names: set[str], without: set[str]) -> set[str]:
    """Return the packages, and all that they require on Kaggle, by the metadata of what is installed here."""
    found, waiting = set(), [name for name in names if name not in without]
    while waiting:
        name = waiting.pop()
        if name in found:
            continue
        found.add(name)
        wanted = [Requirement(line) for line in metadata.requires(name) or ()]
        wanted = [each for each in wanted if each.marker is None or each.marker.evaluate(_KAGGLE)]
        waiting += {re.sub(r"[._]+", "-", each.name.lower()) for each in wanted} - without
    return found


def for_scoring() -> set[str]:
    """Return the names of the locked packages that scoring needs, torch and what comes with it left out."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    direct = {_NAME.match(line)[0] for line in content["project"]["dependencies"]} | {"accelerate"}
    return needed(direct, {*_NOT_FOR_SCORING, "torch"})


def wheel_list() -> str:
    """Return templates/kaggle_wheels.txt; each hash is one of the lock's, for pip looks at them as it downloads."""
    from scoring.kaggle_pack import DOWNLOAD

    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8").replace("\\\n", " ")
    pins = [line for line in lock.splitlines() if (name := _PIN.match(line)) and name[1] in for_scoring()]
    pins = [re.sub(r" ; .*?(?= --hash)", "", line) for line in pins if _holds(line)]
    hashes, size = {}, {}
    for python in _PYTHONS:
        with tempfile.TemporaryDirectory() as folder:
            (asked := Path(folder) / "wheels.txt").write_text("\n".join(pins), encoding="utf-8")
            call = shlex.split(DOWNLOAD.format(python=python, wheels=shlex.quote(folder), list=shlex.quote(str(asked))))
            subprocess.run([sys.executable, *call[1:], "--quiet"], check=True)
            for wheel in Path(folder).glob("*.whl"):
                name = wheel.name.split("-")[0].lower().replace("_", "-").replace(".", "-")
                hashes.setdefault(name, {})[hashlib.sha256(wheel.read_bytes()).hexdigest()] = None
                size.setdefault(name, wheel.stat().st_size)
    lines = []
    for name, version in (_PIN.match(line).groups() for line in pins):
        sums = " ".join(f"--hash=sha256:{each}" for each in hashes[name])
        lines.append(f"{name}=={version} {sums}  # {size[name] / 1e6:.1f} MB")
    count = {"count": len(lines), "size": sum(size.values()) / 1e6, "python": _PYTHONS[0]}
    return _WHEELS.format(lines="\n".join(lines), **count)


def _holds(line: str) -> bool:
    """Tell whether a line of the lock is for Kaggle's Python."""
    return (marker := Requirement(line.split(" --hash")[0]).marker) is None or marker.evaluate(_KAGGLE)


def main() -> None:
    """Print the licences, or write the page or the list of wheels."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["tables", "licences", "wheels"], help="a page, two lists")
    what = parser.parse_args().what
    if what == "tables":
        DEPENDENCIES.write_text(dependencies_page(), encoding="utf-8")
        print(f"wrote {DEPENDENCIES.relative_to(ROOT)}")
    elif what == "wheels":
        wheels = ROOT / "templates" / "kaggle_wheels.txt"
        wheels.write_text(wheel_list(), encoding="utf-8")
        print(wheels.read_text(encoding="utf-8").splitlines()[1])
    else:
        print("\n".join(licences()))


if __name__ == "__main__":
    main()
