"""What this project stands on: known vulnerabilities, licences, and why each direct dependency is there.

    python benchmarks/supply_chain.py audit      # report: pip-audit over every lock (make audit)
    python benchmarks/supply_chain.py tables     # writes docs/dependencies.md (make tables)
    python benchmarks/supply_chain.py licences   # prints the licence of every locked package

The audit is a report, not a gate: a new vulnerability is no fault of the last change. What could not be audited is
said by name and number, so that no silence looks like a pass.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DEPENDENCIES = ROOT / "docs" / "dependencies.md"
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^ \\;]+)", re.MULTILINE)
_REASON = re.compile(r'^\s*"?([A-Za-z0-9._-]+)([^"#]*)"?,?\s*#\s*(.+)$')
_SECONDS = 240
_LONGEST_LICENCE = 60
_NOT_INSTALLED = "not installed"
_ALWAYS = ("project", "development")  # what `make install` installs
_PERMISSIVE = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software")


def locks() -> list[Path]:
    """Return every lock, the project's own first."""
    return [ROOT / "requirements.lock", *sorted((ROOT / "extras").glob("*.lock"))]


def locked(lock: Path) -> dict[str, str]:
    """Return the version of every package that a lock pins."""
    return dict(_PIN.findall(lock.read_text(encoding="utf-8")))


# --- known vulnerabilities ------------------------------------------------------------------------------------


def audit() -> list[str]:
    """Return the report's lines; nothing raises where the service or the tool is out of reach."""
    if find_spec("pip_audit") is None:
        return ["audit: NOT DONE: pip-audit is not installed (make extra-audit)"]
    smallest = min(locks(), key=lambda lock: len(locked(lock)))
    lines = _audited(smallest)
    if any("NOT" in line for line in lines):
        return [
            *lines,
            "audit: NOT DONE: the vulnerability service is not reachable from here, or does not know this package",
        ]
    return [line for lock in locks() for line in _audited(lock)]


def _audited(lock: Path) -> list[str]:
    name = lock.relative_to(ROOT).as_posix()
    options = ["--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json", "--timeout", "10"]
    call = [sys.executable, "-m", "pip_audit", "-r", str(lock), *options]
    try:
        done = subprocess.run(call, capture_output=True, text=True, timeout=_SECONDS, check=False)
        packages = json.loads(done.stdout)["dependencies"]
    except subprocess.TimeoutExpired:
        return [f"{name}: NOT audited: no answer within {_SECONDS} s"]
    except (ValueError, KeyError):
        reason = (done.stderr.strip().splitlines() or ["no output"])[-1]
        return [f"{name}: NOT audited: {reason[:200]}"]
    skipped = [each["name"] for each in packages if "skip_reason" in each]
    found = [(each, fault) for each in packages for fault in each.get("vulns", [])]
    lines = [
        f"{name}: {len(packages) - len(skipped)} of {len(packages)} packages audited, {len(found)} vulnerabilities"
    ]
    if skipped:
        lines.append(f"{name}: NOT audited, unknown to the service: {len(skipped)}: {', '.join(skipped[:8])} …")
    for each, fault in found:
        mended = ", ".join(fault.get("fix_versions") or []) or "no version"
        lines.append(f"  {each['name']} {each['version']}: {fault['id']}, mended in {mended}")
    return lines


# --- tables ---------------------------------------------------------------------------------------------------


def direct() -> list[tuple[str, str, str]]:
    """Return (where, requirement, reason) of each direct dependency, from pyproject.toml and extras/*.in."""
    project = ROOT / "pyproject.toml"
    content = tomllib.loads(project.read_text(encoding="utf-8"))
    lists = {"project": content["project"]["dependencies"], "development": content["dependency-groups"]["dev"]}
    reasons = _reasons(project)
    found = [(where, line, reasons.get(_name(line), "")) for where, lines in lists.items() for line in lines]
    for path in sorted((ROOT / "extras").glob("*.in")):
        lines = [line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines()]
        own = _reasons(path)
        found += [(f"extra {path.stem}", line, own.get(_name(line), "")) for line in lines if line]
    return found


def _reasons(path: Path) -> dict[str, str]:
    matches = (_REASON.match(line) for line in path.read_text(encoding="utf-8").splitlines())
    return {match[1]: match[3].strip() for match in matches if match}


def _name(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def dependency_rows() -> list[str]:
    """Return a row of the page for each direct dependency; the licence of an extra is not known unless installed."""
    return [
        f"| `{line}`{'' if where in _ALWAYS else f' ({where})'} | {reason} "
        f"| {licence_of(_name(line)) if where in _ALWAYS else ''} |"
        for where, line, reason in direct()
    ]


def dependencies_page() -> str:
    """Return docs/dependencies.md, from the locks and the metadata of what is installed here."""
    found = {name: licence_of(name) for lock in locks() for name in locked(lock)}
    installed = {name: licence for name, licence in found.items() if licence != _NOT_INSTALLED}
    nvidia = [name for name in installed if name.startswith("nvidia-")]
    rest = [
        f"{name} ({licence})"
        for name, licence in installed.items()
        if not _PERMISSIVE.search(licence) and name not in nvidia
    ]
    return "\n".join(
        [
            "# Dependencies",
            "",
            "For whoever reviews packages and licences. `make tables` writes this page from `pyproject.toml`,",
            "`extras/*.in` and package metadata. All versions are pinned with hashes in `requirements.lock` and",
            "`extras/*.lock`; `make audit` reports known vulnerabilities.",
            "",
            "| package | why | licence |",
            "|---|---|---|",
            *dependency_rows(),
            "",
            f"The locks hold {len(found)} packages, of which {len(installed)} were installed when this was written.",
            f"NVIDIA's own licences: {len(nvidia)} packages `nvidia-*`. Neither MIT, BSD, Apache, ISC nor PSF:",
            f"{', '.join(rest)}. `python benchmarks/supply_chain.py licences` lists all.",
            "",
        ]
    )


def licences() -> list[str]:
    """Return a line for every locked package: name, version, licence, lock."""
    lines = []
    for lock in locks():
        for name, version in locked(lock).items():
            lines.append(f"{name} {version}: {licence_of(name)} ({lock.relative_to(ROOT).as_posix()})")
    return lines


def licence_of(name: str) -> str:
    """Return a package's licence: its SPDX expression, else its classifiers, else the first line of its text."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return _NOT_INSTALLED
    classifiers = [line for line in found.get_all("Classifier") or [] if line.startswith("License ::")]
    names = [line.rsplit(" :: ", 1)[-1] for line in classifiers]
    text = found.get("License-Expression") or ", ".join(names) or found.get("License") or "not said"
    first = text.strip().splitlines()[0].replace("|", "/")
    return first if len(first) <= _LONGEST_LICENCE else f"{first[:_LONGEST_LICENCE]}…"


def main() -> None:
    """Print the audit or the licences, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["audit", "tables", "licences"], help="a report, the page, or a list")
    what = parser.parse_args().what
    if what == "tables":
        DEPENDENCIES.write_text(dependencies_page(), encoding="utf-8")
        print(f"wrote {DEPENDENCIES.relative_to(ROOT)}")
    else:
        print("\n".join(audit() if what == "audit" else licences()))


if __name__ == "__main__":
    main()
