"""The table of docs/trust.md: kills survived, bad inputs handled, hostile cases guarded, fuzzing.

    python benchmarks/trust.py      # make trust

Bad inputs and hostile cases are run now. The rest takes long: its last results are read from benchmarks/results/
(fuzz.json of benchmarks/fuzz.py, kills.json of benchmarks/kills.py).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from figures import ROOT, measured_on, put, table

RESULTS = ROOT / "benchmarks" / "results"
DOCUMENT = ROOT / "docs" / "trust.md"
_NOT_RUN = "not run"


def tests(path: str, prefix: str) -> str:
    """Run a test file and return passed / tried of the tests whose name begins with `prefix`."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path, f"--junitxml={found}"]
        subprocess.run(call, cwd=ROOT, check=False)
        cases = [case for case in ElementTree.parse(found).iter("testcase") if case.get("name").startswith(prefix)]
    passed = [case for case in cases if not any(child.tag in ("failure", "error", "skipped") for child in case)]
    return f"{len(passed)} / {len(cases)}"


def kills() -> list[str]:
    """Return survived / tried of the last fault injection."""
    found = _result("kills.json")
    if found is None:
        return ["kills survived / tried", _NOT_RUN]
    name = f"kills survived / tried, seed {found['seed']}, {found['date']}"
    return [name, f"{found['survived']:,} / {found['tried']:,}"]


def fuzzing() -> list[str]:
    """Return executions and new crashes of all targets together."""
    found = _result("fuzz.json")
    if found is None:
        return ["fuzz executions; new crashes", _NOT_RUN]
    targets = found["targets"]
    limit = f"{found['seconds']} s" if found["seconds"] else f"{found['runs']:,} inputs"
    executions = sum(target["executions"] for target in targets)
    crashes = sum(max(len(target["crashes"]), int(not target["ended_well"])) for target in targets)
    return [f"fuzz executions, {len(targets)} targets, {limit} each; new crashes", f"{executions:,}; {crashes}"]


def _result(name: str) -> dict | None:
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def main() -> None:
    """Run what is quick, read what is slow, write the table."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows = [
        kills(),
        ["bad inputs handled / tried", tests("tests/test_bad_inputs.py", "test_bad_input[")],
        ["hostile cases guarded / tried", tests("tests/test_hostile.py", "test_")],
        fuzzing(),
    ]
    text = f"{table(['what', 'figure'], rows)}\n\n{measured_on('make trust')}"
    put(DOCUMENT, "trust", text)
    print(text)


if __name__ == "__main__":
    main()
