"""LLaMA-Factory's command line as our child process runs it, with guards before the model loads.

`python -m factory.launcher train recipe.yaml [key=value]` is `llamafactory-cli train recipe.yaml [key=value]`: same
entry, same arguments, same environment variables. Where several processes train, this module calls torchrun (or
accelerate) itself: LLaMA-Factory puts its command line into one string and splits it at blanks, also those of a path.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import threading
from collections.abc import Mapping
from functools import wraps
from types import SimpleNamespace

# Number of an inherited pipe whose other end only our parent holds: it ends when the parent ends, even by SIGKILL.
LIFELINE = "ARENA_FACTORY_LIFELINE"
# Names accelerate's config file: then accelerate starts the workers instead of torchrun (FSDP).
ACCELERATE_CONFIG = "ARENA_FACTORY_ACCELERATE"
RAY_CORES = 10  # that LLaMA-Factory asks of Ray for each worker, whatever the machine has
_GRACE = 5.0  # seconds that descendants get to end by themselves


def main(arguments: list[str]) -> int:
    """Run one LLaMA-Factory command and return the exit code."""
    follow_parent()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker of torchrun, see `_run_workers`
        guard_worker()
        from llamafactory.train.tuner import run_exp

        run_exp()
        return 0
    from llamafactory.cli import main as llamafactory_cli
    from llamafactory.extras.misc import get_current_device, get_device_count, is_env_enabled, use_kt, use_ray

    if arguments[0] == "train":
        several = get_device_count() > 1 and not use_ray() and not use_kt()
        if is_env_enabled("FORCE_TORCHRUN") or several:
            _run_workers(arguments[1:], get_device_count())
            return 0
        guard_worker()
        if use_ray():
            _make_ray_start(on_cpus=get_current_device().type == "cpu")
    elif get_current_device().type == "cpu":
        _keep_nf4_weights()
    for name in ("GRADIO_SERVER_NAME", "API_HOST"):  # LLaMA-Factory's servers would listen on every network
        os.environ.setdefault(name, "127.0.0.1")
    sys.argv = ["llamafactory-cli", *arguments]
    llamafactory_cli()
    return 0


def _run_workers(arguments: list[str], devices: int) -> None:
    """Start this file in several processes, as LLaMA-Factory's own launcher starts its own, and wait for them."""
    if os.getenv("OPTIM_TORCH", "1").lower() in ("true", "y", "1"):  # LLaMA-Factory's default for its workers
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
        os.environ["TORCH_NCCL_AVOID_RECORD_STREAMS"] = "1"
    config = os.environ.pop(ACCELERATE_CONFIG, None)
    if config is None:
        from torch.distributed.run import main as torchrun

        torchrun([*torchrun_options(os.environ, devices), __file__, *arguments])
        return
    from accelerate.commands.launch import launch_command, launch_command_parser

    options = accelerate_options(os.environ, devices)
    launch_command(launch_command_parser().parse_args(["--config_file", config, *options, __file__, *arguments]))


def torchrun_options(given: Mapping[str, str], devices: int) -> list[str]:
    """Return torchrun's options from the environment, by the names and defaults of LLaMA-Factory's launcher."""
    nodes, port = given.get("NNODES", "1"), given.get("MASTER_PORT") or _free_port()
    address, processes = given.get("MASTER_ADDR", "127.0.0.1"), given.get("NPROC_PER_NODE", str(max(devices, 1)))
    return [
        *("--nnodes", nodes, "--node_rank", given.get("NODE_RANK", "0"), "--nproc_per_node", processes),
        *("--master_addr", address, "--master_port", port),
    ]


def accelerate_options(given: Mapping[str, str], devices: int) -> list[str]:
    """Return accelerate's options from the same variables; it counts the processes of all nodes together."""
    nodes, processes = int(given.get("NNODES", "1")), int(given.get("NPROC_PER_NODE", max(devices, 1)))
    options = ["--num_processes", str(nodes * processes), "--num_machines", str(nodes)]
    options += ["--machine_rank", given.get("NODE_RANK", "0")]
    options += ["--main_process_ip", given.get("MASTER_ADDR", "127.0.0.1")]
    return [*options, "--main_process_port", given.get("MASTER_PORT") or _free_port()]


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def follow_parent() -> None:
    """End this process and its descendants as soon as the process that started it is gone, even by SIGKILL.

    Without the environment variable LIFELINE (started by hand) nothing happens. A pipe rather than Linux'
    PR_SET_PDEATHSIG: it works on every POSIX system and reaches the workers of torchrun as well.
    """
    handle = os.environ.pop(LIFELINE, None)
    if handle is not None:
        threading.Thread(target=_end_with_parent, args=(int(handle),), daemon=True).start()


def _end_with_parent(handle: int) -> None:
    import psutil  # late: run as a file, a module of this folder could hide one that psutil imports

    while os.read(handle, 1):  # nothing is written: this returns when the last writer is gone
        pass
    family = psutil.Process().children(recursive=True)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for process in family:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
        _, family = psutil.wait_procs(family, timeout=_GRACE)
    os.kill(os.getpid(), signal.SIGKILL)


def guard_worker() -> None:
    """Correct, in a process that is about to train, what would spoil the training without any error."""
    import llamafactory.data.loader as loader
    from torch.serialization import register_package

    _keep_nf4_weights()
    _quote_examples()
    # LLaMA-Factory takes a folder's files as the disk lists them. Each process reads for itself and trains on its
    # share of the rows: two nodes with another order would train on some rows twice and on others never.
    loader.os = SimpleNamespace(**{**vars(os), "listdir": lambda path: sorted(os.listdir(path))})  # noqa: PTH208
    # Where several processes train on CPUs their devices are called cpu:0, cpu:1, …; the trainer asks torch to read a
    # checkpoint's optimizer to such a device, which torch does not know, so that no such run could be resumed.
    register_package(9, lambda _: None, lambda storage, place: storage if place.startswith("cpu:") else None)
    _end_at_the_last_step()


def _quote_examples() -> None:
    # LLaMA-Factory prints the texts of its first rows. Our parent reads this output line by line: a vote must not hold
    # a line of it, such as another number of rows.
    from llamafactory.data.processor import feedback, pairwise, pretrain, supervised, unsupervised

    def show(text: str) -> None:
        name, _, value = text.partition(":\n")
        print(f"{name}:\n{value if name.endswith('ids') else json.dumps(value, ensure_ascii=False)}")

    for module in (feedback, pairwise, pretrain, supervised, unsupervised):
        module.print = show


def _keep_nf4_weights() -> None:
    # On a CPU with avx512_bf16, bitsandbytes repacks nf4 weights for good in the first forward pass of an
    # evaluation; the training steps after it take a kernel without autograd and get wrong gradients silently.
    try:
        import bitsandbytes.nn.modules as modules
    except ImportError:
        return  # LLaMA-Factory itself says so, where the recipe needs it
    modules.has_avx512bf16 = lambda: False


def _end_at_the_last_step() -> None:
    # A run that was killed after its last checkpoint and before its end is resumed from there. Where that is not the
    # end of an epoch, too (max_steps, num_train_epochs: 1.5), the trainer of transformers 5 makes a step too many, on
    # every resume again, with a learning rate that rises behind its end.
    from transformers import Trainer

    run_epoch = Trainer._run_epoch

    @wraps(run_epoch)
    def run_epoch_if_steps_are_left(self, *arguments, **options):
        if self.state.global_step >= self.state.max_steps > 0:
            self.control.should_training_stop = True
        else:
            run_epoch(self, *arguments, **options)

    Trainer._run_epoch = run_epoch_if_steps_are_left


def _make_ray_start(*, on_cpus: bool) -> None:
    """Let LLaMA-Factory find Ray's first node without Ray's dashboard, and on CPUs claim no more cores than exist."""
    import llamafactory.train.tuner as tuner

    def head() -> str:
        import ray

        nodes = [node for node in ray.nodes() if node["Alive"]]
        return next(node["NodeManagerAddress"] for node in nodes if "node:__internal_head__" in node["Resources"])

    tuner.get_ray_head_node_ip = head
    if on_cpus:
        # Every core counts as a device there, and ten cores are claimed for each device, which no machine has: Ray
        # would wait for them for ever. One bundle for each ten cores is what the workers then use.
        claim = tuner.get_placement_group
        tuner.get_placement_group = lambda cores: claim(max(cores // RAY_CORES, 1))


if __name__ == "__main__":
    # Run as a file by torchrun: our modules' names must not hide other packages' modules.
    if not __package__ and not sys.flags.safe_path:
        sys.path.pop(0)
    sys.exit(main(sys.argv[1:]))
