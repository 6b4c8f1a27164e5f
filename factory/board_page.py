"""LLaMA Board as our child process runs it: LLaMA-Factory 0.9.5's own page, with our models and runs in it.

`python -m factory.board_page --host 127.0.0.1 --port 7860`, in a folder that factory.board laid out.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from common.experiment import read_yaml
from common.progress import Show
from common.stages import TRAININGS
from factory.board import (
    BoardModel,
    board_models,
    configs_newest_first,
    log_lines,
    publish_run,
    recipe_started,
    stage_of,
)
from factory.process import child_environment, llamafactory
from factory.serve_page import serve_gradio
from factory.stage_context import StageContext
from factory.status import readable_experiments
from factory.train import adopt

_LOG_LINES = 100  # of a job's log that the page shows; 20,000 characters are ten screens


def main(arguments: list[str]) -> int:
    """Serve the page until the process is ended."""
    return serve_gradio(build, arguments)


def build() -> Any:
    """Return LLaMA Board's page (gradio.Blocks). What is replaced in it, and why, is listed here in full.

    engine.Runner          a run of the command line is shown; keys stay out of files; code of models is not trusted
    runner.Popen           jobs run in our launcher, which holds our guards, write to a file, and become a stage's runs
    list_checkpoints       adapters are offered on the base that they were trained on only
    list_config_paths      the demo's saved configurations first, then the newest
    extra arguments        of Train, Chat and Export: they do not trust code of models
    get_infer_args         of Chat and Export, in this process: what trusts code unasked is refused (see `Trust`)
    get_trainer_info       a log's fence does not end the box in which it is shown
    """
    from llamafactory.chat import chat_model
    from llamafactory.train import tuner
    from llamafactory.webui import control, engine, interface, runner
    from llamafactory.webui.components import top, train

    experiments, _ = readable_experiments()
    models = board_models(experiments)
    register(dict.fromkeys(models.values()))
    runs = {each.adapter_folder(stage, each.written_fold): (each, stage) for each in experiments for stage in TRAININGS}

    def refresh(folder: Path) -> None:
        """Publish a run again: it may have begun or ended after the page was laid out."""
        for adapter, (experiment, stage) in runs.items():
            if adapter.resolve() == folder.resolve():
                with suppress(ArenaError):  # reported when the board began; the page shows the rest of the folder
                    context = StageContext(experiment, stage, fold=experiment.written_fold)
                    publish_run(context, models[experiment.name, stage])

    trusting = [each for each in experiments if each.trust_remote_code]
    trust = Trust({models[each.name, stage].path for each in trusting for stage in TRAININGS})
    chat_model.get_infer_args = tuner.get_infer_args = trust.guarded(tuner.get_infer_args)
    runner.get_trainer_info = control.get_trainer_info = fenced(control.get_trainer_info)
    engine.Runner = runner_class(refresh, trust)
    runner.Popen = Job
    bases = {adapter: models[experiment.name, stage].name for adapter, (experiment, stage) in runs.items()}
    top.list_checkpoints = train.list_checkpoints = on_own_base(train.list_checkpoints, bases)
    train.list_config_paths = list_config_paths
    page = interface.create_ui()
    (check,) = (function for function in page.fns.values() if function.name == "check_output_dir")
    manager = check.fn.__self__.manager
    check.outputs = [
        *check.outputs,
        *(manager.get_elem_by_id(f"train.{name}") for name in ("progress_bar", "loss_viewer")),
    ]
    for name in ("train.extra_args", "infer.extra_args", "export.extra_args"):
        element = manager.get_elem_by_id(name)
        element.value = json.dumps({**json.loads(element.value), "trust_remote_code": False})
    return page


def register(models: Iterable[BoardModel]) -> None:
    """Put our models at the head of the page's list, each with its path and chat template."""
    from llamafactory.extras.constants import DEFAULT_TEMPLATE, SUPPORTED_MODELS, DownloadSource

    for model in reversed(list(models)):
        known = SUPPORTED_MODELS.get(model.name, {})
        if known.get(DownloadSource.DEFAULT) != model.path:  # otherwise LLaMA-Factory may know it on other hubs, too
            SUPPORTED_MODELS[model.name] = {DownloadSource.DEFAULT: model.path}
        SUPPORTED_MODELS.move_to_end(model.name, last=False)
        DEFAULT_TEMPLATE[model.name] = model.template


class Job(subprocess.Popen):
    """The page's training process: our launcher, with its guards, writing into a file.

    LLaMA Board's runner reads a job's pipe only while a browser is open: without one the pipe fills up, and the job
    hangs. This class takes the same arguments as the Popen that it replaces.
    """

    def __init__(self, command: list[str], env: dict[str, str], **_: Any):
        self._log = Path(env["LLAMABOARD_WORKDIR"]) / "board_job.log"
        board = {key: value for key, value in env.items() if key.startswith("LLAMABOARD_") or key == "FORCE_TORCHRUN"}
        with self._log.open("wb") as output:
            super().__init__(
                llamafactory(*command[1:]),
                env={**child_environment(), **board},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        threading.Thread(target=self._adopt, args=(Path(command[-1]),), daemon=True).start()

    def _adopt(self, arguments: Path) -> None:
        """Make it the run of the stage whose data it trains on, so that `status`, `merge` and `score` know it."""
        try:
            started = read_yaml(arguments)
            if context := stage_of(started):
                recipe = recipe_started(context, started)
                adopt(context, recipe, arguments.parent, self._log, self.wait, Show())
        except ArenaError as error:  # into the page's log: the page itself shows how the job ended
            print(f"{arguments.parent} is no stage's run: {error}", file=sys.stderr, flush=True)

    def communicate(self, input: Any = None, timeout: float | None = None) -> tuple[None, str]:
        """Wait as Popen does, and return the end of the log as the text of the error stream."""
        self.wait(timeout)
        return None, _unfenced("\n".join(log_lines(self._log)))


@dataclass(frozen=True)
class Trust:
    """The models whose experiments say `trust_remote_code: true`: code of no other runs, whatever is asked for."""

    models: set[str]

    def check(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments of a job; raises gradio.Error where they trust code of a model that is not ours."""
        import gradio as gr

        if arguments.get("trust_remote_code") and arguments.get("model_name_or_path") not in self.models:
            raise gr.Error(
                'trust_remote_code is refused: no experiment with this model says "trust_remote_code: true" in its '
                'experiment.yaml. Write {"trust_remote_code": false} into the extra arguments'
            )
        return arguments

    def guarded(self, native: Callable[..., Any]) -> Callable[..., Any]:
        """Return get_infer_args with that check before it."""
        return lambda arguments=None: native(self.check(arguments))


def fenced(native: Callable[..., tuple[str, Any, Any]]) -> Callable[..., tuple[str, Any, Any]]:
    """Return get_trainer_info with the end of a log, whose prompts cannot leave its code block as Markdown."""

    def get_trainer_info(*arguments: Any) -> tuple[str, Any, Any]:
        log, progress, info = native(*arguments)
        body = log.removeprefix("```\n").removesuffix("\n```\n")
        shown = "\n".join(body.splitlines()[-_LOG_LINES:])
        return (f"```\n{_unfenced(shown)}\n```\n" if log else ""), progress, info

    return get_trainer_info


def _unfenced(text: str) -> str:
    return text.replace("```", "`\u200b`\u200b`")


def runner_class(refresh: Callable[[Path], None], trust: Trust) -> type:
    """Return LLaMA Board's Runner with our changes; `refresh` publishes the run in a folder again."""
    import gradio as gr
    from llamafactory.extras.constants import LLAMABOARD_CONFIG
    from llamafactory.webui.common import get_save_dir, load_args
    from llamafactory.webui.control import get_trainer_info
    from llamafactory.webui.locales import ALERTS
    from llamafactory.webui.runner import Runner

    class OurRunner(Runner):
        def check_output_dir(self, lang: str, model_name: str, finetuning_type: str, output_dir: str) -> dict:
            """Show settings, log and chart of the run in a folder; 0.9.5 shows those of its own runs only."""
            folder = Path(get_save_dir(model_name, finetuning_type, output_dir)) if model_name and output_dir else None
            if folder is None or not folder.is_dir():
                return super().check_output_dir(lang, model_name, finetuning_type, output_dir)
            refresh(folder)
            shown = {}
            if load_args(str(folder / LLAMABOARD_CONFIG)) is not None:  # without that file 0.9.5 raises an exception
                shown = super().check_output_dir(lang, model_name, finetuning_type, output_dir)
            log, progress, info = get_trainer_info(lang, str(folder), True)
            box, bar, chart = (
                self.manager.get_elem_by_id(f"train.{name}") for name in ("output_box", "progress_bar", "loss_viewer")
            )
            text = f"{ALERTS['warn_output_dir_exists'][lang]}\n\n{log}"
            return {**shown, box: text, bar: progress, chart: info.get("loss_viewer", gr.Plot(None))}

        def _parse_train_args(self, data: dict) -> dict[str, Any]:
            """Pass a SwanLab key to the job by its environment: 0.9.5 writes arguments into a file."""
            arguments = super()._parse_train_args(data)
            if key := arguments.pop("swanlab_api_key", None):
                os.environ["SWANLAB_API_KEY"] = key
            return trust.check(arguments)

        def _build_config_dict(self, data: dict) -> dict[str, Any]:
            """Leave the SwanLab key out of saved settings."""
            settings = super()._build_config_dict(data)
            settings.pop("train.swanlab_api_key", None)
            return settings

        def _parse_eval_args(self, data: dict) -> dict[str, Any]:
            """Trust a model's code where its experiment does: Evaluate has no box of extra arguments."""
            arguments = super()._parse_eval_args(data)
            return {**arguments, "trust_remote_code": arguments["model_name_or_path"] in trust.models}

    return OurRunner


def list_config_paths(current_time: str) -> Any:
    """Return the choices of 'Config path': a name for the page's own settings, then what is saved."""
    import gradio as gr

    return gr.Dropdown(choices=[f"{current_time}.yaml", *configs_newest_first()])


def on_own_base(native: Callable, bases: dict[Path, str]) -> Callable:
    """Return list_checkpoints without adapters that were trained on another base, on which they answer nonsense.

    `bases` holds the page's model for each adapter folder of ours: the adapters of preference stages, which start from
    a merged judge, are in the same folder as those of its base.
    """

    def list_checkpoints(model_name: str, finetuning_type: str) -> Any:
        import gradio as gr
        from llamafactory.webui.common import get_save_dir

        listed = native(model_name, finetuning_type).constructor_args
        own = [
            name
            for name in listed["choices"]
            if bases.get(Path(get_save_dir(model_name, finetuning_type, name)), model_name) == model_name
        ]
        return gr.Dropdown(**{**listed, "choices": sorted(own)})

    return list_checkpoints


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
