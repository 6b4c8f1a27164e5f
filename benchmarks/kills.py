"""Fault injection: run.py, its child and its workers are killed (SIGKILL) at random moments over the whole chain.

    python benchmarks/kills.py --minutes 8      # again and again until it says that all 200 kills were tried

prepare -> sft (train, merge, score, report) -> score --input, on the embedded tiny base and some hundred battles.
After each kill every finished step must be whole and no process left; in the end data, adapter, merged model and
probabilities must be those of a run that nobody disturbed, byte for byte. Results go to benchmarks/results/kills.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from datetime import date
from importlib import import_module
from pathlib import Path
from typing import Any

from figures import ROOT
from killing import CHILD, RUN, WORKER, Call, Round, Work, rounds

RESULTS = ROOT / "benchmarks" / "results" / "kills.json"
STATES = ("laid", "prepared", "trained", "merged", "scored")
VOTES = ("--train", "arena/train.csv", "--test", "arena/test.csv")
ADAPTER, OUT = "saves/arena-tiny/lora/demo_sft", "outputs/demo/sft"
_DATA = ("data/demo/*", "data/dataset_info.json", "factory_configs/demo/*")
_FIXED = ("models/**/*", "arena/*")
_ADAPTER = (f"{ADAPTER}/adapter_*",)
_MERGED = (f"{OUT}/merged/*",)
_SCORES = (f"{OUT}/*.csv", f"{OUT}/scores_*.parquet", f"{OUT}/report.json")
_IMPORTS = (
    "run",
    "pandas",
    "pyarrow.parquet",
    "sklearn.feature_extraction.text",
    "scoring.pipeline",
)
_IMPORTS += ("transformers.models.qwen3.modeling_qwen3",)
# How many kills of each work, of 200.
SHARES = {"prepare": 58, "prepare --workers": 6, "train": 20, "merge": 14, "score": 34, "report": 26}
SHARES |= {"score --input": 36, "score --input --workers": 6}


def works(score: tuple[str, ...], states: dict[str, str]) -> list[Work]:
    """Return the works; `score` are the arguments that score a stage, `states` what each starts from."""
    prepare = ("prepare", "-e", "demo", *VOTES)
    judged = (*_FIXED, *_DATA, *_ADAPTER, *_MERGED)
    scored = (*judged, *_SCORES)
    given = ("score", "-e", "demo", "--input", "arena/test.csv", "--output", "mine.csv")
    shards = ((f"{OUT}/scoring/*/*.scores", 6), (f"{OUT}/scoring/*/rows.*", 4))
    written = tuple((f"{OUT}/{name}", 1) for name in ("scores_*.parquet", "probabilities_*.csv", "report.html"))
    training = ("sft", "-e", "demo", "--until", "train", "--resume")
    saving = ((f"{ADAPTER}/checkpoint-*", 2), (f"{ADAPTER}/checkpoint-*/*.pt", 2), (f"{ADAPTER}/*.safetensors", 1))
    merging = (("saves/arena-tiny/dequantised/.*.tmp", 1), (f"{OUT}/.merged.*.tmp/*", 3), (f"{OUT}/merged", 1))
    tables = (("data/.demo.*.tmp", 1), ("data/.demo.*.tmp/*.parquet", 2), ("data/.demo.*.tmp/*.jsonl", 2))
    return [
        Work("prepare", prepare, states["laid"], _DATA, _FIXED, signs=tables),
        Work("prepare --workers", prepare, states["laid"], _DATA, _FIXED, victims=(WORKER,), most=3),
        Work("train", training, states["prepared"], _ADAPTER, (*_FIXED, *_DATA), (RUN, RUN, CHILD), saving, most=7),
        Work("merge", ("sft", "-e", "demo", "--until", "merge"), states["trained"], (*_ADAPTER, *_MERGED),
             (*_FIXED, *_DATA, *_ADAPTER), (RUN, RUN, CHILD), merging, most=5),
        Work("score", score, states["merged"], _SCORES, judged, signs=shards),
        Work("report", score, states["merged"], _SCORES, judged, signs=written, only_signs=True),
        Work("score --input", given, states["scored"], ("mine.csv",), scored, signs=shards),
        Work("score --input --workers", given, states["scored"], ("mine.csv",), scored, victims=(WORKER,), most=3),
    ]  # fmt: skip


class Grounds:
    """The folder where all this happens: a state of the project a step, each made once by an undisturbed run."""

    def __init__(self, folder: Path, finished: Path | None):
        self.folder = folder.absolute()
        self._finished = finished
        self._times = self.folder / "seconds.json"
        if finished:  # one state that is all of them: only what needs no training is killed
            states = dict.fromkeys(STATES, "scored")
            if not (self.folder / "scored").exists():
                shutil.copytree(finished, self.folder / "scored", symlinks=True)
            score = ("score", "-e", "demo", "--fresh")
        else:
            states = {name: name for name in STATES}
            score = ("sft", "-e", "demo")
        self.works = {work.name: work for work in works(score, states)}

    def lay(self) -> None:
        """Make the first state: templates, a demo experiment of a few steps, an arena, the base, an earlier export."""
        from omegaconf import OmegaConf

        from data_prep.synthetic import write_arena

        laid = self.folder / "laid"
        if self._finished or laid.exists():
            return
        shutil.copytree(ROOT / "templates", laid / "templates")
        content = OmegaConf.to_container(OmegaConf.load(ROOT / "factory_configs" / "demo" / "experiment.yaml"))
        steps = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "logging_steps": 1}
        content["recipes"]["sft"] = {**content["recipes"]["sft"], **steps, "per_device_train_batch_size": 4}
        (laid / "factory_configs" / "demo").mkdir(parents=True)
        OmegaConf.save(OmegaConf.create(content), laid / "factory_configs" / "demo" / "experiment.yaml")
        write_arena(laid / "arena", seed=11, train_rows=120, test_rows=30)
        write_arena(laid / "other", seed=12, train_rows=80, test_rows=9)
        self._undisturbed(laid, ("prepare", "-e", "demo", "--train", "other/train.csv"))

    def reference(self, work: Work) -> Path:
        """Return the folder of the undisturbed run of a work; made now, with all before it, where it is missing."""
        target = self.folder / f"{work.name.replace(' ', '_')}.reference"
        place = {"prepare": "prepared", "train": "trained", "merge": "merged", "score": "scored"}.get(work.name)
        if not self._finished and place:
            target = self.folder / place
        if target.exists():
            return target
        before = {"prepared": "prepare", "trained": "train", "merged": "merge", "scored": "score"}.get(work.start)
        if before and not self._finished:
            self.reference(self.works[before])
        growing = target.with_name(f".{target.name}.growing")
        shutil.rmtree(growing, ignore_errors=True)
        shutil.copytree(self.folder / work.start, growing, symlinks=True)
        beside = ("--workers", "2") if work.workers else ()
        self._remember(work.name, self._undisturbed(growing, (*work.arguments, *beside)))
        growing.rename(target)
        return target

    def round(self, work: Work, number: int, seed: int) -> Round:
        """Return a round of kills of a work."""
        reference = self.reference(work)
        seconds = json.loads(self._times.read_text())[work.name]
        folder = self.folder / f"round_{work.name.replace(' ', '_')}_{number}"
        return Round(work, folder, reference, self.folder / work.start, seconds, f"{seed} {work.name} {number}")

    def _undisturbed(self, folder: Path, arguments: tuple[str, ...]) -> float:
        call = Call(folder, arguments, self.folder / "undisturbed.log")
        if call.wait(600):
            raise SystemExit(f"the undisturbed run.py {' '.join(arguments)} failed: {call.said()[-3000:]}")
        return call.seconds

    def _remember(self, name: str, seconds: float) -> None:
        known = json.loads(self._times.read_text()) if self._times.exists() else {}
        self._times.write_text(json.dumps({**known, name: seconds}))


def main() -> int:
    """Go on with the kills until all were tried or the minutes are over; exit code 1 if one was not survived."""
    asked = _arguments()
    _import_everything()
    shutil.rmtree(asked.place, ignore_errors=True) if asked.anew else None
    asked.place.mkdir(parents=True, exist_ok=True)
    grounds = Grounds(asked.place, asked.finished)
    found = _begun(asked)
    left = {name: round(share * asked.kills / 200) for name, share in SHARES.items() if name in asked.steps}
    for each in found["rounds"]:
        left[each["step"]] = left.get(each["step"], 0) - len(each["kills"])
    until = time.monotonic() + 60 * asked.minutes
    grounds.lay()
    done = {(each["step"], each["round"]) for each in found["rounds"]}
    for work, number in rounds([grounds.works[name] for name in asked.steps], left):
        if (work.name, number) in done:
            continue
        if time.monotonic() > until:
            break
        _try(grounds.round(work, number, asked.seed), number, left, found)
        _write(asked.results, found)
    _write(asked.results, found)
    print(json.dumps({key: found[key] for key in ("tried", "survived", "by_step")}, indent=2))
    print("all kills were tried" if not any(count > 0 for count in left.values()) else "again, to go on")
    return int(found["survived"] < found["tried"])


def _try(tried: Round, number: int, left: dict[str, int], found: dict[str, Any]) -> None:
    """Run one round and note what came of it; the folder of a bad one is kept."""
    name, started = tried.work.name, time.monotonic()
    try:
        fault = tried.run(left[name])
    except (RuntimeError, TimeoutError, OSError, ValueError) as error:
        fault = f"{type(error).__name__}: {error}"
    left[name] -= len(tried.kills)
    seconds = round(time.monotonic() - started, 1)
    found["rounds"].append({"step": name, "round": number, "kills": tried.kills, "fault": fault, "seconds": seconds})
    print(
        f"{name} {number}: {len(tried.kills)} kills in {seconds} s, {fault or 'survived'}", file=sys.stderr, flush=True
    )
    if fault is None:
        shutil.rmtree(tried.folder)
        tried.log.unlink()


def _begun(asked: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far of the same seed and number, or empty ones."""
    if asked.results.is_file() and not asked.anew:
        found = json.loads(asked.results.read_text(encoding="utf-8"))
        if (found["seed"], found["wanted"]) == (asked.seed, asked.kills):
            return found
    return {"seed": asked.seed, "wanted": asked.kills, "rounds": []}


def _write(path: Path, found: dict[str, Any]) -> None:
    from common.files import write_json
    from scoring.checks.provenance import git_commit, hardware

    by_step: dict[str, Any] = {}
    for each in found["rounds"]:
        tally = by_step.setdefault(each["step"], {"tried": 0, "survived": 0, "rounds": 0, "killed": {}})
        tally["rounds"] += 1
        tally["tried"] += len(each["kills"])
        tally["survived"] += 0 if each["fault"] else len(each["kills"])
        for kill in each["kills"]:
            tally["killed"][kill["victim"]] = tally["killed"].get(kill["victim"], 0) + 1
    totals = {key: sum(tally[key] for tally in by_step.values()) for key in ("tried", "survived")}
    about = {"date": str(date.today()), "hardware": hardware(), "git_commit": git_commit()}
    found.update({**totals, "by_step": by_step, **about})
    write_json(path, found)


def _import_everything() -> None:
    """Import what calls of run.py need, and set what they inherit."""
    os.environ |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NO_COLOR": "1"}
    for name in _IMPORTS:
        import_module(name)
    import torch

    from scoring import score_store as shard_plan

    torch.set_num_threads(1)
    shard_plan.SHARD_TOKENS = 1500  # several shards of few rows


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--minutes", type=float, default=60, help="begin no round after this time")
    parser.add_argument("--steps", type=lambda text: text.split(","), default=list(SHARES), help="only these")
    parser.add_argument("--place", type=Path, default=ROOT / "outputs" / ".kills", help="where the states are kept")
    parser.add_argument("--finished", type=Path, help="a place where demo was scored: no training, only what follows")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--anew", action="store_true", help="forget the earlier rounds and states")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
