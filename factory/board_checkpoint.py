"""A checkpoint chosen in LLaMA Board: what its tabs Evaluate & Predict and Export then hold, and what Evaluate does.

LLaMA-Factory 0.9.5 evaluates generated texts alone, which needs three more packages and says nothing about a judge;
it cuts rows at 1,024 tokens whatever the checkpoint was trained on, reads them with 16 processes, and trusts code that
comes with a model. Here an evaluation tells the loss and the accuracy over an answer's tokens, on the checkpoint's own
terms; texts are still to be had where "Save predictions" is ticked and the packages are there.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from factory.inputs import names

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
