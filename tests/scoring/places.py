"""A place with a judge in it that was never trained, as training and scoring would have left it, made in a second."""

from __future__ import annotations

import csv
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from common.experiment import Experiment
from common.files import write_json
from data_prep.export_reader import FORMAT
from scoring.calibration import FittedLink
from scoring.judge import write_judge


def identity(swap_tta: bool = False) -> dict:
    """Return the calibration that leaves the softmax as it is, as a report keeps it."""
    third, none = dict.fromkeys(["a", "b", "tie"], 1 / 3), np.empty((0, 3))
    plain = FittedLink("logits", 2 if swap_tta else 1, False, None, "few rows", None, None, 0, third, None, none)
    return plain.to_json()


def judged_place(experiment: Experiment, model, tokenizer, frame, prompt, *, swap_tta: bool = False) -> None:
    """Lay a judge, its export's manifest and its report into the current folder."""
    merged = experiment.merged_folder("sft")
    model.save_pretrained(merged)
    tokenizer.save(str(merged / "tokenizer.json"))
    write_judge(merged, experiment, frame, prompt.source, {"experiment": experiment.name, "stage": "sft"})
    manifest = {"format": FORMAT, "frame": asdict(frame), "files": {}, "sources": {}, "views": []}
    write_json(experiment.data_folder / "manifest.json", manifest)
    calibrations = {"one_order": identity(), "both_orders": identity(True)}
    report = {"calibration": identity(swap_tta), "calibrations": calibrations}
    report["scoring"] = {"engine": "torch", "precision": "fp32"}
    write_json(experiment.output_folder("sft") / "report.json", report)


def write_battles(path: Path, count: int, seed: int = 0) -> Path:
    """Write short battles of varying length in the competition's schema."""
    random = np.random.default_rng(seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "prompt", "response_a", "response_b"])
        for number in range(count):
            texts = ["quick fox " * int(random.integers(1, 6)) + str(random.integers(1000)) for _ in range(3)]
            writer.writerow([f"b{number}", *(json.dumps([text]) for text in texts)])
    return path


def save_adapter(base: Path, folder: Path, *, train=True, **config) -> Path:
    """Save a LoRA adapter on `base`, with random weights where `train`, as LLaMA-Factory does (fp32, safetensors)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base)
    config = {"target_modules": "all-linear", "modules_to_save": ["embed_tokens", "lm_head"]} | config
    torch.manual_seed(4)
    policy = get_peft_model(model, LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, task_type="CAUSAL_LM", **config))
    if train:
        with torch.no_grad():
            for parameter in policy.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.05)
    policy.save_pretrained(folder)
    return folder


def configured(folder: Path, base: Path, *keys: str) -> Path:
    """Lay out templates, a base model and the experiment exam with these keys in `folder`."""
    (folder / "templates").symlink_to(Path(__file__).resolve().parents[2] / "templates")
    (folder / "models").mkdir()
    (folder / "models" / "arena-tiny").symlink_to(base)
    experiment = folder / "factory_configs" / "exam" / "experiment.yaml"
    experiment.parent.mkdir(parents=True)
    keys = ("model: models/arena-tiny", "template: qwen3_nothink", "cutoff_len: 300", *keys)
    experiment.write_text("\n".join(keys))
    return folder
