"""What of a stage is finished: state.json, whole checkpoints, and earlier runs put aside."""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shlex
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from common.errors import ArenaError, Interrupted
from common.experiment import Experiment, read_yaml
from common.files import read_json, sha256_of, write_json
from common.stages import STEPS
from data_prep.export_reader import read_manifest

# Keys whose value may name local files or folders that shape the result.
_PATH_KEYS = ("model_name_or_path", "adapter_name_or_path", "ref_model", "ref_model_adapters", "deepspeed")
_MODEL_FILE = re.compile(
    r".*\.(safetensors|bin|model|jinja|txt|py)|(adapter_|generation_)?config\.json|tokenizer.*\.json|vocab\.json"
    r"|special_tokens_map\.json|added_tokens\.json"
)
# What the trainer leaves beside a model, and the log that LLaMA Board shows: no part of it.
_NO_MODEL = frozenset({"training_args.bin", "optimizer.bin", "pytorch_model_fsdp.bin", "running_log.txt"})
# `prepare` keeps a person's entries, and so reads the list, too.
_MEND = "mend it; or move it away where it holds no entries of your own, and run `run.py prepare` again"
_HASHED_UP_TO = 256 * 2**20  # bytes
_STRIDE, _SAMPLE = 4 * 2**20, 64 * 2**10


def inputs_of(recipe_path: Path, recipe: dict[str, Any], *, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """Return the inputs of a recipe: its keys, its data files and local models, but those of the keys `without`.

    A weights file of over 256 MiB counts by its size and samples, as hashing an 8B model takes half a minute.
    """
    inputs: dict[str, Any] = {str(recipe_path): recipe}
    for key in (key for key in _PATH_KEYS if key not in without):
        for name in names(recipe.get(key)):
            if Path(name).exists():
                inputs[f"{key} {name}"] = model_files(Path(name))
    data: dict[str, Any] = {}
    for key in ("dataset", "eval_dataset"):
        data.update({f"{_info(recipe)} {name}": entry for name, entry in _entries(recipe, key).items()})
        data.update({str(path): _content(path) for path in dataset_files(recipe, key)})
    return {**inputs, "data": data} if data else inputs


def dataset_files(recipe: dict[str, Any], key: str) -> list[Path]:
    """Return the local files of the recipe's `dataset` or `eval_dataset`, those that exist; of a folder its parts."""
    return [file for entry in _entries(recipe, key).values() for file in _entry_files(recipe, entry)]


def _entry_files(recipe: dict[str, Any], entry: dict[str, Any]) -> list[Path]:
    path = _info(recipe).parent / entry.get("file_name", "")
    return sorted(path.iterdir()) if path.is_dir() and entry.get("file_name") else [path] if path.is_file() else []


def training_rows(recipe: dict[str, Any]) -> int | None:
    """Return the number of rows that LLaMA-Factory must train on, None where the recipe makes that unknowable.

    Counted are JSON Lines files; `max_samples` and `num_samples` are taken into account, while packing,
    streaming, a random validation split, mixing and other file types leave the number open.
    """
    open_keys = ("packing", "neat_packing", "streaming", "val_size", "tokenized_path")
    if any(recipe.get(key) for key in open_keys) or recipe.get("mix_strategy", "concat") != "concat":
        return None
    entries = _entries(recipe, "dataset")
    files = {name: _entry_files(recipe, entry) for name, entry in entries.items()}
    if not files or len(files) != len(names(recipe.get("dataset"))):
        return None
    if not all(files.values()) or any(path.suffix != ".jsonl" for each in files.values() for path in each):
        return None
    total = 0
    for name, entry in entries.items():
        rows = entry.get("num_samples") or sum(map(_count_lines, files[name]))
        if not isinstance(rows, int):
            raise ArenaError(f"num_samples {rows!r} is no number", where=str(_info(recipe)), remedy="prepare again")
        total += min(rows, recipe.get("max_samples") or rows)
    return total


def names(value: Any) -> list[str]:
    """Return a recipe's comma list (or YAML list) as a list of names."""
    parts = value if isinstance(value, list) else str(value).split(",") if value is not None else []
    return [str(part).strip() for part in parts if str(part).strip()]


def _info(recipe: dict[str, Any]) -> Path:
    return Path(recipe.get("dataset_dir", "data")) / "dataset_info.json"


def _entries(recipe: dict[str, Any], key: str) -> dict[str, dict[str, Any]]:
    path, wanted = _info(recipe), names(recipe.get(key))
    if not wanted or not path.is_file():
        return {}
    try:
        info = read_json(path)
    except (OSError, ValueError) as error:
        raise ArenaError(f"is not JSON: {error}", where=str(path), remedy=_MEND) from None
    if not isinstance(info, dict):
        raise ArenaError("is not a JSON object", where=str(path), remedy=_MEND)
    entries = {name: info[name] for name in wanted if name in info}
    for name, entry in entries.items():
        _check_entry(entry, f"{path}: {name}")
    return entries


def _check_entry(entry: Any, where: str) -> None:
    """Raise ArenaError unless a data set's file, if it names one, lies in the folder of dataset_info.json."""
    file = entry.get("file_name", "") if isinstance(entry, dict) else None
    if not isinstance(file, str):
        raise ArenaError("is not an object that names a file", where=where, remedy="run `run.py prepare` again")
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ArenaError(
            f"file_name {file!r} leads out of the data folder",
            where=where,
            remedy="run `run.py prepare` again; a data set of your own belongs into the data folder once it is done",
        )


def model_files(path: Path) -> Any:
    """Return what a model's or an adapter's folder holds, by name, each as 'sha256:…'; of a file its content alone."""
    if path.is_file():
        return _content(path)
    own = [file for file in sorted(path.iterdir()) if _MODEL_FILE.fullmatch(file.name) and file.name not in _NO_MODEL]
    return {file.name: _content(file) for file in own if file.is_file()}


def _content(path: Path) -> str:
    status = path.stat()
    if status.st_size > _HASHED_UP_TO and path.suffix in (".safetensors", ".bin"):
        return f"sha256:{_sampled(path, status.st_size)} of samples, {status.st_size} bytes"
    return f"sha256:{sha256_of(path)}"


def _sampled(path: Path, size: int) -> str:
    """Return the SHA-256 of a block in every 4 MiB and of the end: no large tensor changes unseen, a copy stays equal.

    The time of change would be another one on a disk that the project was moved to.
    """
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for place in (*range(0, size, _STRIDE), max(size - _SAMPLE, 0)):
            file.seek(place)
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def _count_lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(1 for line in file if line.strip())


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


# The keys of experiment.yaml that the exported rows depend on; model and bits are the recipes' matter, too, which are
# compared where they are read. Those of one stage alone are no other stage's matter.
_SHAPING = (
    *("template", "enable_thinking", "cutoff_len", "labels", "budget_shares", "valid_share", "swap_copies", "seed"),
)
_SHAPING_ONE = {"dpo_judge": ("dpo_rejected",)}
_NAMED = 3  # so many files are named, the others counted


def changed_files(inputs: Mapping[str, Any], folder: Path) -> list[str]:
    """Return the exported files among a part's recorded inputs that the export no longer holds as they were.

    Raises ArenaError where nothing is exported any more. Data sets of the user's own are not looked at.
    """
    files, changed = read_manifest(folder)["files"], []
    data = inputs.get("data")
    for name, content in data.items() if isinstance(data, dict) else ():
        path = Path(name) if "/" in name else folder / name  # scoring names them without the folder
        if isinstance(content, str) and path.is_relative_to(folder):
            name = path.relative_to(folder).as_posix()
            if content != f"sha256:{files.get(name)}":
                changed.append(name)
    return changed


def outdated_files(experiment: Experiment, stage: str, parts: tuple[str, ...] = PARTS) -> list[str]:
    """Return the exported files that changed since a stage was trained or scored, each once."""
    state = StageState(experiment.output_folder(stage))
    records = filter(None, map(state.record, parts))
    changed = (name for record in records for name in changed_files(record.inputs, experiment.data_folder))
    return list(dict.fromkeys(changed))


def require_own_votes(experiment: Experiment, stage: str, *, trained: bool = True) -> None:
    """Raise ArenaError where a stage (if it is `trained`) or the judge that it starts from has learned from another
    export than today's: validation rows may be among what it has seen."""
    start = ["sft"] if experiment.start_model(stage) != experiment.model else []
    for each in (*start, *([stage] if trained else [])):
        if changed := outdated_files(experiment, each, ("train",)):
            raise ArenaError(
                f"{each} was trained on another export than {experiment.data_folder} holds now "
                f"({_listed(changed)} changed since): its validation rows may have been trained on",
                where=str(experiment.output_folder(each)),
                remedy="prepare the earlier votes again; or train on the new ones: "
                f"python run.py {STEPS[each].command} -e {experiment.name} --fresh",
            )


def changed_settings(experiment: Experiment, stage: str) -> list[str]:
    """Return one line for each setting that the exported rows of a stage depend on and that changed since `prepare`.

    Raises ArenaError where nothing is exported.
    """
    folder = experiment.data_folder
    manifest, today = read_manifest(folder), experiment.model_dump(mode="json")
    made = manifest["experiment"]
    keys = [key for key in (*_SHAPING, *_SHAPING_ONE.get(stage, ())) if key in made]
    before, now = ({key: each[key] for key in keys} for each in (made, today))
    template = Path(experiment.prompt_template)
    if template.is_file():  # what is fed is the export's own copy, so that a project may be moved without it
        before["prompt_template"] = f"sha256:{manifest['files'].get('judge_prompt.j2')}"
        now["prompt_template"] = f"sha256:{sha256_of(template)}"
    return differences(before, now)


def require_own_settings(experiment: Experiment, stage: str) -> None:
    """Raise ArenaError where experiment.yaml or the judge prompt says other rows than those that are exported."""
    if changes := changed_settings(experiment, stage):
        raise ArenaError(
            listed("was exported with other settings; since then changed:", changes),
            where=str(experiment.data_folder),
            remedy=f"undo the change (in {experiment.folder / 'experiment.yaml'}); or export anew, then train with "
            f"--fresh: {prepare_again(experiment)}",
        )


def prepare_again(experiment: Experiment) -> str:
    """Return the command that exports the same votes anew; raises ArenaError where nothing is exported."""
    sources = read_manifest(experiment.data_folder)["sources"]
    votes = " ".join(f"--{name} {shlex.quote(sources[name]['file'])}" for name in ("train", "test") if name in sources)
    return f"python run.py prepare -e {shlex.quote(experiment.name)} {votes}"


def changed_recipe(experiment: Experiment, stage: str) -> list[str]:
    """Return one line for each key of a stage's recipe, and of what starts it, that changed since its training began.

    Those that change no weights are left out; nothing is told of an adapter that `run.py` did not train.
    """
    record, path = StageState(experiment.output_folder(stage)).record("train"), experiment.recipe(stage)
    if (began := _recipe_of(record, path)) is None:
        return []
    engine = {"distributed": record.inputs.get("distributed", "auto")}
    return differences(
        {path.name: began, "experiment.yaml": engine},
        {path.name: read_yaml(path), "experiment.yaml": {"distributed": experiment.distributed}},
    )


def earlier_scores(experiment: Experiment, stage: str) -> str | None:
    """Return why the report and the tables of a stage are not of its judge as it is now, None where they are.

    A result without state.json is taken as it is: it was brought here without its books.
    """
    state = StageState(experiment.output_folder(stage))
    if not state.path.is_file():
        return None
    record = state.record("score")
    if record is not None and record.finished_at is not None:
        return None
    begun = next((f"{part} began" for part in reversed(PARTS) if state.record(part)), "nothing is finished")
    return f"{stage} was begun anew since its report was written, and its scoring did not end ({begun})"


def require_scored(experiment: Experiment, stage: str, model: Mapping[str, Any] | None = None) -> None:
    """Raise ArenaError where a stage's report is of an earlier judge; with `model` (what the scores depend on now) also
    where it is another one than was scored."""
    where, again = str(experiment.output_folder(stage)), f"python run.py {{}} -e {shlex.quote(experiment.name)}"
    if why := earlier_scores(experiment, stage):
        remedy = f"go on to a new report: {again.format(STEPS[stage].command)}"
        raise ArenaError(f"{why}: its calibration and figures are of an earlier judge", where=where, remedy=remedy)
    record = StageState(experiment.output_folder(stage)).record("score")
    changes = differences(record.inputs.get("model", {}), model) if record and model is not None else []
    if changes:
        raise ArenaError(
            listed("the judge is not the one that was scored; since then changed:", changes),
            where=where,
            remedy=f"undo the change, or fit the calibration anew: {again.format('score')} --stage {stage} --fresh",
        )


def trained_recipe(experiment: Experiment, stage: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Return a stage's recipe as it is today, with the values of `keys` that its adapter was trained with.

    Today's are taken where `run.py` did not train the adapter.
    """
    path = experiment.recipe(stage)
    recipe = read_yaml(path)
    trained = _recipe_of(StageState(experiment.output_folder(stage)).record("train"), path)
    if trained is None:
        return recipe
    others = {key: value for key, value in recipe.items() if key not in keys}
    return {**others, **{key: trained[key] for key in keys if key in trained}}


def _recipe_of(record: Record | None, path: Path) -> dict[str, Any] | None:
    """Return the recipe that a training began with, None where `run.py` began none."""
    recipe = record.inputs.get(str(path)) if record else None
    return recipe if isinstance(recipe, dict) else None


def replaced(before: Mapping[str, Any] | None, now: Mapping[str, Any]) -> str | None:
    """Return what a person should know of an export that took another one's place, from both manifests."""
    if before is None or _contents(before) == _contents(now):
        return None
    was, held = before["sources"]["train"]["file"], "test" in before["sources"]
    words = f"the earlier export, of {was}, is replaced"
    if held and "test" not in now["sources"]:
        words += "; it had a test set, this one has none, so that there will be no submission.csv (--test FILE)"
    if before["files"].get("sft_train.jsonl") != now["files"].get("sft_train.jsonl"):
        words += "; what was trained on it is outdated: train with --fresh"
    return words


def _contents(manifest: Mapping[str, Any]) -> dict[str, str]:
    return {name: source["sha256"] for name, source in manifest["sources"].items()}


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
