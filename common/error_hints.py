"""What went wrong in a child's log, and what to do about it: the last real error, and a table of remedies."""

from __future__ import annotations

import re
from typing import NamedTuple


class Remedy(NamedTuple):
    """A pattern of an error's text and what a user does about it."""

    pattern: re.Pattern[str]
    advice: str


def _remedy(pattern: str, advice: str) -> Remedy:
    return Remedy(re.compile(pattern, re.IGNORECASE), advice)


_LESS_MEMORY = (
    "lower per_device_train_batch_size (and raise gradient_accumulation_steps by the same factor), then "
    "cutoff_len, then lora_rank; quantization_bit: 4 and gradient checkpointing save most"
)

# The first that fits is the one shown: the particular stands before the general.
REMEDIES: tuple[Remedy, ...] = (
    _remedy(r"CUDA out of memory|OutOfMemoryError|CUBLAS_STATUS_ALLOC_FAILED", _LESS_MEMORY),
    _remedy(
        r"can't allocate memory|Cannot allocate memory|Unable to allocate|\bMemoryError\b",
        f"the machine's memory is full: close other programs, or {_LESS_MEMORY}",
    ),
    _remedy(
        r"signal 9\b|SIGKILL|exitcode\s*: -9|exit code 137",
        "most likely the system ran out of memory and killed it (see `dmesg`): close other programs, use a "
        f"machine with more memory, or {_LESS_MEMORY}; --resume goes on from the last checkpoint",
    ),
    _remedy(
        r"No space left on device|Disk quota exceeded|errno 28\b|errno 122\b",
        "free disk space (old checkpoints under saves/, earlier runs named *.earlier-N), then --resume",
    ),
    _remedy(
        r"wandb\.|swanlab|SwanLab",
        "the tracker that the recipe reports to ended the run: mend its account or the network; or keep it off the "
        "network (WANDB_MODE=offline, swanlab_mode: local); or report_to: none. --resume goes on from a checkpoint",
    ),
    _remedy(
        r"gated repo|GatedRepo|401 Client Error|403 Client Error|Invalid user token|Invalid username or password",
        "accept the model's licence on its hub page, then `hf auth login` (or set HF_TOKEN); or choose a model "
        "that is not gated",
    ),
    _remedy(
        r"outgoing traffic has been disabled|HF_HUB_OFFLINE|offline mode is enabled|OfflineModeIsEnabled",
        "the hub is switched off by HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE and the model is not in the cache: "
        "unset it, or set `model` in experiment.yaml to a local folder",
    ),
    _remedy(
        r"RayActorError|ActorDiedError|ActorUnavailableError|WorkerCrashedError|The actor died",
        "a Ray worker ended without a word, most likely killed for lack of memory (see `dmesg` on its node); --resume "
        "goes on from the last checkpoint",
    ),
    _remedy(
        r"couldn't connect to|MaxRetryError|ConnectionError|ConnectError|ReadTimeout|Name or service not known"
        r"|Temporary failure in name resolution|LocalEntryNotFound|Network is unreachable",
        "the hub cannot be reached: check the network or HF_ENDPOINT, or download the model elsewhere and set "
        "`model` in experiment.yaml to its folder",
    ),
    _remedy(
        r"is not a local folder and is not a valid model identifier|RepositoryNotFound|404 Client Error"
        r"|RevisionNotFound|Repo id must",
        "there is no such model: check the spelling of `model` and `revision` in experiment.yaml",
    ),
    _remedy(
        r"Error while deserializing header|incomplete metadata|InvalidHeaderDeserialization|header too large",
        "a weights file is damaged, often by a broken download: delete it (for the hub's cache the model's "
        "folder under ~/.cache/huggingface/hub) and fetch it again",
    ),
    _remedy(
        r"compiled with different CUDA versions|torchvision::nms does not exist|libtorch.*undefined symbol",
        "torch, torchvision and torchaudio come from different builds: install the locked set (`make install`)",
    ),
    _remedy(
        r"bitsandbytes.*(not compiled with|without) (CUDA|GPU)|CUDA Setup failed|libbitsandbytes|libcudart"
        r"|None of the available devices.*are supported by the bitsandbytes",
        "bitsandbytes does not fit this machine's CUDA: run `python -m bitsandbytes`, install the locked set "
        "(`make install`), or remove quantization_bit from the recipe",
    ),
    _remedy(
        r"requires bitsandbytes|No module named 'bitsandbytes'|No package metadata was found for bitsandbytes",
        "bitsandbytes is missing: install the locked set (`make install`)",
    ),
    _remedy(
        r"driver version is insufficient|driver on your system is too old|no kernel image is available",
        "the GPU's driver or its generation does not fit this torch build: update the driver, or run without "
        "the GPU (CUDA_VISIBLE_DEVICES=)",
    ),
    _remedy(
        r"support bf16|bf16/gpu|bf16 is not supported|pure_bf16",
        "this device has no bf16: set `bf16: false` (and `fp16: true` on a GPU) in the recipe; on a CPU bf16 "
        "needs `use_cpu: true` and no visible GPU",
    ),
    _remedy(
        r"Template .+ does not exist",
        "set `template` in experiment.yaml to one of LLaMA-Factory's names (llama3, qwen3_nothink, gemma2, …)",
    ),
    _remedy(
        r"not used by the HfArgumentParser|unknown_args|unexpected keyword argument",
        "the recipe holds a key that LLaMA-Factory 0.9.5 does not know: mend its spelling or remove it",
    ),
    _remedy(
        r"is not a valid \w+, please select one of|Invalid literal|Unknown (finetuning type|task|optim)"
        r"|Unknown attention type|invalid choice",
        "a value in the recipe is none of the choices: use one that the message or the recipe's comment names",
    ),
    _remedy(
        r"Cannot find (valid|sufficient) samples",
        "no row of the export fits what this stage reads: run `run.py prepare` again and read data/<exp>/audit.json",
    ),
    _remedy(
        r"Undefined dataset|File .+ not found|Cannot open .*dataset_info\.json|DatasetGenerationError",
        "the recipe's dataset is not in dataset_dir, or damaged: run `run.py prepare` again, and let `dataset` "
        "and `dataset_dir` name what it wrote",
    ),
    _remedy(
        r"dataset is not applicable in the current training stage",
        "this stage reads another form of data (rm and dpo: pairs with `ranking: true`; sft: without): run "
        "`run.py prepare` for it",
    ),
    _remedy(
        r"Output directory already exists",
        "an earlier run lies in output_dir: --resume goes on with it, --fresh archives it and begins anew",
    ),
    _remedy(
        r"Cannot merge adapters to a quantized model",
        "remove quantization_bit from the merge recipe: adapters are merged into the 16-bit base model",
    ),
    _remedy(
        r"Can't find 'adapter_config\.json'|adapter_model\.safetensors.*(not|No such)",
        "the adapter to merge is not there: train the stage first, and let adapter_name_or_path of the merge "
        "recipe equal output_dir of the training recipe",
    ),
    _remedy(
        r"Target modules .+ not found in the base model|No modules were targeted",
        "`lora_target` does not fit this model: use `lora_target: all`",
    ),
    _remedy(
        r"size mismatch for",
        "adapter and base model do not belong together: train again with --fresh, or set the base model back",
    ),
    _remedy(
        r"does not recognize this architecture|model type .+ but Transformers does not",
        "this model is newer than the locked transformers: choose another model",
    ),
    _remedy(
        r"trust_remote_code",
        "the model brings its own code: read it, then set `trust_remote_code: true` in experiment.yaml, or "
        "choose a model that needs none",
    ),
    _remedy(
        r"FORCE_TORCHRUN=1",
        "set FORCE_TORCHRUN=1 in the environment and start again: DeepSpeed runs under torchrun only",
    ),
    _remedy(
        r"No such file or directory: 'torchrun'",
        "torchrun must be on the PATH for several GPUs: activate the environment (`source .venv/bin/activate`)",
    ),
    _remedy(
        r"EADDRINUSE|address already in use",
        "another run holds the port: wait for it, or set MASTER_PORT to a free one",
    ),
    _remedy(
        r"Bus error|insufficient shared memory|/dev/shm",
        "the container's shared memory is too small: start it with a larger one (docker run --shm-size=8g), or "
        "set `dataloader_num_workers: 0`",
    ),
    _remedy(r"Too many open files", "raise the limit of open files (`ulimit -n 65536`)"),
    _remedy(
        r"loss .*(NaN|infinite|not finite)|(NaN|inf)\b.*\bloss|weights .*not finite",
        "training ran away: lower learning_rate (by 3 to 10 times), prefer bf16 to fp16, set max_grad_norm: 1.0 "
        "and some warmup_ratio, then --fresh",
    ),
    _remedy(r"NCCL", "the GPUs cannot talk to each other: see `NCCL_DEBUG=INFO`, or use one GPU"),
    _remedy(
        r"signal 11\b|Segmentation fault|SIGSEGV|signal 4\b|SIGILL|Illegal instruction",
        "a library crashed: install the locked set (`make install`); on an old CPU, or with another CUDA, "
        "`run.py doctor` says what fits",
    ),
    _remedy(r"No module named|cannot import name", "install the locked set of libraries (`make install`)"),
    _remedy(r"Permission ?denied", "make the named file or folder writable, or run from a folder of your own"),
)


def remedy_for(text: str) -> str | None:
    """Return the advice of the first entry of REMEDIES that fits `text`, None where none fits."""
    return next((remedy.advice for remedy in REMEDIES if remedy.pattern.search(text)), None)


def last_error(log: str) -> str | None:
    """Return a log's last real error: exception line and message, without the chatter around it.

    Errors that only report another process's end (torchrun's and subprocess's wrappers, what an interpreter says
    while it shuts down, the other GPUs' broken connections) count only where there is no other.
    """
    found = all_errors(log)
    return found[-1] if found else None


def all_errors(log: str) -> list[str]:
    """Return the errors of a log, the most telling one last."""
    lines = clean_lines(log)
    errors = [error for i, line in enumerate(lines) if _TRACEBACK.match(line) and (error := _after(lines, i))]
    real = [error for error in errors if not _WRAPPER.match(error)]
    wrappers = [error for error in errors if _WRAPPER.match(error)]
    if real:
        return [*wrappers, *real]
    signals = [line.strip() for line in lines if _SIGNAL.search(line)]
    if signals or wrappers:
        return [*wrappers, *signals]
    said = [line.strip() for line in lines if _COMPLAINT.search(line) and not _CHATTER.match(line)]
    return said[-1:]


def last_lines(log: str, count: int = 3) -> str:
    """Return the last lines that say something, for a log without any error in it."""
    said = [line.rstrip() for line in clean_lines(log) if line.strip() and not _PROGRESS.search(line)]
    return "\n".join(said[-count:])


def clean_lines(log: str) -> list[str]:
    """Return the lines of a log without colours and without torchrun's `[rank0]: ` in front."""
    return [_RANK.sub("", line) for line in re.split(r"\r\n|\n|\r", _COLOUR.sub("", log))]


_COLOUR = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_RANK = re.compile(r"^\s*\[(?:rank|default)?\d+\]:[ ]?")
_TRACEBACK = re.compile(r"^(?:\s*[+|] )?Traceback \(most recent call last\):")
_EXCEPTION = re.compile(r"^[A-Za-z_][\w.]*(?:: .*|:)?$")
_PROGRESS = re.compile(r"\d+%\|")
_CHATTER = re.compile(
    r"^\s*(?:\[?(?:INFO|WARNING|DEBUG)\b|[WEIF]\d{4} \d\d:|\[?\d{4}-\d\d-\d\d[ T]\d\d:|.*\d+%\||={5,}|-{5,}|\*{3,})"
)
_END = re.compile(
    r"^(?:Traceback \(|During handling of the above|The above exception was|Exception ignored in|Exception in thread"
    r"|Root Cause|Failures:|wandb: |swanlab: |\"\"\"$)"
)
_ASIDE = re.compile(r"^(?:Exception ignored (?:in|on)|Exception in thread)")
_WRAPPER = re.compile(
    r"^(?:[\w.]*\.)?(?:ChildFailedError|CalledProcessError|DatasetGenerationError|RemoteTraceback|SystemExit"
    r"|KeyboardInterrupt|SignalException|BrokenPipeError|ConnectionResetError|ProcessRaisedException"
    r"|ProcessExitedException|DistBackendError|DistNetworkError|RayTaskError|WorkerCrashedError)\b"
    r"|^RuntimeError: (?:DataLoader worker|\[?.*Connection (?:closed|reset) by peer)"
)
_COMPLAINT = re.compile(
    r"\b\w*Error\b|\berror:|^Fatal|terminate called|what\(\):|\b[Kk]illed\b|[Cc]annot |Bus error|Segmentation fault"
    r"|Unknown command"
)
_SIGNAL = re.compile(r"Signal \d+ \(SIG\w+\) received")  # torchrun on a worker that could not say anything
_MESSAGE_LINES = 12


def _after(lines: list[str], traceback: int) -> str | None:
    """Return exception and message of the traceback that starts at that line, None for an aside or a torn one."""
    before = next((line for line in reversed(lines[:traceback]) if line.strip()), "")
    if _ASIDE.match(before):
        return None
    start = traceback + 1
    while start < len(lines) and (not lines[start].strip() or lines[start][0] in " \t"):
        start += 1
    if start == len(lines) or not _EXCEPTION.match(lines[start]):
        return None
    message = [lines[start]]
    for line in lines[start + 1 : start + _MESSAGE_LINES]:
        if _END.match(line) or _CHATTER.match(line):
            break
        message.append(line.rstrip())
    return "\n".join(message).strip()
