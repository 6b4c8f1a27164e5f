"""The fuzzer's targets without a fuzzer: seeds, kept crashes and seeded mutations; with it a short fixed run."""

import random
import subprocess
import sys
import time
from importlib.util import find_spec

import pytest
from chain import ROOT
from fuzz import CRASHES, LONGEST_SECONDS
from fuzz_targets import OUR_ERRORS, TARGETS, never_crashes

_MUTANTS = 40
_PIECES = (b"\0", b"\xff", b'"', b"[" * 200, b"{", b"}", b"'", b"\n", b": ", b"&a *a ", b"${", b"{{", b"%}", b"9" * 400)


@pytest.mark.parametrize("name", TARGETS)
def test_good_inputs_are_accepted(name, workplace):
    """A target whose seeds are all refused would fuzz nothing."""
    target, accepted = TARGETS[name], 0
    for seed in target.seeds:
        try:
            target.run(seed)
            accepted += 1
        except OUR_ERRORS:
            continue
    assert accepted


@pytest.mark.parametrize("name", TARGETS)
def test_seeded_mutations_never_crash(name, workplace):
    target, draw = TARGETS[name], random.Random(name)
    for seed in target.seeds:
        for _ in range(_MUTANTS // len(target.seeds)):
            started = time.monotonic()
            never_crashes(target, _mutated(seed, draw))
            assert time.monotonic() - started < LONGEST_SECONDS


@pytest.mark.parametrize("path", sorted(CRASHES.glob("*/*")), ids=lambda path: f"{path.parent.name}-{path.name[:20]}")
def test_crashes_of_the_past_stay_mended(path, workplace):
    never_crashes(TARGETS[path.parent.name], path.read_bytes())


@pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: make extra-fuzz")
@pytest.mark.parametrize("name", ["cells", "manifest"])
def test_a_short_fixed_run_of_the_fuzzer(name, tmp_path):
    call = [sys.executable, str(ROOT / "benchmarks" / "fuzz.py"), "--runs", "500", "--target", name]
    done = subprocess.run([*call, "--output", str(tmp_path / "x.json")], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "500 executions, 0 crashes, ended well" in done.stdout


def _mutated(seed: bytes, draw: random.Random) -> bytes:
    data = bytearray(seed)
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(len(data) + 1)
        match draw.randrange(4):
            case 0:
                data[place:place] = draw.choice(_PIECES)
            case 1:
                del data[place : place + draw.randint(1, 40)]
            case 2 if data:
                data[place % len(data)] ^= 1 << draw.randrange(8)
            case _:
                other = draw.randrange(len(data) + 1)
                data[place:place] = data[other : other + draw.randint(1, 60)]
    return bytes(data)
