"""The corpus of broken inputs: each is refused with where and remedy, changes nothing, and is never a traceback."""

import json
import time
from pathlib import Path

import pytest
from chain import call

from common.errors import ArenaError
from tests.bad_inputs import CASES
from tests.bad_inputs.place import Case

# No input may hang: all of them are small, and what they would grow into is refused.
_LONGEST = 60.0  # seconds


def test_the_corpus_is_large_and_its_names_are_distinct():
    assert len(CASES) >= 150 and len({case.name for case in CASES}) == len(CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, place):
    case.breaks(place)
    before, started = place.snapshot(), time.monotonic()
    told = _told(case)
    assert time.monotonic() - started < _LONGEST
    assert "Traceback" not in told
    missing = [word for word in case.words if word not in told]
    assert not missing, told
    if case.code:
        kept, expected = (
            {name: digest for name, digest in files.items() if not name.startswith(case.writes)}
            for files in (place.snapshot(), before)
        )
        assert kept == expected, "something was written or lost"
    else:
        assert not list(Path("data").rglob("*.tmp"))


def _told(case: Case) -> str:
    """Do what the case calls and return what it says: the error, or for rows that are left out the audit."""
    if callable(case.call):
        with pytest.raises(ArenaError) as caught:
            case.call()
        assert caught.value.where and caught.value.remedy and caught.value.exit_code == case.code
        return str(caught.value)
    done = call(*case.call)
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    assert done.exit_code == case.code, done.output
    if case.code == 1:
        assert "remedy: " in done.output, done.output
    return done.output if case.code else json.dumps(json.loads(Path("data/exam/audit.json").read_text())["rejected"])
