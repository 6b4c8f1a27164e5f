"""Loading models for scoring: a merged folder in some precision, or a trained adapter on its quantised base.

Only safetensors are read. No code of a merged folder runs; that of a base runs only where the experiment trusts it.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ArenaError, first_line
from common.experiment import Experiment
from data_prep.model_lookup import offline_if_unreachable
from factory.devices import has_bf16
from factory.recipe_reach import ADAPTER_FILES, adapter_config, config_of, odd_index, odd_setting
from factory.stage_context import StageContext

if TYPE_CHECKING:
    import torch

BROKEN_WEIGHTS = "the weights are broken (a diverged training, or an overflow in 16 bit): look at the loss curve"


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter's folder and its base, quantised as it was in training; defaults are LLaMA-Factory's own."""

    folder: Path
    base: str
    quantization_bit: int | None = None
    quantization_type: str = "nf4"
    double_quantization: bool = True
    revision: str = "main"
    trust_remote_code: bool = False

    @classmethod
    def of(cls, recipe: dict[str, Any], experiment: Experiment) -> TrainedAdapter:
        """Return the adapter that a recipe trained."""
        named = ("quantization_bit", "quantization_type", "double_quantization")
        return cls(
            Path(recipe["output_dir"]),
            recipe["model_name_or_path"],
            **{key: recipe[key] for key in named if key in recipe},
            revision=experiment.revision,
            trust_remote_code=experiment.trust_remote_code,
        )

    def load(self, device: str, *, precision: str | None = None) -> Any:
        """Load the base with the adapter on it, unmerged; `precision` is that of what is not quantised.

        The base with the adapter switched off is the reference of implicit rewards. Raises ArenaError if either cannot
        be loaded, the adapter belongs to another base, or switching it off does not give the base back.
        """
        import torch

        self._check_folder()
        model = self.load_base(device, precision=precision)
        ids = torch.arange(8, device=model.device).unsqueeze(0)
        with torch.inference_mode():
            before = model(input_ids=ids, use_cache=False).logits.float()
        policy = self._on(model)
        with torch.inference_mode(), policy.disable_adapter():
            after = policy(input_ids=ids, use_cache=False).logits.float()
        if not torch.allclose(before, after, rtol=1e-3, atol=1e-3 * float(before.abs().max())):
            what = "switching the adapter off does not give the base back, so there is no reference to compare with"
            remedy = "train without the key that changes the base itself (pissa_init, resize_vocab, a trained bias)"
            raise ArenaError(what, where=str(self.folder), remedy=remedy)
        return policy

    def load_base(self, device: str, *, precision: str | None = None) -> Any:
        """Load the base as LLaMA-Factory trained on it, without the adapter."""
        dtype = weight_dtype(device, precision)
        quantised = (self.quantization_bit, self.quantization_type, self.double_quantization)
        trust = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        try:
            return _load(self.base, device, dtype, _bitsandbytes(*quantised, dtype, device), **trust)
        except loading_errors() as error:
            remedy = "the folder or hub id must be the one that the training started from"
            what = f"the base model cannot be loaded: {first_line(error)}"
            raise ArenaError(what, where=self.base, remedy=remedy) from None

    def _check_folder(self) -> None:
        """Raise ArenaError unless the folder holds safetensors that were trained on the base."""
        if missing := [name for name in ADAPTER_FILES if not (self.folder / name).is_file()]:
            raise self._misfit(f"is no finished adapter: {' and '.join(missing)} missing")
        try:
            trained_on = adapter_config(self.folder)["base_model_name_or_path"]
        except ValueError as error:
            raise self._misfit(str(error)) from None
        if not is_same_model(trained_on, self.base):
            raise self._misfit(f"was trained on {trained_on}, not on {self.base}: another reference, other rewards")

    def _on(self, model: Any) -> Any:
        """Return the model with the adapter; its weights must be exactly those that the model has places for.

        PEFT only warns where they are not, and the rewards would all be nearly zero.
        """
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        try:
            with warnings.catch_warnings():
                # PEFT warns of missing weights (an error below) and of tied weights that do not exist.
                warnings.simplefilter("ignore", UserWarning)
                policy = PeftModel.from_pretrained(model, str(self.folder)).eval()
        except loading_errors() as error:
            raise self._misfit(f"cannot be put on {self.base}: {first_line(error)}") from None
        with safe_open(self.folder / "adapter_model.safetensors", framework="pt") as file:
            saved = set(file.keys())
        expected = set(get_peft_model_state_dict(policy, save_embedding_layers=False))
        if missing := sorted(expected - saved):
            raise self._misfit(f"lacks {len(missing)} weights that its configuration names, such as {missing[0]}")
        if extra := sorted(saved - expected - set(policy.state_dict())):
            raise self._misfit(f"has {len(extra)} weights that the base has no place for, such as {extra[0]}")
        return policy

    def _misfit(self, what: str) -> ArenaError:
        return ArenaError(what, where=str(self.folder), remedy="train again, that stage with --fresh")


def trained_adapter(context: StageContext) -> TrainedAdapter:
    """Return the adapter that a stage's recipe trained; raises ArenaError if that training began with another one."""
    if context.recipe.get("adapter_name_or_path"):
        what = "the training continued another adapter, so its base is not a model by itself"
        where = f"{context.recipe_path}: adapter_name_or_path"
        raise ArenaError(what, where=where, remedy="score the merged model instead (--precision auto)")
    return TrainedAdapter.of({**context.recipe, "output_dir": context.weights}, context.experiment)


def load_model(folder: Path, device: str, *, precision: str | None = None) -> Any:
    """Load a merged model for scoring: 16-bit on a GPU, fp32 on a CPU unless `precision` names another.

    `precision` is fp32, bf16, fp16, 8bit or 4bit (the last two by bitsandbytes). Raises ArenaError if it cannot be
    loaded.
    """
    bits = int(precision[0]) if precision in ("8bit", "4bit") else None
    dtype = weight_dtype(device, None if bits else precision)
    try:
        quantisation = _bitsandbytes(bits, "nf4", True, dtype, device)
        return _load(folder, device, dtype, quantisation, trust_remote_code=False, local_files_only=True)
    except loading_errors() as error:
        what = f"the model cannot be loaded: {first_line(error)}"
        remedy = "move the folder away and merge again: python run.py sft (dpo, rm) -e EXP --until merge"
        raise ArenaError(what, where=str(folder), remedy=remedy) from None


def base_folder(experiment: Experiment) -> Path:
    """Return the folder of the base model, which is downloaded where it is not on this disk; raises ArenaError."""
    from huggingface_hub import snapshot_download
    from llamafactory.extras.misc import try_download_model_from_other_hub
    from llamafactory.hparams import ModelArguments

    name, revision = experiment.model, experiment.revision
    try:
        with offline_if_unreachable(name, revision):
            asked = ModelArguments(model_name_or_path=name, model_revision=revision)
            folder = Path(try_download_model_from_other_hub(asked))  # ModelScope and others, where they are asked for
            if not folder.is_dir():
                kinds = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
                folder = Path(snapshot_download(name, revision=revision, allow_patterns=kinds))
    except loading_errors() as error:
        remedy = "check the key model in experiment.yaml; a gated model needs its licence accepted and HF_TOKEN set"
        raise ArenaError(f"cannot be loaded: {first_line(error)}", where=name, remedy=remedy) from None
    return folder


def device_name() -> str:
    """Return "cuda" where a GPU is visible, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def float_precision(device: str) -> str:
    """Return the precision that "auto" stands for on a device."""
    if not device.startswith("cuda"):
        return "fp32"
    return "bf16" if has_bf16(device) else "fp16"


def weight_dtype(device: str, precision: str | None = None) -> torch.dtype:
    """Return the type that weights are loaded in: that of `precision`, or the device's usual one."""
    import torch

    names = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    return names[precision or float_precision(device)]


def is_same_model(one: str, other: str) -> bool:
    """Return whether two names of models, folders or hub ids, mean the same model."""
    folders = [Path(name) for name in (one, other)]
    if all(folder.is_dir() for folder in folders):
        return folders[0].samefile(folders[1])
    # A hub id may have been kept as the folder of its download (ModelScope writes "." as "___"); the name of a folder
    # that exists is never taken for a hub id, for a merged judge may have any name.
    ends = {Path(name).name.replace("___", ".").lower() for name in (one, other)}
    return one == other or (len(ends) == 1 and not any(folder.is_dir() for folder in folders))


def loading_errors() -> tuple[type[Exception], ...]:
    """Return what damaged or foreign files of a model raise while they are loaded."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    usual = (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, ArithmeticError)
    usual += (ImportError, AssertionError)  # a quantisation or a kernel whose library is not installed
    return (*usual, SafetensorError, StrictDataclassError)


def _load(source: str | Path, device: str, dtype: torch.dtype, quantisation: Any, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    if odd := odd_setting(config_of(str(source), options.get("revision"))) or odd_index(Path(source)):
        raise ValueError(odd)
    if quantisation is not None:
        options |= {"quantization_config": quantisation, "device_map": {"": device}}
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, use_safetensors=True, **options)
    # bitsandbytes puts quantised weights on the device itself
    return (model if quantisation is not None else model.to(device)).eval()


def _bitsandbytes(bit: int | None, kind: str, double: bool, dtype: torch.dtype, device: str) -> Any:
    """Return LLaMA-Factory's own quantisation (model/model_utils/quantization.py), or None."""
    from transformers import BitsAndBytesConfig

    if bit is None:
        return None
    if bit == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    if device == "cpu":
        # With avx512_bf16, bitsandbytes repacks nf4 weights in the first pass and computes in bf16 from then on:
        # that is neither the function that was trained nor the fp32 that is asked for here.
        import bitsandbytes.nn.modules as modules

        modules.has_avx512bf16 = lambda: False
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_type=kind,
        bnb_4bit_quant_storage=dtype,
    )
