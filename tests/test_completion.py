"""Completion: the shell reads the script that `run.py completion` prints, and completes a line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from chain import ROOT, call


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("run.py s", {"sft", "score", "serve", "show", "status"}),
        ("./run.py show 1 -e ", {"demo", "exam"}),
        ("run.py watch --stage dpo_", {"dpo_judge", "dpo_reward"}),
        ("run.py sft --unt", {"--until"}),
    ],
)
def test_bash_completes_commands_options_and_experiments(tmp_path, line, expected):
    for name in ("demo", "exam"):
        (tmp_path / "factory_configs" / name).mkdir(parents=True)
        (tmp_path / "factory_configs" / name / "experiment.yaml").touch()
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    (tmp_path / "script").write_text(call("completion", "bash").output)
    words = " ".join(f"'{word}'" for word in line.split(" "))
    code = (
        "source ./script; compopt() { :; }\n"
        f"COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        '_runpy_completion "${COMP_WORDS[0]}"; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    own, bash = {**os.environ, "PATH": path}, ["bash", "--norc", "-c", code]
    done = subprocess.run(bash, cwd=tmp_path, env=own, capture_output=True, text=True)
    assert not done.stderr and set(done.stdout.split()) == expected


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_each_script_is_valid_and_puts_run_py_on_the_path(tmp_path, shell):
    printed = call("completion", shell).output
    assert str(ROOT) in printed.splitlines()[0] and "_RUN_PY_COMPLETE" in printed
    if shutil.which(shell):
        (tmp_path / "script").write_text(printed)
        check = "--no-execute" if shell == "fish" else "-n"
        assert subprocess.run([shell, check, str(tmp_path / "script")], check=False).returncode == 0
