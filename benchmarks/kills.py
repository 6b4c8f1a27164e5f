"""Fault injection: run.py, its child and its workers are killed (SIGKILL) at random moments over the whole chain.

    python benchmarks/kills.py --minutes 8      # again and again until it says that all 200 kills were tried

prepare -> sft (train, merge, score, report) -> score --input, on the embedded tiny base and some hundred battles.
A round copies the project in the state before a step (and so moves it to another folder), runs the step again and
again, kills it, and lets it end at last. After each kill every finished step must be whole and no process left; in the
end data, adapter, merged model and probabilities must be those of an undisturbed run, byte for byte. Calls of run.py
are forked from one process that has imported everything: a kill costs the work, not the imports.
Results go to benchmarks/results/kills.json; remove it and outputs/.kills for other code.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from datetime import date
from importlib import import_module
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import psutil
from figures import ROOT, options
from workbench import Workbench

from common.files import read_json, write_json
from data_prep.synthetic import write_arena

RESULTS = ROOT / "benchmarks" / "results" / "kills.json"
RUN, CHILD, WORKER = "run.py", "child", "worker"
# What the command line of a victim other than run.py holds.
MARKS = {CHILD: "factory.launcher", WORKER: "spawn_main"}
ADAPTER, OUT = "saves/arena-tiny/lora/demo_sft", "outputs/demo/sft"
# Each state of the project, in their order, with the files that the step before it made.
STATES = {
    "laid": ("models/**/*", "arena/*"),
    "prepared": ("data/demo/*", "data/dataset_info.json", "factory_configs/demo/*"),
    "trained": (f"{ADAPTER}/adapter_*",),
    "merged": (f"{OUT}/merged/*",),
    "scored": (f"{OUT}/*.csv", f"{OUT}/scores_*.parquet", f"{OUT}/report.json"),
    "given": ("mine.csv",),
}
RECIPE = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 1}
RECIPE |= {"per_device_train_batch_size": 4}
# What differs between two undisturbed runs, too.
VOLATILE = frozenset({"started_at", "finished_at", "seconds", "scoring_seconds", "created_at", "date", "git_commit"})
IMPORTS = ("run", "sklearn.feature_extraction.text", "scoring.pipeline", "transformers.models.qwen3.modeling_qwen3")
LONGEST = 300.0  # seconds that one call may take
ORPHANS = 20.0  # seconds that the descendants of a killed process have to end


class Step(NamedTuple):
    """One command under test: its state before and after, how many of 200 kills it gets, who is killed and when."""

    name: str
    kills: int
    arguments: tuple[str, ...]
    start: str
    end: str
    # Patterns of files that appear in the course of it and how many do: half of the kills follow one of them.
    signs: tuple[tuple[str, int], ...] = ()
    victims: tuple[str, ...] = (RUN,)
    most: int = 5  # kills in a row, before it may end


PREPARE = ("prepare", "-e", "demo", "--train", "arena/train.csv", "--test", "arena/test.csv")
SFT = ("sft", "-e", "demo")
GIVEN = ("score", "-e", "demo", "--input", "arena/test.csv", "--output", "mine.csv")
TABLES = (("data/.demo.*.tmp", 1), ("data/.demo.*.tmp/*.parquet", 2), ("data/.demo.*.tmp/*.jsonl", 2))
SAVING = ((f"{ADAPTER}/checkpoint-*", 2), (f"{ADAPTER}/checkpoint-*/*.pt", 2), (f"{ADAPTER}/*.safetensors", 1))
MERGING = (("saves/arena-tiny/dequantised/.*.tmp", 1), (f"{OUT}/.merged.*.tmp/*", 3), (f"{OUT}/merged", 1))
SHARDS = ((f"{OUT}/scoring/*/*.scores", 6), (f"{OUT}/scoring/*/rows.*", 4))
WRITTEN = ((f"{OUT}/scores_*.parquet", 1), (f"{OUT}/probabilities_*.csv", 1), (f"{OUT}/report.html", 1))
CHILDREN = (RUN, RUN, CHILD)
STEPS = (
    Step("prepare", 58, PREPARE, "laid", "prepared", TABLES),
    Step("prepare --workers", 6, PREPARE, "laid", "prepared", victims=(WORKER,), most=3),
    Step("train", 20, (*SFT, "--until", "train", "--resume"), "prepared", "trained", SAVING, CHILDREN, most=7),
    Step("merge", 14, (*SFT, "--until", "merge"), "trained", "merged", MERGING, CHILDREN),
    Step("score", 34, SFT, "merged", "scored", SHARDS),
    Step("report", 26, SFT, "merged", "scored", WRITTEN),  # only after a sign
    Step("score --input", 36, GIVEN, "scored", "given", SHARDS),
    Step("score --input --workers", 6, GIVEN, "scored", "given", victims=(WORKER,), most=3),
)


class Call(get_context("fork").Process):
    """One call of run.py in a process of its own, forked from this one; `exitcode` is negative for a signal."""

    def __init__(self, folder: Path, arguments: Sequence[str], log: Path):
        super().__init__()
        self._folder, self._arguments, self._log, self._started = folder, arguments, log, time.monotonic()
        self.start()

    def run(self) -> None:
        """Be run.py, in the forked process."""
        os.setsid()
        os.chdir(self._folder)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        output = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        import_module("run").cli.main(list(self._arguments), prog_name="run.py")

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return time.monotonic() - self._started

    def end(self, victim: str | None = None) -> float:
        """Wait for its end and return its seconds; raises TimeoutError.

        Raises RuntimeError where it was not killed itself and ended without success or an error with a remedy.
        """
        self.join(max(0.0, LONGEST - self.seconds))
        if self.is_alive():
            self.kill()
            raise TimeoutError(f"{self._log}: not ended after {LONGEST:.0f} s")
        printed = self._log.read_text(encoding="utf-8", errors="replace")
        good = self.exitcode == 0 or (victim and self.exitcode == 1 and "remedy:" in printed)
        if (victim, self.exitcode) != (RUN, -signal.SIGKILL) and (not good or "Traceback" in printed):
            what = f"run.py {' '.join(self._arguments)}, killed: {victim}, exit code {self.exitcode}"
            raise RuntimeError(f"{what}: {printed[-2000:]}")
        return self.seconds

    def processes(self, victim: str | None = None) -> list[psutil.Process]:
        """Return all processes below it; with a victim only run.py itself, LLaMA-Factory's, or its workers."""
        with suppress(psutil.Error):  # one that ended meanwhile
            if victim == RUN:
                return [psutil.Process(self.pid)]
            below = psutil.Process(self.pid).children(recursive=True)
            return [each for each in below if victim is None or MARKS[victim] in " ".join(each.cmdline())]
        return []


def state(place: Path, name: str) -> Path:
    """Return the folder of a state of the project; made now, by undisturbed runs, where it is missing."""
    folder, fresh = place / name, place / f".{name}"
    if folder.exists():
        return folder
    shutil.rmtree(fresh, ignore_errors=True)
    if name == "laid":  # arenas, a demo experiment of a few steps, and an earlier export
        write_arena(fresh / "arena", seed=11, train_rows=120, test_rows=30)
        write_arena(fresh / "other", seed=12, train_rows=80, test_rows=9)
        Workbench(fresh).variant("demo", "--train", "other/train.csv", recipes={"sft": RECIPE})
    else:
        step = next(step for step in STEPS if step.end == name)
        shutil.copytree(state(place, step.start), fresh, symlinks=True)
        (fresh / "seconds").write_text(f"{Call(fresh, step.arguments, place / 'undisturbed.log').end()}")
    return fresh.rename(folder)


class Round:
    """One round of kills of one step, in a folder of its own."""

    def __init__(self, step: Step, place: Path, number: int, seed: int):
        name = f"{step.name} {number}"
        self.step, self.kills, self._draw = step, [], random.Random(f"{seed} {name}")
        self._start, self._reference = state(place, step.start), state(place, step.end)
        self._seconds = float((self._reference / "seconds").read_text())
        self.folder, self.log = (place / f"round_{name.replace(' ', '_')}{end}" for end in ("", ".log"))
        names = list(STATES)
        self._kept = [pattern for each in names[: names.index(step.start) + 1] for pattern in STATES[each]]

    def run(self, wanted: int) -> dict[str, Any]:
        """Kill at most `wanted` times, then let the step end; return what came of it, and keep a bad round's folder."""
        started, fault = time.monotonic(), None
        try:
            self._run(wanted)
            shutil.rmtree(self.folder)
            self.log.unlink()
        except (RuntimeError, TimeoutError, OSError, ValueError) as error:
            fault = f"{type(error).__name__}: {error}"
        seconds = round(time.monotonic() - started, 1)
        print(f"{self.folder.name}: {len(self.kills)} kills, {seconds} s, {fault or 'survived'}", file=sys.stderr)
        return {"step": self.step.name, "kills": self.kills, "fault": fault, "seconds": seconds}

    def _run(self, wanted: int) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        shutil.copytree(self._start, self.folder, symlinks=True)
        before = files(self.folder, self._kept)
        for _ in range(min(self._draw.randint(2, self.step.most), wanted)):
            if not self._kill():
                break
            self._check(before)
        Call(self.folder, self.step.arguments, self.log).end()
        self._check(before)
        if fault := difference(self.folder, self._reference, STATES[self.step.end]):
            raise RuntimeError(fault)

    def _kill(self) -> bool:
        """Run the step and kill a process of it at a random moment; return False if the step ended before."""
        victim, sign, count = self._draw.choice(self.step.victims), None, 0
        if self.step.signs and (self.step.name == "report" or self._draw.random() < 0.5):
            sign, most = self._draw.choice(self.step.signs)
            count = len(list(self.folder.glob(sign))) + self._draw.randint(1, most)
        # The undisturbed run was the first and so the slowest; a file that is a sign is soon followed by the next.
        delay = self._draw.random() * self._seconds * (0.15 if sign else 0.8)
        call = Call(self.folder, (*self.step.arguments, *(["--workers", "2"] if victim == WORKER else [])), self.log)
        since = None
        while call.is_alive() and call.seconds < LONGEST:
            begun = len(list(self.folder.glob(sign))) >= count if sign else call.processes(victim)
            since = since or (time.monotonic() if begun else None)
            if since and time.monotonic() - since >= delay:
                break
            time.sleep(0.003)
        family, targets, after = call.processes(), call.processes(victim), call.seconds
        if not targets or not call.is_alive() or call.seconds >= LONGEST:
            seconds = call.end()
            if not self.kills:  # the whole step, perhaps on a machine that is less busy than it was
                (self._reference / "seconds").write_text(f"{seconds}")
            return False
        os.kill(targets[0].pid, signal.SIGKILL)
        call.end(victim)
        _, alive = psutil.wait_procs(family, timeout=ORPHANS)
        if alive:
            raise RuntimeError(f"processes outlived a killed one: {alive}")
        self.kills.append(
            {"victim": victim, "after_seconds": round(after, 3), "sign": sign, "exit_code": call.exitcode}
        )
        return True

    def _check(self, before: dict[str, bytes]) -> None:
        """Raise RuntimeError where a finished file of an earlier step changed, or an export is neither old nor new."""
        now = files(self.folder, self._kept)
        if changed := [name for name, content in before.items() if now.get(name) != content]:
            raise RuntimeError(f"files of finished steps changed: {', '.join(changed[:5])}")
        data = self.folder / "data"
        # Between two renames the earlier export is put aside.
        export = data / "demo" if (data / "demo" / "manifest.json").is_file() else data / ".demo.old"
        if all(difference(export, root / "data" / "demo", ("*",)) for root in (self._start, self._reference)):
            raise RuntimeError("the export is neither the earlier one nor the new one")


def files(folder: Path, patterns: Sequence[str]) -> dict[str, bytes]:
    """Return every file that a pattern names, by its relative path."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def difference(folder: Path, reference: Path, patterns: Sequence[str]) -> str | None:
    """Return which files are not those of the undisturbed run: others in bytes, JSON in what is not a time."""
    mine, theirs = files(folder, patterns), files(reference, patterns)
    if not theirs:
        return f"nothing to compare: {patterns}"
    if lost := sorted(mine.keys() ^ theirs.keys()):
        return f"not in both: {', '.join(lost[:5])}"
    others = [name for name in sorted(mine) if mine[name] != theirs[name]]
    others = [name for name in others if not name.endswith(".json") or lasting(mine[name]) != lasting(theirs[name])]
    return f"differ from the undisturbed run: {', '.join(others[:5])}" if others else None


def lasting(text: bytes) -> Any:
    """Return a JSON value without times; peft writes target_modules, a set, in any order."""

    def of(entry: dict[str, Any]) -> dict[str, Any]:
        kept = {key: value for key, value in entry.items() if key not in VOLATILE}
        return {key: sorted(value) if key == "target_modules" else value for key, value in kept.items()}

    return json.loads(text, object_hook=of)


def main() -> int:
    """Go on with the kills until all were tried or the minutes are over; exit code 1 if one was not survived."""
    own = {"seed": 1, "kills": 200, "minutes": 60.0, "place": ROOT / "outputs" / ".kills", "results": RESULTS}
    parser = options(__doc__, write=False, **own)
    names = [step.name for step in STEPS]
    parser.add_argument("--steps", nargs="+", choices=names, default=names, help="only these")
    asked = parser.parse_args()
    place, until = asked.place.absolute(), time.monotonic() + 60 * asked.minutes
    place.mkdir(parents=True, exist_ok=True)
    found = {"seed": asked.seed, "wanted": asked.kills, "rounds": []}
    if asked.results.is_file():
        earlier = read_json(asked.results)
        found = earlier if (earlier["seed"], earlier["wanted"]) == (asked.seed, asked.kills) else found
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_COLOR": "1"}
    for name in IMPORTS:  # what calls of run.py need
        import_module(name)
    import_module("torch").set_num_threads(1)
    import_module("scoring.score_store").SHARD_TOKENS = 1500  # several shards of few rows

    def tried(step: Step) -> list[int]:
        return [len(each["kills"]) for each in found["rounds"] if each["step"] == step.name]

    def open_steps() -> list[tuple[Step, int]]:
        left = [(step, round(step.kills * asked.kills / 200) - sum(tried(step))) for step in STEPS]
        return [(step, count) for step, count in left if count > 0 and step.name in asked.steps]

    while open_steps() and time.monotonic() < until:
        for step, count in open_steps():
            found["rounds"].append(Round(step, place, len(tried(step)), asked.seed).run(count))
            found["tried"] = sum(len(each["kills"]) for each in found["rounds"])
            found["survived"] = sum(len(each["kills"]) for each in found["rounds"] if not each["fault"])
            write_json(asked.results, found | {"date": str(date.today())})
    print(f"{found['survived']} of {found['tried']} kills survived")
    print("call again, to go on" if open_steps() else "all kills were tried")
    return int(found["survived"] < found["tried"])


if __name__ == "__main__":
    sys.exit(main())
