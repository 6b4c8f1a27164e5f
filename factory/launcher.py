"""LLaMA-Factory's command line as our child process runs it, with one guard before the model loads.

`python -m factory.launcher train recipe.yaml [key=value]` is `llamafactory-cli train recipe.yaml [key=value]`:
same entry, same arguments, and the same re-execution under torchrun where there are several GPUs.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

# Number of an inherited pipe whose other end only our parent holds: it ends when the parent ends, even by -9.
LIFELINE = "ARENA_FACTORY_LIFELINE"
COMMANDS = ("train", "export", "chat", "api", "webchat", "webui", "env", "version", "help")
_GRACE = 5.0  # seconds that descendants get to end by themselves


def main(arguments: list[str]) -> int:
    """Run one LLaMA-Factory command and return the exit code; 2 for a command that does not exist."""
    follow_parent()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # a worker of torchrun, see `_guard_workers`
        _keep_nf4_weights_as_they_are()
        from llamafactory.train.tuner import run_exp

        run_exp()
        return 0
    if not arguments or arguments[0] not in COMMANDS:  # llamafactory-cli would exit with 0
        given = arguments[0] if arguments else "(none)"
        print(f"Unknown command: {given}. Choose one of: {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    from llamafactory.cli import main as llamafactory_cli
    from llamafactory.extras.misc import get_current_device, get_device_count, is_env_enabled

    if arguments[0] == "train" and (is_env_enabled("FORCE_TORCHRUN") or get_device_count() > 1):
        _refuse_spaces(arguments)
    if get_current_device().type == "cpu":
        _keep_nf4_weights_as_they_are()
        _guard_workers()
    sys.argv = ["llamafactory-cli", *arguments]
    llamafactory_cli()
    return 0


def follow_parent() -> None:
    """End this process and its descendants as soon as the process that started it is gone, however it went.

    Without the environment variable LIFELINE (started by hand) nothing happens. A pipe rather than Linux'
    PR_SET_PDEATHSIG: it works on every POSIX system and reaches the workers of torchrun as well.
    """
    handle = os.environ.pop(LIFELINE, None)
    if handle is not None:
        threading.Thread(target=_end_with_parent, args=(int(handle),), daemon=True).start()


def _end_with_parent(handle: int) -> None:
    import psutil

    while os.read(handle, 1):  # nobody writes: this returns when the last writer is gone
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


def _keep_nf4_weights_as_they_are() -> None:
    # On a CPU with avx512_bf16, bitsandbytes repacks nf4 weights for good in the first forward pass of an
    # evaluation; the training steps after it take a kernel without autograd and get wrong gradients silently.
    try:
        import bitsandbytes.nn.modules as modules
    except ImportError:
        return  # LLaMA-Factory itself says so, where the recipe needs it
    modules.has_avx512bf16 = lambda: False


def _guard_workers() -> None:
    # Under FORCE_TORCHRUN the workers run the file of LLaMA-Factory's launcher, where the guard would be
    # missing; on a CPU they run this file instead, which then calls the same function.
    import llamafactory.launcher as native

    native.__file__ = __file__


def _refuse_spaces(arguments: list[str]) -> None:
    spaced = [part for part in (*arguments, __file__) if len(part.split()) != 1]
    if spaced:  # LLaMA-Factory builds torchrun's command line with str.split()
        raise SystemExit(
            f"ValueError: LLaMA-Factory cannot pass {spaced[0]!r} to torchrun because of the blank in it; "
            "move the project to a folder without blanks, or show it one GPU (CUDA_VISIBLE_DEVICES=0)"
        )


if __name__ == "__main__":
    if not __package__:  # run as a file by torchrun: our modules' names must not hide anybody else's
        sys.path.pop(0)
    sys.exit(main(sys.argv[1:]))
