"""The list of guards cannot rot: each stands in the sources, each test exists, what was shown is the list of today."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))  # its modules import each other by their bare names

import guards  # noqa: E402
from guard_list import GUARDS, KINDS, Cut, Guard  # noqa: E402


@pytest.mark.parametrize("guard", GUARDS, ids=lambda guard: guard.name)
def test_a_guard_stands_once_in_the_sources_and_what_is_left_without_it_is_python(guard, tmp_path):
    for file in {cut.file for cut in guard.cuts}:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((ROOT / file).read_bytes())
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.py")}
    with guards.removed(guard, tmp_path):
        for path, content in before.items():
            assert path.read_bytes() != content
            ast.parse(path.read_text(encoding="utf-8"))
    assert {path: path.read_bytes() for path in before} == before


def test_every_guards_test_exists_and_every_kind_of_attack_has_guards():
    tree = ast.parse((ROOT / guards.TESTS).read_text(encoding="utf-8"))
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    assert {guard.test.partition("[")[0] for guard in GUARDS} <= names
    assert {guard.kind for guard in GUARDS} == set(KINDS)
    assert len({guard.name for guard in GUARDS}) == len(GUARDS)
    assert all(guard.why for guard in GUARDS if len({cut.file for cut in guard.cuts}) > 1)


def test_what_was_shown_is_the_list_of_today():
    found = json.loads(guards.RESULTS.read_text(encoding="utf-8"))
    assert [each["guard"] for each in found] == [guard.name for guard in GUARDS], "make guards"
    assert [each["guard"] for each in found if not each["shown"]] == []


def test_a_guard_that_is_not_there_any_more_is_an_error(tmp_path):
    (tmp_path / "x.py").write_text("a = 1\nb = 1\n")
    for old in ("c = 1", "= 1"):
        with pytest.raises(ValueError, match=r"stands there [02] times instead of once"):
            guards.without(Cut("x.py", old, ""), tmp_path)


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("assert guarded()", True),
        ("with pytest.raises(ValueError): guarded(1)", True),
        ("guarded(); raise OSError('another error')", False),
        ("assert True", False),
        ("assert not guarded()", None),
    ],
)
def test_only_an_assertion_shows_a_guard(tmp_path, body, shown):
    (tmp_path / "tests").mkdir()
    (tmp_path / "guarded.py").write_text("def guarded(fail=0):\n    if fail: raise ValueError\n    return True\n")
    test = f"import pytest\nfrom guarded import guarded\n\ndef test_it():\n    {body}\n"
    (tmp_path / guards.TESTS).write_text(test)
    (tmp_path / "conftest.py").write_text("import sys; sys.path.insert(0, '.')\n")
    guard = Guard("it", "texts", "test_it", (Cut("guarded.py", "if fail: raise ValueError\n    return True", "pass"),))
    passed, _ = guards.run_tests(["test_it"], tmp_path)
    assert bool(passed) == (shown is not None and "OSError" not in body)
    if shown is not None:
        assert guards.shown(guard, tmp_path)["shown"] is shown


def test_what_cannot_be_imported_shows_nothing(tmp_path):
    (tmp_path / "tests").mkdir()
    (tmp_path / guards.TESTS).write_text("import nothing_of_that_name\n\ndef test_it():\n    assert False\n")
    (tmp_path / "x.py").write_text("a = 1\n")
    assert not guards.shown(Guard("it", "texts", "test_it", (Cut("x.py", "a", "b"),)), tmp_path)["shown"]
