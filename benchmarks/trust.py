"""The table of docs/trust.md: kills survived, bad inputs handled, hostile cases guarded, fuzzing.

    python benchmarks/trust.py --write      # make trust

Bad inputs and hostile cases are run now. The rest takes long: its last results are read from benchmarks/results/
(fuzz.json of benchmarks/fuzz.py, kills.json of benchmarks/kills.py).
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

from figures import ROOT, options, publish, table

from common.files import read_json


def tests(prefix: str, *paths: str) -> str:
    """Run test files and return passed / tried of the tests whose name begins with `prefix`."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.xml"
        call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, f"--junitxml={found}"]
        subprocess.run(call, cwd=ROOT, check=False)
        cases = [case for case in ElementTree.parse(found).iter("testcase") if case.get("name").startswith(prefix)]
    passed = [case for case in cases if not any(child.tag in ("failure", "error", "skipped") for child in case)]
    return f"{len(passed)} / {len(cases)}"


def main() -> None:
    asked = options(__doc__).parse_args()
    kills, fuzz = (read_json(ROOT / "benchmarks" / "results" / f"{name}.json") for name in ("kills", "fuzz"))
    limit = f"{fuzz['seconds']} s" if fuzz["seconds"] else f"{fuzz['runs']:,} inputs"
    executions = sum(each["executions"] for each in fuzz["targets"])
    crashes = sum(max(len(each["crashes"]), int(not each["ended_well"])) for each in fuzz["targets"])
    what = f"fuzz executions, {len(fuzz['targets'])} targets, {limit} each; new crashes"
    rows = [
        [f"kills survived / tried, seed {kills['seed']}, {kills['date']}", f"{kills['survived']} / {kills['tried']}"],
        ["bad inputs handled / tried", tests("test_bad_input[", "tests/test_bad_inputs.py")],
        ["hostile cases guarded / tried", tests("test_", "tests/test_hostile.py", "tests/test_hostile_servers.py")],
        [what, f"{executions:,}; {crashes}"],
    ]
    publish("trust", table(["what", "figure"], rows), asked.write)


if __name__ == "__main__":
    main()
