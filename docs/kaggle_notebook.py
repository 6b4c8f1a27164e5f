# %% [markdown]
# # Score the LMSYS test set without internet
# Attach the competition and three data sets: `arena-wheels`, `arena-code`, `arena-judge` (docs/kaggle.md).

# %%
import os
import subprocess
import sys
from pathlib import Path

INPUT = Path(os.environ.get("KAGGLE_INPUT", "/kaggle/input"))
WORKING = Path(os.environ.get("KAGGLE_WORKING", "/kaggle/working"))
EXPERIMENT = os.environ.get("ARENA_EXPERIMENT", "qwen3-4b")
STAGE = os.environ.get("ARENA_STAGE", "sft")
PRECISION = os.environ.get("ARENA_PRECISION", "fp16")  # T4s have no bf16
TIME_LIMIT = os.environ.get("ARENA_TIME_LIMIT", "8h")
TEST = INPUT / "lmsys-chatbot-arena" / "test.csv"
os.environ["HF_HUB_OFFLINE"] = "1"

# %%
# Packages, from the wheels alone.
wheels = INPUT / "arena-wheels"
if wheels.is_dir():
    code = INPUT / "arena-code"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels)]
    subprocess.run([*install, "--require-hashes", "-r", str(code / "requirements.lock")], check=True)

# %%
# One folder in which code and judge lie as they did at home; inputs are read-only, so they are linked into it.
for source in (INPUT / "arena-code", INPUT / "arena-judge"):
    for path in sorted(p for p in source.rglob("*") if p.is_file()):
        target = WORKING / "arena" / path.relative_to(source)
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.exists():
            target.symlink_to(path)


# %%
def run(*arguments: str) -> None:
    """Call run.py in the working folder; its errors say what to do."""
    subprocess.run([sys.executable, "run.py", *map(str, arguments)], cwd=WORKING / "arena", check=True)


run(
    "score",
    "-e",
    EXPERIMENT,
    "--stage",
    STAGE,
    "--input",
    TEST,
    "--output",
    WORKING / "submission.csv",
    "--precision",
    PRECISION,
    "--time-limit",
    TIME_LIMIT,
)

# %%
print((WORKING / "submission.csv").read_text().splitlines()[:4])
