"""What a merge loses: the trained adapter on its quantised base against merges of it, on the same battles.

python benchmarks/merge_gate.py --demo FOLDER            # a folder where `run.py demo` was run to its end
python benchmarks/merge_gate.py --wide FOLDER            # trains a wider judge from scratch in FOLDER (minutes)
python benchmarks/merge_gate.py --demo … --wide … --write   # both, into docs/merge.md
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from figures import ROOT, options, publish, table
from workbench import Workbench, battles_of

from common.experiment import Labels, load_experiment
from common.progress import Show
from data_prep.export_reader import read_battles
from data_prep.prompt import JudgePrompt
from data_prep.synthetic import write_arena
from factory.merge import DequantisedBase
from factory.stage_context import StageContext
from scoring.checks.merge_check import compared
from scoring.engines.torch_engine import score_labels
from scoring.judge import load_judge
from scoring.links import softmax
from scoring.model_loading import trained_adapter

BASES = {"the base": "base", "the dequantised base": "dequantised"}
HEADINGS = ["judge", "merged into", "stored in", "largest difference", "log loss difference"]


def train_wide(folder: Path) -> None:
    """Train a judge on a random base whose weights are large enough for nf4's rounding to matter."""
    import torch
    from transformers import AutoModelForCausalLM

    bench = Workbench(folder)
    if (bench.output("wide", "sft") / "merged").is_dir():
        return
    write_arena(folder / "arena", seed=3, train_rows=2000, test_rows=50)
    prompt = JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels())
    texts = map(prompt.message, battles_of(folder / "arena" / "train.csv"))
    plain = folder / bench.base("plain", texts, seed=3, hidden=256, layers=2, heads=8, feed_forward=512)
    shutil.copytree(plain, folder / "models" / "wide", dirs_exist_ok=True)
    model = AutoModelForCausalLM.from_pretrained(plain)
    with torch.no_grad():  # linear layers four times as large as fresh ones, as those of trained models are
        for key, weight in model.named_parameters():
            if "_proj" in key:
                weight.mul_(4)
    model.save_pretrained(folder / "models" / "wide")
    recipe = {"learning_rate": 1.0e-3, "lora_rank": 16, "lora_alpha": 32, "max_steps": 120}
    bench.variant("wide", "demo", model="models/wide", recipes={"sft": recipe})
    bench.prepare("wide", "--train", "arena/train.csv", "--truth", "arena/truth.csv")
    bench.run("sft", "-e", "wide", "--until", "merge")


def measure(folder: Path, name: str, title: str, count: int) -> list[list[str]]:
    """Return one row a kind of merge of a trained adapter, the first `count` validation battles asked."""
    import torch

    os.chdir(folder)
    experiment = load_experiment(name)
    context = StageContext(experiment, "sft")
    judge, battles = load_judge(context.merged), read_battles(experiment.data_folder, "valid")[:count]
    sequences, verdicts = judge.sequences(battles), [battle.verdict for battle, _ in battles]

    def ask(model: Any) -> Any:
        return softmax(score_labels(model, sequences, judge.frame.label_ids))

    trained, rows = ask(trained_adapter(context).load("cpu")), []
    for onto, value in BASES.items():
        model = merged(StageContext(experiment.model_copy(update={"merge_onto": value}), "sft"))
        for stored in ("fp32", "bf16"):
            if stored == "bf16":
                model = model.to(torch.bfloat16).float()
            found = compared(trained, ask(model), verdicts, 1.0)
            apart = found["log_loss_merged"] - found["log_loss_adapter"]
            rows.append([title, onto, stored, f"**{found['max_abs_diff']:.1e}**", f"{apart:+.5f}"])
    return rows


def merged(context: StageContext) -> Any:
    """Return base and adapter as one model in fp32, merged as LLaMA-Factory merges."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if context.experiment.merges_dequantised:
        DequantisedBase(context).ensure(Show())
    model = AutoModelForCausalLM.from_pretrained(context.experiment.merge_model("sft"))
    return PeftModel.from_pretrained(model, str(context.adapter)).merge_and_unload().eval()


def main() -> None:
    parser = options(__doc__)
    parser.add_argument("--demo", type=lambda path: Path(path).resolve(), help="a folder with a finished demo")
    parser.add_argument("--wide", type=lambda path: Path(path).resolve(), help="a folder to train a wider judge in")
    parser.add_argument("--rows", type=int, default=200, help="validation battles that each model answers [200]")
    asked = parser.parse_args()
    rows = []
    if asked.demo:
        rows += measure(asked.demo, "demo", "the demo's (hidden 64)", asked.rows)
    if asked.wide:
        train_wide(asked.wide)
        rows += measure(asked.wide, "wide", "wider (hidden 256, weights x4)", asked.rows)
    publish("merge figures", table(HEADINGS, rows), asked.write)


if __name__ == "__main__":
    main()
