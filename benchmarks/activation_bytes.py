"""What training keeps in 16 bits, counted: every allocation of one step, on a CPU, against the forecast's formula.

    python benchmarks/activation_bytes.py --votes FILE --work FOLDER [--docs]

A CPU's allocator tells each allocation and each release, so that the peak of a step's tensors is known to the byte. The
operations are those of a GPU without fused kernels (bf16 base, fp32 adapter, autocast, sdpa or eager attention); memory
that CUDA's libraries take for themselves is not in it. Two tables: one decoder layer of several shapes and families,
and whole steps through LLaMA-Factory.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from figures import ROOT, measured_on, put, table
from forecast_check import Case, prepare
from workbench import Workbench

from factory.memory import SLACK, layer_bytes, training_memory
from factory.model_size import ModelShape

MIB = 2**20
# hidden, heads, key-value heads, head width, feed-forward width
SHAPES = ((256, 8, 8, 32, 768), (512, 8, 2, 64, 1536), (256, 16, 2, 32, 1024), (384, 8, 4, 64, 512))
FAMILIES = ("Llama", "Qwen3", "Gemma2")
ROWS, LENGTH = 4, 512
STAGES = {"sft": 8, "dpo_reward": 4, "rm": 4}  # with their batch
SIZES = ("small", "medium")


def peak_of(call: Callable[[], None]) -> int:
    """Return the most bytes that were allocated at once while `call` ran, above those of its start."""
    with profiled() as profile:
        call()
    return peak_in(profile)


def profiled():
    """Return a profile that notes each allocation on the CPU, to be entered."""
    import torch

    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)


def peak_in(profile) -> int:
    """Return the peak of a finished profile's allocations."""
    now = peak = 0
    events = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def layered(family: str, layers: int, sizes: tuple[int, ...], checkpointing: bool):
    """Build a bf16 model of some layers with an fp32 adapter on each linear layer, as LLaMA-Factory trains it."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model

    hidden, heads, kv_heads, width, feed_forward = sizes
    more = {"attn_implementation": "eager", "query_pre_attn_scalar": width} if family == "Gemma2" else {}
    config = getattr(transformers, f"{family}Config")(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=width, intermediate_size=feed_forward, vocab_size=256, use_cache=False, **more,
    )  # fmt: skip
    base = getattr(transformers, f"{family}ForCausalLM")(config).to(torch.bfloat16)
    adapter = LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, adapter, autocast_adapter_dtype=True)
    model.enable_input_require_grads()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
    return model.train()


def step_of(model) -> Callable[[], None]:
    """Return a forward and backward pass through the layers, without the head."""
    import torch

    ids = torch.randint(0, 256, (ROWS, LENGTH))

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            states = model.base_model.model.model(input_ids=ids, attention_mask=torch.ones_like(ids))[0]
        states.float().mean().backward()
        model.zero_grad()

    step()  # what the first step alone allocates is not the question
    return step


def one_layer(family: str, sizes: tuple[int, ...]) -> list[str]:
    """Measure one layer of a shape; return its line of the table."""
    tokens, hidden = ROWS * LENGTH, sizes[0]
    two, four = (peak_of(step_of(layered(family, layers, sizes, False))) for layers in (2, 4))
    checkpointed = peak_of(step_of(layered(family, 2, sizes, True)))
    kept = (four - two) / 2 / tokens
    whole = checkpointed / tokens - 2 * hidden * 2  # the inputs of the two layers are kept
    heads, kv_heads, width, feed_forward = sizes[1:]
    kind = {"normed": family == "Qwen3", "soft_capped": family == "Gemma2"}
    shape = ModelShape(hidden, 1, heads, kv_heads, width, feed_forward, 256, False, **kind)
    said, beside = layer_bytes(shape, LENGTH, "cuda")
    numbers = [f"{said:,.0f}", f"{kept:,.0f}", f"{said / kept - 1:+.0%}"]
    numbers += [f"{said + beside:,.0f}", f"{whole:,.0f}", f"{(said + beside) / whole - 1:+.0%}"]
    return [family, " / ".join(map(str, sizes)), *numbers]


def whole_step(bench: Workbench, votes: Path, size: str, stage: str, checkpointing: bool) -> list[str]:
    """Measure one real step of a stage through LLaMA-Factory; return its line of the table."""
    case = Case(size, stage, STAGES[stage], checkpointing, None, 512)
    name = prepare(bench, case, votes)
    os.chdir(bench.folder)
    call = [sys.executable, __file__, "--one", f"factory_configs/{name}/{stage}.yaml"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: {done.stderr[-2000:]}")
    measured, rows, length = map(int, done.stdout.split()[-3:])
    said = _formula(name, stage, length)
    what = f"{size}, {stage}, {rows} sequences of {length}" + (", checkpointing" if checkpointing else "")
    return [what, f"{said:,.0f} MiB", f"{measured / MIB:,.0f} MiB", f"{said * MIB / measured - 1:+.0%}"]


def _formula(name: str, stage: str, length: int) -> float:
    """Return activations and logits by the formula, in MiB: what a step allocates beside weights and optimizer."""
    from common.experiment import load_experiment
    from factory.model_size import shape_of
    from factory.train_config import setup_of

    experiment = load_experiment(name)
    setup = setup_of(experiment, stage).changed(compute_bytes=2, trained_modules=())
    parts = training_memory(shape_of(experiment.model), setup, length, "cuda").parts
    return (parts.get("activations", 0) + parts.get("logits", 0)) / SLACK["cuda"] * 1024


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
            self.peak = peak_in(self.profile)

    counter = Counter()
    recipe = OmegaConf.to_container(OmegaConf.load(recipe_path))
    changed = {"bf16": True, "use_cpu": True, "max_steps": 2, "eval_strategy": "no", "additional_target": None}
    run_exp({**recipe, **changed, "gradient_accumulation_steps": 1}, callbacks=[counter])
    print("", counter.peak, *counter.shapes[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--votes", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--docs", action="store_true")
    asked = parser.parse_args()
    layers = [one_layer(family, sizes) for family in FAMILIES for sizes in SHAPES]
    headings = ["layer", "hidden / heads / kv heads / head / feed-forward", "kept: formula", "measured", "off by"]
    first = table([*headings, "kept and beside it: formula", "measured", "off by"], layers)
    print(first, flush=True)
    bench, votes = Workbench(asked.work.resolve()), asked.votes.resolve()
    shutil.rmtree(bench.folder / "saves", ignore_errors=True)
    cases = [(size, stage, checkpointing) for size in SIZES for stage in STAGES for checkpointing in (False, True)]
    steps = [whole_step(bench, votes, *case) for case in cases]
    second = table(["step through LLaMA-Factory", "formula", "measured", "off by"], steps)
    how = measured_on(f"python benchmarks/activation_bytes.py --votes {asked.votes.name} --work FOLDER")
    text = f"Bytes a token:\n\n{first}\n\n{second}\n\n{how}"
    print(second)
    if asked.docs:
        put(ROOT / "docs" / "forecast.md", "activation bytes", text)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(sys.argv[2])
    else:
        main()
