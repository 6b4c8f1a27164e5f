"""What of a stage is finished: state.json, whole checkpoints, and earlier runs put aside."""

from __future__ import annotations

import glob
import json
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import ArenaError, Interrupted
from common.files import read_json, sha256_of, write_json

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
    failed: str | None = None  # what ended it, where that was an error and no interrupt

    @property
    def is_sound(self) -> bool:
        """Whether the values have their types: the file may have been edited by hand."""
        if not isinstance(self.sha256, dict):
            return False
        names = isinstance(self.outputs, list) and all(isinstance(name, str) for name in self.outputs)
        if not isinstance(self.failed, str | None):
            return False
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

    def damaged(self, part: str) -> list[str]:
        """Return the outputs of a finished part that are not what it wrote."""
        record = self.record(part)
        known = record.sha256.items() if record else ()
        return [name for name, digest in known if not Path(name).is_file() or sha256_of(Path(name)) != digest]

    def refuse_changes(self, part: str, inputs: Inputs, *, fresh_remedy: str) -> None:
        """Raise ArenaError that says which inputs differ from those that the part began with, if any."""
        record = self.record(part)
        changes = differences(record.inputs, inputs) if record else []
        if changes:
            verb = "was finished" if record.finished_at else "began"
            raise ArenaError(
                listed(f"{part} {verb} with other inputs; since then changed:", changes),
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

    @contextmanager
    def failures_of(self, part: str) -> Iterator[None]:
        """Write down what ends a part that began, unless it is an interrupt, and let it go on up.

        A kill that nobody can catch leaves nothing: the part then counts as interrupted.
        """
        try:
            yield
        except Interrupted:
            raise
        except ArenaError as error:
            begun, told = self._records[part], error.what.splitlines()
            self._write(part, replace(begun, failed=next((line.strip() for line in told[1:]), told[0])))
            raise

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


def listed(what: str, changes: Sequence[str]) -> str:
    """Return what is told of changes, a line each."""
    return "\n".join([what, *(f"  - {change}" for change in changes)])


def archive(*paths: Path, places: Sequence[Path] = ()) -> list[Path]:
    """Rename the given files and folders that exist to '<name>.earlier-N', one N for all; delete nothing.

    N is one more than the highest of them and of `places`, a stage's folders and what they hold: equal numbers were put
    aside together, the highest last.
    """
    siblings = [each for path in (*paths, *places) for each in path.parent.glob(f"{glob.escape(path.name)}.earlier-*")]
    within = [each for place in places for each in place.glob("*.earlier-*")]
    numbers = [int(told[1]) for each in (*siblings, *within) if (told := _EARLIER.search(each.name))]
    number = max(numbers, default=0) + 1
    present = [path for path in paths if path.exists() or path.is_symlink()]
    return [path.rename(_earlier(path, number)) for path in present]


def last_checkpoint(folder: Path) -> Path | None:
    """Return the highest whole checkpoint-N of a trainer's folder, None without one.

    A checkpoint is whole when trainer_state.json is readable, which the trainer writes last, and no file ends
    early: a run that was killed while it saved, or a full disk, leaves a folder that LLaMA-Factory would choose and
    then fail on.
    """
    return next((path for path in checkpoints(folder) if _is_whole(path)), None)


def flag_to_go_on(adapter: Path, stage: str) -> str:
    """Return the option that goes on with a training that did not end; `stage` is LLaMA-Factory's: sft, dpo, rm.

    --resume from a whole checkpoint, --fresh where there is none (or of a reward model, which LLaMA-Factory cannot
    resume), nothing where nothing was written.
    """
    if not is_occupied(adapter):
        return ""
    return "--resume" if stage != "rm" and last_checkpoint(adapter) else "--fresh"


def is_occupied(folder: Path) -> bool:
    """Tell whether a training would find something in its folder's place."""
    return folder.exists() and (not folder.is_dir() or any(folder.iterdir()))


def checkpoints(folder: Path) -> list[Path]:
    """Return the folders checkpoint-N of a trainer's folder, whole or not, the highest first."""
    numbered = [(int(m[1]), path) for path in folder.glob("checkpoint-*") if (m := _CHECKPOINT.fullmatch(path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


_EARLIER = re.compile(r"\.earlier-(\d+)$")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_ABSENT = type("Absent", (), {"__repr__": lambda self: "(absent)"})()


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
        return all(_is_complete(file) for file in checkpoint.iterdir() if file.is_file())
    except (OSError, ValueError):
        return False


def _is_complete(file: Path) -> bool:
    """Tell whether a file of weights or of the trainer's state reaches to its own end; contents are not compared."""
    if file.suffix in (".pt", ".pth", ".bin"):
        return zipfile.is_zipfile(file)  # its directory is at the end
    if file.suffix != ".safetensors":
        return True
    with file.open("rb") as stream:
        size = int.from_bytes(stream.read(8), "little")
        if not 0 < size < file.stat().st_size:
            return False
        tensors = json.loads(stream.read(size))
    ends = [about["data_offsets"][1] for name, about in tensors.items() if name != "__metadata__"]
    return file.stat().st_size == 8 + size + max(ends, default=0)


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
