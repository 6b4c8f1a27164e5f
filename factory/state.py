"""state.json: what of a stage began, from which inputs, what ended and what it wrote; checkpoints; runs put aside.

`StageState.standing` decides whether a part is finished or outdated: it compares what state.json recorded with today's
inputs (factory.stage_context and factory.fingerprint name them), which its caller passes in.
Changed settings and another export are refused before that: `require_current_settings` and `require_current_training`
of factory.stage_context.
"""

from __future__ import annotations

import glob
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.console import one_line
from common.errors import ArenaError, Interrupted, first_line
from common.files import read_json, sha256_of, write_json
from factory.fingerprint import differences

# Parts of a stage in the order in which each is made from the one before.
PARTS = ("train", "merge", "score")
_EARLIER = re.compile(r"\.earlier-(\d+)$")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Record:
    """One part of state.json; `outputs` are relative paths, `sha256` the sums of those that are files."""

    inputs: dict[str, Any]
    outputs: list[str]
    started_at: str  # ISO 8601 with the zone
    finished_at: str | None = None
    seconds: float | None = None
    sha256: dict[str, str] | None = None
    failed: str | None = None  # the error that ended it; None after an interrupt

    @property
    def missing(self) -> list[str]:
        """The outputs that do not exist any more."""
        return [name for name in self.outputs if not Path(name).exists()]

    @property
    def damaged(self) -> list[str]:
        """The outputs whose content is not what the part wrote."""
        known = (self.sha256 or {}).items()
        return [name for name, digest in known if not Path(name).is_file() or sha256_of(Path(name)) != digest]


@dataclass(frozen=True)
class Standing:
    """How a part stands against its inputs of today: its record, and one line for each input that changed since."""

    record: Record | None = None
    changes: tuple[str, ...] = ()

    @property
    def is_finished(self) -> bool:
        """Whether the part ended and its outputs exist, from whatever inputs."""
        return self.record is not None and self.record.finished_at is not None and not self.record.missing

    @property
    def only_prior_changed(self) -> bool:
        """Whether nothing but target_prior changed, which needs a new report of the same scores."""
        return bool(self.changes) and all(line.startswith("target_prior") for line in self.changes)

    def require_same_inputs(self, part: str, where: Path, remedy: str) -> None:
        """Raise ArenaError that lists the changed inputs of an outdated part."""
        if self.changes:
            verb = "was finished" if self.record and self.record.finished_at else "began"
            what = f"{part} {verb} with other inputs; since then changed:"
            raise ArenaError(listed(what, self.changes), where=str(where), remedy=f"undo the change, or {remedy}")


class StageState:
    """The state.json of one stage's output folder."""

    def __init__(self, folder: Path):
        self.path = folder / "state.json"
        self._records = _read(self.path)

    def record(self, part: str) -> Record | None:
        """Return what is known of a part, None if it never began."""
        return self._records.get(part)

    def standing(self, part: str, inputs: Mapping[str, Any], *, partial: bool = False) -> Standing:
        """Return how a part stands; `partial` inputs are compared with the recorded ones of the same names only."""
        record = self.record(part)
        if record is None:
            return Standing()
        recorded = {k: v for k, v in record.inputs.items() if k in inputs} if partial else record.inputs
        return Standing(record, tuple(differences(recorded, inputs)))

    def begin(self, part: str, inputs: Mapping[str, Any]) -> None:
        """Record that a part begins; what was made from its earlier result counts as not made."""
        later = PARTS[PARTS.index(part) :]
        self._records = {name: each for name, each in self._records.items() if name not in later}
        self._write(part, Record(dict(inputs), [], _now()))

    def finish(self, part: str, outputs: Sequence[Path], seconds: float) -> None:
        """Record that a part that began is finished, once its outputs are whole."""
        paths = [Path(path).as_posix() for path in outputs]
        sums = {name: sha256_of(Path(name)) for name in paths if Path(name).is_file()}
        record = replace(self._records[part], outputs=paths, finished_at=_now(), seconds=round(seconds, 3), sha256=sums)
        self._write(part, record)

    @contextmanager
    def failures_of(self, part: str) -> Iterator[None]:
        """Record the error that ends a part; an interrupt or a kill leaves it unfinished."""
        try:
            yield
        except Interrupted:
            raise
        except ArenaError as error:
            lines = [line.strip() for line in error.what.splitlines()]
            self._write(part, replace(self._records[part], failed=next(iter(lines[1:]), lines[0])))
            raise

    def _write(self, part: str, record: Record) -> None:
        self._records[part] = record
        write_json(self.path, {"version": 1, "parts": {name: vars(each) for name, each in self._records.items()}})


def _read(path: Path) -> dict[str, Record]:
    try:
        content = read_json(path)
        return TypeAdapter(dict[str, Record]).validate_python(content["parts"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
        raise ArenaError(
            f"is not a state that this version wrote ({first_line(error)})",
            where=str(path),
            remedy="move the file away, or give --fresh: the stage then begins again",
        ) from None


def listed(what: str, lines: Sequence[str]) -> str:
    """Return a heading with a list below it."""
    return "\n".join([what, *(f"  - {one_line(line)}" for line in lines)])


def archive(*paths: Path) -> list[Path]:
    """Rename the given files and folders that exist to '<name>.earlier-N', one N for all; return the new names.

    N is one more than the highest beside them: the highest number is the newest.
    """
    beside = [each for path in paths for each in path.parent.glob(f"{glob.escape(path.name)}.earlier-*")]
    number = max((int(m[1]) for each in beside if (m := _EARLIER.search(each.name))), default=0) + 1
    return [p.rename(p.with_name(f"{p.name}.earlier-{number}")) for p in paths if p.exists() or p.is_symlink()]


def archived() -> dict[Path, int]:
    """Return what `archive` put aside below outputs/ and saves/, with its bytes."""
    found = {}
    for top in ("outputs", "saves"):
        for folder, names, files in os.walk(top):
            old = [name for name in (*names, *files) if _EARLIER.search(name)]
            names[:] = [name for name in names if name not in old]
            found |= {path: _size(path) for path in (Path(folder, name) for name in old)}
    return dict(sorted(found.items()))


def _size(path: Path) -> int:
    files = [Path(top, name) for top, _, names in os.walk(path) for name in names] or [path]
    return sum(file.lstat().st_size for file in files)


def delete(path: Path) -> None:
    """Delete a file, a link or a folder."""
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def last_checkpoint(folder: Path, *, to_go_on: bool = True) -> Path | None:
    """Return the highest whole checkpoint-N, None without one; one `to_go_on` from has optimizer and scheduler, too."""
    return next(reversed(whole_checkpoints(folder, to_go_on=to_go_on)), None)


def whole_checkpoints(folder: Path, *, to_go_on: bool = False) -> list[Path]:
    """Return the whole checkpoint-N in order of steps.

    trainer_state.json is written last; a kill or a full disk leaves a folder without it, or files that end early, which
    LLaMA-Factory would choose and then fail on. Without optimizer and scheduler it would silently start both from zero.
    """
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered) if _is_whole(path, to_go_on)]


def is_occupied(folder: Path) -> bool:
    """Return whether a training would find something in its folder's place."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def flag_to_go_on(adapter: Path, llamafactory_stage: str) -> str:
    """Return --resume where a whole checkpoint exists, --fresh where none does (or for a reward model, which
    LLaMA-Factory 0.9.5 cannot resume), nothing where the adapter's folder is empty."""
    if not is_occupied(adapter):
        return ""
    return "--resume" if llamafactory_stage != "rm" and last_checkpoint(adapter) else "--fresh"


def _is_whole(checkpoint: Path, to_go_on: bool) -> bool:
    from safetensors import SafetensorError

    try:
        read_json(checkpoint / "trainer_state.json")
        # DeepSpeed has both in a folder of its own, FSDP the optimizer.
        plain = any(checkpoint.glob("optimizer*")) and (checkpoint / "scheduler.pt").is_file()
        if to_go_on and not (plain or any(checkpoint.glob("global_step*"))):
            return False
        return all(_is_complete(file) for file in checkpoint.iterdir() if file.is_file())
    except (OSError, ValueError, SafetensorError):
        return False


def _is_complete(file: Path) -> bool:
    """Return whether a file of weights or of the trainer's state reaches to its own end."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="numpy"):  # compares the file's size with what its header says
            return True
    # The directory of a zip file is at its end.
    return file.suffix not in (".pt", ".pth", ".bin") or zipfile.is_zipfile(file)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")
