"""The presets: the experiments for models that people use for this task, as `run.py new` would make them.

`python -m factory.presets` renders their folders in factory_configs anew after a change here or in templates/; a test
compares the committed files with what is rendered. The card of each is by the forecast's formula, by test; none of them
was run on it.
"""

from __future__ import annotations

from pathlib import Path

from common.experiment import Experiment
from common.stages import TRAININGS
from factory.new_experiment import Wish, render_experiment, write_experiment

_FORECAST = "by calculation; `python run.py forecast` tells what your votes need"
# A row's fp32 logits take 4 GB and more of a 24 GB card beside the weights of 7 to 9 billion parameters.
_BY_ONE = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "per_device_eval_batch_size": 1}
_ONE_ROW = {"sft": _BY_ONE}
# A pair's logits leave a 24 GB card no room for Adam's moments in 32 bits beside 8 billion parameters.
_SMALL_OPTIMIZER = {step: {"optim": "paged_adamw_8bit"} for step in ("dpo_judge", "dpo_reward")}
# Its adapter would weigh as much as the model at rank 64, optimizer included.
_SMALL_ADAPTER = {"sft": {"lora_rank": 16, **_BY_ONE}, **{step: {"lora_rank": 16} for step in TRAININGS[1:]}}

PRESETS: tuple[Wish, ...] = (
    Wish(
        name="qwen3-4b",
        model="Qwen/Qwen3-4B-Instruct-2507",
        model_note="Apache-2.0, not gated, 8 GB to download",
        opening=(
            "The default experiment: a 4B instruct model that anyone may download, one pass of QLoRA over the votes.",
        ),
        description=f"sized for one 24 GB GPU {_FORECAST}",
    ),
    Wish(
        name="llama3-8b",
        model="meta-llama/Meta-Llama-3-8B-Instruct",
        model_note="Meta Llama 3 Community License, 16 GB to download",
        opening=(
            "Llama 3 8B: the base of the competition's public judge on label tokens (log loss .9231 by its author).",
        ),
        description=f"sized for one 24 GB GPU {_FORECAST}",
        recipes=_ONE_ROW,
    ),
    Wish(
        name="llama3.1-8b",
        model="meta-llama/Meta-Llama-3.1-8B-Instruct",
        model_note="Llama 3.1 Community License, 16 GB to download",
        opening=("Llama 3.1 8B: as Llama 3 8B, with a context of 128k tokens.",),
        description=f"sized for one 24 GB GPU {_FORECAST}",
        recipes=_ONE_ROW,
    ),
    Wish(
        name="gemma2-9b",
        model="google/gemma-2-9b-it",
        model_note="Gemma Terms of Use, 18 GB to download",
        opening=(
            "Gemma 2 9B: what the competition's 1st place distilled its larger judges into.",
            "Its 256,000 tokens make the logits large: on 24 GB take cutoff_len: 1024.",
        ),
        description=f"sized for one 48 GB GPU {_FORECAST}",
        recipes=_ONE_ROW,
    ),
    Wish(
        name="qwen2.5-7b",
        model="Qwen/Qwen2.5-7B-Instruct",
        model_note="Apache-2.0, not gated, 15 GB to download",
        opening=("Qwen2.5 7B: of the size of Llama 3 8B, without a licence to accept.",),
        description=f"sized for one 24 GB GPU {_FORECAST}",
        recipes=_ONE_ROW,
    ),
    Wish(
        name="qwen3-8b",
        model="Qwen/Qwen3-8B",
        model_note="Apache-2.0, not gated, 16 GB to download",
        opening=("Qwen3 8B, which can think before it answers: a judge must not, so thinking is switched off.",),
        description=f"sized for one 24 GB GPU {_FORECAST}",
        recipes=_ONE_ROW | _SMALL_OPTIMIZER,
    ),
    Wish(
        name="phi4-mini",
        model="microsoft/Phi-4-mini-instruct",
        model_note="MIT, not gated, 8 GB to download",
        opening=("Phi-4-mini, 3.8B.",),
        description=f"sized for one 24 GB GPU {_FORECAST}",
    ),
    Wish(
        name="qwen2.5-1.5b",
        model="Qwen/Qwen2.5-1.5B-Instruct",
        model_note="Apache-2.0, not gated, 3 GB to download",
        cutoff_len=1024,
        opening=(
            "Qwen2.5 1.5B: small enough for SFT on one 6 GB GPU. dpo and rm hold two rows at once and need 10 GB, or",
            "cutoff_len: 512. A card before Ampere has no bf16: give each step fp16: true and bf16: false.",
        ),
        description=f"sized for SFT on one 6 GB GPU {_FORECAST}",
        recipes=_SMALL_ADAPTER,
    ),
)


def write_preset(wish: Wish, root: Path = Path()) -> Experiment:
    """Write factory_configs/<name> of a preset anew."""
    folder = root / "factory_configs" / wish.name
    folder.mkdir(parents=True, exist_ok=True)
    return write_experiment(render_experiment(wish), wish.name, folder)


if __name__ == "__main__":
    for preset in PRESETS:
        print(write_preset(preset).folder)
