"""The llama.cpp engine: a judge's GGUF file, one prompt at a time, on whatever llama.cpp was compiled for.

outputs/<experiment>/<stage>/judge-q8_0.gguf        the weights
outputs/<experiment>/<stage>/judge-q8_0.gguf.json   the source's files, the file's own SHA-256, what was checked

scoring.engines.gguf writes both. The engine reads token ids, never text, so llama.cpp's tokenizer plays no part in a
score.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock, patch

import numpy as np

from common.errors import ArenaError, UsageError
from common.files import read_json, sha256_of
from data_prep.export_reader import readable
from scoring.judge import Judge

# llama.cpp's own names, most exact first.
QUANTIZATIONS = ("f16", "bf16", "q8_0", "q4_k_m")
FORMAT = 1
# The files that a judge's answers depend on; the weights are *.safetensors.
_SMALL_FILES = ("judge.json", "config.json", "tokenizer.json")


class LlamaCppEngine:
    """A judge as a GGUF file; `precision` is the file's quantisation."""

    def __init__(self, judge: Judge, precision: str = "auto"):
        """Check that the file was made of this judge and load it."""
        path = find_gguf(judge, precision)
        self.precision = check_gguf(path, judge)["quantization"]
        self._longest = judge.cutoff_len
        self._model: Any = load_gguf(path, context=judge.cutoff_len)

    def label_logits(
        self,
        sequences: Sequence[Sequence[int]],
        label_ids: Sequence[int],
        *,
        progress: Callable[[float], None] = lambda _: None,
        name: Callable[[int], str] = "prompt {}".format,
    ) -> np.ndarray:
        """Return the labels' logits behind each sequence, [n, len(label_ids)] float64, in input order.

        Raises ArenaError that calls a row by `name(index)` where it is longer than the judge's budget or has no
        finite logits.
        """
        total, tokens = sum(map(len, sequences)), 0
        result = np.full((len(sequences), len(label_ids)), np.nan)
        for row, ids in enumerate(sequences):
            if not 0 < len(ids) <= self._longest:
                what = f"its {len(ids)} tokens are not between 1 and the judge's budget of {self._longest}"
                raise ArenaError(what, where=name(row), remedy="fit the battle with the judge's fitter, as score does")
            result[row] = last_logits(self._model, ids)[list(label_ids)]
            if not np.isfinite(result[row]).all():
                remedy = "a number overflowed in 16 bits: export as bf16 or q8_0; or the training diverged"
                raise ArenaError("the model gave no finite score for it", where=name(row), remedy=remedy)
            tokens += len(ids)
            progress(tokens / total)
        return result

    def close(self) -> None:
        """Free the model's memory."""
        if self._model is not None:
            self._model.close()
        self._model = None


def load_gguf(path: Path, *, context: int) -> Any:
    """Load a GGUF file for prompts of up to `context` tokens; raises ArenaError if llama.cpp cannot read it."""
    from llama_cpp import Llama, llama_chat_format, llama_cpp

    threads = len(os.sched_getaffinity(0))
    usual = llama_cpp.llama_model_default_params

    def keep_weights() -> Any:
        # On a processor with AMX llama.cpp packs quantised weights again, and for narrow layers (64 inputs) then reads
        # past them and kills the process. Llama has no argument for this switch.
        parameters = usual()
        parameters.use_extra_bufts = False
        return parameters

    try:
        # A chat template in the file, which nobody asks for, would be compiled: 9 ** (9 ** 9) in it never ends.
        no_template = patch.object(llama_chat_format, "Jinja2ChatFormatter", MagicMock())
        with no_template, patch.object(llama_cpp, "llama_model_default_params", keep_weights):
            return Llama(
                str(path),
                n_ctx=context,
                n_batch=context,  # a prompt is one call
                n_threads=threads,
                n_threads_batch=threads,
                n_gpu_layers=-1,  # all, where llama.cpp was compiled for a GPU
                verbose=False,
            )
    except (ValueError, RuntimeError, OSError) as error:
        remedy = "export it again, or free memory"
        raise ArenaError(f"llama.cpp cannot load it: {error}", where=str(path), remedy=remedy) from None


def last_logits(model: Any, ids: Sequence[int]) -> np.ndarray:
    """Return the logits [vocabulary] float64 behind one sequence; only its last position passes through the head."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(model.ctx), False)
    tokens = (llama_cpp.llama_token * len(ids))(*ids)
    code = llama_cpp.llama_decode(model.ctx, llama_cpp.llama_batch_get_one(tokens, len(ids)))
    if code != 0:
        raise ArenaError(f"llama.cpp stopped with code {code}", remedy="free memory; an id outside the vocabulary?")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model.model))
    values = llama_cpp.llama_get_logits_ith(model.ctx, -1)
    found = np.ctypeslib.as_array(ctypes.cast(values, ctypes.POINTER(ctypes.c_float)), shape=(size,))
    return found.astype(np.float64)  # a copy: the next call writes there


def gguf_path(judge_folder: Path, quantization: str) -> Path:
    """Return the place of a merged folder's GGUF of a quantisation, beside that folder."""
    return judge_folder.parent / f"judge-{quantization}.gguf"


def manifest_path(gguf: Path) -> Path:
    """Return the place of a GGUF's manifest: its own name and .json."""
    return gguf.with_name(f"{gguf.name}.json")


def source_files(judge_folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a merged folder that a judge's answers depend on, by name."""
    paths = [judge_folder / name for name in _SMALL_FILES] + sorted(judge_folder.glob("*.safetensors"))
    return {path.name: sha256_of(path) for path in paths if path.is_file()}


def find_gguf(judge: Judge, precision: str) -> Path:
    """Return a judge's GGUF file; "auto" is the only one that was exported.

    Raises UsageError for an unknown precision or where "auto" would have to choose, ArenaError where no file exists.
    """
    if precision not in ("auto", *QUANTIZATIONS):
        choices = f"choose one of: auto, {', '.join(QUANTIZATIONS)}"
        raise UsageError(f"llama.cpp has no precision {precision!r} here", remedy=choices)
    wanted = QUANTIZATIONS if precision == "auto" else (precision,)
    found = [name for name in wanted if gguf_path(judge.folder, name).is_file()]
    if len(found) > 1:
        what = f"several GGUF files of this judge were exported: {', '.join(found)}"
        raise UsageError(what, remedy=f"say which: --precision {found[0]}")
    if not found:
        what = "this judge was not exported to GGUF" + ("" if precision == "auto" else f" as {precision}")
        remedy = f"{export_command(judge)} --quantization {wanted[0]}"
        raise ArenaError(what, where=str(judge.folder.parent), remedy=remedy)
    return gguf_path(judge.folder, found[0])


def export_command(judge: Judge) -> str:
    """Return the command that exports this judge again."""
    source = judge.source
    return f"python run.py export -e {source.get('experiment', 'EXP')} --stage {source.get('stage', 'sft')}"


def check_gguf(gguf: Path, judge: Judge) -> dict[str, Any]:
    """Return a GGUF's manifest after checking that file, manifest and judge belong together.

    On a small machine the merged folder may be there without its *.safetensors: the other files must then fit.
    Raises ArenaError for a file that is missing, damaged, without a manifest, stale, or made of another judge.
    """
    again, path = f"{export_command(judge)} --quantization …", manifest_path(gguf)
    if gone := [each for each in (gguf, path) if not each.is_file()]:
        raise ArenaError("is missing: a GGUF file needs its manifest", where=str(gone[0]), remedy=again)
    with readable(path, again):
        manifest = read_json(path)
        if manifest["format"] != FORMAT:
            raise ArenaError("was written by another version", where=str(path), remedy=again)
        made_of, is_whole = dict(manifest["source"]), sha256_of(gguf) == manifest["sha256"]
    if not is_whole:
        raise ArenaError("is damaged: its SHA-256 is not the manifest's", where=str(gguf), remedy=again)
    present = source_files(judge.folder)
    if not any(name.endswith(".safetensors") for name in present):
        made_of = {name: digest for name, digest in made_of.items() if not name.endswith(".safetensors")}
    if made_of != present:
        differs = sorted(name for name in made_of | present if made_of.get(name) != present.get(name))
        what = f"was made of another judge, or this judge was trained again since ({', '.join(differs)} differ)"
        raise ArenaError(what, where=str(gguf), remedy=again)
    return manifest
