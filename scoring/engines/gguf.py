"""Exporting a judge to one GGUF file, and proving that the file is still the same judge."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from common.battle import Battle
from common.errors import ArenaError, UsageError
from common.files import read_json, sha256_of, write_json
from common.progress import Show
from data_prep.export_reader import read_battles
from factory.demo import SENTENCE_ENDS
from factory.process import module, run_child
from factory.recipe_reach import config_of, odd_index, odd_setting
from factory.stage_context import StageContext
from scoring.engines.gguf_converter import SCRIPT
from scoring.engines.llama_cpp import (
    FORMAT,
    gguf_path,
    last_logits,
    load_gguf,
    manifest_path,
    source_files,
)
from scoring.engines.torch_engine import TorchEngine
from scoring.judge import Judge, load_judge, require_judge
from scoring.links import softmax
from scoring.model_loading import device_name

CHECKED_ROWS = 32
# The largest difference of a class probability from the merged model's own: (worth a warning, a failed export).
# Sixteen bits round; docs/edge.md measures what fewer bits cost; a file of other weights was wrong by 0.67.
LIMITS = {"f16": (5e-3, 5e-3), "bf16": (2e-2, 5e-2), "q8_0": (3e-2, 1e-1), "q4_k_m": (5e-2, 3e-1)}
# On a GPU the merged model itself computes in 16 bits, and rounds as well.
_GPU_ROUNDING = 1e-2


def export_gguf(
    context: StageContext, quantization: str, *, output: Path | None = None, converter: Path | None = None, show: Show
) -> dict[str, Any]:
    """Write a stage's judge as a GGUF file with its manifest; return the manifest.

    Raises UsageError for a stage that is no language model, ArenaError if something is missing, the architecture is
    unknown to llama.cpp, or the file does not answer as the judge does: then an earlier file stays as it was.
    """
    stage = context.name
    if stage not in ("sft", "dpo_judge"):
        what = f"{stage} cannot be exported to GGUF: its scores are rewards, and GGUF holds one language model alone"
        raise UsageError(what, remedy="choose --stage sft or dpo_judge")
    if output and (output.suffix != ".gguf" or (output.exists() and not is_gguf(output))):
        what = "is no place for a GGUF file: such a file alone is replaced"
        raise UsageError(what, where=f"--output {output}", remedy="give a new name that ends in .gguf")
    converter = find_converter(converter)
    require_judge(context)
    judge = load_judge(context.merged)
    if odd := odd_setting(config_of(str(judge.folder), None)) or odd_index(judge.folder):
        raise ArenaError(odd, where=str(judge.folder), remedy="export a judge that was merged here, or remove that")
    source = source_files(judge.folder)
    output = output or gguf_path(judge.folder, quantization)
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as scratch:
        fresh = Path(scratch) / "judge.gguf"
        with show.line(f"{stage}: converting to {quantization}"):
            tokenizer = judge.folder / "tokenizer.json"
            pre = ["--pre", "gpt-2"] if plain_byte_level(tokenizer) or is_embedded(tokenizer) else []
            options = [str(judge.folder), str(fresh), quantization, "--converter", str(converter), *pre]
            command = module("scoring.engines.gguf_converter", *options)
            log = context.folder / "export.log"
            run_child(command, log, what="llama.cpp's converter", interrupted_remedy=lambda: "export again")
        with show.line(f"{stage}: comparing with the merged model"):
            checked = compare(judge, fresh, read_battles(context.experiment.data_folder, context.parts("valid")))
        for text in check_agreement(checked, quantization):
            show.note(text)
        manifest = {
            "format": FORMAT,
            "quantization": quantization,
            "sha256": sha256_of(fresh),
            "bytes": fresh.stat().st_size,
            "source": source,
            "llama_cpp_python": version("llama-cpp-python"),
            "checked": checked,
        }
        fresh.chmod(0o644)
        fresh.replace(output)
        write_json(manifest_path(output), manifest)  # the last: a file without it is refused
    show.note(f"{stage}: {output} ({manifest['bytes'] / 2**20:,.1f} MiB)")
    return {**manifest, "output": output.as_posix()}


def find_converter(folder: Path | None = None) -> Path:
    """Return the folder of llama.cpp with its converter: the given one, or that of `make extra-gguf`.

    Raises ArenaError with the way to get it, or where llama-cpp-python itself is missing.
    """
    if find_spec("llama_cpp") is None:
        raise ArenaError("llama-cpp-python is not installed", where="run.py export", remedy="make extra-gguf")
    found = folder or Path(sys.prefix, "llama.cpp")
    if not (found / SCRIPT).is_file():
        remedy = "make extra-gguf unpacks it; or name a folder of llama.cpp with --converter"
        raise ArenaError(f"there is no llama.cpp with its {SCRIPT}", where=str(found), remedy=remedy)
    return found


def is_gguf(path: Path) -> bool:
    """Tell whether a file begins as GGUF files do."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def compare(judge: Judge, gguf: Path, battles: Sequence[tuple[Battle, int]]) -> dict[str, Any]:
    """Compare a file with the merged model on some battles, evenly over the lengths; return what the manifest says.

    Raises ArenaError if there is no battle, llama.cpp's tokenizer gives other ids for the texts in judge.json, or the
    file's probabilities are not finite.
    """
    if not battles:
        what = "the export has no validation rows, on which the file is compared"
        remedy = "raise valid_share in experiment.yaml and run prepare again"
        raise ArenaError(what, where=str(judge.folder), remedy=remedy)
    every = judge.sequences(battles)
    order, count = sorted(range(len(every)), key=lambda i: -len(every[i])), min(CHECKED_ROWS, len(every))
    chosen = [order[i * len(order) // count] for i in range(count)]
    sequences, labels = [every[i] for i in chosen], list(judge.frame.label_ids)
    engine = TorchEngine(judge, "fp32" if device_name() == "cpu" else "auto")  # refuses what would crash llama.cpp
    expected = softmax(engine.label_logits(sequences, labels))
    engine.close()
    model = load_gguf(gguf, context=judge.cutoff_len)

    def same_ids(text: str, ids: list[int]) -> bool:
        return model.tokenize(text.encode(), add_bos=False, special=True) == ids

    try:
        for text, ids in read_json(judge.folder / "judge.json")["canaries"].items():
            if not same_ids(text, ids) and not is_embedded(judge.folder / "tokenizer.json"):
                what = f"llama.cpp's tokenizer gives other ids than the judge's own for {text!r}"
                remedy = "this tokenizer is not supported by this version of llama.cpp; look at tokenizer.ggml.pre"
                raise ArenaError(what, where=gguf.name, remedy=remedy)
        texts = [judge.frame.wrap(judge.prompt.message(*battles[i])) for i in chosen]
        same = sum(same_ids(text, judge.tokenizer.encode(text, add_special_tokens=False).ids) for text in texts)
        found = softmax(np.array([last_logits(model, ids)[labels] for ids in sequences]))
    finally:
        model.close()
    apart = np.abs(found - expected)
    if not np.isfinite(found).all():
        raise ArenaError("gives no finite probabilities", where=gguf.name, remedy="export as bf16 or q8_0")
    return {
        "prompts": count,
        "same_token_ids": same,
        "largest_probability_difference": float(apart.max()),
        "mean_probability_difference": float(apart.mean()),
        "merged_model_in": engine.precision,
    }


def check_agreement(checked: dict[str, Any], quantization: str) -> list[str]:
    """Return what a user should know of `compare`'s result; raises ArenaError where the file is another judge."""
    slack = 0.0 if checked["merged_model_in"] == "fp32" else _GPU_ROUNDING
    warn, fail = (limit + slack for limit in LIMITS[quantization])
    largest, rows = checked["largest_probability_difference"], checked["prompts"]
    difference = f"class probabilities differ by up to {largest:.4f} from the merged model ({rows} prompts)"
    if not largest <= fail:  # also where it is NaN
        what = f"{difference}, more than {fail:g}: this file is not the same judge"
        remedy = "merge again (--until merge); if it stays, choose more bits: bf16, or q8_0 for a 4-bit file"
        raise ArenaError(what, where=f"--quantization {quantization}", remedy=remedy)
    notes = [f"{difference}{'; see docs/edge.md for what fewer bits cost' if largest > warn else ''}"]
    if other := rows - checked["same_token_ids"]:
        notes.append(
            f"llama.cpp's own tokenizer gives other ids for {other} of {rows} prompts: "
            "send token ids, not text, to a server (run.py score does)"
        )
    return notes


def plain_byte_level(tokenizer: Path) -> bool:
    """Return whether a tokenizer.json splits texts as GPT-2 does and no other way: llama.cpp's "gpt-2" is then exact.

    The converter knows tokenizers by a table of hashes, which cannot hold one that a user trained.
    """
    content = read_json(tokenizer)
    split = content.get("pre_tokenizer") or {}
    return (
        content.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split.get("add_prefix_space", True)
    )


def is_embedded(tokenizer: Path) -> bool:
    """Return whether it is the demo's own tokenizer: llama.cpp has no such split, so its file is for token ids only."""
    split = read_json(tokenizer).get("pre_tokenizer") or {}
    return any((each.get("pattern") or {}).get("Regex") == SENTENCE_ENDS for each in split.get("pretokenizers", ()))
