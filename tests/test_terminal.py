"""The same commands attended, under a pseudo-terminal, and piped: a live line with time left, or plain lines."""

import contextlib
import io
import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import run
from common.console import make_output_safe
from factory.devices import Devices

ROOT = Path(__file__).resolve().parents[1]
COLOUR = re.compile(r"\x1b\[(?:\d+;)*(?:3\d|4\d|9\d)(?:;\d+)*m")
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def attended(folder: Path, *arguments: str, seconds: float = 400, **environment: str) -> tuple[int, str]:
    """Call run.py in a terminal of 120 columns; return its exit code and everything that the terminal got."""
    ours, theirs = pty.openpty()
    own = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "120", "HF_DATASETS_CACHE": str(folder / "cache")}
    for name in ("CI", "NO_COLOR", "FORCE_COLOR"):
        own.pop(name, None)
    call = [sys.executable, str(ROOT / "run.py"), *arguments]
    process = subprocess.Popen(call, cwd=folder, env={**own, **environment}, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said, end = b"", time.monotonic() + seconds
    with contextlib.suppress(OSError):  # Linux' way to say that the other end is closed
        while time.monotonic() < end:
            if select.select([ours], [], [], 0.2)[0]:
                said += os.read(ours, 65536)
    os.close(ours)
    return process.wait(30), said.decode("utf-8", "replace")


def test_an_attended_run_has_a_live_line_and_trains_the_same_bytes(chain, tmp_path):
    folder = tmp_path / "place"
    shutil.copytree(chain, folder, symlinks=True, ignore=shutil.ignore_patterns("cache", "saves", "outputs"))
    code, said = attended(folder, "prepare", "-e", "demo", "--train", "arena/train.csv", "--test", "arena/test.csv")
    assert code == 0, said
    assert "━" in said or "train battles" in said, "the bar of prepare"
    assert re.search(r"next: python run.py sft -e demo", said)
    code, said = attended(folder, "sft", "-e", "demo", "--fresh")
    assert code == 0, said
    bare = CONTROL.sub("", said)
    assert re.search(r"sft: (training|\d+%.*step \d+/12  training loss \d+\.\d+)", bare)
    assert re.search(r"sft: (merging|\d+%  of the merged model written)", bare)
    assert re.search(r"scoring the validation fold.*\d:\d\d:\d\d left  [\d,]+/[\d,]+, [\d,]+ tokens/s", bare)
    assert "\x1b[2K" in said and COLOUR.search(said), "the line is drawn again in its place, in colours"
    for said_once in ("sft: trained in", "sft: merged in", "sft: scored"):
        assert sum(line.startswith(said_once) for line in bare.splitlines()) == 1
    last, tokens, label = re.search(r"loss \S+ -> (\S+), the mean of (\d+) tokens: at most (\S+) for", bare).groups()
    assert float(label) == pytest.approx(float(last) * int(tokens), abs=0.006)
    for word in ("report:", "submission:", "next:"):
        assert word in bare
    (adapter,) = folder.glob("saves/*/lora/demo_sft/adapter_model.safetensors")
    assert adapter.read_bytes() == (chain / adapter.relative_to(folder)).read_bytes(), "same seed, same bytes"


def test_a_piped_run_says_plain_lines(chain):
    said = (chain / "sft.said").read_text(encoding="utf-8")
    assert "\x1b" not in said and "\r" not in said and "━" not in said
    assert re.search(r"^sft: 83% .*step 10/12  training loss \d+\.\d+  lr \S+$", said, re.MULTILINE)
    assert re.search(r"^sft: scoring the validation fold: 100%.* ([\d,]+)/\1, [\d,]+ tokens/s", said, re.MULTILINE)
    for line in ("sft: training", "sft: merging"):
        assert said.splitlines().count(line) == 1


SNOWMAN = "☃ 你好 ünïcode \udcff"
COMMANDS = {
    **dict.fromkeys(("audit-labels", "compare", "dpo", "probe", "render", "rm", "sft"), ("-e", "exam")),
    **dict.fromkeys(("clean", "demo", "doctor", "rank", "status"), ()),
    "board": ("--host", SNOWMAN),
    "completion": ("bash",),
    "ensemble": ("-e", "exam:sft", "-e", "exam:rm", "--name", "both"),
    "export": ("-e", "exam", "--converter", SNOWMAN),
    "forecast": ("-e", "exam", "--card", SNOWMAN),
    "kaggle-pack": ("-e", "exam", "--competition", SNOWMAN),
    "new": ("winter", "--model", SNOWMAN),
    "prepare": ("-e", "exam", "--train", "☃.csv"),
    "publish": ("-e", "exam", "--repo", "☃/x", "--dry-run"),
    "score": ("-e", "exam", "--input", "☃.csv", "--output", "☃ out.csv"),
    "serve": ("-e", SNOWMAN),
    "show": ("1001", "-e", "exam"),
    "verify": ("outputs/exam/sft",),
    "watch": ("-e", "exam", "--once", "--stage", "sft"),
}


@pytest.mark.parametrize("encoding", ["ascii", "gbk", "cp1252"])
def test_the_output_of_every_command_survives_any_terminal(place, monkeypatch, encoding):
    assert COMMANDS.keys() == run.cli.commands.keys()
    monkeypatch.setattr("scoring.pipeline.demo", lambda *_, **__: 1 / 0)  # it would train
    monkeypatch.setattr("factory.doctor.devices", lambda **_: Devices(torch=SNOWMAN))
    rows = place.rows()
    rows[0]["prompt"], rows[1]["id"] = json.dumps([SNOWMAN]), SNOWMAN[:-1]
    place.table(rows, "☃.csv")
    Path("factory_configs/winter").mkdir()
    Path("factory_configs/winter/experiment.yaml").write_text(f"model: {SNOWMAN[:-1]}\n", encoding="utf-8")
    for name, arguments in COMMANDS.items():
        for verbose in ([], ["-v"]):
            with monkeypatch.context() as patch:
                streams = [io.TextIOWrapper(io.BytesIO(), encoding=encoding) for _ in range(2)]
                patch.setattr(sys, "stdout", streams[0])
                patch.setattr(sys, "stderr", streams[1])
                make_output_safe()
                try:
                    code = run.cli.main([name, *arguments, *verbose], standalone_mode=True)
                except (SystemExit, ZeroDivisionError) as ended:
                    code = getattr(ended, "code", 0)
                for stream in streams:
                    stream.flush()
                said = b"".join(stream.buffer.getvalue() for stream in streams).decode(encoding, "replace")
            assert code in (0, 1, 2) and (verbose or "Traceback" not in said), f"{name}: {said}"
            assert said, name
