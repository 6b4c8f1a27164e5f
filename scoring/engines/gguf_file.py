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

# llama.cpp's own names, most exact first.
QUANTIZATIONS = ("f16", "bf16", "q8_0", "q4_k_m")
SOURCE_KEY = "arena_factory.source_sha256"
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
