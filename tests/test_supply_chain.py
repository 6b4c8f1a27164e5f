"""Dependencies: each has a reason, the page says them all, everything locked has hashes."""

import re

import pytest
from supply_chain import DEPENDENCIES, ROOT, direct, for_scoring, licences, locked, locks


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


def test_the_wheels_for_kaggle_are_what_scoring_needs_of_the_lock():
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    wheels = (ROOT / "templates" / "kaggle_wheels.txt").read_text(encoding="utf-8")
    lines = [line for line in wheels.splitlines() if "==" in line]
    assert {line.split("==")[0] for line in lines} == for_scoring()
    assert [line for line in lines if not all(part in lock for part in line.split("  #")[0].split())] == []
