"""What of a stage is finished: state.json, the lock against a second run, and earlier runs put aside."""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from data_prep.errors import ArenaError
from data_prep.files import read_json, sha256_of, write_json

# Parts of a stage in the order in which each is made from the one before.
PARTS = ("train", "merge", "score")
# Recipe keys that change neither weights nor probabilities: a finished or begun run survives a change of them.
NEUTRAL_KEYS = frozenset(
    {
        "logging_steps",
        "logging_first_step",
        "save_steps",
        "save_strategy",
        "save_total_limit",
        "plot_loss",
        "report_to",
        "run_name",
        "dataloader_num_workers",
        "preprocessing_num_workers",
        "overwrite_cache",
        "ddp_timeout",
    }
)
_CONTENT = "sha256:"
Inputs = Mapping[str, Any]


@dataclass(frozen=True)
class Record:
    """What state.json holds of one part. `outputs` are relative paths; times are ISO 8601 with the zone."""

    inputs: dict[str, Any]
    outputs: list[str]
    started_at: str
    finished_at: str | None = None
    seconds: float | None = None
    sha256: dict[str, str] = field(default_factory=dict)  # of the outputs that are files

    @property
    def is_sound(self) -> bool:
        """Whether the values have their types: the file may have been edited by hand."""
        if not isinstance(self.sha256, dict):
            return False
        names = isinstance(self.outputs, list) and all(isinstance(name, str) for name in self.outputs)
        times = isinstance(self.started_at, str) and isinstance(self.finished_at, str | None)
        return names and times and isinstance(self.inputs, dict)

    @property
    def missing(self) -> list[str]:
        """The outputs that are not there any more."""
        return [name for name in self.outputs if not Path(name).exists()]


class StageState:
    """The state.json of one stage's output folder: which part was made from what, and whether it ended."""

    def __init__(self, folder: Path):
        self.path = folder / "state.json"
        self._records = _read(self.path)

    def record(self, part: str) -> Record | None:
        """Return what is known of a part, None if it never began."""
        return self._records.get(part)

    def finished(self, part: str, inputs: Inputs, *, fresh_remedy: str) -> bool:
        """Return whether a part is finished, made from the same inputs, and its outputs are there.

        Raises ArenaError that says which inputs changed.
        """
        record = self.record(part)
        if record is None or record.finished_at is None or record.missing:
            return False
        self.refuse_changes(part, inputs, fresh_remedy=fresh_remedy)
        return True

    def refuse_changes(self, part: str, inputs: Inputs, *, fresh_remedy: str) -> None:
        """Raise ArenaError that says which inputs differ from those that the part began with, if any."""
        record = self.record(part)
        changes = differences(record.inputs, inputs) if record else []
        if changes:
            verb = "was finished" if record.finished_at else "began"
            raise ArenaError(
                "\n".join([f"{part} {verb} with other inputs; since then changed:", *(f"  - {c}" for c in changes)]),
                where=str(self.path.parent),
                remedy=f"undo the change, or {fresh_remedy}",
            )

    def begin(self, part: str, inputs: Inputs) -> None:
        """Write down that a part begins; what was made from its earlier result counts as not made."""
        later = PARTS[PARTS.index(part) :] if part in PARTS else (part,)
        self._records = {name: each for name, each in self._records.items() if name not in later}
        self._write(part, Record(_plain(inputs), [], _now()))

    def finish(self, part: str, outputs: Sequence[Path], seconds: float) -> None:
        """Write down that a part that began is finished, after its outputs are whole."""
        begun = self._records[part]
        names = [Path(path).as_posix() for path in outputs]
        hashes = {name: sha256_of(Path(name)) for name in names if Path(name).is_file()}
        self._write(part, Record(begun.inputs, names, begun.started_at, _now(), round(seconds, 3), hashes))

    def _write(self, part: str, record: Record) -> None:
        self._records[part] = record
        parts = {name: asdict(each) for name, each in self._records.items()}
        write_json(self.path, {"version": 1, "parts": parts})


def differences(old: Inputs, new: Inputs) -> list[str]:
    """Return one line for each input that differs, e.g. 'sft.yaml: learning_rate 0.0001 -> 0.0002'.

    Inputs are values, file contents as 'sha256:…', or groups of these by name.
    """
    before, after = _flat(_plain(old)), _flat(_plain(new))
    lines = []
    for key in dict.fromkeys([*before, *after]):
        if key[-1] in NEUTRAL_KEYS or (key in before and key in after and before[key] == after[key]):
            continue
        name = ": ".join(key)
        was, now = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if _is_content(was) or _is_content(now):
            how = "is new" if was is _ABSENT else "is gone" if now is _ABSENT else "has other content"
            lines.append(f"{name} {how}")
        else:
            lines.append(f"{name} {_shown(was)} -> {_shown(now)}")
    return lines


def archive(*paths: Path) -> list[Path]:
    """Rename the given files and folders that exist to '<name>.earlier-N', one free N for all; delete nothing."""
    present = [path for path in paths if path.exists() or path.is_symlink()]
    number = 1
    while any(_earlier(path, number).exists() for path in present):
        number += 1
    return [path.rename(_earlier(path, number)) for path in present]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the highest whole checkpoint-N of a trainer's folder, None without one.

    A checkpoint is whole when trainer_state.json is readable, which the trainer writes last: a run that was killed
    while it saved leaves a folder that LLaMA-Factory would choose and then fail on.
    """
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(path.name))]
    return next((path for _, path in sorted(numbered, reverse=True) if _is_whole(path)), None)


@contextmanager
def only_run(folder: Path) -> Iterator[None]:
    """Hold the lock of a stage, beside its folder; raises ArenaError while another run holds it.

    The operating system releases the lock of a process that died: what such a run left in the file is stale and
    taken over. The text in it (process id, host, start) is for the reader, and for other hosts on a shared disk.
    """
    import fcntl

    _refuse_links_out(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    path = folder.with_name(f".{folder.name}.lock")
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _held(folder, path) from None
        owner = _owner(path)
        if owner.get("host", socket.gethostname()) != socket.gethostname():
            raise _held(folder, path)  # its system's lock may not reach over a shared disk
        try:
            file.truncate(0)
            json.dump({"pid": os.getpid(), "host": socket.gethostname(), "started_at": _now()}, file)
            file.flush()
            yield
        finally:
            file.truncate(0)  # not deleted: another run may have opened it already


def _refuse_links_out(folder: Path) -> None:
    """Raise ArenaError where a link below outputs/ leads out of it: what lies there is not ours to replace."""
    root = Path(folder.parts[0])
    below = [root.joinpath(*folder.parts[1:end]) for end in range(2, len(folder.parts) + 1)]
    for link in (path for path in below if path.is_symlink()):
        if not link.resolve().is_relative_to(root.resolve()):
            raise ArenaError(
                f"is a link that leads out of {root}/, and a run replaces what lies in its folder",
                where=str(link),
                remedy=f"put a folder in its place; to keep all results on another disk, make {root} itself the link",
            )


_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ABSENT = type("Absent", (), {"__repr__": lambda self: "(absent)"})()


def _held(folder: Path, path: Path) -> ArenaError:
    owner = _owner(path)
    who = "process {pid} on {host}, since {started_at}".format_map(
        {"pid": "?", "host": "?", "started_at": "?", **owner}
    )
    return ArenaError(
        f"another run is at work on this stage ({who})",
        where=str(folder),
        remedy=f"wait for it or end it; if it does not live any more, delete {path}",
    )


def _owner(path: Path) -> dict[str, Any]:
    try:
        owner = read_json(path)
    except (OSError, ValueError):  # empty: released; torn: its writer died
        return {}
    return owner if isinstance(owner, dict) else {}


def _read(path: Path) -> dict[str, Record]:
    try:
        content = read_json(path)
        records = {name: Record(**values) for name, values in content["parts"].items()}
        if not all(record.is_sound for record in records.values()):
            raise ValueError("a value of a wrong type")
        return records
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArenaError(
            f"is not a state that this version wrote ({error})",
            where=str(path),
            remedy="--fresh does not read it; or move the file away, then the stage begins anew",
        ) from None


def _is_whole(checkpoint: Path) -> bool:
    try:
        read_json(checkpoint / "trainer_state.json")
    except (OSError, ValueError):
        return False
    return True


def _earlier(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.earlier-{number}")


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


def _plain(inputs: Inputs) -> dict[str, Any]:
    """Return inputs as JSON gives them back, so that old and new compare equal."""
    return json.loads(json.dumps(inputs))


def _flat(inputs: Inputs, above: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    flat: dict[tuple[str, ...], Any] = {}
    for name, value in inputs.items():
        if isinstance(value, dict):
            flat.update(_flat(value, (*above, name)))
        else:
            flat[*above, name] = value
    return flat


def _is_content(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(_CONTENT)


def _shown(value: Any) -> str:
    return repr(value) if value is _ABSENT else json.dumps(value, ensure_ascii=False)
