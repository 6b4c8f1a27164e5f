"""Dependencies: each has a reason, the page says them all, everything locked has hashes; an audit is never silent."""

from __future__ import annotations

import json
import re
import subprocess

import pytest
import supply_chain
from supply_chain import DEPENDENCIES, ROOT, audit, direct, for_scoring, licences, locked, locks


def test_every_direct_dependency_has_a_reason_and_the_page_is_up_to_date():
    assert [name for name, reason in direct().items() if not reason] == []
    listed = set(re.split(r"[ ,|\n]+", DEPENDENCIES.read_text(encoding="utf-8")))
    assert set(direct()) <= listed, "make tables"


def test_every_locked_package_has_a_line_with_its_licence():
    listed = licences()
    assert len(listed) == sum(len(locked(lock)) for lock in locks())
    assert any(line.startswith("click ") and "BSD" in line for line in listed)


@pytest.mark.parametrize("lock", locks(), ids=lambda lock: lock.name)
def test_everything_locked_has_hashes(lock):
    text = lock.read_text(encoding="utf-8")
    pins = re.split(r"^(?=[A-Za-z0-9._-]+==)", text, flags=re.MULTILINE)[1:]
    assert len(pins) >= len(locked(lock)) > 0
    assert [pin.split()[0] for pin in pins if "--hash=sha256:" not in pin] == []


def answer(monkeypatch, output: str) -> list[str]:
    done = subprocess.CompletedProcess([], 0, output, "no route to host")
    monkeypatch.setattr(supply_chain, "find_spec", lambda name: True)
    monkeypatch.setattr(supply_chain.subprocess, "run", lambda *_, **__: done)
    return audit()


def test_an_audit_says_what_it_found_and_what_it_could_not_look_at(monkeypatch):
    fault = {"id": "PYSEC-1", "fix_versions": ["2.0"]}
    good = json.dumps({"dependencies": [{"name": "x", "version": "1.0", "vulns": [fault]}]})
    told = answer(monkeypatch, good)
    assert "requirements.lock: 1 of 1 packages audited, 1 vulnerabilities" in told
    assert "  x 1.0: PYSEC-1, fixed in 2.0" in told
    unknown = json.dumps({"dependencies": [{"name": "x", "skip_reason": "not found"}]})
    for output in (unknown, "", "{"):
        assert answer(monkeypatch, output)[-1].startswith("audit: NOT DONE")
    monkeypatch.setattr(supply_chain, "find_spec", lambda name: None)
    assert audit() == ["audit: NOT DONE: pip-audit is not installed (make extra-audit)"]


def test_the_wheels_for_kaggle_are_what_scoring_needs_of_the_lock():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    wheels = (ROOT / "templates" / "kaggle_wheels.txt").read_text(encoding="utf-8")
    lines = [line for line in wheels.splitlines() if "==" in line]
    assert {line.split("==")[0] for line in lines} == for_scoring()
    assert [line for line in lines if not all(part in lock for part in line.split("  #")[0].split())] == []
