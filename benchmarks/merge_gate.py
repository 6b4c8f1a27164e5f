"""What a merge loses: the trained adapter on its quantised base against merges of it, on the same battles.

python benchmarks/merge_gate.py --demo FOLDER            # a folder where `run.py demo` was run to its end
python benchmarks/merge_gate.py --wide FOLDER            # trains a wider judge from scratch in FOLDER (minutes)
python benchmarks/merge_gate.py --demo … --wide … --write   # both, into docs/merge.md
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from figures import ROOT, measured_on, put, table
from workbench import Workbench

BASES = {"the base": "base", "the dequantised base": "dequantised"}
HEADINGS = [
    "judge",
    "merged into",
    "stored in",
    "largest difference",
    "log loss difference",
]


def main() -> None:
    """Measure the folders that are given and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", type=Path, help="a folder with a finished demo")
    parser.add_argument("--wide", type=Path, help="a folder to train a wider judge in")
    parser.add_argument("--rows", type=int, default=200, help="validation battles that each model answers [200]")
    parser.add_argument("--write", action="store_true", help="put the table into docs/merge.md")
    options = parser.parse_args()
    rows, shown = [], ""
    if options.demo:
        shown += " --demo FOLDER"
        rows += measure(options.demo.resolve(), "demo", "the demo's (hidden 64)", options.rows)
    if options.wide:
        shown += " --wide FOLDER"
        train_wide(options.wide)
        rows += measure(options.wide.resolve(), "wide", "wider (hidden 256, weights x4)", options.rows)
    text = f"{table(HEADINGS, rows)}\n\n{measured_on(f'python benchmarks/merge_gate.py{shown}')}"
    print(text)
    if options.write:
        put(ROOT / "docs" / "merge.md", "merge figures", text)


def train_wide(folder: Path) -> None:
    """Train a judge on a random base whose weights are large enough for nf4's rounding to matter."""
    from data_prep.synthetic import write_arena

    bench = Workbench(folder)
    if not (folder / "arena").is_dir():
        write_arena(folder / "arena", seed=3, train_rows=2000, test_rows=50)
    build_wide_base(folder / "models" / "wide", folder / "arena" / "train.csv")
    recipe = {"learning_rate": 1.0e-3, "lora_rank": 16, "lora_alpha": 32, "max_steps": 120}
    bench.variant("wide", "demo", model="models/wide", recipes={"sft": recipe})
    bench.prepare("wide", "--train", "arena/train.csv", "--truth", "arena/truth.csv")
    if not (folder / "saves" / "wide" / "lora" / "wide_sft" / "adapter_model.safetensors").is_file():
        bench.run("sft", "-e", "wide", "--until", "train")


def build_wide_base(folder: Path, votes: Path) -> None:
    """Draw a random model whose linear layers are four times as large as a fresh one's, as trained models' are."""
    import torch
    from transformers import AutoModelForCausalLM

    from common.experiment import Labels
    from data_prep.prompt import JudgePrompt
    from data_prep.readers import VoteReader
    from factory.base_model import BaseModelSize, build_base_model

    if folder.is_dir():
        return
    size = BaseModelSize(hidden=256, layers=2, heads=8, feed_forward=512)
    prompt = JudgePrompt.load(ROOT / "templates" / "judge_prompt.j2", Labels())
    build_base_model(folder, (prompt.message(b) for _, b in VoteReader(votes, labelled=True)), seed=3, size=size)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "_proj" in name:
                weight.mul_(4)
    model.save_pretrained(folder)


def measure(folder: Path, experiment: str, name: str, count: int) -> list[list[str]]:
    """Return one row a kind of merge of a trained adapter, the first `count` validation battles asked."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        return _measure(experiment, name, count)
    finally:
        os.chdir(before)


def _measure(experiment: str, name: str, count: int) -> list[list[str]]:
    import torch

    from common.experiment import load_experiment
    from data_prep.chat_template import load_frame
    from data_prep.export_reader import read_battles, read_manifest
    from data_prep.prompt import JudgePrompt
    from factory.stage_context import StageContext
    from scoring.checks.merge_check import compared
    from scoring.engines.torch_engine import score_labels
    from scoring.links import softmax
    from scoring.model_loading import trained_adapter

    its = load_experiment(experiment)
    frame, tokenizer = load_frame(its)
    assert list(frame.label_ids) == list(read_manifest(its.data_folder)["frame"]["label_ids"])
    prompt = JudgePrompt.load(ROOT / its.prompt_template, its.labels)
    battles = read_battles(its.data_folder, "valid")[:count]
    texts = [frame.wrap(prompt.message(battle, dropped)) for battle, dropped in battles]
    sequences = [frame.surround(e.ids) for e in tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def ask(model: Any):
        return softmax(score_labels(model, sequences, frame.label_ids))

    trained = ask(trained_adapter(StageContext(its, "sft")).load("cpu"))
    verdicts, rows = [battle.verdict for battle, _ in battles], []
    for title, onto in BASES.items():
        model = merged(its.model_copy(update={"merge_onto": onto}))
        for stored in ("fp32", "bf16"):
            if stored == "bf16":
                model = model.to(torch.bfloat16).float()
            found = compared(trained, ask(model), verdicts, 1.0)
            rows.append([name, title, stored, *figures(found)])
    return rows


def merged(its) -> Any:
    """Return base and adapter as one model in fp32, merged as LLaMA-Factory merges."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from common.progress import Show
    from factory.merge import dequantised_base

    base = dequantised_base(its, "sft")
    if base:
        base.ensure(Show())
    model = AutoModelForCausalLM.from_pretrained(its.merge_model("sft"))
    return PeftModel.from_pretrained(model, str(its.adapter_folder("sft"))).merge_and_unload().eval()


def figures(found: dict[str, Any]) -> list[str]:
    """Return the figures of one comparison as text."""
    adapter, after = found["log_loss_adapter"], found["log_loss_merged"]
    return [f"**{found['max_abs_diff']:.1e}**", f"{after - adapter:+.5f}"]


if __name__ == "__main__":
    main()
