"""An experiment: what its stages share. One folder of factory_configs with one `experiment.yaml`."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StrictBool, ValidationError, model_validator

from common.battle import VERDICTS
from common.console import name_of
from common.errors import ArenaError, UsageError
from common.files import read_regular, refuse_endless
from common.stages import STEPS, Fold, Start, fold_name

_PROJECT = Path(__file__).resolve().parents[1]
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
LONGEST = 1 << 20  # tokens that a judge may read
# Far more than any experiment or recipe has, and far less than hurts.
_LARGEST, _MOST_VALUES, _DEEPEST, _MOST_BITS = 1 << 18, 10_000, 32, 400
Share = Annotated[float, Field(gt=0, lt=1)]


def _printable(text: str) -> str:
    """Return a text that goes into comments of YAML files as it is; raises ValueError for one that would end a line."""
    if not " ".join(text.split()).replace("\u200d", "").isprintable():
        raise ValueError("must hold no control characters")
    return text


def _one_line(text: str) -> str:
    if not text.isprintable():
        raise ValueError("must be one line without control characters")
    return text


def _within(path: str) -> str:
    if Path(path).is_absolute() or ".." in Path(path).parts:
        raise ValueError("must be a path inside the project, relative to its folder")
    return path


Line = Annotated[str, Field(min_length=1, max_length=1000), AfterValidator(_one_line)]

Engine = Literal["auto", "ddp", "zero2", "zero3", "fsdp", "ray"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Labels(_Strict):
    """The single token that stands for each class, as the judge answers it."""

    a: Line = "A"
    b: Line = "B"
    tie: Line = "C"

    @model_validator(mode="after")
    def _distinct(self) -> Labels:
        if len(set(self.in_order())) != len(VERDICTS):
            raise ValueError("the three verdict labels must be distinct")
        return self

    def in_order(self) -> tuple[str, str, str]:
        """Return the labels in the order of `VERDICTS`."""
        return (self.a, self.b, self.tie)


class Prior(_Strict):
    """The class shares of the rows to come, where they differ from those of the votes; they sum to 1."""

    a: Share
    b: Share
    tie: Share

    @model_validator(mode="after")
    def _sums_to_one(self) -> Prior:
        if abs(self.a + self.b + self.tie - 1) > 1e-6:
            raise ValueError("a + b + tie must be 1")
        return self


class MergeGate(_Strict):
    """How the merged model is held against the trained adapter: on how many battles, and how far it may differ."""

    rows: int = Field(default=200, ge=1, le=1_000_000)
    max_abs_diff: Annotated[float, Field(gt=0, le=1)] = 0.05


class StartFrom(_Strict):
    """What a preference training starts from: the base, or the merged SFT judge, which is then its reference."""

    dpo_judge: Start = "sft"  # the same prompts as SFT: DPO sharpens a judge that exists
    dpo_reward: Start = "base"  # the prompts of the users: a judge is no better start than a chat model
    rm: Start = "base"


class Experiment(_Strict):
    """The checked content of one `experiment.yaml`, and the places where its work goes (relative paths)."""

    name: str
    description: Annotated[str, Field(max_length=1000), AfterValidator(_printable)] = ""
    model: Line  # hub id or folder
    revision: str = Field(default="main", max_length=255, pattern=r"^\w[\w+-]*([./][\w+-]+)*$")
    template: Line  # LLaMA-Factory's chat template
    enable_thinking: bool | None = None
    trust_remote_code: StrictBool = False
    cutoff_len: int = Field(ge=32, le=LONGEST)
    quantization_bit: Literal[4, 8] | None = 4
    labels: Labels = Labels()
    prompt_template: Annotated[Line, AfterValidator(_within)] = "templates/judge_prompt.j2"
    prompt_share: Share = 0.2  # of the token budget, where the last turn alone exceeds it; A and B share the rest
    valid_share: float = Field(default=0.1, gt=0, lt=0.9)
    folds: int = Field(default=1, ge=1, le=50)  # above 1 each fold validates once, and valid_share says nothing
    fold_answer: Literal["mean", "full"] = "mean"  # what answers the test set where there are folds
    swap_copies: bool = True
    orders_together: bool = False  # a battle's two orders in one step: shuffled by the export, not by the trainer
    epochs_as_rows: int = Field(default=1, ge=1, le=20)  # each with soft labels drawn again; num_train_epochs is 1 then
    dpo_rejected: Literal["each", "one"] = "each"  # the wrong labels that a judge pair rejects
    reward_length_normalised: bool = False  # implicit rewards: the mean over an answer's tokens instead of the sum
    swap_tta: bool = False  # score both orders and average
    precision: Literal["auto", "fp32", "bf16", "fp16", "8bit", "4bit", "adapter"] = "auto"  # of the scoring
    distributed: Engine = "auto"  # what starts the training's processes
    seed: int = Field(default=42, ge=0, lt=1 << 32)  # NumPy's bound
    target_prior: Prior | None = None  # corrects the test set's probabilities where the votes' shares are not natural
    start_from: StartFrom = StartFrom()
    merge_onto: Literal["dequantised", "base"] = "dequantised"  # docs/merge.md has the figures
    merge_gate: MergeGate = MergeGate()
    # First values of the rendered recipes, by step, in LLaMA-Factory's keys; the recipe rules once it is rendered.
    recipes: dict[str, dict[str, Any]] = {}

    @model_validator(mode="after")
    def _fits_together(self) -> Experiment:
        if unknown := sorted(self.recipes.keys() - STEPS.keys()):
            raise ValueError(f"recipes: no such step: {', '.join(unknown)} (choices: {', '.join(STEPS)})")
        if self.trust_remote_code and self.quantization_bit and self.merge_onto == "dequantised":
            raise ValueError(
                "merge_onto: dequantised makes a copy of the base without the code that comes with the model; "
                "write merge_onto: base beside trust_remote_code: true"
            )
        return self

    @property
    def warnings(self) -> list[str]:
        """What a person should know before this experiment does anything."""
        if not self.trust_remote_code:
            return []
        return [
            f"warning: trust_remote_code is true in {self.folder / 'experiment.yaml'}: Python code that comes with "
            f"{self.model} (revision {self.revision}) runs on this machine with your rights; read it first"
        ]

    @property
    def folder(self) -> Path:
        """factory_configs/<name>: experiment.yaml and the recipes."""
        return Path("factory_configs") / self.name

    @property
    def data_folder(self) -> Path:
        """data/<name>: the exported sets, LLaMA-Factory's `dataset_dir` of this experiment."""
        return Path("data") / self.name

    def recipe(self, step: str) -> Path:
        """Return the path of a recipe; `step` is one of common.stages.STEPS: sft, merge_sft, dpo_judge, …"""
        return self.folder / f"{step}.yaml"

    @property
    def written_fold(self) -> Fold:
        """The fold that the recipes are of as they are written; the others take overrides."""
        return None if self.folds == 1 else 0

    @property
    def trainings_of_a_stage(self) -> list[Fold]:
        """What a stage trains: one judge, or one a fold and one on all votes."""
        return [None] if self.folds == 1 else [*range(self.folds), "full"]

    @property
    def labelled_parts(self) -> list[str]:
        """The splits of all rows that were voted on; each is a data set of its own."""
        return list(dict.fromkeys([*self.parts("train"), *self.parts("valid")]))

    def parts(self, split: str, fold: Fold = None) -> list[str]:
        """Return the splits of the exported rows that are a fold's train, valid or test rows.

        Without a fold all that were voted on are both: each is trained on by some folds and judged by one.
        """
        if self.folds == 1 or split == "test":
            return [split]
        every = [fold_name(number) for number in range(self.folds)]
        if not isinstance(fold, int):
            return every
        return [name for name in every if (name == fold_name(fold)) == (split == "valid")]

    def adapter_folder(self, stage: str, fold: Fold = None) -> Path:
        """saves/<model>/lora/<name>_<stage>[_fold0]: where LLaMA Board looks for adapters."""
        return Path("saves") / self.short_model / "lora" / "_".join([self.name, stage, *_named(fold)])

    def output_folder(self, stage: str, fold: Fold = None) -> Path:
        """outputs/<name>/<stage>[/fold0]: merged model, probabilities, report, state."""
        return Path("outputs", self.name, stage, *_named(fold))

    def merged_folder(self, stage: str, fold: Fold = None) -> Path:
        """outputs/<name>/<stage>[/fold0]/merged: base and adapter as one ordinary model."""
        return self.output_folder(stage, fold) / "merged"

    def start_model(self, training: str, fold: Fold = None) -> str:
        """Return the model that a training starts from: `model`, or the merged SFT judge (see `start_from`)."""
        start: Start = getattr(self.start_from, training, "base")
        return self.merged_folder("sft", fold).as_posix() if start == "sft" else self.model

    @property
    def merges_dequantised(self) -> bool:
        """Tell whether adapters are merged into the dequantised base: where there is a quantised one to copy."""
        return self.merge_onto == "dequantised" and self.quantization_bit is not None

    def merge_model(self, training: str, fold: Fold = None) -> str:
        """Return the model that a training's adapter is merged into: its start, or the dequantised copy of it."""
        start = self.start_model(training, fold)
        if not self.merges_dequantised:
            return start
        origin = "base" if start == self.model else "_".join([self.name, "sft", *_named(fold)])
        return f"saves/{self.short_model}/dequantised/{origin}_{self.quantization_bit}bit"

    @property
    def short_model(self) -> str:
        """The last part of the model's name."""
        return self.model.rstrip("/").rsplit("/", 1)[-1]


def _named(fold: Fold) -> list[str]:
    return [] if fold is None else [fold_name(fold)]


def check_name(name: str) -> None:
    """Raise UsageError unless `name` may be a folder of factory_configs and a part of file names."""
    if not _NAME.fullmatch(name) or ".." in name:
        raise UsageError(f"{name!r} is not an experiment's name", remedy="use at most 64 letters, digits and . _ -")


def require_project(root: Path = Path()) -> None:
    """Raise UsageError where the folder, by default the current one, is not the project's."""
    if not (root / "factory_configs").is_dir():
        raise UsageError(
            "there is no factory_configs/ here",
            where=str(root.resolve()),
            remedy=f"call run.py from arena-factory's folder: cd {shlex.quote(str(_PROJECT))}",
        )


def load_experiment(name: str, root: Path = Path()) -> Experiment:
    """Read and check factory_configs/<name>/experiment.yaml.

    Raises UsageError for an unknown or unsafe name, ArenaError with every fault of the file, or with a name in it that
    leads to no regular file.
    """
    check_name(name)
    require_project(root)
    path = root / "factory_configs" / name / "experiment.yaml"
    if not path.is_file():
        known = sorted(p.parent.name for p in path.parents[1].glob("*/experiment.yaml"))
        meant = "".join(f"did you mean {near}? Else " for near in get_close_matches(name, known, 1))
        raise UsageError(
            f"there is no experiment {name!r} ({path} is missing)",
            remedy=f"{meant}choose one of: {', '.join(known) or 'none yet'}; "
            f"or make it: python run.py new {name} --model ID",
        )
    experiment = parse_experiment(read_yaml(path), name, where=str(path))
    adapters = (root / experiment.adapter_folder("sft").parent).glob(f"{name}_*")
    model = root / experiment.model
    models = [model] if (model / "config.json").exists() else []
    refuse_endless(*models, root / "data" / name, root / "outputs" / name, *adapters)
    return experiment


def parse_experiment(content: dict[str, Any], name: str, where: str) -> Experiment:
    """Check the content of an experiment.yaml; raises ArenaError that lists every fault together."""
    if "name" in content:
        raise ArenaError("name: there is no such key", where=where, remedy="remove it: the folder is the name")
    try:
        return Experiment.model_validate({"name": name, **content})
    except ValidationError as error:
        faults = [_fault_text(fault) for fault in error.errors()]
    raise ArenaError(
        "\n".join([f"{len(faults)} fault(s) in the experiment:", *faults]),
        where=where,
        remedy="fix these keys; the comments in factory_configs/demo/experiment.yaml explain each",
    )


def _fault_text(fault: Mapping[str, Any]) -> str:
    """Return one of pydantic's faults as a line that names its key."""
    text = fault["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
    if fault["type"] == "missing":
        text = "is missing"
    elif fault["type"] == "extra_forbidden":
        near = get_close_matches(str(fault["loc"][-1]), Experiment.model_fields, 1)
        text = f"there is no such key{f'; did you mean {near[0]}?' if near else ''}"
    elif fault["type"] != "value_error":
        text = f"{text}, not {fault['input']!r}"
    return f"  - {'.'.join(map(str, fault['loc'])) or '(file)'}: {text}"


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping exactly as LLaMA-Factory does: OmegaConf, `${…}` left as text; raises ArenaError."""
    try:
        text = read_regular(path, 4 * _LARGEST).decode("utf-8-sig")
        too_large = _size_fault(text)
        content = {} if too_large else OmegaConf.to_container(OmegaConf.load(StringIO(text)))
    except Exception as error:  # PyYAML's constructors raise nearly anything for values such as `!!int ""`
        raise ArenaError(
            f"is not readable YAML: {_yaml_fault(error)}",
            where=str(path),
            remedy="write `key: value` lines, with a space after each colon and equal indents",
        ) from None
    if too_large:
        raise ArenaError(too_large, where=str(path), remedy="write the values out; a configuration is a page or two")
    if odd := next(_odd_values(content), None):
        raise ArenaError(odd, where=str(path), remedy="write it as a person would")
    if not isinstance(content, dict):
        raise ArenaError("must be a YAML mapping", where=str(path), remedy="write `key: value` lines")
    return {str(key): value for key, value in content.items()}


def _size_fault(text: str) -> str | None:
    """Return why a text is refused before it is read: aliases of aliases can make millions of values of a few lines."""
    if len(text) > _LARGEST:
        return f"is longer than {_LARGEST:,} characters"
    sizes: dict[str, int] = {}
    total, open_nodes = 0, []  # of each open collection: its anchor, and the number of values before it
    for event in yaml.parse(text, yaml.SafeLoader):
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = total - before
        elif isinstance(event, yaml.AliasEvent):
            total += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.NodeEvent):
            total += 1
            if isinstance(event, yaml.CollectionStartEvent):
                open_nodes.append((event.anchor, total - 1))
        if total > _MOST_VALUES:
            return f"holds more than {_MOST_VALUES:,} values, aliases written out"
        if len(open_nodes) > _DEEPEST:
            return f"nests more than {_DEEPEST} levels deep"
    return None


def _odd_values(content: Any) -> Iterator[str]:
    """Yield what no configuration needs and no error can show: endless numbers, keys of several lines."""
    if isinstance(content, int) and content.bit_length() > _MOST_BITS:
        yield f"holds a number of {content.bit_length():,} bits"
    elif isinstance(content, dict | list):
        for key in content if isinstance(content, dict) else ():
            if isinstance(key, str) and not key.isprintable():
                yield f"holds the key {name_of(key)}"
            yield from () if isinstance(key, str) else _odd_values(key)
        for value in content.values() if isinstance(content, dict) else content:
            yield from _odd_values(value)


def _yaml_fault(error: Exception) -> str:
    """Return what the parser found and in which line."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:
        return f"{problem} in line {mark.line + 1}"
    if isinstance(error, (yaml.YAMLError, OmegaConfBaseException, OSError, UnicodeError)):
        return str(error)[:500]
    return "a value that does not fit its tag"
