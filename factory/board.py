"""LLaMA Board's folder: what LLaMA-Factory's web page reads from the current folder, filled with our experiments.

llamaboard_config/<experiment>_<stage>.yaml   every recipe, to be loaded and started
saves/<model>/lora/<adapter>/                 trained adapters: llamaboard_config.yaml and running_log.txt for the page
llamaboard_cache/user_config.yaml             the model that the page opens with, unless the user chose one
data/dataset_info.json                        our exported sets (written by `prepare`)
"""

from __future__ import annotations

import json
import os
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from omegaconf import OmegaConf

from common.error_hints import clean_lines
from common.errors import ArenaError, UsageError, first_line
from common.experiment import Experiment
from common.files import atomic_file
from common.llamafactory_schema import arguments
from common.progress import Show
from common.stages import TRAININGS
from data_prep.export_reader import MANIFEST
from factory.fingerprint import names
from factory.recipe_checks import check_recipe
from factory.recipes import render_recipe
from factory.serve_page import free_port, serve_page
from factory.stage_context import StageContext
from factory.status import readable_experiments

CONFIGS, CACHE = Path("llamaboard_config"), Path("llamaboard_cache")
RUN_CONFIG, RUN_LOG = "llamaboard_config.yaml", "running_log.txt"  # as LLaMA-Factory calls them
_STAGES = {"sft": "Supervised Fine-Tuning", "dpo": "DPO", "rm": "Reward Modeling"}


class Slider(NamedTuple):
    """A number's element with its ends, and the value that it gets when the recipe does not name the key."""

    element: str
    low: float
    high: float
    default: float
    whole: bool = True

    def takes(self, value: Any) -> bool:
        """Return whether the element can hold a value."""
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return number and self.low <= value <= self.high and (not self.whole or value == int(value))


# Keys that LLaMA Board sets before the extra arguments, which can therefore overrule the element.
_SLIDERS = {
    "cutoff_len": Slider("cutoff_len", 4, 131072, 2048),
    "per_device_train_batch_size": Slider("batch_size", 1, 1024, 8),
    "gradient_accumulation_steps": Slider("gradient_accumulation_steps", 1, 1024, 1),
    "logging_steps": Slider("logging_steps", 1, 1000, 500),
    "save_steps": Slider("save_steps", 10, 5000, 500),
    "warmup_steps": Slider("warmup_steps", 0, 5000, 0),
    "neftune_noise_alpha": Slider("neftune_alpha", 0, 10, 0, whole=False),
}
# Keys that it sets after them: the page cannot pass a value that the element does not take.
_LATE_SLIDERS = {
    "lora_rank": Slider("lora_rank", 1, 1024, 8),
    "lora_alpha": Slider("lora_alpha", 1, 2048, 16),
    "lora_dropout": Slider("lora_dropout", 0, 1, 0, whole=False),
    "loraplus_lr_ratio": Slider("loraplus_lr_ratio", 0, 64, 0, whole=False),
    "pref_beta": Slider("pref_beta", 0, 1, 0.1, whole=False),
    "pref_ftx": Slider("pref_ftx", 0, 10, 0, whole=False),
}
_SWITCHES = (
    *("packing", "neat_packing", "train_on_prompt", "mask_history", "resize_vocab", "use_llama_pro"),
    *("use_rslora", "use_dora", "create_new_adapter", "enable_thinking"),
)
_TEXTS = {"learning_rate": "5.0e-5", "num_train_epochs": "3.0", "max_grad_norm": "1.0"}
_EVERY_ROW = "1000000000"  # LLaMA Board always passes max_samples
_PRECISIONS = ("pure_bf16", "bf16", "fp16")
# Keys with elements of their own, and keys that the page makes itself: they are no extra arguments.
_NOT_EXTRA = {
    *("stage", "do_train", "model_name_or_path", "finetuning_type", "template", "output_dir", "dataset_dir"),
    *("dataset", "quantization_bit", "quantization_method", "double_quantization", "lora_target", "additional_target"),
    *("pref_loss", "lr_scheduler_type", "report_to", "plot_loss", "pissa_init", "pissa_convert", "max_samples"),
    *_PRECISIONS,
    *_SWITCHES,
    *_TEXTS,
    *_SLIDERS,
    *_LATE_SLIDERS,
}
# Arguments that the page adds or makes itself.
_OF_THE_PAGE = {"do_train", "output_dir", "dataset_dir", "plot_loss", "include_num_input_tokens_seen", "ddp_timeout"}


def board_config(context: StageContext, recipe: dict[str, Any], model_name: str) -> dict[str, Any]:
    """Return the saved configuration that starts `recipe` from LLaMA Board: values by element id.

    `model_name` is the page's name of the model. The page draws a fresh output folder itself. Raises ArenaError where
    it would start the recipe with another value.
    """
    extra = {key: value for key, value in recipe.items() if key not in _NOT_EXTRA}
    # The page would pass 16 and true.
    extra["preprocessing_num_workers"] = recipe.get("preprocessing_num_workers")
    extra["trust_remote_code"] = bool(recipe.get("trust_remote_code", False))
    reporters, bits = names(recipe.get("report_to")), recipe.get("quantization_bit")
    if len(reporters) > 1:  # the element takes one
        extra["report_to"] = reporters
    if bits and recipe.get("double_quantization") is False:
        raise ArenaError("double_quantization: LLaMA Board always quantizes twice")
    return {
        "top.model_name": model_name,
        "top.finetuning_type": recipe.get("finetuning_type", "lora"),
        "top.checkpoint_path": [],
        "top.quantization_bit": str(bits) if bits else "none",
        "top.quantization_method": recipe.get("quantization_method", "bnb"),
        "top.template": recipe.get("template") or context.experiment.template,
        "top.rope_scaling": "none",
        "top.booster": "auto",  # flash_attn and the like are among the extra arguments
        "train.training_stage": _STAGES[context.step.stage],
        "train.dataset_dir": "data",
        "train.dataset": names(recipe.get("dataset")),
        **{f"train.{key}": str(recipe.get(key, default)) for key, default in _TEXTS.items()},
        "train.max_samples": str(recipe.get("max_samples") or _EVERY_ROW),
        "train.compute_type": next((key for key in _PRECISIONS if recipe.get(key)), "fp32"),
        "train.lr_scheduler_type": recipe.get("lr_scheduler_type", "linear"),
        "train.val_size": 0,
        "train.report_to": reporters[0] if reporters else "none",
        "train.lora_target": ",".join(names(recipe.get("lora_target", "all"))),
        "train.additional_target": ",".join(names(recipe.get("additional_target"))),
        "train.pref_loss": recipe.get("pref_loss", "sigmoid"),
        "train.use_pissa": bool(recipe.get("pissa_init", False)),
        "train.ds_stage": "none",
        **{f"train.{key}": bool(recipe.get(key, key == "enable_thinking")) for key in _SWITCHES},
        **_numbers(recipe, extra),
        "train.extra_args": json.dumps(extra),
    }


def _numbers(recipe: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
    """Return the sliders' values; what a slider does not take is added to `extra`, where that may overrule it."""
    values = {}
    alpha = 2 * (recipe.get("lora_rank") or 8)  # LLaMA-Factory's own rule
    for key, slider in {**_SLIDERS, **_LATE_SLIDERS}.items():
        value = recipe.get(key)
        if value is None:
            value = alpha if key == "lora_alpha" else slider.default
        if not slider.takes(value):
            if key in _LATE_SLIDERS:
                raise ArenaError(f"{key}: {value} is not between LLaMA Board's {slider.low:g} and {slider.high:g}")
            extra[key], value = value, slider.default
        values[f"train.{slider.element}"] = int(value) if slider.whole else value
    return values


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


def board_models(experiments: list[Experiment]) -> dict[tuple[str, str], BoardModel]:
    """Return the page's model for every experiment and stage.

    A base model is called by the last part of its name, as the folder of its adapters is. A merged judge that a
    stage starts from is a model of its own, or its adapters would be offered on top of the wrong base.
    """
    models: dict[tuple[str, str], BoardModel] = {}
    taken: dict[str, tuple[str, str]] = {}
    for experiment in experiments:
        for stage in TRAININGS:
            path = experiment.start_model(stage, experiment.written_fold)
            name = experiment.short_model if path == experiment.model else f"{experiment.name}_sft_merged"
            if taken.setdefault(name, (path, experiment.template)) != (path, experiment.template):
                name = f"{name} of {experiment.name}"
            models[experiment.name, stage] = BoardModel(name, path, experiment.template)
    return models


def serve_board(host: str, port: int | None, *, open_browser: bool, show: Show) -> None:
    """Serve LLaMA Board in the current folder until Ctrl-C."""
    free_port(host, port)  # rejects an invalid address before any file is written
    configs, notes = lay_out()
    for note in notes:
        show.note(note)
    show.note(f"board: {len(configs)} configurations in {CONFIGS}/: choose one at 'Config path', then Load, Start")
    serve_page("factory.board_page", [], "board", CACHE / "board.log", host, port, open_browser=open_browser, show=show)


def lay_out() -> tuple[list[Path], list[str]]:
    """Write what the page reads; return the configurations and notes for the user.

    Files of the user (other configurations, other adapters) stay as they are. Raises UsageError outside a folder with
    experiments.
    """
    experiments, notes = readable_experiments()
    if not experiments:
        raise UsageError(
            "there is no experiment that can be read",
            where=str(Path.cwd() / "factory_configs"),
            remedy="; ".join(notes) or "make one: python run.py new EXP --model ID",
        )
    models, configs = board_models(experiments), []
    for context in (StageContext(e, stage, fold=e.written_fold) for e in experiments for stage in TRAININGS):
        name, model = f"{context.experiment.name} {context.name}", models[context.experiment.name, context.name]
        try:
            if faults := check_recipe(context.experiment, context.name, recipe=_recipe(context)):
                raise ArenaError("; ".join(faults))
            path = CONFIGS / f"{context.experiment.name}_{context.name}.yaml"
            _write_yaml(path, configuration(context, model))
            sources = (
                context.experiment.folder / "experiment.yaml",
                context.recipe_path,
                _manifest(context.experiment),
            )
            changed = max(file.stat().st_mtime for file in sources if file.is_file())
            os.utime(path, (changed, changed))  # the page lists the newest first
            configs.append(path)
        except ArenaError as error:
            notes.append(f"{name} is left out: {first_line(error)}")
        try:
            publish_run(context, model)
        except ArenaError as error:
            notes.append(f"the run of {name} is left out: {first_line(error)}")
    prepared = [each for each in experiments if _manifest(each).is_file()]
    if prepared and not (CACHE / "user_config.yaml").exists():
        first = models[prepared[0].name, "sft"].name
        user = {"lang": "en", "hub_name": None, "last_model": first, "path_dict": {}, "cache_dir": None}
        _write_yaml(CACHE / "user_config.yaml", user)
    return configs, notes


def _manifest(experiment: Experiment) -> Path:
    return experiment.data_folder / MANIFEST


def configs_newest_first() -> list[str]:
    """Return the names of all saved configurations: the demo's, then what was changed last."""
    found = [(not path.name.startswith("demo_"), -path.stat().st_mtime, path.name) for path in CONFIGS.glob("*.yaml")]
    return [name for *_, name in sorted(found)]


def configuration(context: StageContext, model: BoardModel) -> dict[str, Any]:
    """Return board_config() of a stage's recipe or, before `prepare`, of what would be rendered."""
    return board_config(context, _recipe(context), model.name)


def _recipe(context: StageContext) -> dict[str, Any]:
    if context.recipe_path.is_file():
        return context.recipe
    return dict(OmegaConf.to_container(OmegaConf.create(render_recipe(context.experiment, context.name))))


def publish_run(context: StageContext, model: BoardModel) -> None:
    """Let the page list and show a run of the command line: its adapter folder, its log, its settings.

    Does nothing where nothing was trained. The settings are those that the run began with, not those of today's recipe;
    where those are unknown (`run.py` did not start the run) settings that are there already stay.
    """
    adapter = context.adapter
    if not adapter.is_dir():
        return
    link = model.folder / adapter.name
    if link != adapter and not os.path.lexists(link):
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(adapter, link.parent), target_is_directory=True)
    if lines := log_lines(context.folder / "train.log"):
        with atomic_file(adapter / RUN_LOG) as file:
            file.write("\n".join(lines) + "\n")
    record = context.state.record("train")
    recipe = record.inputs.get(str(context.recipe_path)) if record else None
    if isinstance(recipe, dict):
        _write_yaml(adapter / RUN_CONFIG, board_config(context, recipe, model.name))
    elif not (adapter / RUN_CONFIG).is_file():
        _write_yaml(adapter / RUN_CONFIG, configuration(context, model))


_LOG_TAIL = 60_000  # bytes of train.log; the page shows the last 20,000 characters
_BAR = re.compile(r"\d{1,3}%\|.*\|")  # a progress bar: hundreds of lines that mean nothing afterwards


def log_lines(log: Path) -> list[str]:
    """Return the last lines of a run's log without colours and progress bars; [] without a log."""
    if not log.is_file():
        return []
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _LOG_TAIL))
        lines = clean_lines(file.read().decode("utf-8", "replace"))
    return [line for line in lines if line.strip() and not _BAR.search(line)]


def stage_of(started: dict[str, Any]) -> StageContext | None:
    """Return the stage that the page trains with these arguments, by their data sets; None for any other training."""
    for experiment in readable_experiments()[0] if started.get("do_train") else ():
        for context in (StageContext(experiment, stage, fold=experiment.written_fold) for stage in TRAININGS):
            with suppress(ArenaError):  # a recipe that cannot be read was not started
                if all(_same(_recipe(context).get(key), started.get(key)) for key in ("stage", "dataset")):
                    return context
    return None


def recipe_started(context: StageContext, started: dict[str, Any]) -> dict[str, Any]:
    """Return a stage's recipe with what the page's arguments say otherwise."""
    recipe, known = _recipe(context), arguments()
    usual = {"lora_alpha": 2 * (recipe.get("lora_rank") or 8), "max_samples": int(_EVERY_ROW)}
    changed = {}
    for key in {**recipe, **started}.keys() - _OF_THE_PAGE:
        default = usual.get(key, known[key].default if key in known else None)
        # The page leaves out what is None, false or empty.
        ours, theirs = recipe.get(key, default), started.get(key, default if recipe.get(key) == default else None)
        if (ours or theirs) and not _same(ours, theirs):
            changed[key] = theirs
    return {**recipe, **changed}


def _same(ours: Any, theirs: Any) -> bool:
    return ours == theirs or names(ours) == names(theirs)


def _write_yaml(path: Path, values: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        yaml.safe_dump(values, file, sort_keys=False, allow_unicode=True)
