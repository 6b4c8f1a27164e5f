"""LLaMA Board as our child process runs it: LLaMA-Factory's own page with our models, and faults of 0.9.5 mended.

`python -m factory.board_page --host 127.0.0.1 --port 7860`, in a folder that factory.board laid out.

1. A job writes its log to a pipe that is read only while a browser looks on; with the browser closed the pipe fills
   and the job stands still. Here it writes to a file.
2. Choosing the folder of a run that the page did not start raises an exception. Here it shows that run's log and chart.
3. Loading a configuration of another training stage empties its data sets again. Here they stay.
4. A SwanLab key that is typed in is written into two files of the output folder. Here it goes to the job alone.
5. Evaluate compares generated texts alone, cut at 1,024 tokens: see factory.board_page.
6. The list of checkpoints is read when one clicks into it, and empties the choice when it comes, even one that was made
   while it was on its way. Here a choice that is still in the list stays.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.error_hints import clean_lines
from common.errors import ArenaError
from common.files import read_json
from factory.board import BoardModel, board_models, publish_run, readable_experiments
from factory.launcher import follow_parent
from factory.state import names

# What LLaMA-Factory asks for before it compares texts, as modules and as packages.
TEXT_METRICS = {"jieba": "jieba", "nltk": "nltk", "rouge_chinese": "rouge-chinese"}
_REWARDS = "Reward Modeling"
_LABEL_TOKENS, _NEARLY_GREEDY = 8, 0.01  # the least that the page's sliders take
# Element ids: what decides on the tabs' values, and what is set.
_ASKED = ("top.model_name", "top.finetuning_type", "top.checkpoint_path")
_SET = (
    *("eval.dataset_dir", "eval.dataset", "eval.cutoff_len", "eval.batch_size", "eval.max_new_tokens"),
    *("eval.temperature", "export.extra_args", "top.quantization_bit", "top.quantization_method"),
)


def mend_evaluation(runner: Any) -> None:
    """Let this page's Evaluate measure losses, and refuse to generate texts where that cannot end well."""
    native_arguments, native_check = runner._parse_eval_args, runner._initialize

    def parse(data: dict) -> dict[str, Any]:
        arguments = {**native_arguments(data), "trust_remote_code": False}
        del arguments["preprocessing_num_workers"]
        if arguments.get("do_predict"):
            return arguments
        return {**arguments, "predict_with_generate": False, "compute_accuracy": True}

    def check(data: dict, do_train: bool, from_preview: bool) -> str:
        texts = not do_train and data[runner.manager.get_elem_by_id("eval.predict")]
        return native_check(data, do_train, from_preview) or (text_fault() if texts else "")

    runner._parse_eval_args, runner._initialize = parse, check


def text_fault() -> str:
    """Return what is missing for an evaluation of generated texts and what to do instead, empty where nothing is."""
    missing = [package for module, package in TEXT_METRICS.items() if find_spec(module) is None]
    if not missing:
        return ""
    return (
        f"Generated texts are compared by packages that are not installed: pip install {' '.join(missing)}. Without "
        "them untick 'Save predictions': loss and accuracy need none; `run.py score` gives probabilities."
    )


def follow_checkpoint(page: Any, manager: Any, refresh: Callable[[Path], None]) -> None:
    """Fill both tabs when one checkpoint is chosen, and take the bits that it was trained in; all may be changed.

    `refresh` lays a folder's settings into it where they are not yet: the run may have ended after the page began.
    """
    import gradio as gr
    from llamafactory.webui.common import get_save_dir

    def fill(model_name: str, finetuning_type: str, chosen: list[str] | str | None) -> list[Any]:
        known, adapters = {}, names(chosen)
        if len(adapters) == 1:
            folder = Path(get_save_dir(model_name, finetuning_type, adapters[0]))
            refresh(folder)
            known = tab_values(folder)
        return [known.get(each, gr.skip()) for each in _SET]

    manager.get_elem_by_id("eval.predict").value = False
    asked, filled = ([manager.get_elem_by_id(name) for name in group] for group in (_ASKED, _SET))
    with page:
        manager.get_elem_by_id("top.checkpoint_path").change(fill, asked, filled, queue=False)


def tab_values(adapter: Path) -> dict[str, Any]:
    """Return element values by id from the settings that lie with a checkpoint, nothing where none do.

    Evaluate reads rows of one answer: the validation set of a preference stage, which has pairs, is left out.
    """
    from llamafactory.extras.constants import LLAMABOARD_CONFIG
    from llamafactory.webui.common import load_args, load_dataset_info

    trained = load_args(str(adapter / LLAMABOARD_CONFIG))
    if not isinstance(trained, dict):
        return {}
    extra = _json(trained.get("train.extra_args"))
    dataset_dir = trained.get("train.dataset_dir", "data")
    listed = load_dataset_info(dataset_dir)
    sets = [name for name in names(extra.get("eval_dataset")) if not listed.get(name, {"ranking": True}).get("ranking")]
    rewards = {"stage": "rm"} if trained.get("train.training_stage") == _REWARDS else {}  # else its head is left behind
    values = {
        "eval.dataset_dir": dataset_dir,
        "eval.dataset": sets,
        "eval.cutoff_len": extra.get("cutoff_len") or trained.get("train.cutoff_len"),
        "eval.batch_size": extra.get("per_device_eval_batch_size") or trained.get("train.batch_size"),
        "eval.max_new_tokens": _LABEL_TOKENS,
        "eval.temperature": _NEARLY_GREEDY,
        "export.extra_args": json.dumps({"trust_remote_code": False, **rewards}),
        "top.quantization_bit": trained.get("top.quantization_bit"),  # it answers as it was trained; Export ignores it
        "top.quantization_method": trained.get("top.quantization_method"),
    }
    return {key: value for key, value in values.items() if value is not None}


def _json(text: Any) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (TypeError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")  # OWNER/NAME, or an old one without its owner
_TAIL = 100_000  # bytes of a failed job's log that the page gets to show


def main(arguments: list[str]) -> int:
    """Serve the page until the process is ended."""
    follow_parent()
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args(arguments)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from llamafactory.extras.misc import fix_proxy

    fix_proxy()
    page = build()
    page.queue().launch(server_name=options.host, server_port=options.port, share=False, inbrowser=False)
    return 0


def build() -> Any:
    """Return LLaMA Board's page (gradio.Blocks) with our models and the mended parts."""
    experiments, _ = readable_experiments()
    models = board_models(experiments)
    register(list(dict.fromkeys(models.values())))
    stages = {(each.name, stage): each for each in experiments for name, stage in models if name == each.name}

    def refresh(folder: Path) -> None:
        for (name, stage), experiment in stages.items():
            if experiment.adapter_folder(stage).resolve() == folder.resolve():
                with suppress(ArenaError):  # told when the board began; the page shows the rest of the folder
                    publish_run(experiment, stage, models[name, stage])

    from llamafactory.webui import interface, runner
    from llamafactory.webui.components import top, train

    runner.Popen = Job
    top.list_checkpoints = train.list_checkpoints = _own_checkpoints(train.list_checkpoints)
    engine, check = _recorded(interface), runner.Runner.check_output_dir
    runner.Runner.check_output_dir = _checked(check, refresh)
    try:
        page = interface.create_ui()
    finally:
        runner.Runner.check_output_dir = check
    _show_chart(page, engine().manager)
    _keep_data_sets(page, train)
    _keep_checkpoint(page)
    _trust_no_code(engine().manager)
    _keep_keys_out_of_files(engine().runner)
    mend_evaluation(engine().runner)
    follow_checkpoint(page, engine().manager, refresh)
    return page


def register(models: list[BoardModel]) -> None:
    """Put our models at the head of the page's list, each with its path and chat template."""
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS, DownloadSource

    for model in reversed(models):
        known = SUPPORTED_MODELS.get(model.name, {})
        if known.get(DownloadSource.DEFAULT) != model.path:  # else it may know the path on other hubs, too
            SUPPORTED_MODELS[model.name] = {DownloadSource.DEFAULT: model.path}
        SUPPORTED_MODELS.move_to_end(model.name, last=False)
        DEFAULT_TEMPLATE[model.name] = model.template


class Job(subprocess.Popen):
    """The page's training process: our launcher, so that our guards hold in it too, writing into a file.

    Drop-in for the Popen that LLaMA Board's runner calls with a pipe for the errors.
    """

    def __init__(self, command: list[str], env: dict[str, str], **_: Any):
        from factory.process import child_environment

        self._log = Path(env["LLAMABOARD_WORKDIR"]) / "board_job.log"
        board = {key: value for key, value in env.items() if key.startswith("LLAMABOARD_") or key == "FORCE_TORCHRUN"}
        with self._log.open("wb") as output:
            super().__init__(
                [sys.executable, "-m", "factory.launcher", *command[1:]],
                env={**child_environment(), **board},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[None, str]:
        """Wait as Popen does, and return the end of the log as what was said on the error stream."""
        self.wait(timeout)
        with self._log.open("rb") as file:
            file.seek(max(0, self._log.stat().st_size - _TAIL))
            return None, "\n".join(clean_lines(file.read().decode("utf-8", "replace")))


def _recorded(interface: Any) -> Any:
    """Return a function that gives the engine of the page that is built next."""
    made: list[Any] = []
    native = interface.Engine

    class Engine(native):
        def __init__(self, *arguments: Any, **options: Any):
            super().__init__(*arguments, **options)
            made.append(self)

    interface.Engine = Engine
    return lambda: made[-1]


def _checked(native: Any, refresh: Any) -> Any:
    """Return Runner.check_output_dir as it should be: settings where they are known, and the run's log."""
    from llamafactory.extras.constants import LLAMABOARD_CONFIG
    from llamafactory.webui.common import get_save_dir, load_args
    from llamafactory.webui.control import get_trainer_info
    from llamafactory.webui.locales import ALERTS

    def check_output_dir(self: Any, lang: str, model_name: str, finetuning_type: str, output_dir: str) -> dict:
        box = self.manager.get_elem_by_id("train.output_box")
        folder = Path(get_save_dir(model_name, finetuning_type, output_dir)) if model_name and output_dir else None
        if folder is None or not folder.is_dir():
            return native(self, lang, model_name, finetuning_type, output_dir)
        refresh(folder)
        shown = {}
        if load_args(str(folder / LLAMABOARD_CONFIG)) is not None:
            shown = native(self, lang, model_name, finetuning_type, output_dir)
        log, _, _ = get_trainer_info(lang, str(folder), True)
        return {**shown, box: f"{ALERTS['warn_output_dir_exists'][lang]}\n\n{log}"}

    return check_output_dir


def _show_chart(page: Any, manager: Any) -> None:
    """Draw the loss chart of the output folder that is chosen; LLaMA Board draws that of a job of its own only."""
    import gradio as gr
    from llamafactory.webui.common import get_save_dir
    from llamafactory.webui.control import get_trainer_info

    def chart(lang: str, model_name: str, finetuning_type: str, output_dir: str) -> tuple[Any, Any]:
        if not model_name or not output_dir:
            return gr.skip(), gr.skip()
        folder = str(get_save_dir(model_name, finetuning_type, output_dir))
        _, progress, info = get_trainer_info(lang, folder, True)
        return info.get("loss_viewer", gr.Plot(None)), progress

    ids = ("top.lang", "top.model_name", "top.finetuning_type", "train.output_dir")
    shown = [manager.get_elem_by_id(name) for name in ("train.loss_viewer", "train.progress_bar")]
    with page:
        output_dir = manager.get_elem_by_id("train.output_dir")
        output_dir.input(chart, [manager.get_elem_by_id(name) for name in ids], shown, concurrency_limit=None)


def _keep_data_sets(page: Any, train: Any) -> None:
    """Empty the data sets when the user chooses another stage, not when a loaded configuration does."""
    for function in page.fns.values():
        if function.fn is not None and function.name == train.change_stage.__name__:
            function.targets = [(block, "input" if event == "change" else event) for block, event in function.targets]


def _keep_checkpoint(page: Any) -> None:
    """Tell the list of checkpoints what is chosen there when it is read again."""
    for function in page.fns.values():
        if function.fn is not None and function.name == "list_checkpoints":
            function.inputs = [*function.inputs, *function.outputs]


def _own_checkpoints(native: Any) -> Any:
    """Return list_checkpoints without the adapters that belong to another base: on this one they answer nonsense.

    What is chosen stays where it is in the list. The value is then not sent at all, so that an answer that comes late
    does not undo what was chosen after the question.
    """

    def list_checkpoints(model_name: str, finetuning_type: str, chosen: list[str] | str | None = None) -> Any:
        import gradio as gr
        from llamafactory.extras.constants import PEFT_METHODS
        from llamafactory.webui.common import get_model_path, get_save_dir

        listed = native(model_name, finetuning_type)
        base = get_model_path(model_name) if model_name else ""
        own = [name for _, name in listed.choices if _fits(Path(get_save_dir(model_name, finetuning_type, name)), base)]
        several = finetuning_type in PEFT_METHODS
        stays = isinstance(chosen, list) == several and set(names(chosen)) <= set(own)
        value = {} if stays else {"value": [] if several else None}
        return gr.Dropdown(choices=sorted(own), multiselect=several, **value)

    return list_checkpoints


def _fits(adapter: Path, base: str) -> bool:
    """Tell whether an adapter was trained on a base: both have the same name, or are the same folder.

    A hub id also stands for a local copy of it, told by its last part: an adapter of Qwen/Qwen3-4B goes on
    models/Qwen3-4B, and one of that folder on the hub's model. Two hub ids are two models, and two folders as well.
    """
    try:
        trained_on = read_json(adapter / "adapter_config.json")
    except (OSError, ValueError):  # a whole model, or what LLaMA Board will complain about itself
        return True
    named = trained_on.get("base_model_name_or_path") if isinstance(trained_on, dict) else None
    if not named or not base:
        return True
    return str(named) == base or _is_same_model(str(named), base) or _is_same_model(base, str(named))


def _is_same_model(name: str, other: str) -> bool:
    """Tell whether `other` is a folder, and `name` the same one or the hub id of what lies in it."""
    path, folder = Path(name), Path(other)
    if not folder.is_dir():
        return False
    if path.exists():
        return path.samefile(folder)
    parts = (folder.name, *(part for part in folder.parts if part.startswith("models--")))  # the hub's cache
    return bool(_HUB_ID.fullmatch(name)) and not {
        name.rsplit("/", 1)[-1],
        f"models--{name.replace('/', '--')}",
    }.isdisjoint(parts)


def _trust_no_code(manager: Any) -> None:
    """Chat and Export trust code that comes with a model unless their extra arguments say otherwise: say so."""
    for name in ("infer.extra_args", "export.extra_args"):
        element = manager.get_elem_by_id(name)
        element.value = json.dumps({**json.loads(element.value), "trust_remote_code": False})


def _keep_keys_out_of_files(runner: Any) -> None:
    """Give a SwanLab key to jobs by the environment; neither arguments nor saved settings hold it."""
    native_arguments, native_settings = runner._parse_train_args, runner._build_config_dict

    def parse(data: dict) -> dict[str, Any]:
        arguments = native_arguments(data)
        if key := arguments.pop("swanlab_api_key", None):
            os.environ["SWANLAB_API_KEY"] = key
        return arguments

    def settings(data: dict) -> dict[str, Any]:
        return {name: value for name, value in native_settings(data).items() if name != "train.swanlab_api_key"}

    runner._parse_train_args, runner._build_config_dict = parse, settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
