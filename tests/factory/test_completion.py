"""Completion as each shell does it: the script is read by the shell itself, which then completes a line."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from factory.completion import script

ROOT = Path(__file__).resolve().parents[2]
CASES = [
    ("python run.py s", {"sft", "score", "show", "status"}),
    ("./run.py show 1 -e ", {"demo", "exam"}),
    ("python3 run.py watch --stage dpo_", {"dpo_judge", "dpo_reward"}),
    ("python run.py prepare --train vo", {"votes.csv"}),
    ("run.py sft --unt", {"--until"}),
]


@pytest.fixture
def place(tmp_path) -> Path:
    """A checkout with two experiments and a table of votes; python is this one."""
    for name in ("demo", "exam"):
        (tmp_path / "factory_configs" / name).mkdir(parents=True)
        (tmp_path / "factory_configs" / name / "experiment.yaml").touch()
    (tmp_path / "votes.csv").touch()
    (tmp_path / "run.py").symlink_to(ROOT / "run.py")
    programs = tmp_path / "programs"
    programs.mkdir()
    for name in ("python", "python3"):
        (programs / name).symlink_to(sys.executable)
    (programs / "run.py").symlink_to(ROOT / "run.py")
    return tmp_path


def ask(shell: str, place: Path, code: str) -> str:
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    (place / "script").write_text(script(shell))
    environment = {**os.environ, "PATH": f"{place / 'programs'}{os.pathsep}{os.environ['PATH']}", "HOME": str(place)}
    # A venv's python finds its packages by its own place, which the link hides.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    flags = {"bash": ["--norc"], "zsh": ["-f"], "fish": ["--no-config"]}[shell]
    done = subprocess.run(
        [shell, *flags, "-c", code],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    return done.stdout


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_bash(place, line, expected):
    words = " ".join(f"'{word}'" for word in line.split(" "))
    code = (
        "compopt() { :; }; source ./script\n"
        f"COMP_WORDS=({words}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))\n"
        '_run_py_completion; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    assert set(ask("bash", place, code).split()) == expected


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_fish(place, line, expected):
    offered = ask("fish", place, f"source ./script; complete -C '{line}'")
    assert {row.split("\t")[0] for row in offered.splitlines() if row} == expected


@pytest.mark.parametrize(("line", "expected"), CASES)
def test_zsh(place, line, expected):
    words = " ".join(f"'{word}'" for word in line.split(" "))
    # Outside of the line editor the completer's own commands only say what they were given.
    code = (
        "compdef() { :; }; source ./script\n"
        "compadd() { print -l -- ${(P)@[-1]}; }\n"
        "_describe() { print -l -- ${${(P)3}%%:*}; }\n"
        '_path_files() { print -l -- "${words[CURRENT]}"*(N); }\n'
        f"words=({words}); CURRENT=$#words; _run_py_completion"
    )
    assert set(ask("zsh", place, code).split()) == expected


def test_another_program_of_python_is_left_alone(place):
    code = (
        "compopt() { :; }; source ./script\n"
        'COMP_WORDS=(python other.py vot); COMP_CWORD=2; _run_py_completion; printf "%s" "${COMPREPLY[*]}"'
    )
    assert ask("bash", place, code) == "votes.csv"
    assert ask("fish", place, "source ./script; complete -C 'python other.py vot'").split() == ["votes.csv"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_scripts_are_valid_and_register_for_the_file_itself(shell, place):
    assert "run.py" in script(shell)
    ask(shell, place, {"fish": "fish --no-execute ./script"}.get(shell, f"{shell} -n ./script"))
