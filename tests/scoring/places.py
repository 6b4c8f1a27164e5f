"""Parts of places that several tests of scoring lay out: a calibration, an adapter, an experiment."""

from pathlib import Path

import numpy as np

from scoring.calibration import FittedLink


def identity() -> dict:
    """Return the calibration that leaves the softmax as it is, as a report keeps it."""
    third, none = dict.fromkeys(["a", "b", "tie"], 1 / 3), np.empty((0, 3))
    plain = FittedLink("logits", 1, False, None, "few rows", None, None, 0, third, None, none)
    return plain.to_json()


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
