"""What each precision and quantisation of a trained judge costs in log loss, and how far its probabilities move.

    python benchmarks/quantisation.py --work FOLDER [--experiment demo] [--stage sft] [--rows N] [--write]

FOLDER is a place where run.py trained and merged that stage. Missing GGUF files are exported. Every engine answers
for the validation fold or its first N battles, in one order; the calibration is left out, so that it cannot repair
what rounding did.
"""

from __future__ import annotations

import os

import numpy as np
from figures import options, publish, row, table
from workbench import mean

from common.experiment import load_experiment
from common.progress import Show
from data_prep.export_reader import read_battles, read_rows
from factory.stage_context import StageContext
from scoring.engines import open_engine
from scoring.engines.gguf import export_gguf
from scoring.engines.llama_cpp import gguf_path
from scoring.judge import load_judge
from scoring.links import softmax
from scoring.metrics import row_losses, verdict_codes

PRECISIONS = {"torch": ("fp32", "bf16", "8bit", "4bit"), "llama.cpp": ("f16", "bf16", "q8_0", "q4_k_m")}
HEADINGS = ["engine", "precision", "MiB", "log loss", "minus fp32 [95%]", "largest difference", "mean difference"]


def main() -> None:
    asked = options(__doc__, "work", experiment="demo", stage="sft", rows=1 << 20).parse_args()
    os.chdir(asked.work)
    context = StageContext(load_experiment(asked.experiment), asked.stage)
    data, judge = context.experiment.data_folder, load_judge(context.merged)
    kept, sequences = read_rows(data, "valid")[: asked.rows], judge.sequences(read_battles(data, "valid"))[: asked.rows]
    truth, rows, exact = verdict_codes(kept["verdict"]), [], None
    for engine, precision in ((name, each) for name in PRECISIONS for each in PRECISIONS[name]):
        files, settings = list(judge.folder.glob("*.safetensors")), {}
        if engine == "llama.cpp":
            # Speed is another script's question: one thread does not wait for others on a busy machine.
            files, settings = [gguf_path(judge.folder, precision)], {"threads": 1}
            if not files[0].is_file():
                export_gguf(context, precision, show=Show())
        opened = open_engine(judge, engine, precision, **settings)
        found = softmax(opened.label_logits(sequences, list(judge.frame.label_ids)))
        opened.close()
        exact = found if exact is None else exact
        moved, losses = np.abs(found - exact), row_losses(found, truth)
        size = f"{sum(path.stat().st_size for path in files) / 2**20:,.2f}"
        costs = f"{losses.mean():.4f}", mean(losses - row_losses(exact, truth), kept["group"], "+.5f", 5)
        rows.append(row(engine, precision, size, *costs, f"{moved.max():.1e}", f"{moved.mean():.1e}"))
    publish("quantisation figures", table(HEADINGS, rows), asked.write)


if __name__ == "__main__":
    main()
