"""A launch: how many processes train, and by which of LLaMA-Factory's engines they are started.

experiment.yaml's `distributed` chooses the engine. The environment says how many nodes there are and which of them this
one is, in LLaMA-Factory's own names:

    NPROC_PER_NODE                            processes here (the GPUs there are)
    NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT                      several nodes
    USE_RAY                                   Ray instead, where `distributed` is auto
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from common.errors import ArenaError
from common.experiment import Engine
from factory.launcher import ACCELERATE_CONFIG, RAY_CORES

_FOLDER = Path("templates") / "distributed"
_RAY_CLUSTER = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"  # Ray's name for: 0, listen on 127.0.0.1 only
_CONFIGS = {"zero2": _FOLDER / "zero2.json", "zero3": _FOLDER / "zero3.json", "fsdp": _FOLDER / "fsdp.yaml"}
_TRUE = ("true", "y", "1")  # as LLaMA-Factory reads switches
# The least value of each number that the environment may give.
_LEAST = {"NNODES": 1, "NODE_RANK": 0, "NPROC_PER_NODE": 1, "MASTER_PORT": 1}


@dataclass(frozen=True)
class Launch:
    """How a training is started: `options` and `environment` go to factory.launcher, `inputs` to the stage's state."""

    engine: Engine = "auto"
    options: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    inputs: dict[str, Any] = field(default_factory=dict)
    node: int = 0

    @property
    def is_main_process(self) -> bool:
        """Whether this node writes state, log and results; the others only take part in the training."""
        return self.node == 0


def plan_launch(
    engine: Engine, recipe: Mapping[str, Any], recipe_path: Path, given: Mapping[str, str] = os.environ
) -> Launch:
    """Return how a recipe is trained by `engine` in the environment `given`.

    Raises one ArenaError that lists all faults: missing packages, settings of a cluster that do not fit together,
    what the engine cannot do.
    """
    chosen = _chosen(engine, recipe, given)
    faults = [*_package_faults(chosen, recipe), *_recipe_faults(chosen, recipe)]
    if chosen not in ("auto", "ray"):
        faults += _node_faults(given)
    if faults:
        raise ArenaError(
            "\n".join([f"{len(faults)} fault(s) in the distributed training:", *(f"  - {each}" for each in faults)]),
            where=f"{recipe_path}, distributed: {engine}",
            remedy="fix these settings; docs/distributed.md shows each way with its commands",
        )
    inputs: dict[str, Any] = {} if engine == "auto" else {"distributed": engine}
    if chosen == "auto":
        return Launch(inputs=inputs)
    if chosen == "ray":
        environment = {"USE_RAY": "1"} | ({_RAY_CLUSTER: "0"} if _starts_ray(recipe, given) else {})
        return Launch("ray", _ray_options(recipe, given), environment, inputs)
    environment, options = {"FORCE_TORCHRUN": "1", "USE_RAY": "0"}, ()
    if config := _CONFIGS.get(chosen):
        inputs[config.name] = config.read_text(encoding="utf-8")
        if chosen == "fsdp":
            environment[ACCELERATE_CONFIG] = config.as_posix()
        else:
            options = (f"deepspeed={config.as_posix()}",)
    return Launch(chosen, options, environment, inputs, node=int(given.get("NODE_RANK", "0")))


def _chosen(engine: Engine, recipe: Mapping[str, Any], given: Mapping[str, str]) -> Engine:
    """Resolve `auto`: what the environment asks for; else one process, or one for each GPU."""
    if engine != "auto":
        return engine
    if given.get("USE_RAY", "0").lower() in _TRUE:
        return "ray"
    torchrun = given.get("FORCE_TORCHRUN", "0").lower() in _TRUE or recipe.get("deepspeed")
    return "ddp" if torchrun or given.get("NNODES", "1") != "1" or "RDZV_ID" in given else "auto"


def _package_faults(engine: Engine, recipe: Mapping[str, Any]) -> Iterator[str]:
    if (engine in ("zero2", "zero3") or recipe.get("deepspeed")) and find_spec("deepspeed") is None:
        yield "deepspeed is not installed: pip install deepspeed (it needs CUDA's compiler; or use ddp or fsdp)"
    if engine == "ray" and find_spec("ray") is None:
        yield "ray is not installed: make extra-ray"


def _recipe_faults(engine: Engine, recipe: Mapping[str, Any]) -> Iterator[str]:
    bits = recipe.get("quantization_bit")
    if engine in ("zero3", "fsdp") and bits not in (4, None):
        yield f"{engine} shards 4-bit or 16-bit weights, not {bits}-bit: write quantization_bit: 4 in experiment.yaml"
    for key in ("pure_bf16", "use_unsloth"):
        if engine == "zero3" and recipe.get(key):
            yield f"zero3 does not go with {key}: remove it from the recipe"
    if engine in ("zero2", "zero3", "fsdp", "ray") and recipe.get("deepspeed"):
        yield f"{engine} excludes the recipe's own deepspeed: remove that key, or write distributed: auto"
    if engine == "fsdp" and recipe.get("fsdp"):
        yield f"fsdp brings its own settings ({_CONFIGS[engine]}): remove the key fsdp from the recipe"


def _node_faults(given: Mapping[str, str]) -> Iterator[str]:
    """Yield what torchrun would wait for, or start wrongly, without an error."""
    bad = [name for name, least in _LEAST.items() if name in given and not _is_number(given[name], least)]
    for name in bad:
        yield f"{name}={given[name]!r} is not a whole number of {_LEAST[name]} or more"
    if bad:
        return
    nodes, rank = int(given.get("NNODES", "1")), int(given.get("NODE_RANK", "-1"))
    if nodes > 1 and not 0 <= rank < nodes:
        yield f"NNODES={nodes} needs a NODE_RANK below it: 0 on the first node, 1 on the next, …"
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in given]
    if nodes > 1 and missing:
        yield (
            f"{' and '.join(missing)} missing: give every node the same address (of node 0) and the same free port, "
            "for example MASTER_ADDR=10.0.0.1 MASTER_PORT=29500"
        )
    if elastic := [name for name in ("RDZV_ID", "MIN_NNODES", "MAX_RESTARTS") if name in given]:
        yield f"{' and '.join(elastic)}: nodes that come and go are not supported, unset it"


def _is_number(text: str, least: int) -> bool:
    return re.fullmatch(r"\d{1,9}", text) is not None and int(text) >= least


def _ray_options(recipe: Mapping[str, Any], given: Mapping[str, str]) -> tuple[str, ...]:
    """Return the keys that Ray needs and the recipe does not give.

    LLaMA-Factory asks Ray for ten cores a worker; a Ray that we start on this machine gets that number as its own.
    """
    workers = recipe.get("ray_num_workers") or int(given.get("NPROC_PER_NODE", "0")) or _gpus() or 1
    options = [] if recipe.get("ray_num_workers") else [f"ray_num_workers={workers}"]
    if _starts_ray(recipe, given):
        claim: dict[str, Any] = {"num_cpus": RAY_CORES * max(workers, _gpus()), "include_dashboard": False}
        claim |= {"address": "local"}  # not the cluster that another user's file in /tmp/ray names
        claim["runtime_env"] = {"worker_process_setup_hook": "factory.launcher.guard_worker"}
        options.append(f"ray_init_kwargs={json.dumps(claim)}")
    return tuple(options)


def _starts_ray(recipe: Mapping[str, Any], given: Mapping[str, str]) -> bool:
    return not recipe.get("ray_init_kwargs") and "RAY_ADDRESS" not in given


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()
