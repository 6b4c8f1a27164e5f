"""What training keeps in 16 bits, counted: every allocation of one step, on a CPU, against the forecast's formula.

    python benchmarks/activation_bytes.py --votes FILE --work FOLDER [--docs]

A CPU's allocator reports each allocation and each release, so that the peak of a step's tensors is known to the byte.
The operations are those of a GPU without fused kernels (bf16 base, fp32 adapter, autocast, sdpa or eager attention);
memory that CUDA's libraries take for themselves is not in it. Two tables: one decoder layer of several sizes and
families, and whole steps through LLaMA-Factory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from figures import ROOT, measured_on, put, table
from forecast_check import Case, prepare
from workbench import Workbench

from common.experiment import load_experiment
from factory.memory import SLACK, layer_bytes, training_memory
from factory.model_size import ModelSize, size_of
from factory.stage_context import StageContext
from factory.train_config import TrainConfig

# hidden, heads, key-value heads, head width, feed-forward width
SIZES = ((256, 8, 8, 32, 768), (512, 8, 2, 64, 1536), (256, 16, 2, 32, 1024), (384, 8, 4, 64, 512))
ROWS, LENGTH = 4, 512
STAGES = {"sft": 8, "dpo_reward": 4, "rm": 4}  # with their batch


def profiled():
    """Return a profile that notes each allocation on the CPU, to be entered."""
    import torch

    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def peak(profile) -> int:
    """Return the most bytes that were allocated at once in a finished profile."""
    now = most = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


def layers_peak(family: str, layers: int, sizes: tuple[int, ...], checkpointing: bool) -> int:
    """Return the peak of a step through bf16 layers with an fp32 adapter, as LLaMA-Factory trains them; no head."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    names = ("hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim", "intermediate_size")
    keys = dict(zip(names, sizes, strict=True)) | {"num_hidden_layers": layers, "vocab_size": 256, "use_cache": False}
    if family == "Gemma2":
        keys |= {"attn_implementation": "eager", "query_pre_attn_scalar": sizes[3]}
    base = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**keys))
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base.to(torch.bfloat16), adapter, autocast_adapter_dtype=True).train()
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    ids = torch.randint(0, 256, (ROWS, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            states = model.base_model.model.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        states.float().mean().backward()
        model.zero_grad()

    step()  # what the first step alone allocates is not the question
    with profiled() as profile:
        step()
    return peak(profile)


def one_layer(family: str, sizes: tuple[int, ...]) -> list[str]:
    """Measure one layer; return its line of the table."""
    tokens, (hidden, *others) = ROWS * LENGTH, sizes
    two, four = (layers_peak(family, layers, sizes, False) for layers in (2, 4))
    kept = (four - two) / 2 / tokens
    whole = layers_peak(family, 2, sizes, True) / tokens - 2 * hidden * 2  # the inputs of the two layers are kept
    kind = {"normed": family == "Qwen3", "soft_capped": family == "Gemma2"}
    by_formula, beside = layer_bytes(ModelSize(hidden, 1, *others, 256, tied=False, **kind), LENGTH, "cuda")
    line = [family, " / ".join(map(str, sizes))]
    for formula, measured in ((by_formula, kept), (by_formula + beside, whole)):
        line += [f"{formula:,.0f}", f"{measured:,.0f}", f"{formula / measured - 1:+.0%}"]
    return line


def whole_step(bench: Workbench, votes: Path, size: str, stage: str, checkpointing: bool) -> list[str]:
    """Measure one real step of a stage through LLaMA-Factory; return its line of the table."""
    name = prepare(bench, Case(size, stage, STAGES[stage], checkpointing, None, 512), votes)
    os.chdir(bench.folder)
    call = [sys.executable, __file__, "--one", f"factory_configs/{name}/{stage}.yaml"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    measured, rows, length = map(int, done.stdout.split()[-3:])
    experiment = load_experiment(name)
    config = TrainConfig.of(StageContext(experiment, stage).recipe | {"bf16": True, "additional_target": None})
    parts = training_memory(size_of(experiment.model), config, length)
    formula = (parts.get("activations", 0) + parts.get("logits", 0)) / SLACK["cuda"] * 1024
    measured /= 2**20
    what = f"{size}, {stage}, {rows} sequences of {length}" + (", checkpointing" if checkpointing else "")
    return [what, f"{formula:,.0f} MiB", f"{measured:,.0f} MiB", f"{formula / measured - 1:+.0%}"]


def one(recipe_path: str) -> None:
    """Train two steps by a recipe with a bf16 base; print the second step's peak and the shape of its batch."""
    import torch
    from llamafactory.train.tuner import run_exp
    from omegaconf import OmegaConf
    from transformers import TrainerCallback

    class Counter(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **_):
            self.shapes = []
            for parameter in model.parameters():
                if not parameter.requires_grad:  # on a CPU LLaMA-Factory loads a base in 32 bits
                    parameter.data = parameter.data.to(torch.bfloat16)
            model.register_forward_pre_hook(lambda m, a, k: self.shapes.append(k["input_ids"].shape), with_kwargs=True)

        def on_step_begin(self, *_, **__):
            self.profile = profiled()
            self.profile.__enter__()

        def on_step_end(self, *_, **__):
            self.profile.__exit__(None, None, None)

    counter, recipe = Counter(), OmegaConf.to_container(OmegaConf.load(recipe_path))
    changed = {"bf16": True, "use_cpu": True, "max_steps": 2, "eval_strategy": "no", "additional_target": None}
    run_exp({**recipe, **changed, "gradient_accumulation_steps": 1}, callbacks=[counter])
    print("", peak(counter.profile), *counter.shapes[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", action="store_true")
    arguments = parser.parse_args()
    bench, votes = Workbench(arguments.work.resolve()), arguments.votes.resolve()
    layers = [one_layer(family, sizes) for family in ("Llama", "Qwen3", "Gemma2") for sizes in SIZES]
    headings = ["layer", "hidden / heads / kv heads / head / feed-forward", "kept: formula", "measured", "off by"]
    first = table([*headings, "kept and beside it: formula", "measured", "off by"], layers)
    shutil.rmtree(bench.folder / "saves", ignore_errors=True)
    cases = [(size, stage, again) for size in ("small", "medium") for stage in STAGES for again in (False, True)]
    steps = [whole_step(bench, votes, *case) for case in cases]
    second = table(["step through LLaMA-Factory", "formula", "measured", "off by"], steps)
    how = measured_on(f"python benchmarks/activation_bytes.py --votes {votes.name} --work FOLDER")
    text = f"Bytes a token:\n\n{first}\n\n{second}\n\n{how}"
    print(text)
    if arguments.docs:
        put(ROOT / "docs" / "forecast.md", "activation bytes", text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main()
