"""What went wrong in the log of a child process, and what to do about it."""

from __future__ import annotations

import re

LESS_MEMORY = (
    "lower per_device_train_batch_size (and raise gradient_accumulation_steps by the same factor), then "
    "cutoff_len, then lora_rank; quantization_bit: 4 and gradient checkpointing save most"
)
_INSTALL = "install the locked set of libraries (`make install`)"

# Pattern of an error's text and the remedy. The first that fits is shown, so the particular come before the general.
# What our own checks refuse before anything starts is not here.
REMEDIES = {
    r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED": LESS_MEMORY,
    r"can't allocate memory|Cannot allocate memory|Unable to allocate|\bMemoryError\b|failed to map segment"
    r"|can't start new thread": (f"the machine's memory is full: close other programs, or {LESS_MEMORY}"),
    r"signal 9\b|SIGKILL|exitcode\s*: -9|exit code 137|(RayActor|ActorDied|ActorUnavailable|WorkerCrashed)Error": (
        f"killed, probably out of memory (see `dmesg`): {LESS_MEMORY}; --resume goes on from the last checkpoint"
    ),
    r"No space left on device|Disk quota exceeded|errno 28\b|errno 122\b": (
        "free disk space (old checkpoints under saves/, earlier runs: python run.py clean), then --resume"
    ),
    r"wandb\.|swanlab": (
        "the recipe's tracker ended the run: check its account and the network, or keep it offline "
        "(WANDB_MODE=offline, swanlab_mode: local), or report_to: none; --resume goes on from a checkpoint"
    ),
    r"gated repo|GatedRepo|401 Client Error|403 Client Error|Invalid user token|Invalid username or password": (
        "accept the model's licence on its hub page, then `hf auth login` (or set HF_TOKEN); or choose another model"
    ),
    r"outgoing traffic has been disabled|HF_HUB_OFFLINE|offline mode is enabled|OfflineModeIsEnabled": (
        "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE forbids the download and the model is not in the cache: unset it, or "
        "set `model` in experiment.yaml to a local folder"
    ),
    r"couldn't connect to|MaxRetryError|ConnectionError|ConnectError|ReadTimeout|Name or service not known"
    r"|Temporary failure in name resolution|LocalEntryNotFound|Network is unreachable": (
        "the hub cannot be reached: check the network or HF_ENDPOINT, or download the model elsewhere and set "
        "`model` in experiment.yaml to its folder"
    ),
    r"is not a valid model identifier|RepositoryNotFound|404 Client Error|RevisionNotFound|Repo id must": (
        "there is no such model: check the spelling of `model` and `revision` in experiment.yaml"
    ),
    r"Error while deserializing header|incomplete metadata|InvalidHeaderDeserialization|header too large": (
        "a weights file is damaged, often by a broken download: delete it (of a hub model its folder in "
        "~/.cache/huggingface/hub) and download it again"
    ),
    r"compiled with different CUDA versions|torchvision::nms does not exist|libtorch.*undefined symbol": (
        f"torch, torchvision and torchaudio come from different builds: {_INSTALL}"
    ),
    r"bitsandbytes.*(not compiled with|without) (CUDA|GPU)|CUDA Setup failed|libbitsandbytes|libcudart"
    r"|None of the available devices.*are supported by the bitsandbytes": (
        f"bitsandbytes does not fit this machine's CUDA: run `python -m bitsandbytes`, {_INSTALL}, or remove "
        "quantization_bit from the recipe"
    ),
    r"No package metadata was found": (
        f"{_INSTALL}; a package that it does not hold comes by `python -m pip install`, or remove the key that needs it"
    ),
    r"driver version is insufficient|driver on your system is too old|no kernel image is available": (
        "this torch build does not fit the GPU or its driver: update the driver, or run without the GPU "
        "(CUDA_VISIBLE_DEVICES=)"
    ),
    r"support bf16|bf16/gpu|bf16 is not supported|pure_bf16": (
        "this device has no bf16: set `bf16: false` (and `fp16: true` on a GPU) in the recipe; on a CPU bf16 "
        "needs `use_cpu: true` and no visible GPU"
    ),
    r"Cannot find (valid|sufficient) samples": (
        "no exported row fits this stage: run `run.py prepare` again and read data/<exp>/audit.json"
    ),
    r"Undefined dataset|File .+ not found|Cannot open .*dataset_info\.json|DatasetGenerationError": (
        "the recipe's dataset is not in dataset_dir, or damaged: run `run.py prepare` again, and let `dataset` "
        "and `dataset_dir` name what it wrote"
    ),
    r"size mismatch for": (
        "adapter and base model do not belong together: train again with --fresh, or set the base model back"
    ),
    r"does not recognize this architecture|model type .+ but Transformers does not": (
        "this model is newer than the locked transformers: choose another model"
    ),
    r"trust_remote_code": (
        "the model brings its own code: read it, then set `trust_remote_code: true` in experiment.yaml, or "
        "choose a model that needs none"
    ),
    r"EADDRINUSE|address already in use": "another run uses the port: wait for it, or set MASTER_PORT to a free one",
    r"Bus error|insufficient shared memory|/dev/shm": (
        "the container's shared memory is too small: start it with a larger one (docker run --shm-size=8g), or "
        "set `dataloader_num_workers: 0`"
    ),
    r"Too many open files": "raise the limit of open files (`ulimit -n 65536`)",
    r"loss .*(NaN|infinite|not finite)|(NaN|inf)\b.*\bloss|weights .*not finite": (
        "the training diverged: lower learning_rate (by 3 to 10 times), prefer bf16 to fp16, set max_grad_norm: 1.0 "
        "and more warmup_steps, then --fresh"
    ),
    r"NCCL": "the GPUs cannot talk to each other: see `NCCL_DEBUG=INFO`, or use one GPU",
    r"signal 11\b|Segmentation fault|SIGSEGV|signal 4\b|SIGILL|Illegal instruction": (
        f"a library crashed: {_INSTALL}; `run.py doctor` says what fits this CPU and CUDA"
    ),
    r"requires bitsandbytes|No module named|cannot import name": _INSTALL,
    r"Permission ?denied": "make the named file or folder writable, or run from a folder of your own",
}

_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_RANK = re.compile(r"^\s*\[(?:rank|default)?\d+\]:[ ]?")
_TRACEBACK = re.compile(r"^(?:\s*[+|] )?Traceback \(most recent call last\):")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:: .*|:)?$")
# Lines that belong to no error: loggers, bars, rules, trackers, and what comes between two tracebacks.
_OTHER = re.compile(
    r"^\s*(?:\[?(?:INFO|WARNING|DEBUG)\b|[WEIF]\d{4} \d\d:|\[?\d{4}-\d\d-\d\d[ T]\d\d:|.*\d{1,3}%\||={5,}|-{5,}|\*{3,}"
    r"|Traceback \(|During handling of the above|The above exception was|Exception ignored|Exception in thread"
    r"|Root Cause|Failures:|wandb: |swanlab: |\"\"\"$)"
)
_ASIDE = re.compile(r"^Exception (?:ignored|in thread)")
# Errors that only report the end of another process.
_WRAPPER = re.compile(
    r"^(?:[\w.]*\.)?(?:ChildFailedError|CalledProcessError|DatasetGenerationError|RemoteTraceback|SystemExit"
    r"|KeyboardInterrupt|SignalException|BrokenPipeError|ConnectionResetError|ProcessRaisedException"
    r"|ProcessExitedException|DistBackendError|DistNetworkError|RayTaskError|WorkerCrashedError)\b"
    r"|^RuntimeError: (?:DataLoader worker|\[?.*Connection (?:closed|reset) by peer)"
)
_COMPLAINT = re.compile(
    r"\b\w*Error\b|\berror:|^Fatal|terminate called|what\(\):|\b[Kk]illed\b|[Cc]annot |Bus error|Segmentation fault"
)
_SIGNAL = re.compile(r"Signal \d+ \(SIG\w+\) received")  # torchrun about a worker that was killed
_MESSAGE_LINES, _LONGEST = 12, 10_000


def remedy_for(text: str) -> str | None:
    """Return the remedy of the first pattern of REMEDIES that fits `text`, None where none fits."""
    text = text[:_LONGEST]  # a prompt may stand in it, and a pattern may take quadratic time
    return next((remedy for pattern, remedy in REMEDIES.items() if re.search(pattern, text, re.IGNORECASE)), None)


def all_errors(log: str) -> list[str]:
    """Return the errors of a log (exception and message), the most telling one last.

    Errors that only report the end of another process, such as torchrun's, come first.
    """
    lines = clean_lines(log)
    errors = [error for i, line in enumerate(lines) if _TRACEBACK.match(line) and (error := _after(lines, i))]
    wrappers = [error for error in errors if _WRAPPER.match(error)]
    real = [error for error in errors if not _WRAPPER.match(error)]
    if not real:
        real = [line.strip() for line in lines if _SIGNAL.search(line)]
    if not real and not wrappers:
        real = [line.strip() for line in lines if _COMPLAINT.search(line) and not _OTHER.match(line)][-1:]
    return [*wrappers, *real]


def last_lines(log: str, count: int = 3) -> str:
    """Return the last lines of a log without empty lines and bars, for a log without any error in it."""
    lines = [line.rstrip() for line in clean_lines(log) if line.strip() and "%|" not in line]
    return "\n".join(lines[-count:])


def clean_lines(log: str) -> list[str]:
    """Return the lines of a log without colours and without torchrun's `[rank0]: ` in front."""
    return [_RANK.sub("", line) for line in re.split(r"\r\n|\n|\r", _COLOUR.sub("", log))]


def _after(lines: list[str], traceback: int) -> str | None:
    """Return exception and message of the traceback that starts at that line.

    None for a torn one, and for one that the interpreter prints while it shuts down.
    """
    before = next((line for line in reversed(lines[:traceback]) if line.strip()), "")
    start = traceback + 1
    while start < len(lines) and (not lines[start].strip() or lines[start][0] in " \t"):
        start += 1
    if _ASIDE.match(before) or start == len(lines) or not _EXCEPTION.match(lines[start]):
        return None
    message = [lines[start]]
    for line in lines[start + 1 : start + _MESSAGE_LINES]:
        if _OTHER.match(line):
            break
        message.append(line.rstrip())
    return "\n".join(message).strip()
