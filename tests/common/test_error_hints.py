import pytest

from common.error_hints import all_errors, last_lines, remedy_for

TRACE = 'Traceback (most recent call last):\n  File "x.py", line 5, in <module>\n    run_exp()\n'
TORCHRUN = f"""
[rank0]: {TRACE.replace(chr(10), chr(10) + "[rank0]: ")}ValueError: Undefined dataset x.
W1123 17:00:00.000 1 torch/distributed/elastic/multiprocessing/api.py:1010] Sending process 2 closing signal SIGTERM
{TRACE}torch.distributed.DistBackendError: NCCL error: remote process exited
{TRACE}torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
launcher.py FAILED
{TRACE}subprocess.CalledProcessError: Command '['torchrun', 'launcher.py']' returned non-zero exit status 1.
"""
KILLED_WORKER = f"""
{TRACE}torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
Root Cause (first observed failure):
[0]:
  exitcode  : -9 (pid: 4242)
  traceback : Signal 9 (SIGKILL) received by PID 4242
"""
GATED = f"""[INFO|configuration_utils.py:765] 2026-01-01 10:00:00,000 >> loading configuration file
{TRACE}requests.exceptions.HTTPError: 401 Client Error: Unauthorized for url: https://huggingface.co/x

The above exception was the direct cause of the following exception:

{TRACE}OSError: You are trying to access a gated repo.
Make sure to have access to it at https://huggingface.co/x.

Access to model x is restricted. Please log in.
"""
CHATTER_AFTER = (
    "  5%|#         | 10/200 [00:10<03:10]\r  6%|#         | 12/200 [00:12<03:08]\r"
    f"{TRACE}\x1b[31mtorch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\x1b[0m\n"
    "  6%|#         | 12/200 [00:13<03:10]\nException ignored in: <function Pool.__del__ at 0x1>\n"
    f"{TRACE}OSError: [Errno 9] Bad file descriptor\n"
    "[W1123 17:00:00 ProcessGroup.cpp] Warning: destroy_process_group() was not called\n"
)
WORKER = (
    f'multiprocess.pool.RemoteTraceback:\n"""\n{TRACE}KeyError: \'conversations\'\n"""\n\n'
    f"The above exception was the direct cause of the following exception:\n\n{TRACE}"
    "datasets.exceptions.DatasetGenerationError: An error occurred while generating the dataset\n"
)


@pytest.mark.parametrize(
    ("log", "error", "remedy"),
    [
        (TORCHRUN, "ValueError: Undefined dataset x.", "prepare"),
        (KILLED_WORKER, "traceback : Signal 9 (SIGKILL) received by PID 4242", "out of memory"),
        (CHATTER_AFTER, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", "batch_size"),
        ("loading\nerror: Permission denied\nbye\n", "error: Permission denied", "writable"),
    ],
    ids=("wrappers and other ranks", "a killed worker", "bars, colours and shutdown", "no traceback"),
)
def test_the_real_error_is_the_last_one(log, error, remedy):
    assert all_errors(log)[-1] == error and remedy in remedy_for(error)


def test_a_message_of_many_lines_is_kept_complete():
    error = all_errors(GATED)[-1]
    assert error.startswith("OSError: You are trying to access a gated repo.\nMake sure")
    assert error.endswith("Please log in.") and "hf auth login" in remedy_for(error)


def test_an_error_of_a_datasets_worker_is_found_behind_its_wrapper():
    first, *_, last = all_errors(WORKER)
    assert last == "KeyError: 'conversations'" and first.startswith("datasets.exceptions.DatasetGenerationError")


def test_a_log_without_an_error_has_its_last_lines():
    assert all_errors("all\nis\nwell\n") == all_errors("") == []
    assert last_lines("one\ntwo\n\nthree\n 50%|## | 1/2\nfour\n") == "two\nthree\nfour"
    assert remedy_for("ZeroDivisionError: division by zero") is None


KNOWN = [
    ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "gradient_accumulation_steps"),
    ("RuntimeError: [enforce fail] DefaultCPUAllocator: can't allocate memory: you tried", "memory is full"),
    ("was killed by signal 9 (SIGKILL)", "out of memory"),
    ("OSError: [Errno 28] No space left on device", "free disk space"),
    ("huggingface_hub.errors.GatedRepoError: 403 Client Error.", "licence"),
    ("Cannot reach https://x: offline mode is enabled. To disable it, unset HF_HUB_OFFLINE", "HF_HUB_OFFLINE"),
    ("OSError: We couldn't connect to 'https://huggingface.co' to load the files", "network"),
    ("OSError: nobody/x is not a local folder and is not a valid model identifier listed on", "spelling"),
    ("safetensors_rust.SafetensorError: Error while deserializing header: incomplete metadata", "damaged"),
    ("RuntimeError: PyTorch and TorchAudio were compiled with different CUDA versions", "make install"),
    ("RuntimeError: operator torchvision::nms does not exist", "make install"),
    ("RuntimeError: CUDA Setup failed despite GPU being available.", "python -m bitsandbytes"),
    ("ImportError: Using `bitsandbytes` 4-bit quantization requires bitsandbytes: `pip", "make install"),
    ("ValueError: Your setup doesn't support bf16/gpu.", "bf16: false"),
    ("RuntimeError: Cannot find valid samples, check `data/README.md` for the data format.", "audit.json"),
    ("ValueError: Undefined dataset demo_sft in dataset_info.json.", "prepare"),
    ("RuntimeError: size mismatch for base_model.model.lm_head", "do not belong together"),
    ("ValueError: The checkpoint you are trying to load has model type `x` but Transformers does not", "newer"),
    ("ValueError: x requires you to execute the file; set the option `trust_remote_code=True`", "own code"),
    ("torch.distributed.DistNetworkError: port: 29500, useIpv6: 0, code: -98, name: EADDRINUSE", "MASTER_PORT"),
    ("RuntimeError: DataLoader worker is killed by signal: Bus error.", "shm-size"),
    ("the loss is NaN or infinite at step 3", "learning_rate"),
    ("torch.distributed.DistBackendError: NCCL error in: x.cpp", "NCCL_DEBUG"),
    ("was killed by signal 11 (SIGSEGV)", "crashed"),
    ("ModuleNotFoundError: No module named 'trl'", "make install"),
    ("PermissionError: [Errno 13] Permission denied: 'saves'", "writable"),
]


@pytest.mark.parametrize(("message", "part"), KNOWN, ids=[part for _, part in KNOWN])
def test_known_errors_have_their_remedy(message, part):
    assert part in remedy_for(message)
