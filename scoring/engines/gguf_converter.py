"""llama.cpp's own converter and quantiser as our child process runs them, without a change to their files.

    python -m scoring.engines.gguf_converter FOLDER OUTPUT TYPE --converter LLAMA_CPP [--pre NAME]

`--pre` names the pre-tokenizer where the converter's table of known tokenizers does not hold this one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from factory.launcher import follow_parent

SCRIPT = "convert_hf_to_gguf.py"
FOUR_BITS = "q4_k_m"


def main() -> None:
    """Convert one folder; the converter's own messages go to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "output"):
        parser.add_argument(name, type=Path)
    parser.add_argument("type")
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--pre")
    arguments = parser.parse_args()
    follow_parent()
    _refuse_own_code()
    if arguments.type != FOUR_BITS:
        _convert(arguments, arguments.output, arguments.type)
        return
    # The quantiser starts from what the merged model holds, not from something rounded before.
    whole = arguments.output.with_name("whole.gguf")
    _convert(arguments, whole, _own_type(arguments.folder))
    _quantise(whole, arguments.output)
    whole.unlink()


def _refuse_own_code() -> None:
    """Run no code that a model brings along: the converter trusts that of a dozen architectures, here or on a hub."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub's library is imported
    from transformers import dynamic_module_utils

    def refuse(name: str, module: str, **_: Any) -> None:
        raise PermissionError(f"{module}: the model's own code ({name}) is not run")

    dynamic_module_utils.get_class_in_module = refuse


def _convert(arguments: argparse.Namespace, output: Path, kind: str) -> None:
    os.environ.pop("NO_LOCAL_GGUF", None)  # the converter fits the gguf package beside it, and no other
    converter = arguments.converter.resolve()
    sys.path[:0] = [str(converter / "gguf-py"), str(converter)]
    import convert_hf_to_gguf
    from conversion.base import TextModel

    original = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self, tokenizer):
        try:
            return original(self, tokenizer)
        except NotImplementedError:
            if not arguments.pre:
                raise
            print(f"not in the converter's table of tokenizers: {arguments.pre} fits this one", file=sys.stderr)
            return arguments.pre

    TextModel.get_vocab_base_pre = get_vocab_base_pre
    sys.argv = [SCRIPT, str(arguments.folder), "--outfile", str(output), "--outtype", kind]
    convert_hf_to_gguf.main()


def _own_type(folder: Path) -> str:
    """Return the converter's name of the type that the merged weights have."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    names = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
    return names.get(config.get("dtype") or config.get("torch_dtype"), "f32")


def _quantise(source: Path, target: Path) -> None:
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if code != 0 or not target.is_file():
        raise RuntimeError(f"llama.cpp's quantiser stopped with code {code}: free disk space; or choose q8_0")


if __name__ == "__main__":
    main()
