"""What benchmarks/kills.py kills, when, and what must then still be true.

A round copies a state of a small project (so that it also moves to another folder), runs one command of run.py again
and again, kills it at random moments, and lets it end at last. Calls of run.py are forked from one process that has
imported everything, so that a kill costs the work and not the imports.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

RUN, CHILD, WORKER = "run.py", "child", "worker"
# What differs between two undisturbed runs, too: times, the clock, what they were called with.
_VOLATILE = frozenset({"started_at", "finished_at", "seconds", "scoring_seconds", "created_at", "date", "git_commit"})
_LONGEST = 300.0  # seconds that one call may take
_ORPHANS = 20.0  # seconds that the descendants of a killed process have to end


@dataclass(frozen=True)
class Work:
    """One command under test: what it starts from, which of its files must come out equal, what of it is killed."""

    name: str
    arguments: tuple[str, ...]
    start: str  # the state that it is run on
    makes: tuple[str, ...]  # patterns of files that must be those of the undisturbed run
    keeps: tuple[str, ...]  # patterns of files of earlier steps, which no kill may touch
    victims: tuple[str, ...] = (RUN,)
    # Patterns of files that appear in the course of it and how many do: half of the kills follow one of them.
    signs: tuple[tuple[str, int], ...] = ()
    only_signs: bool = False
    most: int = 5  # kills in a row, before it may end

    @property
    def workers(self) -> bool:
        """Whether it is run with processes beside it."""
        return WORKER in self.victims


class Call:
    """One call of run.py in a process of its own, forked from this one."""

    def __init__(self, folder: Path, arguments: Sequence[str], log: Path):
        self.log = log
        self.pid = os.fork()
        if not self.pid:
            _be_run_py(folder, arguments, log)
        self._started, self.code = time.monotonic(), None

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._started

    def ended(self) -> bool:
        """Tell whether it has ended; `code` is then its exit code, negative for a signal."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def wait(self, limit: float = _LONGEST) -> int:
        """Wait for its end and return its exit code; raises TimeoutError."""
        while not self.ended():
            if self.seconds > limit:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"{self.log}: still at work after {limit:.0f} s")
            time.sleep(0.01)
        return self.code

    def said(self) -> str:
        """Return what it printed."""
        return self.log.read_text(encoding="utf-8", errors="replace")


def _be_run_py(folder: Path, arguments: Sequence[str], log: Path) -> None:
    """Be run.py, in the forked process; never returns."""
    code = 70
    try:
        os.setsid()
        os.chdir(folder)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(target, 1)
        os.dup2(target, 2)
        import run

        run.cli.main(list(arguments), prog_name="run.py")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Round:
    """One round of kills of one work, in a folder of its own."""

    def __init__(self, work: Work, folder: Path, reference: Path, start: Path, seconds: float, seed: str):
        self.work, self.folder, self.reference, self._start = work, folder, reference, start
        self._typical, self._draw = seconds, random.Random(seed)
        self.kills: list[dict[str, Any]] = []
        self.log = folder.with_name(f"{folder.name}.log")

    def run(self, wanted: int) -> str | None:
        """Kill at most `wanted` times, then let the work end; return what was wrong, None if nothing."""
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._start, self.folder, symlinks=True)
        before = sums(self.folder, self.work.keeps)
        for _ in range(min(self._draw.randint(2, self.work.most), wanted)):
            if self._kill() is None:
                break  # it had ended before
            if fault := self._fault_after_kill(before):
                return fault
        call = self._call(self.work.arguments)
        if call.wait():
            return f"the last call ended with {call.code}: {call.said()[-2000:]}"
        return self._fault_after_kill(before) or difference(self.folder, self.reference, self.work.makes)

    def _kill(self) -> str | None:
        """Start the work and kill somebody at a random moment; return whom, None if it ended before."""
        victim = self._draw.choice(self.work.victims)
        beside = ("--workers", "2") if victim == WORKER else ()
        call = self._call((*self.work.arguments, *beside))
        moment = _Moment(self.work, self._draw, self._typical, victim, self.folder)
        while not moment.has_come(call):
            if call.ended():
                self._require_well(call, killed=False)
                return None
            if call.seconds > _LONGEST:
                call.wait(0)
            time.sleep(0.003)
        family = _descendants(call.pid)
        target = call.pid if victim == RUN else moment.victim(family)
        if target is None or call.ended():
            call.wait()
            return None
        at = call.seconds
        os.kill(target, signal.SIGKILL)
        code = call.wait()
        self._require_well(call, killed=True, victim=victim)
        _require_gone(family)
        self.kills.append({"victim": victim, "after_seconds": round(at, 3), "sign": moment.sign, "exit_code": code})
        return victim

    def _require_well(self, call: Call, *, killed: bool, victim: str = "") -> None:
        """Raise RuntimeError where a call that was not killed itself ended without an error in words."""
        if killed and victim == RUN and call.code == -signal.SIGKILL:
            return
        said = call.said()
        told = "remedy:" in said and call.code == 1 if killed and call.code else call.code == 0
        if not told or "Traceback" in said:
            raise RuntimeError(f"{victim or 'nobody'} was killed, exit code {call.code}: {said[-2000:]}")

    def _call(self, arguments: Sequence[str]) -> Call:
        return Call(self.folder, arguments, self.log)

    def _fault_after_kill(self, before: dict[str, str]) -> str | None:
        """Tell which finished file of an earlier step changed, or that an export is neither the old nor the new."""
        now = sums(self.folder, self.work.keeps)
        if changed := [name for name, digest in before.items() if now.get(name) != digest]:
            return f"of finished steps changed: {', '.join(changed[:5])}"
        manifests = [root / "data" / "demo" / "manifest.json" for root in (self.folder, self._start, self.reference)]
        mine, *whole = (json.loads(path.read_text()) if path.is_file() else None for path in manifests)
        if mine is None and whole[0] is not None:
            old = self.folder / "data" / ".demo.old"
            return None if (old / "manifest.json").is_file() else "the earlier export is gone"
        if mine not in whole:
            return "the export is neither the earlier one nor the new one"
        for name, digest in (mine or {"files": {}})["files"].items():
            if sha256(self.folder / "data" / "demo" / name) != digest:
                return f"data/demo/{name} is not whole"
        return None


class _Moment:
    """When to kill: after a random time, or a random blink after a file appeared that tells how far the work is."""

    def __init__(self, work: Work, draw: random.Random, seconds: float, victim: str, folder: Path):
        self._victim, self._folder = victim, folder
        by_sign = work.signs and (work.only_signs or draw.random() < 0.5)
        self.sign, most = draw.choice(work.signs) if by_sign else (None, 1)
        self._count = draw.randint(1, most) + (len(list(folder.glob(self.sign))) if self.sign else 0)
        # The undisturbed run was the first and so the slowest; a file of interest is soon followed by the next.
        self._delay = draw.random() * seconds * (0.15 if self.sign else 0.8)
        self._since: float | None = None if self.sign or victim != RUN else time.monotonic()

    def has_come(self, call: Call) -> bool:
        """Tell whether it is time."""
        if self._since is None and self._begins(call):
            self._since = time.monotonic()
        return self._since is not None and time.monotonic() - self._since >= self._delay

    def victim(self, family: Sequence[psutil.Process]) -> int | None:
        """Return the process to kill instead of run.py itself: LLaMA-Factory's, or one of the workers."""
        mark = "factory.launcher" if self._victim == CHILD else "spawn_main"
        found = [process.pid for process in family if mark in _command(process)]
        return found[0] if found else None

    def _begins(self, call: Call) -> bool:
        if self.sign:
            return len(list(self._folder.glob(self.sign))) >= self._count
        return self.victim(_descendants(call.pid)) is not None


def sums(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of every file that a pattern names, by its relative path."""
    files = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(files)}


def difference(folder: Path, reference: Path, patterns: Sequence[str]) -> str | None:
    """Return which files are not those of the undisturbed run: others in bytes, JSON in what is not a time."""
    mine, theirs = sums(folder, patterns), sums(reference, patterns)
    if not theirs:
        return f"nothing to compare: {patterns}"
    if lost := sorted(mine.keys() ^ theirs.keys()):
        return f"not in both: {', '.join(lost[:5])}"
    other = [name for name in mine if mine[name] != theirs[name] and not _same_json(folder / name, reference / name)]
    return f"differ from the undisturbed run: {', '.join(other[:5])}" if other else None


def _same_json(first: Path, second: Path) -> bool:
    if first.suffix != ".json":
        return False
    return _timeless(json.loads(first.read_text())) == _timeless(json.loads(second.read_text()))


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: _timeless(each) for key, each in value.items() if key not in _VOLATILE}
        if "target_modules" in kept:  # peft writes a set
            kept["target_modules"] = sorted(kept["target_modules"])
        return kept
    return [_timeless(each) for each in value] if isinstance(value, list) else value


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, an empty text where there is none."""
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _require_gone(family: Sequence[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=_ORPHANS)
    if alive:
        raise RuntimeError(f"{len(alive)} process(es) outlived a killed one: {[_command(p)[:80] for p in alive]}")


def rounds(works: Sequence[Work], wanted: dict[str, int]) -> Iterator[tuple[Work, int]]:
    """Yield works with the number of their round, in turns, as long as kills are wanted of them (`wanted` is lowered
    by whoever counts)."""
    number = 0
    while any(wanted[work.name] > 0 for work in works):
        for work in works:
            if wanted[work.name] > 0:
                yield work, number
        number += 1
