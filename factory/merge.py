"""The merge of a trained adapter into its base, or into the dequantised copy of a quantised base.

A QLoRA training freezes rounded weights, and the adapter learns on top of them: base + adapter is not the trained
function, rounded base + adapter is. LLaMA-Factory cannot merge into a quantised model; it can merge into an ordinary
folder that holds the rounded weights. One such copy serves all trainings from the same weights and quantisation.

LLaMA-Factory adds the adapter in the type that the weights are stored in. A copy of bf16 weights is stored in fp16,
which holds the same values (to 3e-8) and three more bits of the sum; docs/merge.md has what that is worth.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.console import duration
from common.errors import ArenaError, first_line, same_command
from common.files import atomic_folder, only_run, read_json, write_json
from common.progress import Show
from common.stages import merge_of
from factory.fingerprint import local_models, model_files
from factory.process import llamafactory, run_child
from factory.recipe_reach import ADAPTER_FILES, adapter_config
from factory.stage_context import StageContext
from factory.state import archive
from factory.train import require_files, show_phase

MANIFEST = "dequantised.json"
VALUE_HEAD = "value_head.safetensors"
# Half of fp16's largest number (65,504): the adapter is still to be added.
_LARGEST_FP16 = 32_752
# LLaMA-Factory's own values where a recipe leaves them out (hparams/model_args.py).
_QUANTISATION = {"quantization_type": "nf4", "double_quantization": True}


def merge(context: StageContext, complete: Callable[[Path], None], show: Show) -> Path:
    """Merge the stage's adapter and return the merged folder, which appears when it is whole.

    `complete` adds files to the new folder before it appears. A finished merge with the same inputs is kept; a folder
    that was made from another training is renamed, not deleted. Raises ArenaError as `train` does.
    """
    recipe, merged, name = context.merge_recipe, context.merged, context.label
    with only_run(context.folder):
        adapter = Path(recipe["adapter_name_or_path"])
        if missing := [file for file in ADAPTER_FILES if not (adapter / file).is_file()]:
            raise ArenaError(
                f"holds no finished adapter to merge: {', '.join(missing)} missing",
                where=str(adapter),
                remedy=f"train {name} first (`--until train`), or go on with it by --resume",
            )
        try:
            adapter_config(adapter)
        except ValueError as error:
            raise ArenaError(str(error), where=str(adapter), remedy="train again, that stage with --fresh") from None
        base = DequantisedBase(context) if context.experiment.merges_dequantised else None
        inputs = {str(context.merge_recipe_path): recipe, **local_models(recipe)}
        if base:  # its source, so that the copy itself may be deleted
            inputs = {key: value for key, value in inputs.items() if not key.startswith("model_name_or_path ")}
            inputs["dequantised"] = base.source
        standing = context.state.standing("merge", inputs)
        if standing.is_finished:
            standing.require_same_inputs("merge", context.folder, f"move {merged} away to merge again")
            show.note(f"{name}: merge kept, finished {standing.record.finished_at}")
            return merged
        for old in archive(merged):
            show.note(f"{name}: the earlier merge is now {old}")
        context.state.begin("merge", inputs)
        with context.state.failures_of("merge"):
            if base:
                base.ensure(show)
            seconds = _run(context, base, complete, show)
        context.state.finish("merge", [merged / "config.json"], seconds)
    show.note(f"{name}: merged in {duration(seconds)}")
    return merged


def _run(context: StageContext, base: DequantisedBase | None, complete: Callable[[Path], None], show: Show) -> float:
    log, what = context.folder / "merge.log", f"merging {context.label}"
    overrides = context.overrides(merge_of(context.name))
    with atomic_folder(context.merged) as folder, show.line(context.label) as line:
        line.update("starting LLaMA-Factory")
        seconds = run_child(
            llamafactory("export", str(context.merge_recipe_path), *overrides, f"export_dir={folder}"),
            log,
            what=what,
            on_line=lambda text: show_phase(text, line, show),
            interrupted_remedy=lambda: f"start {same_command()} again; the training is kept",
        )
        head = (VALUE_HEAD,) if context.merge_recipe.get("stage") == "rm" else ()
        require_files(folder, ("config.json", "tokenizer_config.json", "*.safetensors", *head), log, what)
        if base:
            base.restore_type(folder / "config.json")
        complete(folder)
    return seconds


class DequantisedBase:
    """The dequantised copy that one training's adapter is merged into: where it lies and what it is made from."""

    def __init__(self, context: StageContext):
        recipe = context.recipe
        self.folder = Path(context.experiment.merge_model(context.name, context.fold))
        self._model, self._revision = recipe["model_name_or_path"], recipe.get("model_revision", "main")
        self._bits: int = recipe["quantization_bit"]
        how = {key: recipe.get(key, value) for key, value in _QUANTISATION.items()} if self._bits == 4 else {}
        self._quantisation = {"bits": self._bits, **how}
        local = Path(self._model)
        files = model_files(local) if local.exists() else {"hub": f"{self._model}@{self._revision}"}
        # What the copy depends on: the files of the start (of a hub model its name) and the quantisation.
        self.source = {"model": self._model, "files": files, "quantisation": self._quantisation}

    @property
    def is_whole(self) -> bool:
        """Whether the copy exists, was made from this source, and has every file at its size."""
        try:
            manifest = read_json(self.folder / MANIFEST)
            sizes = {name: (self.folder / name).stat().st_size for name in manifest["sizes"]}
            return (manifest["source"], manifest["sizes"]) == (self.source, sizes)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def ensure(self, show: Show) -> None:
        """Make the copy unless it exists; raises ArenaError if the start cannot be loaded or memory is too small."""
        # One run makes it while the others wait: replaced a second time it would vanish under the first one's merge.
        with only_run(self.folder, wait=lambda who: show.note(f"{self.folder} is being made by {who}: waiting")):
            if self.is_whole:
                return
            with show.line("dequantised base") as line:
                line.update(f"{self._bits}-bit weights of {self._model} as an ordinary model")
                self._make(show)
            show.note(f"dequantised the {self._bits}-bit base: {self.folder}")

    def _make(self, show: Show) -> None:
        from transformers import AutoTokenizer

        model = self._load(show)
        own_type = str(model.dtype).removeprefix("torch.")
        with atomic_folder(self.folder) as folder:
            in_fp16(model, show).save_pretrained(folder)
            AutoTokenizer.from_pretrained(self._model, revision=self._revision).save_pretrained(folder)
            sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
            write_json(folder / MANIFEST, {"source": self.source, "sizes": sizes, "dtype": own_type})

    def restore_type(self, path: Path) -> None:
        """Name the base's own type in a merged model's config.json, whatever its weights are stored in.

        Others compute in the type that is named there, and a model that was trained in bf16 may overflow in fp16.
        """
        if own_type := read_json(self.folder / MANIFEST).get("dtype"):
            write_json(path, read_json(path) | {"dtype": own_type})

    def _load(self, show: Show) -> Any:
        """Return the quantised and dequantised model, on the device where it was trained if it fits there."""
        import torch

        if torch.cuda.is_available():
            try:
                return dequantise(self._model, self._revision, self._quantisation, "cuda")
            except torch.OutOfMemoryError:
                show.note("the dequantised base does not fit in the GPU's memory: made on the CPU")
            # Only here, where the exception and with it the failed model are gone, can memory be given back.
            torch.cuda.empty_cache()
        return dequantise(self._model, self._revision, self._quantisation, "cpu")


def in_fp16(model: Any, show: Show) -> Any:
    """Return a bf16 model in fp16; as it is where it has another type, or a weight too large for fp16."""
    import torch

    if model.dtype != torch.bfloat16:
        return model
    largest = max(float(weight.detach().abs().max()) for weight in model.parameters())
    if not largest < _LARGEST_FP16:
        show.note(
            f"the dequantised base stays in bf16, for its largest weight is {largest:,.0f}: the merge rounds more"
        )
        return model
    return model.to(torch.float16)


def dequantise(model: str, revision: str, quantisation: dict[str, Any], device: str) -> Any:
    """Load a model quantised as LLaMA-Factory quantises it (model/model_utils/quantization.py) and dequantise it.

    The weights keep the type that they are stored in, as in the training ("auto"): the blocks' scales and with them
    the rounded values depend on it.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    config = BitsAndBytesConfig(load_in_8bit=True)
    if quantisation["bits"] == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_use_double_quant=quantisation["double_quantization"],
            bnb_4bit_quant_type=quantisation["quantization_type"],
        )
    transformers_logging.disable_progress_bar()
    options = {"revision": revision, "dtype": "auto", "use_safetensors": True, "device_map": {"": device}}
    try:
        return AutoModelForCausalLM.from_pretrained(model, quantization_config=config, **options).dequantize()
    except (OSError, ValueError, MemoryError) as error:
        raise ArenaError(
            f"cannot be loaded to be dequantised: {first_line(error)}",
            where=model,
            remedy="free memory (it takes the model's size in 16 bits); or merge_onto: base in experiment.yaml, then "
            "prepare again",
        ) from None
