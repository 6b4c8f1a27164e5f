"""The dequantised base: a copy of the base model that holds the very weights that a QLoRA training computed with.

A quantised training freezes rounded weights and the adapter learns on top of them, so base + adapter is not the
trained function but rounded base + adapter is. LLaMA-Factory cannot merge into a quantised model; it can merge into
this ordinary folder. One copy serves all trainings that start from the same weights with the same quantisation.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.console import duration
from common.errors import ArenaError
from common.experiment import Experiment, read_yaml
from common.files import atomic_folder, only_run, write_json
from factory.state import model_files

if TYPE_CHECKING:
    from common.progress import Show
import re

from common.progress import Line

MANIFEST = "dequantised.json"
FORMAT = 1
# LLaMA-Factory's own values where a recipe leaves them out (hparams/model_args.py).
_QUANTISATION = {"quantization_type": "nf4", "double_quantization": True}


class DequantisedBase:
    """The dequantised copy that one training's adapter is merged into: where it lies and what it is made from."""

    def __init__(self, experiment: Experiment, training: str):
        recipe = read_yaml(experiment.recipe(training))
        self.folder = Path(experiment.merge_model(training))
        self.model: str = recipe["model_name_or_path"]
        self.revision: str = recipe.get("model_revision", "main")
        self.bits: int = recipe["quantization_bit"]
        self._quantisation = {
            "bits": self.bits,
            **({key: recipe.get(key, value) for key, value in _QUANTISATION.items()} if self.bits == 4 else {}),
        }

    def source(self) -> dict[str, Any]:
        """Return what the copy depends on: the files of the start (of a hub model its name) and the quantisation."""
        local = Path(self.model)
        files = model_files(local) if local.exists() else {"hub": f"{self.model}@{self.revision}"}
        return {"model": self.model, "files": files, "quantisation": self._quantisation}

    def is_whole(self) -> bool:
        """Tell whether the copy is there, made from this very source, with every file that was written then."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            sizes = {name: (self.folder / name).stat().st_size for name in manifest["sizes"]}
            return (manifest["format"], manifest["source"], manifest["sizes"]) == (FORMAT, self.source(), sizes)
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def ensure(self, show: Show) -> None:
        """Make the copy unless it is there; raises ArenaError if the start cannot be loaded or memory is too small."""
        # One run makes it, the others wait: replaced a second time it would vanish under the first one's merge.
        with only_run(self.folder, wait=lambda who: show.note(f"{self.folder} is being made by {who}: waiting")):
            if not self.is_whole():
                self._make(show)

    def _make(self, show: Show) -> None:
        started = time.monotonic()
        with show.line("dequantised base") as line:
            line.update(f"{self.bits}-bit weights of {self.model} as an ordinary model")
            model = self._load(show)
            with atomic_folder(self.folder) as folder:
                self._save(model, folder)
        show.note(f"dequantised the {self.bits}-bit base in {duration(time.monotonic() - started)}: {self.folder}")

    def _save(self, model: Any, folder: Path) -> None:
        from transformers import AutoTokenizer

        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(self.model, revision=self.revision).save_pretrained(folder)
        sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
        write_json(folder / MANIFEST, {"format": FORMAT, "source": self.source(), "sizes": sizes})
        for path in folder.iterdir():  # safetensors writes for the owner alone
            path.chmod((folder / MANIFEST).stat().st_mode)

    def _load(self, show: Show) -> Any:
        """Return the quantised and dequantised model, on the device where it was trained if it fits there."""
        import torch

        if torch.cuda.is_available():
            try:
                return _dequantised(self.model, self.revision, self._quantisation, "cuda")
            except torch.OutOfMemoryError:
                show.note("the dequantised base does not fit in the GPU's memory: made on the CPU")
            # Only here, where the exception and with it the failed model are gone, can memory be given back.
            torch.cuda.empty_cache()
        return _dequantised(self.model, self.revision, self._quantisation, "cpu")


def dequantised_base(experiment: Experiment, training: str) -> DequantisedBase | None:
    """Return the copy that a training's adapter is merged into, None where it is merged into the base itself."""
    return DequantisedBase(experiment, training) if experiment.merges_dequantised else None


def _dequantised(model: str, revision: str, quantisation: dict[str, Any], device: str) -> Any:
    """Load a model quantised as LLaMA-Factory quantises it (model/model_utils/quantization.py) and dequantise it.

    The weights keep the type that they are stored in, as in the training ("auto"): the blocks' scales and with them
    the rounded values depend on it.
    """
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    from transformers.utils import logging as transformers_logging

    if quantisation["bits"] == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_use_double_quant=quantisation["double_quantization"],
            bnb_4bit_quant_type=quantisation["quantization_type"],
        )
    transformers_logging.disable_progress_bar()
    try:
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            revision=revision,
            dtype="auto",
            use_safetensors=True,
            quantization_config=config,
            device_map={"": device},
        )
        return loaded.dequantize()
    except (OSError, ValueError, MemoryError) as error:
        raise ArenaError(
            f"cannot be loaded to be dequantised: {(str(error).strip() or repr(error)).splitlines()[0]}",
            where=model,
            remedy="free memory (it takes the model's size in 16 bits); or merge_onto: base in experiment.yaml, then "
            "prepare again",
        ) from None


# transformers' own bar, as tqdm writes it into a file: Loading weights:  43%|████  | 125/290 [00:05<00:07, 23.1it/s]
_LOADING = re.compile(r"Loading weights:\s+(\d+)%\|")
_WEIGHTS = "*.safetensors"
_KIB, _MIB = 2**10, 2**20


class MergeProgress:
    """Shows a merge on a live line; the merged weights are as many bytes as the model's that the adapter goes into."""

    def __init__(self, line: Line, recipe: dict[str, Any], merged: Path):
        """`merged` is the folder that the child writes to."""
        self._line, self._recipe, self._merged = line, recipe, merged
        self._total: int | None = None

    def read(self, text: str) -> None:
        """Take one line of the child's output."""
        if (told := _LOADING.search(text)) and told[1] != "100":
            self._line.update("of the weights loaded", int(told[1]) / 100)

    def look(self) -> None:
        """Look at what is written so far."""
        written = _bytes(self._merged)
        if not written:
            return
        if self._total is None:
            self._total = _bytes(_folder_of(self._recipe))
        if not self._total:  # a hub model in a cache that we cannot find
            self._line.update(f"writing the merged model, {_size(written, written)} so far")
            return
        share = min(written / self._total, 1.0)
        size = f"{_number(written, self._total)} of {_size(self._total, self._total)}"
        self._line.update(f"of the merged model written, {size}", share)


def _size(count: int, largest: int) -> str:
    """Return bytes with their unit: that of `largest`, so that a tiny model is not 0 of 0 MiB."""
    return f"{_number(count, largest)} {'MiB' if largest >= _MIB else 'KiB'}"


def _number(count: int, largest: int) -> str:
    return f"{count // (_MIB if largest >= _MIB else _KIB):,}"


def _bytes(folder: Path) -> int:
    try:
        return sum(path.stat().st_size for path in folder.glob(_WEIGHTS))
    except OSError:  # a file that was renamed between the list and the look
        return 0


def _folder_of(recipe: dict[str, Any]) -> Path:
    """Return the folder of the model that is merged into: its own, or the hub's cache, where the child has put it."""
    name = recipe["model_name_or_path"]
    if Path(name).exists():
        return Path(name)
    from huggingface_hub import snapshot_download

    try:
        revision = recipe.get("model_revision", "main")
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=_WEIGHTS))
    except Exception:  # ModelScope's or Openmind's cache: only the time left is unknown then
        return Path(name)
