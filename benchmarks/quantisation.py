"""What each precision and quantisation of a trained judge costs in log loss, and how far its probabilities move.

    python benchmarks/quantisation.py --work FOLDER [--experiment demo] [--stage sft] [--docs]

FOLDER is a place where run.py trained and merged that stage. Missing GGUF files are exported. Every engine answers
for the whole validation fold, in one order; the calibration is left out, so that it cannot repair what rounding did.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from figures import ROOT, measured_on, put, table

RUNS = (
    ("torch", "fp32"),
    ("torch", "bf16"),
    ("torch", "8bit"),
    ("torch", "4bit"),
    ("llama.cpp", "f16"),
    ("llama.cpp", "bf16"),
    ("llama.cpp", "q8_0"),
    ("llama.cpp", "q4_k_m"),
)


def megabytes(judge, engine: str, precision: str) -> str:
    """Return the size of what the engine reads, in MiB."""
    from scoring.engines.llama_cpp import gguf_path

    gguf = [gguf_path(judge.folder, precision)]
    paths = gguf if engine == "llama.cpp" else judge.folder.glob("*.safetensors")
    return f"{sum(path.stat().st_size for path in paths) / 2**20:,.2f}"


def measure(experiment: str, stage: str) -> list[list[str]]:
    """Return one row an engine and precision."""
    import numpy as np

    from common.experiment import load_experiment
    from common.progress import Show
    from data_prep.export_reader import read_battles, read_rows
    from factory.stage_context import StageContext
    from scoring.engines.gguf import export_gguf
    from scoring.engines.llama_cpp import gguf_path
    from scoring.engines.protocol import open_engine
    from scoring.judge import load_judge
    from scoring.links import softmax
    from scoring.metrics import log_loss, paired_difference, verdict_codes

    exp = load_experiment(experiment)
    judge = load_judge(exp.merged_folder(stage))
    kept = read_rows(exp.data_folder, "valid")
    truth, labels = verdict_codes(kept["verdict"]), list(judge.frame.label_ids)
    sequences = judge.sequences(read_battles(exp.data_folder, "valid"))
    rows, exact = [], None
    for engine, precision in RUNS:
        if engine == "llama.cpp" and not gguf_path(judge.folder, precision).is_file():
            export_gguf(StageContext(exp, stage), precision, show=Show())
        # Speed is another script's matter: one thread suffices, and does not wait for another on a busy machine.
        options = {"threads": 1} if engine == "llama.cpp" else {}
        opened = open_engine(judge, engine, precision, **options)
        found = softmax(opened.label_logits(sequences, labels))
        opened.close()
        exact = found if exact is None else exact
        apart = paired_difference(found, exact, truth, kept["group"], seed=1)
        low, high = apart["ci95"]
        moved = np.abs(found - exact)
        rows.append(
            [
                engine,
                precision,
                megabytes(judge, engine, precision),
                f"{log_loss(found, truth):.4f}",
                f"{apart['difference']:+.5f} [{low:+.5f}, {high:+.5f}]",
                f"{moved.max():.1e}",
                f"{moved.mean():.1e}",
            ]
        )
        print(" | ".join(rows[-1]), flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--experiment", default="demo")
    parser.add_argument("--stage", default="sft")
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    os.chdir(arguments.work)
    rows = measure(arguments.experiment, arguments.stage)
    headings = ["engine", "precision", "MiB", "log loss", "minus fp32 [95%]", "largest difference", "mean difference"]
    how = measured_on(f"python benchmarks/quantisation.py --work FOLDER --experiment {arguments.experiment}")
    text = f"{table(headings, rows)}\n\n{how}"
    print(text)
    if arguments.docs:
        put(ROOT / "docs" / "edge.md", "quantisation figures", text)


if __name__ == "__main__":
    main()
