"""Coverage-guided fuzzing of everything that reads a file (needs the extra: make extra-fuzz).

    python benchmarks/fuzz.py --seconds 60                 # every target, one after the other; make fuzz SECONDS=60
    python benchmarks/fuzz.py --target csv --runs 2000     # one target, so many inputs

An input that raises anything but our own errors, takes over 10 s or over 2 GiB ends its target: the input is kept in
benchmarks/fuzz_crashes/TARGET/ and, once that is corrected, the tests go on replaying it. The figures go to --output.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from figures import ROOT, options

CRASHES = ROOT / "benchmarks" / "fuzz_crashes"
RESULTS = ROOT / "benchmarks" / "results" / "fuzz.json"
LONGEST_SECONDS, LARGEST_MIB, LONGEST_INPUT = 10, 2048, 8192


def fuzz_one(name: str, limits: list[str]) -> None:
    """Fuzz one target in this process, which ends with it."""
    import atheris

    with atheris.instrument_imports(include=["common", "data_prep", "factory", "scoring"]):
        from fuzz_targets import TARGETS, never_crashes
    Path("corpus").mkdir()
    for number, seed in enumerate(TARGETS[name].seeds):
        Path(f"corpus/seed{number}").write_bytes(seed)
    atheris.Setup([sys.argv[0], *limits, "corpus"], lambda data: never_crashes(TARGETS[name], data))
    atheris.Fuzz()


def fuzz(name: str, limits: list[str]) -> dict[str, object]:
    """Fuzz one target in a child in a scratch folder; return its executions and new crashes."""
    crashes = CRASHES / name
    crashes.mkdir(parents=True, exist_ok=True)
    before = set(crashes.iterdir())
    bounds = [f"-timeout={LONGEST_SECONDS}", f"-rss_limit_mb={LARGEST_MIB}", f"-max_len={LONGEST_INPUT}"]
    given = [*limits, *bounds, f"-artifact_prefix={crashes}/", "-print_final_stats=1", "-seed=1"]
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "templates").symlink_to(ROOT / "templates")
        call = [sys.executable, __file__, "--child", name, *given]
        done = subprocess.run(call, cwd=scratch, capture_output=True, text=True, errors="replace", check=False)
    log = done.stdout + done.stderr
    runs = re.search(r"stat::number_of_executed_units:\s*(\d+)", log) or re.search(r"Done (\d+) runs", log)
    if done.returncode:
        print(log[-4000:], file=sys.stderr)
    return {
        "target": name,
        "executions": int(runs[1]) if runs else 0,
        "crashes": sorted(path.name for path in set(crashes.iterdir()) - before),
        "ended_well": done.returncode == 0,
    }


def main() -> None:
    if sys.argv[1:2] == ["--child"]:
        fuzz_one(sys.argv[2], sys.argv[3:])
        return
    from fuzz_targets import TARGETS

    parser = options(__doc__, write=False, seconds=60, runs=0, output=RESULTS)
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS), help="only these")
    asked = parser.parse_args()
    limits = [f"-runs={asked.runs}"] if asked.runs else [f"-max_total_time={asked.seconds}"]
    found = []
    for name in asked.target:
        found.append(fuzz(name, limits))
        line = f"{found[-1]['executions']:,} executions, {len(found[-1]['crashes'])} crashes"
        print(f"{name:<14} {line}, ended {'well' if found[-1]['ended_well'] else 'BADLY'}", flush=True)
    result = {"seconds": None if asked.runs else asked.seconds, "runs": asked.runs or None, "targets": found}
    asked.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(each["crashes"] or not each["ended_well"] for each in found))


if __name__ == "__main__":
    main()
