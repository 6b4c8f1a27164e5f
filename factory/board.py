"""LLaMA Board's folder: what LLaMA-Factory's web page reads from the current folder, filled with our experiments.

data/dataset_info.json                        our exported sets
llamaboard_config/<experiment>_<stage>.yaml   every recipe, to be loaded and started
saves/<model>/lora/<adapter>/                 trained adapters: llamaboard_config.yaml and running_log.txt for the page
llamaboard_cache/user_config.yaml             the model that the page opens with, unless the user chose one
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
import webbrowser
from dataclasses import dataclass, field
from ipaddress import IPv6Address
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.error_hints import clean_lines
from common.errors import ArenaError, UsageError
from common.experiment import Experiment, load_experiment, read_yaml
from common.files import atomic_file, only_run, write_json
from common.stages import STEPS, TRAININGS
from data_prep.dataset_info import listed_sets
from factory.recipe_checks import check_recipe
from factory.recipes import render_recipe
from factory.state import StageState, names
from factory.status import experiment_names, running_stages

if TYPE_CHECKING:
    from common.progress import Show

STAGE_NAMES = {"sft": "Supervised Fine-Tuning", "dpo": "DPO", "rm": "Reward Modeling"}


@dataclass(frozen=True)
class _Slider:
    """A number's element with its ends, and the value that stands there when the recipe does not name the key."""

    element: str
    low: float
    high: float
    default: float
    whole: bool = True

    def takes(self, value: Any) -> bool:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.whole or value == int(value))


# Keys that LLaMA Board sets before the extra arguments, which may therefore say something else.
_SLIDERS = {
    "cutoff_len": _Slider("cutoff_len", 4, 131072, 2048),
    "per_device_train_batch_size": _Slider("batch_size", 1, 1024, 8),
    "gradient_accumulation_steps": _Slider("gradient_accumulation_steps", 1, 1024, 1),
    "logging_steps": _Slider("logging_steps", 1, 1000, 500),
    "save_steps": _Slider("save_steps", 10, 5000, 500),
    "warmup_steps": _Slider("warmup_steps", 0, 5000, 0),
    "neftune_noise_alpha": _Slider("neftune_alpha", 0, 10, 0, whole=False),
}
# Keys that it sets after them: a value that the element does not take cannot be had there.
_LATE_SLIDERS = {
    "lora_rank": _Slider("lora_rank", 1, 1024, 8),
    "lora_alpha": _Slider("lora_alpha", 1, 2048, 16),
    "lora_dropout": _Slider("lora_dropout", 0, 1, 0, whole=False),
    "loraplus_lr_ratio": _Slider("loraplus_lr_ratio", 0, 64, 0, whole=False),
    "pref_beta": _Slider("pref_beta", 0, 1, 0.1, whole=False),
    "pref_ftx": _Slider("pref_ftx", 0, 10, 0, whole=False),
}
_SWITCHES = (
    *("packing", "neat_packing", "train_on_prompt", "mask_history", "resize_vocab", "use_llama_pro"),
    *("use_rslora", "use_dora", "create_new_adapter", "enable_thinking"),
)
_TEXTS = {"learning_rate": "5.0e-5", "num_train_epochs": "3.0", "max_grad_norm": "1.0"}
_EVERY_ROW = "1000000000"  # LLaMA Board always passes max_samples
_PRECISIONS = ("pure_bf16", "bf16", "fp16")
# Keys that elements of their own answer for, or that the page makes itself.
_ELSEWHERE = frozenset(
    {
        *("stage", "do_train", "model_name_or_path", "finetuning_type", "template", "output_dir", "dataset_dir"),
        *("dataset", "quantization_bit", "quantization_method", "lora_target", "additional_target", "pref_loss"),
        *("lr_scheduler_type", "report_to", "plot_loss", "pissa_init", "pissa_convert", "max_samples"),
        *_PRECISIONS,
        *_SWITCHES,
        *_TEXTS,
        *_LATE_SLIDERS,
    }
)


@dataclass(frozen=True)
class BoardConfig:
    """The values by element id, and a sentence for each key that LLaMA Board cannot be given."""

    values: dict[str, Any]
    left_out: list[str]


def board_config(
    experiment: Experiment, stage: str, recipe: dict[str, Any], model_name: str, dataset_dir: str = "data"
) -> BoardConfig:
    """Return the saved configuration that starts `recipe` from LLaMA Board; `model_name` is the page's name for it.

    The output folder is left to the page, which draws a fresh name at each start.
    """
    extra = {key: value for key, value in recipe.items() if key not in _ELSEWHERE and key not in _SLIDERS}
    # The page would pass 16 and true.
    extra["preprocessing_num_workers"] = recipe.get("preprocessing_num_workers")
    extra["trust_remote_code"] = bool(recipe.get("trust_remote_code", False))
    numbers, left_out = _numbers(recipe, extra)
    values = {
        **_top(recipe, model_name, experiment.template),
        "train.training_stage": STAGE_NAMES[STEPS[stage].stage],
        "train.dataset_dir": dataset_dir,
        "train.dataset": names(recipe.get("dataset")),
        **{f"train.{key}": str(recipe.get(key, default)) for key, default in _TEXTS.items()},
        "train.max_samples": str(recipe.get("max_samples") or _EVERY_ROW),
        "train.compute_type": next((key for key in _PRECISIONS if recipe.get(key)), "fp32"),
        "train.lr_scheduler_type": recipe.get("lr_scheduler_type", "linear"),
        "train.val_size": 0,
        "train.report_to": _one(recipe.get("report_to", "none"), extra),
        "train.lora_target": ",".join(names(recipe.get("lora_target", "all"))),
        "train.additional_target": ",".join(names(recipe.get("additional_target"))),
        "train.pref_loss": recipe.get("pref_loss", "sigmoid"),
        "train.use_pissa": bool(recipe.get("pissa_init", False)),
        "train.ds_stage": "none",
        **{f"train.{key}": bool(recipe.get(key, key == "enable_thinking")) for key in _SWITCHES},
        **numbers,
    }
    if recipe.get("quantization_bit") and recipe.get("double_quantization") is False:
        left_out.append("double_quantization: LLaMA Board always quantizes twice")
    extra.pop("double_quantization", None)
    values["train.extra_args"] = json.dumps(extra)
    return BoardConfig(values, left_out)


def _top(recipe: dict[str, Any], model_name: str, template: str) -> dict[str, Any]:
    bits = recipe.get("quantization_bit")
    return {
        "top.model_name": model_name,
        "top.finetuning_type": recipe.get("finetuning_type", "lora"),
        "top.checkpoint_path": [],
        "top.quantization_bit": str(bits) if bits else "none",
        "top.quantization_method": recipe.get("quantization_method", "bnb"),
        "top.template": recipe.get("template") or template,
        "top.rope_scaling": "none",
        "top.booster": "auto",  # flash_attn and the like stand among the extra arguments
    }


def _numbers(recipe: dict[str, Any], extra: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return the sliders' values; what a slider does not take goes to `extra` or is named as left out."""
    values, left_out = {}, []
    for key, slider in {**_SLIDERS, **_LATE_SLIDERS}.items():
        value = recipe.get(key)
        if key == "lora_alpha" and value is None:  # LLaMA-Factory's own rule
            value = 2 * (recipe.get("lora_rank") or 8)
        if key == "neftune_noise_alpha" and value is None:
            value = 0
        if slider.takes(value):
            values[f"train.{slider.element}"] = int(value) if slider.whole else value
            continue
        values[f"train.{slider.element}"] = slider.default
        if value is not None and key in _SLIDERS:
            extra[key] = value
        elif value is not None:
            left_out.append(f"{key}: {value} is not between {slider.low:g} and {slider.high:g}")
    return values, left_out


def _one(value: Any, extra: dict[str, Any]) -> str:
    """Return the only entry of a list; several go to the extra arguments."""
    entries = names(value)
    if len(entries) > 1:
        extra["report_to"] = entries
    return entries[0] if entries else "none"


CONFIGS = Path("llamaboard_config")
CACHE = Path("llamaboard_cache")
DATA = Path("data")
RUN_CONFIG, RUN_LOG = "llamaboard_config.yaml", "running_log.txt"  # as LLaMA-Factory calls them
_LOG_TAIL = 60_000  # bytes of train.log; the page shows the last 20,000 characters
_BAR = re.compile(r"\d+%\|.*\|")  # a progress bar: hundreds of lines that say nothing afterwards
_LISTENING = ("Running on local URL:", "(Press CTRL+C to quit)")  # what Gradio and TensorBoard say then
LOOPBACK = ("127.0.0.1", "localhost")
FIRST_PORT = 7860  # Gradio's


@dataclass(frozen=True)
class BoardModel:
    """A model as the page lists it. Its adapters lie in saves/<name>/lora."""

    name: str
    path: str
    template: str

    @property
    def folder(self) -> Path:
        """Where LLaMA Board looks for this model's adapters: its name without spaces."""
        return Path("saves") / self.name.replace(" ", "") / "lora"


@dataclass
class BoardPlace:
    """What was laid out: the models by (experiment, stage), the configurations written, and what to tell the user."""

    models: dict[tuple[str, str], BoardModel] = field(default_factory=dict)
    configs: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def board_models(experiments: list[Experiment]) -> dict[tuple[str, str], BoardModel]:
    """Return the page's model for every experiment and stage.

    A base model is called by the last part of its name, as the folder of its adapters is. A merged judge that a
    stage starts from is a model of its own, or its adapters would be offered on top of the wrong base.
    """
    models: dict[tuple[str, str], BoardModel] = {}
    taken: dict[str, tuple[str, str]] = {}
    for experiment in experiments:
        for stage in TRAININGS:
            path = experiment.start_model(stage)
            name = experiment.short_model if path == experiment.model else f"{experiment.name}_sft_merged"
            if taken.setdefault(name, (path, experiment.template)) != (path, experiment.template):
                name = f"{name} of {experiment.name}"
                taken[name] = (path, experiment.template)
            models[experiment.name, stage] = BoardModel(name, path, experiment.template)
    return models


def readable_experiments() -> tuple[list[Experiment], list[str]]:
    """Return the experiments of the current folder, and a sentence for each that cannot be read."""
    found, faults = [], []
    for name in experiment_names():
        try:
            found.append(load_experiment(name))
        except ArenaError as error:
            faults.append(f"experiment {name} is left out: {str(error).splitlines()[0]}")
    return found, faults


def lay_out() -> BoardPlace:
    """Write everything that the page reads; raises UsageError outside a folder with experiments.

    Files of the user (other configurations, other data sets, other adapters) stay as they are.
    """
    experiments, faults = readable_experiments()
    if not experiments:
        raise UsageError(
            "there is no experiment that can be read",
            where=str(Path.cwd() / "factory_configs"),
            remedy="; ".join(faults) or "make one: python run.py new EXP --model ID",
        )
    place = BoardPlace(board_models(experiments), notes=faults)
    _list_data(experiments, place)
    for experiment in experiments:
        for stage in TRAININGS:
            try:
                place.configs.append(_save_config(experiment, stage, place))
            except ArenaError as error:
                place.notes.append(f"{experiment.name} {stage} is left out: {str(error).splitlines()[0]}")
            try:
                publish_run(experiment, stage, place.models[experiment.name, stage])
            except ArenaError as error:
                place.notes.append(f"the run of {experiment.name} {stage} is left out: {str(error).splitlines()[0]}")
    _choose_first_model(experiments, place.models)
    return place


def configuration(experiment: Experiment, stage: str, model: BoardModel) -> BoardConfig:
    """Return a stage's configuration, from its recipe or, before `prepare`, from what would be rendered."""
    path = experiment.recipe(stage)
    if path.is_file():
        recipe = read_yaml(path)
    else:
        from omegaconf import OmegaConf

        recipe = dict(OmegaConf.to_container(OmegaConf.create(render_recipe(experiment, stage))))
    return board_config(experiment, stage, recipe, model.name, DATA.as_posix())


def publish_run(experiment: Experiment, stage: str, model: BoardModel) -> None:
    """Let the page list and show a run of the command line: its adapter folder, its log, its settings.

    Nothing happens where nothing was trained. The log is that of the run so far. The settings are those that the run
    began with, not those of today's recipe; of a run that `run.py` did not start the first ones that were found stay.
    """
    adapter = experiment.adapter_folder(stage)
    if not adapter.is_dir():
        return
    if model.folder != adapter.parent:
        _link(model.folder / adapter.name, adapter)
    record, settings = StageState(experiment.output_folder(stage)).record("train"), adapter / RUN_CONFIG
    recipe = record.inputs.get(str(experiment.recipe(stage))) if record else None
    if isinstance(recipe, dict):
        _write_yaml(settings, board_config(experiment, stage, recipe, model.name, DATA.as_posix()).values)
    elif not settings.is_file():  # trained by something else: today's recipe is the best that is known
        _write_yaml(settings, configuration(experiment, stage, model).values)
    log = experiment.output_folder(stage) / "train.log"
    if log.is_file():
        with atomic_file(adapter / RUN_LOG) as file:
            file.write("\n".join(log_lines(log)) + "\n")


def log_lines(log: Path) -> list[str]:
    """Return the last lines of a run's log without colours and progress bars, none if it is not there."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        lines = clean_lines(file.read().decode("utf-8", "replace"))
    return [line for line in lines if line.strip() and not _BAR.search(line)]


def free_port(host: str, wanted: int | None = None) -> int:
    """Return `wanted`, or the first free port from Gradio's on; raises UsageError if it cannot be listened on."""
    _refuse_other_addresses(host)
    tries = [wanted] if wanted else range(FIRST_PORT, FIRST_PORT + 100)
    for port in tries:
        try:
            family, kind, number, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind, number) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(address)
        except (socket.gaierror, UnicodeError):  # the latter of a name that no network could have: a..b
            raise _no_address(host, "--host 127.0.0.1") from None
        except OSError:
            continue
        return port
    taken = f"port {wanted}" if wanted else f"every port from {FIRST_PORT} to {FIRST_PORT + 99}"
    raise UsageError(f"{taken} of {host} cannot be listened on", remedy="choose another one with --port")


def _refuse_other_addresses(host: str) -> None:
    """Raise UsageError for what has a colon in it: an IPv6 address, or one with its port."""
    name, colon, port = host.rpartition(":")
    if not colon:
        return
    if not any(map(_is_ipv6, (host, name))):
        remedy = f"--host {name} --port {port}" if name and port.isdecimal() else "--host 127.0.0.1"
        raise _no_address(host, remedy)
    raise UsageError(
        f"{host!r} is an IPv6 address, which Gradio cannot serve a page at",
        where="--host",
        remedy="--host 127.0.0.1; 0.0.0.0 are all IPv4 addresses of this machine",
    )


def _is_ipv6(text: str) -> bool:
    try:
        IPv6Address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _no_address(host: str, remedy: str) -> UsageError:
    return UsageError(f"{host!r} is no address of this machine", where="--host", remedy=remedy)


def exposure(host: str) -> str | None:
    """Return a warning where others than this machine can reach a page, None on the loopback."""
    if host in LOOPBACK:
        return None
    return (
        f"warning: everybody who reaches this machine at {host} can start trainings, load models and read files there; "
        "prefer 127.0.0.1 and `ssh -L`"
    )


def serve_board(place: BoardPlace, host: str, port: int | None, *, open_browser: bool, show: Show) -> None:
    """Serve LLaMA Board in the current folder until Ctrl-C, and say what is in it."""
    for note in place.notes:
        show.note(note)
    show.note(
        f"board: {len(place.configs)} configurations in {CONFIGS}/: choose one at 'Config path', then Load, Start"
    )
    serve_page("factory.board_page", [], "board", CACHE / "board.log", host, port, open_browser=open_browser, show=show)
    show.note("what was trained there lies under saves/; a training that was at work there ended with the page")


def serve_tensorboard(experiment: Experiment, host: str, port: int | None, *, open_browser: bool, show: Show) -> None:
    """Serve TensorBoard over every run on an experiment's base model until Ctrl-C."""
    folder = experiment.adapter_folder("sft").parent
    if not any(folder.glob("*/runs/*/events.*")) and not running_stages(experiment):  # one at work will write them
        raise ArenaError(
            "no run here wrote anything for TensorBoard",
            where=str(folder),
            remedy=f"train first, with report_to: tensorboard in the recipe: python run.py sft -e {experiment.name}",
        )
    arguments = ["--logdir", str(folder), "--reload_interval", "5"]
    log = CACHE / "tensorboard.log"
    serve_page("tensorboard.main", arguments, "tensorboard", log, host, port, open_browser=open_browser, show=show)


def serve_page(
    module: str,
    arguments: list[str],
    label: str,
    log: Path,
    host: str,
    port: int | None,
    *,
    open_browser: bool,
    show: Show,
) -> None:
    """Run a module that serves a page, as a watched child, until Ctrl-C or its own end.

    Its address is told when it listens, and opened in a browser where asked. Raises ArenaError if the module ends
    with an error, UsageError for an address that cannot be listened on.
    """
    from factory.process import run_child

    port = free_port(host, port)
    if warning := exposure(host):
        show.note(warning)
    url = f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}/"
    show.note(f"{label}: starting (up to half a minute)")
    told = False

    def read(line: str) -> None:
        nonlocal told
        if not told and any(sign in line for sign in _LISTENING):
            told = True
            show.note(f"{label}: {url}   (Ctrl-C ends it)")
            if open_browser:
                webbrowser.open(url)

    command = [sys.executable, "-m", module, *arguments, "--host", host, "--port", str(port)]
    try:
        run_child(command, log, what=label, on_line=read, interrupted_remedy="")
    except ArenaError as error:
        if "was interrupted" not in error.what:  # Ctrl-C is how one leaves a page
            raise
    show.note(f"{label}: ended; its log is {log}")


def _save_config(experiment: Experiment, stage: str, place: BoardPlace) -> Path:
    if experiment.recipe(stage).is_file() and (faults := check_recipe(experiment, stage)):
        raise ArenaError("; ".join(faults))
    config = configuration(experiment, stage, place.models[experiment.name, stage])
    path = CONFIGS / f"{experiment.name}_{stage}.yaml"
    _write_yaml(path, config.values)
    place.notes += [f"{path}: LLaMA Board cannot set {each}" for each in config.left_out]
    return path


def _list_data(experiments: list[Experiment], place: BoardPlace) -> None:
    """List exported sets that data/dataset_info.json lacks, for instance because the folder was copied here."""
    exported: dict[str, Any] = {}
    for experiment in experiments:
        try:
            exported |= _exported_sets(experiment)
        except ArenaError as error:
            place.notes.append(f"{experiment.name}'s data sets are not listed: {str(error).splitlines()[0]}")
    path = DATA / "dataset_info.json"
    try:
        if exported.keys() <= listed_sets(path).keys():
            return
        with only_run(path, wait=lambda _: None):  # an export has it for a moment
            write_json(path, {**exported, **listed_sets(path)})
    except ArenaError as error:
        place.notes.append(f"{path} {error.what}; it stays as it is, and our data sets may be missing in it")


def _exported_sets(experiment: Experiment) -> dict[str, Any]:
    """Return the entries of an experiment's own list, as they read in that of all experiments."""
    return {
        name: {**entry, "file_name": f"{experiment.name}/{entry['file_name']}"}
        for name, entry in listed_sets(experiment.data_folder / "dataset_info.json").items()
        if isinstance(entry, dict) and isinstance(entry.get("file_name"), str)
    }


def _choose_first_model(experiments: list[Experiment], models: dict[tuple[str, str], BoardModel]) -> None:
    path = CACHE / "user_config.yaml"
    prepared = [each for each in experiments if (each.data_folder / "manifest.json").is_file()]
    if path.exists() or not prepared:
        return
    first = models[prepared[0].name, "sft"].name
    _write_yaml(path, {"lang": "en", "hub_name": None, "last_model": first, "path_dict": {}, "cache_dir": None})


def _link(link: Path, target: Path) -> None:
    if link.is_symlink() or link.exists():
        return
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(target, link.parent), target_is_directory=True)


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    import yaml

    with atomic_file(path) as file:
        yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
