"""What this project depends on: known vulnerabilities, licences, and why each direct dependency is there.

    python benchmarks/supply_chain.py audit      # report: pip-audit over every lock (make audit)
    python benchmarks/supply_chain.py tables     # writes docs/dependencies.md (make tables)
    python benchmarks/supply_chain.py licences   # prints the licence of every locked package

The audit reports and never fails: a new vulnerability is no fault of the last change. What could not be audited is
listed by name and number, so that silence never looks like a pass.
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
_NAME = re.compile(r"[A-Za-z0-9._-]+")
_REASON = re.compile(r'^\s*"?([A-Za-z0-9._-]+)[^"#\n]*"?,?[ \t]*#[ \t]*(.+)$', re.MULTILINE)
_AUDIT = ("--disable-pip", "--require-hashes", "--progress-spinner", "off", "--format", "json", "--timeout", "10")
_SECONDS = 240
_LONGEST_LICENCE = 60
_FAMILIES = {"MPL": "MPL 2.0", "Apache": "Apache 2.0", "BSD": "BSD", "MIT": "MIT", "PSF|Python Soft": "PSF"}
_PAGE = """\
# Dependencies and licences

For whoever reviews packages. `pyproject.toml` and `extras/*.in` list the direct dependencies, each with its reason
beside it. Everything is pinned with hashes in `requirements.lock` and `extras/*.lock`. `make audit` reports known
vulnerabilities; `python benchmarks/supply_chain.py licences` lists the licence of each package.

`make tables` writes this table of all {count} locked packages from their metadata. "Not installed" are packages of
other systems, and of extras that were not installed then.

| licence | packages | direct dependencies among them |
|---|---|---|
{rows}
"""


def locks() -> list[Path]:
    """Return every lock, the project's own first."""
    return [ROOT / "requirements.lock", *sorted((ROOT / "extras").glob("*.lock"))]


def locked(lock: Path) -> dict[str, str]:
    """Return the version of every package that a lock pins."""
    return dict(_PIN.findall(lock.read_text(encoding="utf-8")))


def audit() -> list[str]:
    """Return the report's lines; nothing raises where the service or the tool is out of reach."""
    if find_spec("pip_audit") is None:
        return ["audit: NOT DONE: pip-audit is not installed (make extra-audit)"]
    lines = audit_of(min(locks(), key=lambda lock: len(locked(lock))))
    if any("NOT" in line for line in lines):
        return [*lines, "audit: NOT DONE: the vulnerability service cannot be reached, or does not know this package"]
    return [line for lock in locks() for line in audit_of(lock)]


def audit_of(lock: Path) -> list[str]:
    """Return the report's lines on one lock."""
    name = lock.relative_to(ROOT).as_posix()
    call = [sys.executable, "-m", "pip_audit", "-r", str(lock), *_AUDIT]
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
    audited = len(packages) - len(skipped)
    lines = [f"{name}: {audited} of {len(packages)} packages audited, {len(found)} vulnerabilities"]
    if skipped:
        lines.append(f"{name}: NOT audited, unknown to the service: {len(skipped)}: {', '.join(skipped[:8])} …")
    for each, fault in found:
        fixed = ", ".join(fault.get("fix_versions") or []) or "no version"
        lines.append(f"  {each['name']} {each['version']}: {fault['id']}, fixed in {fixed}")
    return lines


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
