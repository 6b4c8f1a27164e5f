"""Shows every guard by its removal: without it, a test of tests/test_hostile.py fails at an assertion about the danger.

    python benchmarks/guards.py                 # make guards: all of benchmarks/guard_list.py
    python benchmarks/guards.py --only YAML     # those whose name or kind holds a word; nothing is written down

The tracked files are copied to a scratch folder. There all named tests must pass first; then one guard after another is
taken away and its test must fail: by an assertion, by what pytest.raises did not see, or by a time or memory bound of
the test's own, never because something could not be imported or because another error got in the way.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

from figures import ROOT
from guard_list import GUARDS, Cut, Guard

RESULTS = ROOT / "benchmarks" / "results" / "guards.json"
TESTS = "tests/test_hostile.py"
_LONGEST = 400  # seconds of one test run
# What a failed assertion, pytest.raises and pytest.fail begin their messages with.
_ASSERTIONS = ("AssertionError", "assert ", "Failed: ")


def without(cut: Cut, root: Path) -> str:
    """Return the text of a file without a guard; raises ValueError unless the guard stands there exactly once."""
    text = (root / cut.file).read_text(encoding="utf-8")
    if (found := text.count(cut.old)) != 1:
        raise ValueError(f"{cut.file}: this stands there {found} times instead of once: {cut.old!r}")
    return text.replace(cut.old, cut.new)


@contextmanager
def removed(guard: Guard, root: Path) -> Iterator[None]:
    """Within the block a project does without a guard."""
    kept = {cut.file: (root / cut.file).read_bytes() for cut in guard.cuts}
    try:
        for cut in guard.cuts:
            (root / cut.file).write_text(without(cut, root), encoding="utf-8")
        yield
    finally:
        for name, content in kept.items():
            (root / name).write_bytes(content)


def run_tests(tests: Sequence[str], root: Path) -> tuple[list[str], dict[str, str]]:
    """Run tests of TESTS by their names; return those that passed, and of the others how each failed."""
    found = root / "found.xml"
    found.unlink(missing_ok=True)
    call = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={found}"]
    # A module that is changed within a second must not be taken from its compiled copy.
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    try:
        subprocess.run(
            [*call, *(f"{TESTS}::{test}" for test in tests)],
            cwd=root,
            env=environment,
            capture_output=True,
            timeout=_LONGEST,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return [], {"all": f"took more than {_LONGEST} s"}
    if not found.is_file():
        return [], {"all": "pytest wrote no results"}
    passed, failed = [], {}
    for case in ElementTree.parse(found).iter("testcase"):
        faults = [child for child in case if child.tag in ("failure", "error", "skipped")]
        if faults:
            failed[case.get("name")] = f"{faults[0].tag}: {faults[0].get('message', '')}"
        else:
            passed.append(case.get("name"))
    return passed, failed


def shown(guard: Guard, root: Path) -> dict[str, object]:
    """Take a guard away and return what the tests said: `shown`, the tests that failed as they must, other failures."""
    with removed(guard, root):
        _, failed = run_tests([guard.test], root)
    kinds = {name: how.partition(": ")[2] for name, how in failed.items() if how.startswith("failure: ")}
    rightly = sorted(name for name, message in kinds.items() if message.startswith(_ASSERTIONS))
    others = {name: how.splitlines()[0][:160] for name, how in failed.items() if name not in rightly}
    broken = any(how.startswith("error") or name == "all" for name, how in failed.items())
    return {"shown": bool(rightly) and not broken, "failed": rightly, "otherwise": others}


def copy_of_the_project(folder: Path) -> Path:
    """Copy the tracked files, as they are in the working tree, to a new folder, and return it."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    for name in filter(None, listed.decode().split("\0")):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name, follow_symlinks=False)
    return folder


def chosen(word: str | None) -> list[Guard]:
    """Return the guards whose name or kind holds a word, or all."""
    return [guard for guard in GUARDS if not word or word.lower() in f"{guard.kind} {guard.name}".lower()]


def main() -> int:
    """Show the guards and write down which were shown; the exit code is 1 where one was not."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", metavar="WORD")
    options = parser.parse_args()
    guards, results = chosen(options.only), []
    with tempfile.TemporaryDirectory() as scratch:
        root = copy_of_the_project(Path(scratch) / "project")
        tests = list(dict.fromkeys(guard.test for guard in guards))
        passed, failed = run_tests(tests, root)
        if failed or not passed:
            print(f"with all guards in place these tests fail: {failed}", file=sys.stderr)
            return 1
        print(f"{len(passed)} tests pass with every guard in place")
        for guard in guards:
            result = shown(guard, root)
            results.append({"guard": guard.name, "kind": guard.kind, **result})
            print(f"{'shown    ' if result['shown'] else 'NOT SHOWN'} {guard.kind}: {guard.name}", flush=True)
            if not result["shown"]:
                print(f"          {json.dumps(result)}", flush=True)
    if not options.only:
        content = [{key: each[key] for key in ("guard", "kind", "shown", "failed")} for each in results]
        RESULTS.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    count = sum(each["shown"] for each in results)
    print(f"guards shown by removal: {count} / {len(results)}")
    return int(count < len(results))


if __name__ == "__main__":
    sys.exit(main())
