"""What a merge of real weights loses: a trained adapter on its base against merges of it, on the same real battles.

    python benchmarks/merge_gate.py --votes FILE --model FOLDER --work FOLDER [--steps 60] [--cutoff 192] [--rows 148]
                                    [--only lora|qlora] [--write]

FOLDER of --model is a pretrained model in 32 bits (make extra-smollm2). It is trained for some steps of 4 battles, at a
rate that moves its answers as a long training would: LoRA on the weights as they are, and QLoRA (nf4) on a copy in
bf16, as most models are published. LLaMA-Factory merges in the type that the weights are stored in; all then answer
some validation battles in fp32, so that only the merge differs. Answers are kept in --work: an interrupted run goes on.
"""

from __future__ import annotations

import os
from argparse import Namespace
from pathlib import Path

import numpy as np
from figures import options, publish, row, table
from workbench import Workbench

from common.experiment import load_experiment
from common.progress import Show
from data_prep.export_reader import read_battles
from factory.merge import DequantisedBase
from factory.stage_context import StageContext
from scoring.checks.merge_check import compared
from scoring.engines.torch_engine import score_labels
from scoring.judge import load_judge
from scoring.links import softmax

RECIPE = {"lora_rank": 64, "lora_alpha": 128, "learning_rate": 1.0e-3, "gradient_accumulation_steps": 1}
RECIPE |= {"per_device_train_batch_size": 4, "save_strategy": "no", "report_to": "none"}
JUDGES = {"lora": "LoRA, base in fp32", "qlora": "QLoRA, base in bf16"}
TYPES, BESIDE, WITHOUT = ("bfloat16", "float16", "float32"), "beside", "without the adapter"
HEADINGS = ["training", "merged into", "in", "largest difference", "mean difference", "log loss difference"]


def train(bench: Workbench, name: str, asked: Namespace) -> None:
    """Train and merge one judge, unless that was done."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base, bits = (asked.model.name, None) if name == "lora" else (f"{asked.model.name}-bf16", 4)
    folder = bench.folder / "models" / base
    if not folder.is_dir():
        AutoTokenizer.from_pretrained(asked.model).save_pretrained(folder)
        dtype = "bfloat16" if bits else "float32"
        AutoModelForCausalLM.from_pretrained(asked.model, dtype=dtype).save_pretrained(folder)
    keys = {"valid_share": 0.3, "cutoff_len": asked.cutoff, "quantization_bit": bits, "model": f"models/{base}"}
    keys["recipes"] = {"sft": RECIPE | {"max_steps": asked.steps}}
    bench.variant(name, "--train", str(asked.votes[0]), of="smollm2-135m", **keys)
    if not (bench.output(name, "sft") / "merged").is_dir():
        bench.run("sft", "-e", name, "--until", "merge")


def measure(name: str, title: str, count: int) -> list[list[str]]:
    """Return how far a trained adapter moved its base, and one row a kind of merge; drawn validation battles asked."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    context = StageContext(load_experiment(name), "sft")
    judge, battles = load_judge(context.merged), read_battles(context.experiment.data_folder, "valid")
    battles = [battles[i] for i in np.random.default_rng(1).permutation(len(battles))[:count]]
    sequences, verdicts = judge.sequences(battles), [battle.verdict for battle, _ in battles]

    def answers(weights: Path, how: str) -> np.ndarray:
        """Return what the weights answer in fp32, with the adapter merged in a type, beside them, or without it."""
        kept = Path(f"answers-{name}-{weights.name}-{how}-{count}.npy")
        if not kept.is_file():
            model = AutoModelForCausalLM.from_pretrained(weights, dtype=how if how in TYPES else "float32")
            if how != WITHOUT:
                model = PeftModel.from_pretrained(model, context.adapter)
            model = (model.merge_and_unload() if how in TYPES else model).float().eval()
            np.save(kept, softmax(score_labels(model, sequences, judge.frame.label_ids)))
        return np.load(kept)

    bases = {"the base": Path(context.recipe["model_name_or_path"])}
    if context.experiment.merges_dequantised:
        (copy := DequantisedBase(context)).ensure(Show())
        bases["the dequantised base"] = copy.folder
    own, rows = list(bases)[-1], []
    trained = answers(bases[own], BESIDE)
    for onto, how in [(own, WITHOUT), *((onto, dtype) for onto in bases for dtype in TYPES)]:
        found = compared(trained, answers(bases[onto], how), verdicts, 1.0)
        apart = found["log_loss_merged"] - found["log_loss_adapter"]
        moved = [f"**{100 * found[f'{which}_abs_diff']:.2f}** points" for which in ("max", "mean")]
        rows.append(row(title, onto, how, *moved, f"{apart:+.5f}"))
    return rows


def main() -> None:
    parser = options(__doc__, "votes", "model", "work", steps=60, cutoff=192, rows=148)
    parser.add_argument("--only", choices=JUDGES)
    asked = parser.parse_args()
    bench, rows = Workbench(asked.work), []
    os.chdir(bench.folder)
    for name in [asked.only] if asked.only else JUDGES:
        train(bench, name, asked)
        rows += measure(name, JUDGES[name], asked.rows)
    publish("merge figures", table(HEADINGS, rows), asked.write)


if __name__ == "__main__":
    main()
