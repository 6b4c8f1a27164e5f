"""A judge's GGUF file: its name, which judge it was made of, and the manifest beside it that proves it.

outputs/<experiment>/<stage>/judge-q8_0.gguf        the weights, with the source's digest in the metadata
outputs/<experiment>/<stage>/judge-q8_0.gguf.json   the source's files, the file's own SHA-256, what was checked
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import ArenaError, UsageError
from common.files import sha256_of

if TYPE_CHECKING:
    from scoring.judge import Judge
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import numpy as np

from common.files import write_json
from data_prep.export_reader import read_battles
from factory.process import run_child
from scoring.engines.gguf_converter import SCRIPT, SOURCE_KEY
from scoring.judge import load_judge, require_judge
from scoring.links import softmax

if TYPE_CHECKING:
    from common.experiment import Experiment
    from common.progress import Show
    from scoring.judge import Judge

# llama.cpp's own names, most exact first.
QUANTIZATIONS = ("f16", "bf16", "q8_0", "q4_k_m")
FORMAT = 1
# What a judge's answers depend on; the weights are *.safetensors.
_SMALL_FILES = ("judge.json", "config.json", "tokenizer.json")


def gguf_path(judge_folder: Path, quantization: str) -> Path:
    """Return where a merged folder's GGUF of a quantisation lies: beside that folder."""
    return judge_folder.parent / f"judge-{quantization}.gguf"


def manifest_path(gguf: Path) -> Path:
    """Return the place of a GGUF's manifest: its own name and .json."""
    return gguf.with_name(f"{gguf.name}.json")


def source_files(judge_folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a merged folder that a judge's answers depend on, by name."""
    paths = [judge_folder / name for name in _SMALL_FILES] + sorted(judge_folder.glob("*.safetensors"))
    return {path.name: sha256_of(path) for path in paths if path.is_file()}


def source_digest(files: dict[str, str]) -> str:
    """Return one SHA-256 for all of `source_files`."""
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def find_gguf(judge: Judge, precision: str) -> Path:
    """Return a judge's GGUF file; "auto" is the only one that was exported.

    Raises UsageError for an unknown precision or where "auto" would have to choose, ArenaError where there is none.
    """
    if precision != "auto" and precision not in QUANTIZATIONS:
        choices = ", ".join(("auto", *QUANTIZATIONS))
        raise UsageError(f"llama.cpp has no precision {precision!r} here", remedy=f"choose one of: {choices}")
    asked = QUANTIZATIONS if precision == "auto" else (precision,)
    found = [name for name in asked if gguf_path(judge.folder, name).is_file()]
    if len(found) > 1:
        raise UsageError(
            f"several GGUF files of this judge were exported: {', '.join(found)}",
            remedy=f"say which: --precision {found[0]}",
        )
    if not found:
        raise ArenaError(
            "this judge was not exported to GGUF" + ("" if precision == "auto" else f" as {precision}"),
            where=str(judge.folder.parent),
            remedy=f"{export_command(judge)} --quantization {asked[0]}",
        )
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
    again = f"{export_command(judge)} --quantization …"
    manifest = _manifest(gguf, again)
    if sha256_of(gguf) != manifest["sha256"]:
        raise ArenaError("is damaged: its SHA-256 is not the manifest's", where=str(gguf), remedy=again)
    made_of, present = manifest["source"], source_files(judge.folder)
    if not any(name.endswith(".safetensors") for name in present):
        made_of = {name: digest for name, digest in made_of.items() if not name.endswith(".safetensors")}
    if made_of != present:
        differs = sorted(name for name in made_of | present if made_of.get(name) != present.get(name))
        raise ArenaError(
            f"was made of another judge, or this judge was trained again since ({', '.join(differs)} differ)",
            where=str(gguf),
            remedy=again,
        )
    return manifest


def _manifest(gguf: Path, again: str) -> dict[str, Any]:
    path = manifest_path(gguf)
    if not gguf.is_file():
        raise ArenaError("there is no such GGUF file", where=str(gguf), remedy=again)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT or not isinstance(manifest["source"], dict):
            raise ArenaError("was written by another version", where=str(path), remedy=again)
        if manifest["source_sha256"] != source_digest(manifest["source"]) or not manifest["quantization"]:
            raise ArenaError("contradicts itself", where=str(path), remedy=again)
        return manifest
    except FileNotFoundError:
        raise ArenaError(
            "has no manifest beside it, so nobody can say which judge it is",
            where=str(gguf),
            remedy=f"copy {path.name} with it, or {again}",
        ) from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArenaError(f"is damaged: {error}", where=str(path), remedy=again) from None


# A folder with the converter of llama.cpp; without it `make extra-gguf` has put one into the environment.
CONVERTER_VARIABLE = "ARENA_LLAMA_CPP"
CHECKED_ROWS = 32
# The largest difference of a class probability to the merged model's own: (worth a warning, a failed export).
# Sixteen bits round; fewer bits cost what docs/edge.md measures; a file of other weights was wrong by 0.67.
LIMITS = {"f16": (5e-3, 5e-3), "bf16": (2e-2, 5e-2), "q8_0": (3e-2, 1e-1), "q4_k_m": (5e-2, 3e-1)}
# On a GPU the merged model itself is asked in 16 bits, and rounds as well.
_GPU_ROUNDING = 1e-2
_NOT_EXPORTABLE = {
    "rm": "its reward comes from a value head, which a GGUF file of a language model cannot hold",
    "dpo_reward": "its reward is the difference between two models, the adapter on and off; a GGUF file holds one",
}


@dataclass(frozen=True)
class Agreement:
    """How near the file is to the merged model: class probabilities, and token ids of the prompts' texts."""

    rows: int
    largest: float
    mean: float
    same_ids: int  # prompts whose text llama.cpp's own tokenizer turns into the same ids
    reference: str  # what the merged model was computed in


def export_gguf(
    experiment: Experiment,
    stage: str,
    quantization: str,
    *,
    output: Path | None = None,
    converter: Path | None = None,
    show: Show,
) -> dict[str, Any]:
    """Write a stage's judge as a GGUF file with its manifest; return the manifest.

    Raises UsageError for a stage that is no language model, ArenaError if something is missing, the architecture is
    unknown to llama.cpp, or the file does not answer as the judge does: then an earlier file stays as it was.
    """
    _check_request(stage, quantization)
    script = find_converter(converter)
    require_judge(experiment, stage)
    judge = load_judge(experiment.merged_folder(stage))
    output = output or gguf_path(judge.folder, quantization)
    log = experiment.output_folder(stage) / "export.log"
    source = source_files(judge.folder)
    with _beside(output) as scratch:
        fresh = scratch / "judge.gguf"
        with show.line(f"{stage}: converting to {quantization}"):
            _convert(judge, quantization, fresh, script, source_digest(source), log)
        with show.line(f"{stage}: comparing with the merged model"):
            agreement = compare(judge, fresh, _prompts(experiment, judge))
        _judge_agreement(agreement, quantization, show)
        manifest = _new_manifest(fresh, quantization, source, agreement)
        fresh.chmod(0o644)
        fresh.replace(output)
        write_json(manifest_path(output), manifest)  # the last: a file without it is refused
    show.note(f"{stage}: {output} ({output.stat().st_size / 2**20:,.1f} MiB)")
    return {**manifest, "output": output.as_posix()}


def find_converter(folder: Path | None = None) -> Path:
    """Return the folder of llama.cpp with its converter: the given one, the environment's, or `make extra-gguf`'s.

    Raises ArenaError with the way to get it, or where llama-cpp-python itself is missing.
    """
    from importlib.util import find_spec

    if find_spec("llama_cpp") is None:
        raise ArenaError("llama-cpp-python is not installed", where="export --format gguf", remedy="make extra-gguf")
    named = folder or (Path(os.environ[CONVERTER_VARIABLE]) if os.environ.get(CONVERTER_VARIABLE) else None)
    found = named or Path(sys.prefix) / "llama.cpp"
    if not (found / SCRIPT).is_file():
        raise ArenaError(
            f"there is no llama.cpp with its {SCRIPT}",
            where=str(named or ".venv/llama.cpp"),
            remedy=f"make extra-gguf unpacks it; or name a folder of llama.cpp: --converter or {CONVERTER_VARIABLE}",
        )
    return found


def compare(judge: Judge, gguf: Path, prompts: Sequence[tuple[str, list[int], list[int]]]) -> Agreement:
    """Ask file and merged model for the same prompts: (text, its ids, the whole prompt's ids) each.

    Raises ArenaError if llama.cpp's tokenizer gives other ids for the judge's canaries.
    """
    from scoring.engines.llama_cpp import last_logits, load_gguf
    from scoring.engines.protocol import open_engine
    from scoring.engines.torch_engine import device_name

    labels = list(judge.frame.label_ids)
    model = load_gguf(gguf, context=judge.cutoff_len)
    try:
        _check_canaries(judge, model, gguf)
        same = sum(_llama_ids(model, text) == ids for text, ids, _ in prompts)
        ours = softmax(np.array([last_logits(model, ids)[labels] for _, _, ids in prompts]))
    finally:
        model.close()
    engine = open_engine(judge, "torch", "fp32" if device_name() == "cpu" else "auto")
    try:
        theirs = softmax(engine.label_logits([ids for _, _, ids in prompts], labels))
    finally:
        engine.close()
    if not np.isfinite(ours).all():
        raise ArenaError("gives no finite probabilities", where=str(gguf.name), remedy="export as bf16 or q8_0")
    apart = np.abs(ours - theirs)
    return Agreement(len(prompts), float(apart.max()), float(apart.mean()), same, engine.precision)


def _check_request(stage: str, quantization: str) -> None:
    if stage in _NOT_EXPORTABLE:
        raise UsageError(
            f"{stage} cannot be exported to GGUF: {_NOT_EXPORTABLE[stage]}", remedy="choose --stage sft or dpo_judge"
        )
    if quantization not in QUANTIZATIONS:
        raise UsageError(
            f"there is no quantization {quantization!r}", remedy=f"choose one of: {', '.join(QUANTIZATIONS)}"
        )


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """Yield an empty folder on the same disk as `output`; it is removed with all that is left in it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}.", dir=output.parent) as folder:
        yield Path(folder)


def _convert(judge: Judge, quantization: str, target: Path, converter: Path, digest: str, log: Path) -> None:
    if quantization != "q4_k_m":
        _run_converter(judge, quantization, target, converter, digest, log)
        return
    # The quantiser starts from what the merged model holds, not from something rounded before.
    whole = target.with_name("whole.gguf")
    _run_converter(judge, _own_type(judge.folder), whole, converter, digest, log)
    _quantize(whole, target)
    whole.unlink()


def _run_converter(judge: Judge, kind: str, target: Path, converter: Path, digest: str, log: Path) -> None:
    command = [sys.executable, "-m", "scoring.engines.gguf_converter", str(judge.folder), str(target), kind]
    command += ["--converter", str(converter), "--source", digest]
    if plain_byte_level(judge.folder / "tokenizer.json"):
        command += ["--pre", "gpt-2"]
    run_child(command, log, what="llama.cpp's converter", interrupted_remedy="export again")


def plain_byte_level(tokenizer: Path) -> bool:
    """Return whether a tokenizer.json splits texts as GPT-2 does and no other way: llama.cpp's "gpt-2" is then exact.

    The converter knows tokenizers by a table of hashes, in which one trained at home cannot stand.
    """
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    split = content.get("pre_tokenizer") or {}
    return (
        content.get("normalizer") is None
        and split.get("type") == "ByteLevel"
        and split.get("use_regex", True)
        and not split.get("add_prefix_space", True)
    )


def _own_type(folder: Path) -> str:
    """Return the converter's name of the type that the merged weights have."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    return names.get(config.get("dtype") or config.get("torch_dtype"), "f32")


def _quantize(source: Path, target: Path) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    _silence()
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if code != 0 or not target.is_file():
        raise ArenaError(
            f"llama.cpp's quantiser stopped with code {code}",
            where=str(target.parent.parent),
            remedy="free disk space; or choose q8_0, which every shape allows",
        )


@cache
def _silence() -> Any:
    """Keep llama.cpp's own log off the terminal from now on; the callback must outlive every call."""
    import llama_cpp

    silent = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(silent, None)
    return silent


def _prompts(experiment: Experiment, judge: Judge) -> list[tuple[str, list[int], list[int]]]:
    """Return the longest and other validation prompts, evenly over the lengths: (text, its ids, the prompt's ids)."""
    battles = read_battles(experiment.data_folder, "valid")
    sequences = judge.sequences(battles)
    order = sorted(range(len(battles)), key=lambda i: -len(sequences[i]))
    count = min(CHECKED_ROWS, len(order))
    if not count:
        raise ArenaError(
            "has no validation rows, and an export is compared on them",
            where=str(experiment.data_folder),
            remedy="raise valid_share in experiment.yaml and run prepare again",
        )
    chosen = [order[i * len(order) // count] for i in range(count)]
    texts = [judge.frame.wrap(judge.prompt.message(*battles[i])) for i in chosen]
    encoded = [judge.tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    return [(text, ids, sequences[i]) for text, ids, i in zip(texts, encoded, chosen, strict=True)]


def _check_canaries(judge: Judge, model: Any, gguf: Path) -> None:
    canaries = json.loads((judge.folder / "judge.json").read_text(encoding="utf-8"))["canaries"]
    for text, ids in canaries.items():
        if _llama_ids(model, text) != ids:
            raise ArenaError(
                f"llama.cpp's tokenizer gives other ids than the judge's own for {text!r}",
                where=gguf.name,
                remedy="this tokenizer is not supported by this version of llama.cpp; look at tokenizer.ggml.pre",
            )


def _llama_ids(model: Any, text: str) -> list[int]:
    return model.tokenize(text.encode(), add_bos=False, special=True)


def _judge_agreement(found: Agreement, quantization: str, show: Show) -> None:
    """Say or refuse what differs too much."""
    slack = 0.0 if found.reference == "fp32" else _GPU_ROUNDING
    warn, fail = (limit + slack for limit in LIMITS[quantization])
    told = f"class probabilities differ by up to {found.largest:.4f} from the merged model ({found.rows} prompts)"
    if found.largest > fail:
        raise ArenaError(
            f"{told}, more than {fail:g}: this file is not the same judge",
            where=f"--quantization {quantization}",
            remedy="merge again (--until merge); if it stays, choose more bits: bf16, or q8_0 for a 4-bit file",
        )
    show.note(f"{told}{'; see docs/edge.md for what fewer bits cost' if found.largest > warn else ''}")
    if found.same_ids < found.rows:
        show.note(
            f"llama.cpp's own tokenizer gives other ids for {found.rows - found.same_ids} of {found.rows} prompts: "
            "send token ids, not text, to a server (run.py score does)"
        )


def _new_manifest(gguf: Path, quantization: str, source: dict[str, str], agreement: Agreement) -> dict[str, Any]:
    from importlib.metadata import version

    return {
        "format": FORMAT,
        "quantization": quantization,
        "sha256": sha256_of(gguf),
        "bytes": gguf.stat().st_size,
        "source": source,
        "source_sha256": source_digest(source),
        "metadata_key": SOURCE_KEY,
        "llama_cpp_python": version("llama-cpp-python"),
        "checked": {
            "prompts": agreement.rows,
            "same_token_ids": agreement.same_ids,
            "largest_probability_difference": agreement.largest,
            "mean_probability_difference": agreement.mean,
            "merged_model_in": agreement.reference,
        },
    }
